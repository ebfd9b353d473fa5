"""The VAE on the sphere beyond the contract of all models: its prior, and a fit to the digits."""

from __future__ import annotations

import pytest
import torch
from pyro import poutine

import pyrovae
from pyrovae.distributions.von_mises_fisher import SphericalUniform
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides.spherical import AmortizedVonMisesFisher
from pyrovae.models.spherical_vae import SphericalVAE
from pyrovae.registry import MODELS, configuration


@pytest.mark.parametrize(
    "arguments",
    [
        {"likelihood": "bernoulli"},
        {"likelihood": "normal", "latent_dim": 2},
        {"likelihood": "bernoulli", "network": "conv", "channels": (8, 4), "data_shape": (2, 7, 9)},
    ],
    ids=["mlp", "circle", "conv"],
)
def test_generates_conditions_and_is_rebuilt(arguments):
    model = SphericalVAE(**{"data_shape": (5, 3), "latent_dim": 4, "hidden": (16,), **arguments})
    x = model(size=6)
    assert x.shape == (6, *model.data_shape)
    trace = poutine.trace(model).get_trace(x)
    z = trace.nodes["z"]["value"]
    assert z.shape == (6, model.latent_dim)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(6))
    expected = 6 * SphericalUniform(model.latent_dim).entropy().neg() + model.decode(z).log_prob(x).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    again = MODELS.build(configuration(model))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.decode(z).mean, model.decode(z).mean)
    assert model.double().prior().sample().dtype == torch.float64


def test_bad_arguments_are_named():
    with pytest.raises(ArgumentError, match="dim is 1"):
        SphericalVAE(data_shape=(5,), latent_dim=1)
    with pytest.raises(ArgumentError, match="latent_dim is 0|latent_dim is \\(0,\\)"):
        SphericalVAE(data_shape=(5,), latent_dim=0)
    with pytest.raises(ArgumentError, match="unknown likelihood"):
        SphericalVAE(data_shape=(5,), latent_dim=3, likelihood="gauss")
    with pytest.raises(DataError, match="this model takes batches"):
        SphericalVAE(data_shape=(5,), latent_dim=3)(torch.zeros(2, 4))


def test_a_fit_to_the_digits_raises_the_bound_and_uses_the_sphere():
    data = pyrovae.datasets.load("digits")
    model = SphericalVAE(data_shape=data.event_shape, latent_dim=3, hidden=(64,))
    guide = AmortizedVonMisesFisher(model)
    run = pyrovae.fit(
        model,
        guide,
        data.train,
        validation=data.validation,
        objective=pyrovae.ELBO(kl="analytic"),
        epochs=15,
        batch_size=100,
        lr=3e-3,
        compile=False,
        progress=False,
    )
    first, last = run.history[0], run.history[-1]
    for name in ("bound", "validation_bound"):
        assert last[name] > first[name] + 10
    assert last["kl"] > 1  # nats that the latent carries
