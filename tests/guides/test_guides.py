"""One contract over all guides; a new one is covered by a line in GUIDES."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine

import pyrovae
from pyrovae.errors import DataError
from pyrovae.guides import AmortizedNormal
from pyrovae.models import VAE
from pyrovae.registry import GUIDES as REGISTRY
from pyrovae.registry import configuration
from pyrovae.training.programs import local_params

VARIANTS = {
    "normal-mlp": lambda: _pair(dict(data_shape=(5,))),
    "normal-conv": lambda: _pair(dict(data_shape=(1, 8, 8), network="conv", channels=(8, 4), activation="relu")),
    "normal-own-encoder": lambda: _pair(dict(data_shape=(5,)), hidden=(7, 6), activation="gelu"),
}


def _pair(model_arguments, **guide_arguments):
    model = VAE(latent_dim=3, hidden=(16,), **model_arguments)
    return model, AmortizedNormal(model, **guide_arguments)


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
    assert q.event_shape == (3,)
    trace = poutine.trace(guide).get_trace(x)
    z = trace.nodes["z"]["value"]
    assert z.shape == (6, 3)
    torch.testing.assert_close(trace.log_prob_sum(), q.log_prob(z).sum())


def test_samples_have_the_mean_and_scale_of_the_density(pair):
    model, guide = pair
    with torch.no_grad():
        q = guide.encode(batch(model))
    z = q.sample((20_000,))
    # 36 comparisons at 4.5 standard errors: a false alarm once in 4 000 seeds.
    assert (((z.mean(0) - q.mean) / (q.stddev / 20_000**0.5)).abs() < 4.5).all()
    assert (((z.std(0) / q.stddev - 1) * 40_000**0.5).abs() < 4.5).all()


def test_density_integrates_to_one(pair):
    model, guide = pair
    with torch.no_grad():
        q = guide.encode(batch(model, 1))
        grid = torch.linspace(-8, 8, 4001)
        marginal = torch.distributions.Normal(q.mean[..., 0], q.stddev[..., 0])
        assert abs(float(torch.trapezoid(marginal.log_prob(grid).exp(), grid)) - 1) < 1e-4
        z = q.sample()
        by_dimension = torch.distributions.Normal(q.mean, q.stddev).log_prob(z).sum(-1)
    torch.testing.assert_close(q.log_prob(z), by_dimension)


def test_every_parameter_gets_a_gradient(pair):
    model, guide = pair
    x = batch(model)
    with local_params(model, guide):
        pyrovae.ELBO(gradient="stl").differentiable_loss(model, guide, x).backward()
    for name, parameter in guide.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_particles_are_independent_draws_of_the_same_posterior(pair):
    model, guide = pair
    x = batch(model)
    with local_params(model, guide), pyro.plate("particles", 5, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    z = trace.nodes["z"]["value"]
    assert z.shape == (5, 6, 3)
    assert not torch.equal(z[0], z[1])
    torch.testing.assert_close(trace.nodes["z"]["fn"].log_prob(z), guide.encode(x).log_prob(z))


def test_rebuilt_from_its_configuration_with_its_state(pair):
    model, guide = pair
    again = REGISTRY.build(configuration(guide), model)
    again.load_state_dict(guide.state_dict())
    x = batch(model)
    torch.testing.assert_close(again.encode(x).mean, guide.encode(x).mean)
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
    assert (q.stddev > 0).all()


def test_data_of_another_shape_are_refused(pair):
    _, guide = pair
    with pytest.raises(DataError, match=r"x has shape .* this guide encodes data of shape"):
        guide.encode(torch.zeros(2, 11))
