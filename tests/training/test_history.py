"""What a fit reports: nats per data point, equal to an own computation, and the same in every file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from fit_helpers import binary, fit, untimed, vae
from torch.distributions import kl_divergence

import pyrovae

KEYS = {"epoch", "step", "bound", "log_likelihood", "kl", "kl/z", "lr", "seconds", "steps_per_second"}
STILL = 1e-12  # a learning rate that leaves the parameters as they were


def test_one_row_an_epoch_with_the_documented_keys() -> None:
    run = fit(*vae(), binary(20), epochs=3)
    assert [row["epoch"] for row in run.history] == [1, 2, 3]
    assert [row["step"] for row in run.history] == [3, 6, 9]
    assert all(set(row) == KEYS for row in run.history)
    assert all(row["seconds"] >= 0.0 and row["steps_per_second"] > 0.0 for row in run.history)
    watched = fit(*vae(), binary(20), epochs=1, validation=binary(16, 2))
    assert set(watched.history[0]) == KEYS | {"validation_bound"}


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_bound_is_the_log_likelihood_less_the_kl(kl: str) -> None:
    run = fit(*vae(), binary(20), epochs=3, objective=pyrovae.ELBO(particles=3, kl=kl))
    for row in run.history:
        assert row["bound"] == pytest.approx(row["log_likelihood"] - row["kl"], abs=1e-5)
        assert row["kl"] == pytest.approx(row["kl/z"], abs=1e-12)


@pytest.mark.parametrize("points", [24, 20])  # the last minibatch whole, or half a one
def test_reported_numbers_are_nats_per_data_point(points: int) -> None:
    """Against the closed-form KL and the expected log-likelihood from many draws."""
    x = binary(points)
    model, guide = vae()
    run = fit(model, guide, x, epochs=1, lr=STILL, objective=pyrovae.ELBO(particles=4000, kl="analytic"))
    with torch.no_grad():
        q = guide.encode(x)
        kl = float(kl_divergence(q.base_dist, dist.Normal(0.0, 1.0)).sum(-1).mean())
        torch.manual_seed(5)
        log_likelihood = float(model.decode(q.sample((4000,))).log_prob(x).mean())
    assert run.history[0]["kl"] == pytest.approx(kl, rel=1e-5)
    assert run.history[0]["log_likelihood"] == pytest.approx(log_likelihood, abs=0.01)
    assert run.history[0]["bound"] == pytest.approx(log_likelihood - kl, abs=0.01)


@pytest.mark.parametrize("objective", [pyrovae.ELBO(beta=7.0), pyrovae.ELBO(free_bits=2.0), pyrovae.ELBO()])
def test_validation_bound_is_the_plain_one_whatever_the_objective_weighs(objective: pyrovae.ELBO) -> None:
    watched = binary(16, 2)
    model, guide = vae()
    run = fit(model, guide, binary(), validation=watched, objective=objective, epochs=1, batch_size=16)
    torch.manual_seed(0)
    with torch.no_grad():
        q = guide.encode(watched)
        z = q.base_dist.loc + q.base_dist.scale * torch.randn(16, 2)
        bound = model.prior().log_prob(z) + model.decode(z).log_prob(watched) - q.log_prob(z)
    assert run.history[0]["validation_bound"] == pytest.approx(float(bound.mean()), abs=1e-5)


def test_validation_does_not_change_the_fit() -> None:
    keys = ("bound", "kl", "log_likelihood")
    with_it = fit(*vae(), binary(), epochs=3, validation=binary(16, 2))
    without = fit(*vae(), binary(), epochs=3)
    assert [[row[k] for k in keys] for row in with_it.history] == [[row[k] for k in keys] for row in without.history]


def test_validation_bound_of_unchanged_parameters_is_the_same_after_every_epoch() -> None:
    run = fit(*vae(), binary(), epochs=3, validation=binary(16, 2), lr=1e-30, optimizer="sgd")
    assert len({row["validation_bound"] for row in run.history}) == 1
    assert len({row["bound"] for row in run.history}) == 3


def test_validation_bound_weighs_a_smaller_last_minibatch_by_its_data_points() -> None:
    model, guide = vae()
    x = binary(20, 2)
    objective = pyrovae.ELBO(particles=3000, kl="analytic")
    run = fit(model, guide, binary(), validation=x, epochs=1, objective=objective)
    torch.manual_seed(3)
    expected = float(objective.estimate(model, guide, x).bound) / 20
    assert run.history[0]["validation_bound"] == pytest.approx(expected, abs=0.01)


def test_metrics_file_holds_the_history_as_the_run_does(tmp_path: Path) -> None:
    run = fit(*vae(), binary(), epochs=3, validation=binary(16, 2), run_dir=tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.history
    assert pyrovae.load(tmp_path).history == run.history


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the tensorboard extra is not installed")
def test_tensorboard_shows_the_history(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(*vae(), binary(), epochs=2, run_dir=tmp_path)
    run = fit(*vae(), binary(), epochs=4, run_dir=tmp_path, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == KEYS - {"epoch", "step"}
    shown = events.Scalars("bound")
    assert [event.step for event in shown] == [1, 2, 3, 4]
    assert [event.value for event in shown] == pytest.approx([row["bound"] for row in run.history], rel=1e-6)


def test_history_without_a_folder_equals_that_with_one(tmp_path: Path) -> None:
    assert untimed(fit(*vae(), binary(), run_dir=tmp_path).history) == untimed(fit(*vae(), binary()).history)
