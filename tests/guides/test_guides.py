"""Amortized guides of one latent vector and of binary layers; test_all_guides.py has what all guides share."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyrovae
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides.amortized import (
    AmortizedBernoulli,
    AmortizedFactorCovariance,
    AmortizedFlow,
    AmortizedFullRank,
    AmortizedNormal,
)
from pyrovae.models import VAE, SigmoidBeliefNet
from pyrovae.registry import GUIDES as REGISTRY
from pyrovae.registry import configuration
from pyrovae.training.programs import local_params

VARIANTS = {
    "normal-mlp": lambda: _normal(dict(data_shape=(5,))),
    "normal-conv": lambda: _normal(dict(data_shape=(1, 8, 8), network="conv", channels=(8, 4), activation="relu")),
    "normal-own-encoder": lambda: _normal(dict(data_shape=(5,)), hidden=(7, 6), activation="gelu"),
    "full-rank-mlp": lambda: _normal(dict(data_shape=(5,)), AmortizedFullRank),
    "full-rank-conv": lambda: _normal(
        dict(data_shape=(1, 8, 8), network="conv", channels=(8, 4), activation="relu"), AmortizedFullRank
    ),
    "factor-rank-1": lambda: _normal(dict(data_shape=(5,)), AmortizedFactorCovariance, rank=1),
    "factor-rank-2": lambda: _normal(dict(data_shape=(5,)), AmortizedFactorCovariance, rank=2, hidden=(7, 6)),
    "flow-iaf": lambda: _normal(dict(data_shape=(5,)), AmortizedFlow, depth=2, context=8),
    "flow-spline": lambda: _normal(dict(data_shape=(5,)), AmortizedFlow, flow="spline", depth=2, context=8),
    "bernoulli-linear": lambda: _bernoulli((6,)),
    "bernoulli-two-layers": lambda: _bernoulli((6, 4)),
    "bernoulli-two-layers-deep": lambda: _bernoulli((6, 4), model_hidden=(16, 8)),
    "bernoulli-own-encoder": lambda: _bernoulli((6, 4), hidden=(7, 6), activation="gelu"),
}

OBJECTIVES = {
    AmortizedNormal: [pyrovae.ELBO(gradient="stl")],
    AmortizedFullRank: [pyrovae.ELBO(gradient="stl"), pyrovae.IWAE(5, gradient="dreg")],
    AmortizedFactorCovariance: [pyrovae.ELBO(gradient="stl"), pyrovae.IWAE(5, gradient="dreg")],
    AmortizedFlow: [pyrovae.ELBO(gradient="pathwise"), pyrovae.IWAE(5, gradient="pathwise")],
    AmortizedBernoulli: [
        pyrovae.IWAE(5, gradient="vimco"),
        pyrovae.ReweightedWakeSleep(5),
        pyrovae.ELBO(particles=5, gradient="score"),
    ],
}


FACTORISED = [name for name in VARIANTS if name.startswith(("normal", "bernoulli"))]
"""Those whose moments and marginals are known in closed form; test_families.py has the others, by quadrature."""


def _normal(model_arguments, kind=AmortizedNormal, **guide_arguments):
    model = VAE(latent_dim=3, hidden=(16,), **model_arguments)
    return model, kind(model, **guide_arguments)


def _bernoulli(layers, model_hidden=(), **guide_arguments):
    model = SigmoidBeliefNet(data_shape=(5, 1), layers=layers, hidden=model_hidden)
    return model, AmortizedBernoulli(model, **guide_arguments)


def sites_of(model):
    """The latent sites in the guide's order, the one that ``encode`` is of first."""
    return [f"z{layer}" for layer in range(1, len(model.layers) + 1)] if hasattr(model, "layers") else ["z"]


@pytest.fixture(params=VARIANTS)
def pair(request):
    return VARIANTS[request.param]()


def batch(model, n=6):
    return torch.bernoulli(torch.full((n, *model.data_shape), 0.4))


def test_shapes_and_density_match_encode(pair):
    model, guide = pair
    x = batch(model)
    q = guide.encode(x)
    assert q.batch_shape == (6,)
    assert q.event_shape == (model.latent_dim,)
    trace = poutine.trace(guide).get_trace(x)
    z, *above = (trace.nodes[name]["value"] for name in sites_of(model))
    assert z.shape == (6, model.latent_dim)
    expected = q.log_prob(z).sum()
    for layer, (lower, upper) in enumerate(itertools.pairwise([z, *above]), 1):
        assert upper.shape == (6, model.layers[layer])
        logits = guide.encoders[layer](2 * lower - 1)
        expected = expected + dist.Bernoulli(logits=logits).log_prob(upper).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


@pytest.mark.parametrize("pair", FACTORISED, indirect=True)
def test_samples_have_the_mean_and_scale_of_the_density(pair):
    model, guide = pair
    with torch.no_grad():
        q = guide.encode(batch(model))
    z = q.sample((20_000,))
    squares = (z - q.mean).square()
    # At most 72 comparisons at 4.5 standard errors: a false alarm once in 2 000 seeds.
    assert (((z.mean(0) - q.mean) / (q.stddev / 20_000**0.5)).abs() < 4.5).all()
    assert (((squares.mean(0) - q.variance) / (squares.std(0) / 20_000**0.5)).abs() < 4.5).all()


