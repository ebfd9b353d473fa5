"""The von Mises–Fisher guide beyond the contract of all guides: its family, its KL, its fits."""

from __future__ import annotations

import logging
import math

import pyro
import pytest
import torch
from exact import standard_errors
from pyro import poutine
from torch.distributions import kl_divergence

import pyrovae
from pyrovae.distributions.von_mises_fisher import SphericalUniform, VonMisesFisher
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides import AmortizedFullRank, AmortizedNormal
from pyrovae.guides.spherical import AmortizedVonMisesFisher, Direction
from pyrovae.models import VAE, SigmoidBeliefNet
from pyrovae.models.spherical_vae import SphericalVAE
from pyrovae.registry import GUIDES, configuration
from pyrovae.training.programs import local_params


def pair(latent_dim=3, **arguments):
    model = SphericalVAE(**{"data_shape": (5,), "latent_dim": latent_dim, "hidden": (16,), **arguments})
    return model, AmortizedVonMisesFisher(model)


def batch(model, n=6):
    return torch.bernoulli(torch.full((n, *model.data_shape), 0.4))


networks = pytest.mark.parametrize(
    "arguments",
    [{}, {"latent_dim": 2}, {"data_shape": (1, 8, 8), "network": "conv", "channels": (8, 4), "activation": "relu"}],
    ids=["mlp", "circle", "conv"],
)


def test_the_family_is_a_direction_and_a_concentration():
    raw = torch.randn(4, 7, 6)
    q = Direction(5)(raw)
    assert isinstance(q, VonMisesFisher)
    assert (q.batch_shape, q.event_shape) == ((4, 7), (5,))
    cosine = torch.nn.functional.cosine_similarity(q.loc, raw[..., :-1], dim=-1)
    assert cosine.min() > 1 - 1e-4
    torch.testing.assert_close(q.concentration, raw[..., -1].exp())
    with pytest.raises(ArgumentError, match="dim is 1"):
        Direction(1)


def test_the_family_takes_every_number():
    raw = torch.stack([torch.zeros(4), torch.full((4,), 1e6), torch.full((4,), -1e6)]).requires_grad_()
    q = Direction(3)(raw)
    x = q.rsample((5,))
    (q.log_prob(x).sum() + x.sum() + kl_divergence(q, SphericalUniform(3)).sum()).backward()
    assert q.support.check(q.loc).all()
    assert x.isfinite().all()
    assert raw.grad.isfinite().all()


@networks
def test_shapes_particles_and_gradients(arguments):
    model, guide = pair(**arguments)
    x = batch(model)
    q = guide.encode(x)
    assert (q.batch_shape, q.event_shape) == ((6,), (model.latent_dim,))
    assert guide(x).shape == (6, model.latent_dim)
    with local_params(model, guide), pyro.plate("particles", 5, dim=-2):
        site = poutine.trace(guide).get_trace(x).nodes["z"]
    assert site["value"].shape == (5, 6, model.latent_dim)
    assert not torch.equal(site["value"][0], site["value"][1])
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), q.log_prob(site["value"]))
    objectives = (
        pyrovae.ELBO(gradient="stl"),
        pyrovae.ELBO(3, kl="analytic"),
        pyrovae.IWAE(4, gradient="dreg"),
        pyrovae.ELBO(4, gradient="score"),
    )
    for objective in objectives:
        for program in (model, guide):
            program.zero_grad()
        with local_params(model, guide):
            objective.differentiable_loss(model, guide, x).backward()
        for program in (model, guide):
            for name, parameter in program.named_parameters():
                assert parameter.grad.isfinite().all(), (objective, name)
                assert parameter.grad.abs().sum() > 0, (objective, name)


