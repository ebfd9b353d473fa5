"""Priors of flat weights: their densities, and what is asked of them by block, layer and member."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyrovae
from pyrovae.errors import ArgumentError
from pyrovae.guides import MeanField
from pyrovae.models import BNN
from pyrovae.models.flat import FlatNetwork
from pyrovae.models.weight_priors import PRIORS, weight_prior

NET = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
BLOCKS = FlatNetwork(NET).blocks


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        yield


def test_densities_by_hand() -> None:
    w = torch.randn(19)
    assert float(weight_prior("normal", BLOCKS)().log_prob(w)) == pytest.approx(
        float(dist.Normal(0.0, 1.0).log_prob(w).sum()), rel=1e-5
    )
    assert float(weight_prior({"name": "laplace", "scale": 0.3}, BLOCKS)().log_prob(w)) == pytest.approx(
        float(dist.Laplace(0.0, 0.3).log_prob(w).sum()), rel=1e-5
    )
    mixture = weight_prior({"name": "scale-mixture", "scale": 1.5, "share": 0.25, "ratio": 0.1}, BLOCKS)()
    by_hand = torch.logaddexp(
        torch.tensor(0.25).log() + dist.Normal(0.0, 1.5).log_prob(w),
        torch.tensor(0.75).log() + dist.Normal(0.0, 0.15).log_prob(w),
    )
    assert float(mixture.log_prob(w)) == pytest.approx(float(by_hand.sum()), rel=1e-5)


def test_fan_in_patterns_and_layers() -> None:
    fan_in = weight_prior({"name": "normal", "scale": "fan-in"}, BLOCKS)().stddev
    torch.testing.assert_close(fan_in, torch.cat([torch.full((12,), 0.5), torch.ones(3), torch.full((3,), 3**-0.5),
                                                  torch.ones(1)]))  # fmt: skip
    named = weight_prior({"name": "normal", "scale": {"*": 2.0, "*.bias": 0.1}}, BLOCKS)().stddev
    assert named.unique().tolist() == pytest.approx([0.1, 2.0])
    layered = weight_prior({"name": "normal", "latent": "layer"}, BLOCKS)
    trace = poutine.trace(poutine.condition(layered, {"prior_scale": torch.tensor([2.0, 5.0])})).get_trace()
    scale = trace.nodes["_RETURN"]["value"].stddev
    assert scale[:15].eq(2).all()
    assert scale[15:].eq(5).all()


def test_a_grid_of_scales_is_one_fit() -> None:
    """Each member has the KL of its own prior: against the closed form."""
    x, y = torch.randn(10, 4), torch.randn(10)
    model = BNN(NET, members=3, prior={"name": "normal", "scale": [0.1, 1.0, 10.0]})
    guide = MeanField(model, init_scale=0.2)
    estimate = pyrovae.ELBO(kl="analytic").estimate(model, guide, x, y)
    loc = model.start_values(x, y)["weights"]
    with torch.no_grad():
        mean = guide.median()["weights"]
        exact = sum(
            torch.distributions.kl_divergence(dist.Normal(mean[m, 0], 0.2), dist.Normal(0.0, s)).sum()
            for m, s in enumerate([0.1, 1.0, 10.0])
        )
    assert loc.shape == mean.shape
    assert float(sum(estimate.kl.values())) == pytest.approx(float(exact), rel=1e-4)
    with pytest.raises(ArgumentError, match="a list of 2; members is 3"):
        BNN(NET, members=3, prior={"name": "normal", "scale": [0.1, 1.0]})


def test_a_function_of_name_and_shape() -> None:
    def prior(name: str, shape: torch.Size) -> Any:
        scale = 0.1 if name.endswith("bias") else 2.0
        return dist.Normal(torch.zeros(shape), scale)

    law = weight_prior(prior, BLOCKS)()
    w = torch.randn(5, 19)
    scale = torch.cat([torch.full((12,), 2.0), torch.full((3,), 0.1), torch.full((3,), 2.0), torch.full((1,), 0.1)])
    torch.testing.assert_close(law.log_prob(w), dist.Normal(0.0, scale).log_prob(w).sum(-1))
    assert law.sample((6,)).shape == (6, 19)
    assert law.expand([2, 1]).sample().shape == (2, 1, 19)
    model, x = BNN(NET, prior=prior), torch.randn(6, 4)
    run = pyrovae.fit(
        model,
        MeanField(model),
        (x, x[:, 0]),
        epochs=3,
        objective=pyrovae.ELBO(particles=3),
        compile=False,
        progress=False,
    )
    assert run.history[-1]["bound"] > run.history[0]["bound"] - 5
    with pytest.raises(ArgumentError, match=r"'0.weight'; it must return a distribution of shape \(3, 4\)"):
        BNN(NET, prior=lambda name, shape: dist.Normal(0.0, 1.0))(x)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("members", [None, 2])
def test_every_prior_fits(name: str, members: int | None) -> None:
    model, x = BNN(NET, prior=name, members=members), torch.randn(12, 4)
    run = pyrovae.fit(
        model, MeanField(model), (x, x[:, 0]), epochs=20, lr=0.02, batch_size=12, compile=False, progress=False
    )
    assert run.history[-1]["bound"] > run.history[0]["bound"]
    assert pyrovae.predict(model, run.guide, x, samples=3).mean.isfinite().all()


def test_bad_options_are_named() -> None:
    for given, message in [
        ({"name": "normal", "width": 3}, "prior 'normal' was given.*width"),
        ({"scale": 1.0}, "unknown prior None"),
        ({"name": "scale-mixture", "share": 1.5}, "share of a scale mixture is 1.5"),
        ({"name": "horseshoe", "global_scale": 0.0}, "global_scale"),
        ({"name": "normal", "scale": "fan-out"}, "'fan-in'"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            weight_prior(given, BLOCKS)