@pytest.mark.parametrize("pair", FACTORISED, indirect=True)
def test_density_integrates_to_one(pair):
    model, guide = pair
    with torch.no_grad():
        q = guide.encode(batch(model, 1))
        if q.support.is_discrete:
            codes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=model.latent_dim)))
            assert abs(float(q.log_prob(codes).exp().sum()) - 1) < 1e-5
            return
        grid = torch.linspace(-8, 8, 4001)
        marginal = torch.distributions.Normal(q.mean[..., 0], q.stddev[..., 0])
        assert abs(float(torch.trapezoid(marginal.log_prob(grid).exp(), grid)) - 1) < 1e-4
        z = q.sample()
        by_dimension = torch.distributions.Normal(q.mean, q.stddev).log_prob(z).sum(-1)
    torch.testing.assert_close(q.log_prob(z), by_dimension)


def test_every_parameter_gets_a_gradient(pair):
    model, guide = pair
    x = batch(model)
    for objective in OBJECTIVES[type(guide)]:
        guide.zero_grad()
        with local_params(model, guide):
            objective.differentiable_loss(model, guide, x).backward()
        for name, parameter in guide.named_parameters():
            assert parameter.grad is not None, (objective, name)
            assert parameter.grad.abs().sum() > 0, (objective, name)


def test_particles_are_independent_draws_of_the_same_posterior(pair):
    model, guide = pair
    x = batch(model)
    with local_params(model, guide), pyro.plate("particles", 5, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    z, *above = (trace.nodes[name]["value"] for name in sites_of(model))
    first = trace.nodes[sites_of(model)[0]]["fn"]
    assert z.shape == (5, 6, model.latent_dim)
    assert not torch.equal(z[0], z[1])
    torch.testing.assert_close(first.log_prob(z), guide.encode(x).log_prob(z))
    for layer, (lower, upper) in enumerate(itertools.pairwise([z, *above]), 1):
        assert upper.shape == (5, 6, model.layers[layer])
        one = torch.stack([dist.Bernoulli(logits=guide.encoders[layer](2 * row - 1)).mean for row in lower])
        torch.testing.assert_close(trace.nodes[sites_of(model)[layer]]["fn"].mean, one)


def test_rebuilt_from_its_configuration_with_its_state(pair):
    model, guide = pair
    again = REGISTRY.build(configuration(guide), model)
    again.load_state_dict(guide.state_dict())
    x = batch(model)
    traces = []
    for each in (guide, again):
        pyro.set_rng_seed(3)
        traces.append(poutine.trace(each).get_trace(x))
    for name in sites_of(model):
        torch.testing.assert_close(traces[0].nodes[name]["value"], traces[1].nodes[name]["value"])
    torch.testing.assert_close(traces[0].log_prob_sum(), traces[1].log_prob_sum())
    assert "model" not in configuration(guide)["arguments"]


def test_shares_no_parameters_with_the_model(pair):
    model, guide = pair
    assert not {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}


def test_float64(pair):
    model, guide = pair
    assert guide.double().encode(batch(model).double()).mean.dtype == torch.float64


def test_extreme_data_give_a_finite_posterior(pair):
    model, guide = pair
    q = guide.encode(1e6 * batch(model))
    assert q.stddev.isfinite().all()
    if q.support.is_discrete:  # certain, but no other code is impossible
        assert q.log_prob(q.mean.round()).isfinite().all()
        assert q.log_prob(1 - q.mean.round()).isfinite().all()
    else:
        assert (q.stddev > 0).all()


def test_data_of_another_shape_are_refused(pair):
    _, guide = pair
    with pytest.raises(DataError, match=r"x has shape .* this guide encodes data of shape"):
        guide.encode(torch.zeros(2, 11))


@pytest.mark.parametrize(
    ("guide", "model", "words"),
    [
        (
            AmortizedBernoulli,
            VAE(data_shape=(5,), latent_dim=2, hidden=(8,)),
            "guide AmortizedBernoulli does not fit model VAE, which has no 'layers'.*AmortizedNormal takes",
        ),
        (
            AmortizedNormal,
            SigmoidBeliefNet(data_shape=(5,), layers=(3,)),
            "guide AmortizedNormal does not fit model SigmoidBeliefNet.*AmortizedBernoulli takes",
        ),
    ],
)
def test_a_model_of_another_kind_is_refused(guide, model, words):
    with pytest.raises(ArgumentError, match=words):
        guide(model)


def test_bad_arguments_are_named(pair):
    model, guide = pair
    with pytest.raises(ArgumentError, match=r"hidden is \(0,\)"):
        type(guide)(model, hidden=(0,))
    with pytest.raises(ArgumentError, match="unknown activation 'tanhh'"):
        type(guide)(model, activation="tanhh")
