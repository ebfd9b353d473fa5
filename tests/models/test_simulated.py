"""Data that each model simulates: the latents behind them lie in their exact posteriors as often as these say.

Over draws of latents and data together, an exact 90 % interval holds the latent at 90 % of the draws, and the squared
distance from the posterior mean is, in units of its variance, 1 on average. Each check has a false alarm in some
15 000 seeds (four standard errors). Mixtures, the Gaussian process, the mixed model and state-space models have
theirs beside their other tests.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from pyrovae import models

DRAWS = 4000
pytestmark = pytest.mark.slow


def simulated(model: Callable[..., object], draws: int, *args: object, **kwargs: object) -> dict[str, Tensor]:
    """So many independent draws of latents and data by name, all in one vectorized run."""
    with torch.no_grad(), pyro.plate("draws", draws, dim=-2):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}


def assert_share(inside: Tensor, share: float = 0.9) -> None:
    """Within four standard errors of the nominal share."""
    error = (share * (1 - share) / inside.numel()) ** 0.5
    assert float(inside.double().mean()) == pytest.approx(share, abs=4 * error)


def assert_standardised(value: Tensor, mean: Tensor, sd: Tensor) -> None:
    """The standardised distance has mean 0 and mean square 1, within four standard errors."""
    distance = ((value - mean) / sd).double().flatten()
    for moment, expected in ((distance, 0.0), (distance.square(), 1.0)):
        error = float(moment.std()) / len(moment) ** 0.5
        assert float(moment.mean()) == pytest.approx(expected, abs=4 * error)


def test_linear_regression() -> None:
    """A weight is Student t with 2a degrees of freedom a posteriori; here a = a₀ + n/2 = 8."""
    model = models.BayesianLinearRegression(features=2, intercept=True, noise_concentration=3.0, noise_rate=2.0)
    x = torch.linspace(-1, 2, 10)[:, None]
    inside = []
    bound = float(stats.t.ppf(0.95, df=16))
    for _ in range(1000):
        drawn = simulated(model, 1, x)
        after = model.posterior(x, drawn["y"].reshape(-1))
        scale = (torch.linalg.inv(after.precision).diagonal() * after.rate / after.concentration).sqrt()
        inside.append((drawn["weights"].reshape(-1) - after.loc).abs() < bound * scale)
    assert_share(torch.stack(inside)[:, 0])
    assert_share(torch.stack(inside)[:, 1])


@pytest.mark.parametrize("parametrization", ["centred", "non-centred"])
def test_eight_schools(parametrization: str) -> None:
    """τ has no variance under its Half-Cauchy prior, so that this is of θ and μ, of which the draws of large τ say
    little; distances are bounded by the data's errors."""
    model = models.EightSchools(parametrization=parametrization)
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(size=DRAWS)
    nodes = trace.nodes
    theta = nodes["theta"]["value"] if "theta" in nodes else None
    if theta is None:
        mu, tau = nodes["mu"]["value"], nodes["tau"]["value"]
        theta = mu.unsqueeze(-1) + tau.unsqueeze(-1) * nodes["unit"]["value"]
    exact = model.posterior(nodes["x"]["value"], nodes=800)
    small = nodes["x"]["value"].abs().amax(-1) < 300  # a choice by the data alone keeps the statement true
    assert small.float().mean() > 0.7
    assert_standardised(theta[small][:, 0], exact["theta"].mean[small][:, 0], exact["theta"].sd[small][:, 0])
    assert_standardised(nodes["mu"]["value"][small], exact["mu"].mean[small], exact["mu"].sd[small])


def test_groups_of_a_hierarchical_normal() -> None:
    """Given μ and τ the posterior of each group's mean is Gaussian, and shrinks as far as it should."""
    group = torch.tensor([0, 0, 0, 1, 2, 2])
    model = models.HierarchicalNormal(groups=3, noise=0.8, mean_scale=2.0, spread_scale=1.0)
    inside = []
    for _ in range(1500):
        drawn = simulated(model, 1, group)
        after = model.posterior(group, drawn["y"].reshape(-1), drawn["mu"].reshape(()), drawn["tau"].reshape(()))
        inside.append((drawn["theta"].reshape(-1) - after.mean).abs() < 1.6449 * after.stddev)
    for column in torch.stack(inside).T:
        assert_share(column)


def test_two_bernoulli() -> None:
    """Given both coins, the latent's place in its posterior, on a grid, is uniform."""
    model = models.TwoBernoulli(a=(0.3, -0.5), b=(2.0, -1.0))
    drawn = simulated(model, DRAWS, size=1)
    z, x = drawn["z"].reshape(-1), drawn["x"].reshape(-1, 2)
    grid = torch.linspace(-6, 6, 2001)
    with torch.no_grad():
        log_joint = model.prior().log_prob(grid[:, None]) + model.decode(grid[:, None]).log_prob(x[:, None])
    cumulative = log_joint.softmax(-1).cumsum(-1)
    place = cumulative.gather(-1, torch.searchsorted(grid, z).clamp_max(2000)[:, None])[:, 0]
    assert_share((place > 0.05) & (place < 0.95))
    assert_share(place < 0.5, 0.5)


def test_codes_of_a_sigmoid_belief_net() -> None:
    """Each unit is on as often as its exact posterior, the sum over all codes, says on average; in ten bins of it."""
    torch.manual_seed(0)
    model = models.SigmoidBeliefNet(data_shape=(6,), layers=(4,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1.5 * torch.randn_like(parameter))
        trace = poutine.trace(model).get_trace(size=DRAWS)
    codes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    z, x = trace.nodes["z1"]["value"], trace.nodes["x"]["value"]
    with torch.no_grad():
        log_joint = model.top().log_prob(codes) + model.decode(codes).log_prob(x[:, None])
    probability = log_joint.softmax(-1) @ codes
    for low in torch.arange(0, 1, 0.25):
        chosen = (probability >= low) & (probability < low + 0.25)
        expected, spread = probability[chosen], (probability * (1 - probability))[chosen].sum().sqrt()
        assert float((z[chosen] - expected).sum().abs()) < 4 * float(spread) + 1e-6
