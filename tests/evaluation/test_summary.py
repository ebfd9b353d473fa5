"""The table of a fit: its numbers are those of the guide, and what is too long is named."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyrovae
from pyrovae.errors import ArgumentError
from pyrovae.evaluation import posterior_summary


def model() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def guide() -> None:
    pyro.sample("z", dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])).to_event(1))
    with pyro.plate("many", 20):
        pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))


def test_moments_and_quantiles_are_the_guides() -> None:
    """Within four standard errors of 20 000 draws: a false alarm in some thousand seeds."""
    found = posterior_summary(model, guide, draws=20_000)
    assert [row.name for row in found.latents] == ["z[0]", "z[1]"]
    for row, loc, scale in zip(found.latents, (1.0, -2.0), (0.5, 2.0), strict=True):
        assert row.mean == pytest.approx(loc, abs=4 * scale / 20_000**0.5)
        assert row.sd == pytest.approx(scale, abs=4 * scale / 40_000**0.5)
        assert row.low == pytest.approx(loc - 1.645 * scale, abs=0.06 * scale)
        assert row.high == pytest.approx(loc + 1.645 * scale, abs=0.06 * scale)
    assert found.left_out == {"w": (20,)}
    assert "w: 20 numbers, left out" in str(found)
    assert str(found) == str(posterior_summary(model, guide, draws=20_000))


def test_learned_parameters_are_in_their_own_units() -> None:
    process = pyrovae.models.GaussianProcess(lengthscale=2.5)
    nothing = pyrovae.guides.PointEstimate(process)
    x = torch.linspace(0, 1, 5)[:, None]
    found = posterior_summary(process, nothing, x, torch.zeros(5))
    assert found.parameters["kernel.lengthscale"] == pytest.approx(2.5)
    assert constraints.positive.check(torch.tensor(list(found.parameters.values()))).all()
    level = pyrovae.models.LinearGaussianStateSpace.local_level(state_variance=3.0, observation_variance=0.7)
    flat = posterior_summary(level, lambda x: None, torch.zeros(1, 4, 1)).parameters
    assert flat == pytest.approx({"state_covariance[0, 0]": 3.0, "observation_covariance[0, 0]": 0.7}, rel=1e-6)


def test_the_random_state_stays() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    posterior_summary(model, guide)
    assert torch.equal(before, torch.random.get_rng_state())


def test_too_few_draws_are_refused() -> None:
    with pytest.raises(ArgumentError, match="draws is 1"):
        posterior_summary(model, guide, draws=1)
