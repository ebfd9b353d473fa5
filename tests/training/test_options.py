"""Optimizers, schedules, clipping, precision, early stopping, callbacks: each does what its name says."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_helpers import (
    POINTS,
    LinearGuide,
    LocalNormal,
    Regression,
    assert_identical,
    binary,
    fit,
    no_latents,
    parameters,
    regression_data,
    seeded,
    untimed,
    vae,
)
from torch.utils.data import DataLoader, TensorDataset

import pyrovae
from pyrovae.training.optimizers import OPTIMIZERS


def first_gradient() -> dict[str, torch.Tensor]:
    """The gradient of the mean negative log-density of the regression at its start, by hand."""
    x, y = regression_data()
    model = Regression()
    loss = -torch.distributions.Normal(x @ model.weight + model.bias, model.scale).log_prob(y).mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("spelling", ["name", "class", "factory"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_step_of_every_optimizer_is_torchs_own(name: str, spelling: str) -> None:
    cls = OPTIMIZERS[name]
    spec: Any = {"name": name, "class": cls, "factory": lambda p: cls(p, lr=0.03)}[spelling]
    run = fit(Regression(), no_latents, regression_data(), optimizer=spec, lr=0.03, batch_size=POINTS, epochs=1)
    expected = Regression()
    for parameter, gradient in zip(expected.parameters(), first_gradient().values(), strict=True):
        parameter.grad = gradient
    cls(expected.parameters(), lr=0.03).step()
    for (key, ours), theirs in zip(run.model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-6, rtol=1e-5, msg=key)


def test_every_optimizer_lowers_the_loss() -> None:
    for name in OPTIMIZERS:
        run = fit(Regression(), no_latents, regression_data(), optimizer=name, epochs=20, lr=0.02)
        assert run.history[-1]["bound"] > run.history[0]["bound"] + 0.05, name


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda done: 1.0),
        ("cosine", lambda done: 0.5 * (1 + math.cos(math.pi * done))),
        ("linear", lambda done: 1.0 - done),
        (lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), lambda done: 0.9 ** (done * 12)),
    ],
    ids=["constant", "cosine", "linear", "exponential"],
)
def test_learning_rate_follows_its_schedule(schedule: Any, factor: Callable[[float], float]) -> None:
    used: list[float] = []

    def recording(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=0.02)
        optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
        return optimizer

    run = fit(*vae(), binary(), schedule=schedule, epochs=4, optimizer=recording)
    assert used == pytest.approx([0.02 * factor(step / 12) for step in range(12)], rel=1e-6)
    assert [row["lr"] for row in run.history] == pytest.approx([0.02 * factor(e / 4) for e in (1, 2, 3, 4)], rel=1e-6)


@pytest.mark.parametrize("clip_norm", [1e-3, 0.05, None, 1e6])
def test_clipping_bounds_the_norm_of_the_gradient_and_nothing_else(clip_norm: float | None) -> None:
    norms: list[float] = []

    def recording(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=1e-12)
        optimizer.register_step_pre_hook(
            lambda *_: norms.append(float(torch.cat([p.grad.flatten() for p in params]).norm()))
        )
        return optimizer

    fit(Regression(), no_latents, regression_data(), clip_norm=clip_norm, batch_size=POINTS, optimizer=recording)
    free = float(torch.cat([g.flatten() for g in first_gradient().values()]).norm())
    assert free > 0.05
    expected = min(free, clip_norm or math.inf)
    assert norms == pytest.approx([expected, expected], rel=1e-4)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_sgd_step_does_not_depend_on_duplicates_in_the_minibatch(clip_norm: float | None) -> None:
    x, y = regression_data()

    def learned(copies: int) -> dict[str, torch.Tensor]:
        pairs = TensorDataset(x.repeat_interleave(copies, 0), y.repeat_interleave(copies, 0))
        loader = DataLoader(pairs, 8 * copies)
        settings = {"batch_size": None, "optimizer": "sgd", "lr": 0.1, "clip_norm": clip_norm, "epochs": 3}
        return parameters(fit(Regression(), no_latents, loader, **settings))

    once, twice = learned(1), learned(2)
    for name, value in once.items():
        torch.testing.assert_close(value, twice[name], atol=1e-6, rtol=1e-5)
    assert float(once["model.weight"].norm()) > 0.01


def test_bfloat16_bound_is_near_the_float32_one_and_not_the_same() -> None:
    runs = {p: fit(*vae(), binary(), precision=p, epochs=5) for p in ("float32", "bf16")}
    bounds = {p: [row["bound"] for row in run.history] for p, run in runs.items()}
    assert bounds["bf16"] != bounds["float32"]
    assert bounds["bf16"] == pytest.approx(bounds["float32"], abs=0.02)
    assert {value.dtype for value in parameters(runs["bf16"]).values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------
# Early stopping


def opposed(**settings: Any) -> pyrovae.Run:
    """Watches data that are the opposite of those it learns, so that the validation bound falls."""
    return fit(*vae(), binary(), validation=1.0 - binary(16, seed=2), lr=0.05, **settings)


@pytest.mark.parametrize("patience", [1, 3])
def test_early_stopping_stops_after_its_patience_and_restores_the_best_epoch(patience: int, tmp_path: Path) -> None:
    kept: list[dict[str, torch.Tensor]] = []
    run = opposed(
        epochs=40, early_stopping=patience, run_dir=tmp_path, callbacks=[lambda run: kept.append(parameters(run))]
    )
    bounds = [row["validation_bound"] for row in run.history]
    best = bounds.index(max(bounds)) + 1
    assert run.best_epoch == best
    assert len(run.history) == best + patience < 40
    assert_identical(parameters(run), kept[best - 1])
    loaded = {which: pyrovae.load(tmp_path, which=which) for which in ("best", "last", None)}
    assert_identical(parameters(loaded["best"]), kept[best - 1])
    assert_identical(parameters(loaded["last"]), kept[-1])
    assert_identical(parameters(loaded[None]), kept[best - 1])
    assert [loaded[which].best_epoch for which in ("best", "last", None)] == [best, None, best]
    with pytest.raises(AssertionError):
        assert_identical(kept[best - 1], kept[-1])


def test_best_epoch_is_restored_when_all_epochs_were_run() -> None:
    bound = opposed(epochs=40, early_stopping=3)
    assert bound.best_epoch is not None
    short = opposed(epochs=bound.best_epoch + 1, early_stopping=3)
    assert len(short.history) == bound.best_epoch + 1
    assert_identical(parameters(short), parameters(bound))


def test_fit_without_early_stopping_keeps_the_last_epoch(tmp_path: Path) -> None:
    run = opposed(epochs=12, run_dir=tmp_path)
    assert len(run.history) == 12
    assert run.best_epoch is None
    assert not (tmp_path / "best.safetensors").exists()
    with pytest.raises(pyrovae.errors.RunError, match="which='last'"):
        pyrovae.load(tmp_path, which="best")


# ---------------------------------------------------------------------------------------------------------
# Callbacks


def test_callbacks_are_called_once_an_epoch_with_the_run_so_far() -> None:
    seen: list[int] = []
    run = fit(*vae(), binary(), epochs=4, callbacks=[lambda run: seen.append(len(run.history))])
    assert seen == [1, 2, 3, 4]
    assert len(run.history) == 4


@pytest.mark.parametrize(("answer", "epochs"), [(True, 2), (1, 6), ("yes", 6), (None, 6), (False, 6)])
def test_only_true_from_a_callback_stops_the_fit(answer: Any, epochs: int, tmp_path: Path) -> None:
    calls: list[int] = []
    callbacks = [
        lambda run: answer if len(run.history) >= 2 else None,
        lambda run: calls.append(run.history[-1]["epoch"]),
    ]
    run = fit(*vae(), binary(), epochs=6, callbacks=callbacks, run_dir=tmp_path, checkpoint_every=4)
    assert calls == list(range(1, epochs + 1)), "the other callbacks see the last epoch too"
    assert untimed(pyrovae.load(tmp_path).history) == untimed(run.history)
    assert len(run.history) == epochs


def test_constant_schedule_and_automatic_device_and_compile_are_the_defaults() -> None:
    spelled = fit(*vae(), binary(), schedule="constant", device="cpu", compile=False, precision="float32", seed=0)
    if not torch.cuda.is_available():
        assert_identical(parameters(spelled), parameters(fit(*vae(), binary())))


def test_minibatches_are_of_100_data_points_unless_told_otherwise() -> None:
    x = torch.randn(250, generator=seeded(0))
    run = fit(LocalNormal(), LinearGuide(), x, batch_size=None, epochs=1)
    assert run.history[0]["step"] == 3
