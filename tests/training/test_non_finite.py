"""A loss or gradient that is not finite stops the fit, says where, and leaves the last good parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from fit_helpers import LinearGuide, LocalNormal, after_steps, assert_identical, binary, fit, parameters, seeded, vae
from torch import Tensor
from torch.utils.data import DataLoader

import pyrovae
from pyrovae.errors import NonFiniteError


class Breaking(LocalNormal):
    """Divides by zero in the density of ``x`` from the moment on that ``broken`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            loc = z / (0.0 if self.broken else 1.0)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


class BreakingGradient(LinearGuide):
    """Its slope gets a NaN gradient from the moment on that ``broken`` is set; the loss stays finite."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def forward(self, x: Tensor) -> None:
        slope = NanGradient.apply(self.slope) if self.broken else self.slope
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, self.scale))


def data() -> Tensor:
    return torch.randn(24, generator=seeded(0))


def good(steps: int) -> dict[str, Tensor]:
    """The parameters after so many steps of a fit that does not break."""

    def stop() -> None:
        learned.update(parameters(pyrovae.Run(model, guide, [], {})))

    learned: dict[str, Tensor] = {}
    model, guide = LocalNormal(), LinearGuide()
    with after_steps(steps, stop):
        fit(model, guide, data(), epochs=4)
    return learned


@pytest.mark.parametrize(("steps", "place"), [(4, "epoch 2, minibatch 2 of 3"), (3, "epoch 2, minibatch 1 of 3")])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_error_names_the_place_and_the_last_good_parameters_stay(
    kind: str, steps: int, place: str, tmp_path: Path
) -> None:
    model, guide = Breaking(), BreakingGradient()
    breaking = model if kind == "loss" else guide
    said = {
        "loss": rf"the loss is -?(nan|inf); .*log-density of site 'x' is not finite \({place}\)",
        "gradient": rf"loss is finite but its gradient is not; not finite: the gradient of guide\.slope \({place}\)",
    }[kind]
    with (
        after_steps(steps, lambda: setattr(breaking, "broken", True)),
        pytest.raises(NonFiniteError, match=said + r".*last good ones, also in .*Try a smaller lr, clip_norm=…"),
    ):
        fit(model, guide, data(), epochs=4, run_dir=tmp_path)
    assert_identical(parameters(pyrovae.Run(model, guide, [], {})), good(steps))
    saved = pyrovae.load(tmp_path, LocalNormal(), LinearGuide())
    assert_identical(parameters(saved), good(steps))
    assert [row["epoch"] for row in saved.history] == [1]


def test_first_step_that_is_not_finite_leaves_the_start(tmp_path: Path) -> None:
    """Found in the first minibatch, or already by the checks before it."""
    model, guide = Breaking(), LinearGuide()
    model.broken = True
    start = parameters(pyrovae.Run(model, guide, [], {}))
    with pytest.raises((NonFiniteError, ValueError), match=r"site 'x'|invalid values|nan|inf"):
        fit(model, guide, data(), run_dir=tmp_path)
    assert_identical(parameters(pyrovae.Run(model, guide, [], {})), start)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_clipping_does_not_hide_a_gradient_that_is_not_finite(clip_norm: float | None) -> None:
    guide = BreakingGradient()
    with after_steps(2, lambda: setattr(guide, "broken", True)), pytest.raises(NonFiniteError, match=r"guide\.slope"):
        fit(LocalNormal(), guide, data(), clip_norm=clip_norm)
    assert all(bool(value.isfinite().all()) for value in guide.state_dict().values())


def test_nan_in_a_later_minibatch_of_a_loader_is_found_where_it_lies() -> None:
    x = data()
    x[20] = float("nan")
    with pytest.raises(NonFiniteError, match=r"site '[xz]' is not finite \(epoch 1, minibatch 3 of 3\)"):
        fit(LocalNormal(), LinearGuide(), DataLoader(x, 8), batch_size=None)


def test_fit_goes_on_from_the_last_good_step_when_the_cause_is_removed(tmp_path: Path) -> None:
    """With the draws of the failed step not repeated: the bounds agree, the numbers need not."""
    model = Breaking()
    with after_steps(4, lambda: setattr(model, "broken", True)), pytest.raises(NonFiniteError):
        fit(model, LinearGuide(), data(), epochs=4, run_dir=tmp_path)
    resumed = fit(LocalNormal(), LinearGuide(), data(), epochs=4, run_dir=tmp_path, resume=True)
    assert [row["epoch"] for row in resumed.history] == [1, 2, 3, 4]
    assert resumed.history[0]["bound"] == fit(LocalNormal(), LinearGuide(), data(), epochs=1).history[0]["bound"]


def test_exploding_learning_rate_is_reported_and_not_trained_through() -> None:
    model, guide = vae()
    with pytest.raises(NonFiniteError, match=r"epoch \d+, minibatch \d of 3.*Try a smaller lr"):
        fit(model, guide, binary(), optimizer="sgd", lr=1e30, epochs=50)
    for value in (*model.state_dict().values(), *guide.state_dict().values()):
        assert bool(value.isfinite().all())