@torch.no_grad()
def test_the_closed_form_kl_is_the_sampled_one_in_expectation():
    model, guide = pair(latent_dim=4)
    guide.encoder[-1].bias[-1] = math.log(8.0)  # κ is near 8
    x = batch(model)
    exact = pyrovae.log_weights(model, guide, x, kl="analytic").kl()["z"]
    assert exact.shape == (1, 6)
    torch.testing.assert_close(exact[0], kl_divergence(guide.encode(x), model.prior().expand((6,))))
    sampled = pyrovae.log_weights(model, guide, x, particles=10_000).kl()["z"]
    # Six comparisons at 4.5 standard errors: a false alarm once in 24 000 seeds.
    assert standard_errors(sampled, exact[0]).abs().max() < 4.5


def test_pathwise_and_score_gradients_agree_in_expectation():
    """The reparameterization against the score function, which knows nothing of it."""
    raw = torch.tensor([0.3, -0.5, 0.8, 0.4, 1.2], dtype=torch.float64)
    a = torch.tensor([1.0, 0.5, -0.7, 0.2], dtype=torch.float64)
    draws = []
    for pathwise in (True, False):
        copies = raw.expand(20_000, 5).clone().requires_grad_()
        q = Direction(4)(copies)
        z = q.rsample()
        f = (z @ a).exp()
        term = f if pathwise else (f - f.mean()).detach() * q.log_prob(z.detach())
        draws.append(torch.autograd.grad(term.sum(), copies)[0])
    z = standard_errors(draws[0] - draws[1], torch.zeros(5, dtype=torch.float64))
    assert z.abs().max() < 4.5  # five comparisons: a false alarm once in 29 000 seeds
    assert (draws[0].var(0) < draws[1].var(0)).all()


@networks
def test_rebuilt_from_its_configuration_with_its_state(arguments):
    model, guide = pair(**arguments)
    again = GUIDES.build(configuration(guide), model)
    again.load_state_dict(guide.state_dict())
    x = batch(model)
    torch.testing.assert_close(again.encode(x).mean, guide.encode(x).mean)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}
    assert guide.double().encode(x.double()).sample().dtype == torch.float64
    with pytest.raises(DataError, match="this guide encodes data of shape"):
        guide.encode(torch.zeros(2, 11))


@pytest.mark.parametrize(
    "model", [VAE(data_shape=(5,), latent_dim=2, hidden=(8,)), SigmoidBeliefNet(data_shape=(5,), layers=(3,))]
)
def test_a_model_without_a_sphere_is_refused(model):
    with pytest.raises(ArgumentError, match=f"does not fit model {type(model).__name__}"):
        AmortizedVonMisesFisher(model)


@pytest.mark.parametrize("guide", [AmortizedNormal, AmortizedFullRank])
def test_a_real_posterior_does_not_fit_a_sphere(guide):
    model = SphericalVAE(data_shape=(5,), latent_dim=3, hidden=(8,))
    with pytest.raises(
        ArgumentError, match=r"whose latent is on a sphere. Use another guide \(AmortizedVonMisesFisher"
    ):
        guide(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [pyrovae.ELBO(2, kl="analytic"), pyrovae.IWAE(3, gradient="dreg")], ids=["elbo-analytic", "iwae-dreg"]
)
def test_a_compiled_fit_is_the_eager_one(objective, caplog, request):
    if not isinstance(objective, pyrovae.ELBO):
        request.getfixturevalue("inductor")
    caplog.set_level(logging.INFO, logger="pyrovae")
    fitted = []
    for compile in (False, True):
        pyro.set_rng_seed(0)
        model, guide = pair()
        data = torch.bernoulli(torch.full((48, 5), 0.4), generator=torch.Generator().manual_seed(1))
        pyrovae.fit(
            model.double(),
            guide.double(),
            data.double(),
            objective=objective,
            epochs=2,
            batch_size=16,
            lr=1e-2,
            compile=compile,
            progress=False,
        )
        fitted.append([p.detach().clone() for p in (*model.parameters(), *guide.parameters())])
    assert "compiled the step of this fit" in caplog.text
    # Adam divides by the gradient's size, so that rounding counts where that is near zero; it takes steps of 1e-2.
    torch.testing.assert_close(fitted[1], fitted[0], rtol=0, atol=1e-6)
