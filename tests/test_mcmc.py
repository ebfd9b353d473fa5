"""NUTS against exact posteriors, and what it returns."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

import pyrovae
from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.guides import FullRank
from pyrovae.mcmc import Draws, nuts
from pyrovae.models.bnn import BNN

QUIET = {"progress": False}


def regression(n=20):
    x = torch.randn(n, 2).double()
    return x, (x @ torch.tensor([1.0, -2.0]).double() + 0.5 + 0.7 * torch.randn(n).double())


def linear():
    """A Bayesian linear regression as a network of one layer, and its exact posterior mean and covariance."""
    x, y = regression()
    model = BNN([2, 1], {"name": "normal", "scale": 0.7}).double()
    design = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    covariance = torch.linalg.inv(design.mT @ design / 0.7**2 + torch.eye(3).double())
    return model, x, y, covariance @ design.mT @ y / 0.7**2, covariance


@pytest.mark.slow
def test_draws_of_a_linear_regression_have_the_exact_moments():
    """Whitened by the exact posterior the draws are standard normal: 3 means and 6 second moments, each within z
    standard errors (by its own effective number of samples) for one false alarm in 1000 over all nine."""
    model, x, y, mean, covariance = linear()
    draws = nuts(model, x, y, warmup=100, samples=200, chains=2, **QUIET)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (draws["weights"] - mean).mT, upper=False
    ).mT
    first, second = torch.triu_indices(3, 3)
    functions = torch.cat([white, white[:, first] * white[:, second] - (first == second).double()], 1)
    count = Draws({"f": functions}, draws.divergences, draws.acceptance).effective_samples["f"]
    error = functions.mean(0) / (functions.std(0) / count.clamp_max(len(functions)).sqrt())
    assert error.abs().max() < stats.norm.isf(0.001 / 9 / 2)
    assert count.min() > 80
    assert draws.divergences == (0, 0)
    assert all(0.6 < rate < 1.0 for rate in draws.acceptance)
    assert (draws.r_hat["weights"] < 1.05).all()


def test_shapes_prediction_and_chains():
    model, x, y, mean, _ = linear()
    draws = nuts(model, x, y, warmup=50, samples=30, chains=2, **QUIET)
    assert draws["weights"].shape == (60, 3)
    assert list(draws) == ["weights"]
    assert len(draws) == 1
    assert draws.chains == 2
    first, second = draws.by_chain["weights"]
    assert torch.equal(torch.cat([first, second]), draws["weights"])
    assert not (first[:, None] == second).any()
    prediction = pyrovae.predict(model, draws, x)
    assert prediction.samples == 60
    exact = torch.cat([x, torch.ones(len(x), 1).double()], 1) @ mean
    assert (prediction.mean - exact).abs().max() < 0.3
    assert not draws["weights"].requires_grad


def test_seeds():
    """The same seed gives the same draws, another one others; the caller's random state is left alone."""
    model, x, y, *_ = linear()
    options = {"warmup": 20, "samples": 10, "chains": 2, **QUIET}
    before = torch.get_rng_state()
    one, same, other = (nuts(model, x, y, seed=seed, **options)["weights"] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not (one[:, None] == other).any()


def test_learned_parameters_are_held():
    x, y = (part.float() for part in regression())
    model = BNN([2, 4, 1], activation="tanh")
    before = {name: value.clone() for name, value in model.named_parameters()}
    draws = nuts(model, x, y, warmup=20, samples=10, chains=1, max_tree_depth=4, **QUIET)
    assert draws["weights"].shape == (10, model.network.size)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None
    assert model.training


def test_constrained_sites_and_starts():
    """Exponential data under a Gamma prior: the exact posterior is Gamma(3 + n, 2 + Σ y)."""
    y = torch.distributions.Exponential(2.0).sample((15,))

    def model(y):
        rate = pyro.sample("rate", dist.Gamma(y.new_tensor(3.0), 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    seen = []

    def watched(y):
        seen.append(1)
        return model(y)

    draws = nuts(model, y, warmup=100, samples=150, chains=2, start={"rate": torch.tensor(2.0)}, **QUIET)
    exact = dist.Gamma(18.0, 2.0 + y.sum())
    error = (draws["rate"].mean() - exact.mean) / (exact.stddev / draws.effective_samples["rate"].sqrt())
    assert abs(float(error)) < stats.norm.isf(0.001 / 2)  # a false alarm in 1000
    first = nuts(model, y, warmup=0, samples=1, chains=3, start={"rate": torch.tensor(2.0)}, jitter=0.0, **QUIET)
    assert (first["rate"] > 0).all()
    assert nuts(watched, y, warmup=0, samples=1, chains=1, max_tree_depth=1, **QUIET)["rate"].shape == (1,)
    assert 0 < len(seen) < 50


def test_bad_input():
    model, x, y, *_ = linear()
    for name, value in (("samples", 0), ("chains", 0), ("warmup", -1), ("max_tree_depth", 1.5), ("seed", -1)):
        with pytest.raises(ArgumentError, match=f"{name} is {value}"):
            nuts(model, x, y, **{name: value})
    with pytest.raises(ArgumentError, match="target_accept is 1.0"):
        nuts(model, x, y, target_accept=1.0)
    with pytest.raises(ArgumentError, match="jitter is -1"):
        nuts(model, x, y, jitter=-1)
    with pytest.raises(ArgumentError, match="model is None; it must be a Pyro model"):
        nuts(None)
    with pytest.raises(ArgumentError, match="unknown latent site in start 'weight' .did you mean 'weights'"):
        nuts(model, x, y, start={"weight": torch.zeros(3)})
    with pytest.raises(ArgumentError, match=r"start\['weights'\] has shape \(2,\); this site has \(3,\)"):
        nuts(model, x, y, start={"weights": torch.zeros(2)})
    with pytest.raises(ModelGuideError, match="its latents are discrete: k"):
        nuts(lambda: pyro.sample("k", dist.Poisson(torch.ones(()))))
    with pytest.raises(ModelGuideError, match="observes all of its sites"):
        nuts(lambda: pyro.sample("z", dist.Normal(0.0, 1.0), obs=torch.zeros(())))
    with pytest.raises(ModelGuideError, match="not finite where the chain starts"):
        nuts(model, x, y * torch.nan, **QUIET)


@pytest.mark.slow
def test_the_last_layer_of_a_network_has_its_exact_predictions():
    """Given the hidden layer, the last one is a linear regression on its features, whose posterior is known."""
    torch.manual_seed(0)
    x = torch.randn(30, 1)
    sigma, net = 0.3, nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    y = torch.sin(2 * x[:, 0]) + sigma * torch.randn(30)
    model = BNN(net, likelihood={"name": "normal", "scale": sigma}, bayesian="last")
    new = torch.linspace(-2, 2, 7)[:, None]

    def features(inputs):
        return torch.cat([net[:2](inputs), torch.ones(len(inputs), 1)], 1).detach()

    H = features(x)
    precision = H.mT @ H / sigma**2 + torch.eye(4)
    exact = torch.distributions.MultivariateNormal(
        torch.linalg.solve(precision, H.mT @ y / sigma**2), precision_matrix=precision
    )
    at = features(new)
    mean, spread = at @ exact.mean, (at @ exact.covariance_matrix * at).sum(-1)
    draws = nuts(model, x, y, warmup=150, samples=300, chains=1, progress=False)
    by_nuts = pyrovae.predict(model, draws, new)
    guide = FullRank(model)
    objective = pyrovae.ELBO(particles=8, gradient="stl")
    fit = {"epochs": 1000, "batch_size": 30, "lr": 0.1, "schedule": "cosine", "compile": False, "progress": False}
    model.requires_grad_(False)  # the hidden layer is not to be learned here
    pyrovae.fit(model, guide, (x, y), objective=objective, **fit)
    by_guide = pyrovae.predict(model, guide, new, samples=4000)
    # NUTS has an effective sample size of 100 at least, the guide 4000 independent draws: five standard errors each.
    for found, size in ((by_nuts, 100), (by_guide, 4000)):
        assert ((found.mean - mean) / (spread / size).sqrt()).abs().max() < 5
        assert (found.epistemic / spread - 1).abs().max() < 5 * (2 / size) ** 0.5
