"""The conditional VAE: against quadrature, its labels, and a fit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyrovae
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides.conditional import AmortizedConditional
from pyrovae.models import VAE
from pyrovae.models.conditional_vae import ConditionalVAE
from pyrovae.registry import GUIDES, MODELS, OBJECTIVES, configuration
from pyrovae.training.programs import local_params

KINDS = ("bernoulli", "normal", "discretized-logistic")  # one output an element, a scale beside it, several outputs
VARIANTS = {
    f"{likelihood}-{network}": dict(
        data_shape=shape, latent_dim=3, classes=4, hidden=(12,), likelihood=likelihood, network=network, channels=(6, 4)
    )
    for likelihood, (network, shape) in itertools.product(KINDS, (("mlp", (5, 3)), ("conv", (2, 7, 9))))
}
Y = torch.tensor([3, 0, 1, 1, 2])


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> ConditionalVAE:
    return ConditionalVAE(**VARIANTS[request.param])


def test_generates_and_conditions_on_the_same_shape(model):
    x = model(y=Y)
    assert x.shape == (5, *model.data_shape)
    assert model.likelihood.support.check(x).all()
    assert model(x, Y) is x
    trace = poutine.trace(model).get_trace(size=6)
    assert trace.nodes["y"]["value"].shape == (6,)
    assert trace.nodes["x"]["value"].shape == (6, *model.data_shape)


def test_decode_and_encode_are_batch_polymorphic_and_take_weights(model):
    guide, z, x = AmortizedConditional(model), torch.randn(3, 1, 2, 3), model(y=Y)
    many = model.decode(z, Y.unsqueeze(-1))  # 3 x 1 x 2 latents under 5 x 1 labels
    assert many.batch_shape == (3, 5, 2)
    one = torch.stack([model.decode(z[:, 0], label.expand(3, 2)).mean for label in Y], 1)
    torch.testing.assert_close(many.mean, one, rtol=1e-4, atol=1e-4)
    weights = torch.nn.functional.one_hot(Y, 4).float()
    z = torch.randn(5, 3)
    torch.testing.assert_close(model.decode(z, weights).mean, model.decode(z, Y).mean)
    q = guide.encode(x, Y)
    torch.testing.assert_close(guide.encode(x, weights).mean, q.mean)
    every = guide.encode(x, torch.arange(4).unsqueeze(-1))
    assert (every.batch_shape, every.event_shape) == ((4, 5), (3,))
    torch.testing.assert_close(every.mean[Y, torch.arange(5)], q.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guide.encode(x.expand(2, 3, *x.shape), Y).mean[1, 2], q.mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("double", [False, True])
def test_every_parameter_gets_a_gradient(model, double):
    guide, x = AmortizedConditional(model), model(y=Y).detach()
    if double:
        model.double(), guide.double()
        x = x.double()
    with local_params(model, guide):
        loss = pyrovae.ELBO(particles=2).differentiable_loss(model, guide, x, Y)
        loss.backward()
    assert loss.dtype == x.dtype
    for name, parameter in (*model.named_parameters(), *guide.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def evidence(model: ConditionalVAE, x: Tensor, y: Tensor) -> Tensor:
    """log p(x | y) by Gauss and Hermite's rule, for one latent dimension."""
    nodes, weights = (torch.as_tensor(part) for part in np.polynomial.hermite_e.hermegauss(120))
    z = nodes.to(x.dtype).reshape(-1, 1, 1)
    log_p = model.decode(z, y).log_prob(x)
    return (log_p + (weights / weights.sum()).log().to(x.dtype).unsqueeze(-1)).logsumexp(0)


def test_log_likelihood_is_that_of_quadrature():
    model = ConditionalVAE(data_shape=(4,), latent_dim=1, classes=3, hidden=(5,)).double()
    guide = AmortizedConditional(model).double()
    with torch.no_grad():
        guide.encoder[-1].weight.mul_(0.1)
        guide.encoder[-1].bias[1] = 0.3  # broader than the posterior, so that the weights are bounded
    x, y = torch.bernoulli(torch.full((6, 4), 0.5)).double(), torch.arange(6) % 3
    found = pyrovae.evaluation.log_likelihood(model, guide, (x, y), particles=4000)
    with torch.no_grad():
        deviation = (found.values - evidence(model, x, y)) / found.standard_error
    assert deviation.abs().max() < 4.5  # six estimates: 4e-5


def test_the_label_reaches_the_data_and_the_latent_prior_does_not_depend_on_it():
    model = ConditionalVAE(data_shape=(2, 2), latent_dim=1, classes=3, hidden=())
    with torch.no_grad():
        model.decoder[0].weight.zero_()
        model.decoder[0].weight[:, 1:].copy_(torch.tensor([-20.0, 0.0, 20.0]).expand(4, 3))
    assert model(y=torch.tensor([0, 2]).repeat(50)).flatten(1).mean(1).tolist() == [0.0, 1.0] * 50
    drawn = poutine.trace(model).get_trace(size=3000).nodes["y"]["value"].bincount(minlength=3) / 3000
    assert (drawn - 1 / 3).abs().max() < 0.04  # 4.6 standard errors


def test_fits_through_every_door(tmp_path):
    torch.manual_seed(0)
    y = torch.arange(120) % 3
    x = torch.bernoulli(0.1 + 0.8 * torch.nn.functional.one_hot(y, 3).float().repeat(1, 2))
    model = ConditionalVAE(data_shape=(6,), latent_dim=1, classes=3, hidden=(8,)).initialize_output(x)
    torch.testing.assert_close(model.decoder[-1].bias.sigmoid(), x.mean(0))
    guide = AmortizedConditional(model)
    run = pyrovae.fit(
        model,
        guide,
        (x, y),
        objective=pyrovae.ELBO(particles=4),
        validation=(x, y),
        epochs=30,
        lr=2e-2,
        compile=False,
        progress=False,
        run_dir=tmp_path / "run",
    )
    entropy = -6 * (0.1 * np.log(0.1) + 0.9 * np.log(0.9))  # of six coins, 0.1 or 0.9 given the label; 0.13 its error
    assert run.history[-1]["validation_bound"] == pytest.approx(-entropy, abs=0.5)
    again = pyrovae.load(tmp_path / "run")
    torch.testing.assert_close(again.guide.encode(x, y).mean, guide.encode(x, y).mean)
    torch.testing.assert_close(
        again.model.decode(torch.zeros(120, 1), y).mean, model.decode(torch.zeros(120, 1), y).mean
    )


def test_is_rebuilt_from_its_configuration(model):
    again = MODELS.build(configuration(model))
    again.load_state_dict(model.state_dict())
    z = torch.zeros(5, 3)
    torch.testing.assert_close(again.decode(z, Y).mean, model.decode(z, Y).mean)
    guide = GUIDES.build({"name": model.default_guide, "arguments": {"activation": "relu"}}, model)
    assert configuration(guide)["arguments"] == {"hidden": None, "activation": "relu"}
    OBJECTIVES.build(model.default_objective)


def make() -> tuple[ConditionalVAE, AmortizedConditional]:
    model = ConditionalVAE(data_shape=(6,), latent_dim=1, classes=3, hidden=(8,))
    return model, AmortizedConditional(model)


X = torch.zeros(2, 6)
MISTAKES = {
    "classes": (ArgumentError, "classes is 1", lambda: ConditionalVAE((6,), 2, 1)),
    "data_shape": (ArgumentError, "data_shape is 0", lambda: ConditionalVAE((6, 0), 2, 3)),
    "no data_shape": (ArgumentError, "data_shape is empty", lambda: ConditionalVAE((), 2, 3)),
    "latent_dim": (ArgumentError, "latent_dim is 0", lambda: ConditionalVAE((6,), 0, 3)),
    "likelihood": (ArgumentError, "unknown likelihood", lambda: ConditionalVAE((6,), 2, 3, likelihood="gauss")),
    "network": (ArgumentError, "unknown network", lambda: ConditionalVAE((6,), 2, 3, network="cnn")),
    "no image": (ArgumentError, "needs images", lambda: ConditionalVAE((6,), 2, 3, network="conv")),
    "shape": (DataError, "this model takes batches", lambda: make()[0](torch.zeros(2, 5), torch.tensor([0, 1]))),
    "no labels": (DataError, "x comes without its labels y", lambda: make()[0](X)),
    "length": (DataError, r"torch.int64 of shape \(3,\)", lambda: make()[0](X, torch.tensor([0, 1, 2]))),
    "label": (DataError, "labels from 0 to 3; .* 0 … 2", lambda: make()[0](X, torch.tensor([0, 3]))),
    "missing": (DataError, "labels from -1 to 1", lambda: make()[1](X, torch.tensor([-1, 1]))),
    "weights": (DataError, "no weights of classes", lambda: make()[0](X, torch.full((2, 3), 0.5))),
    "real label": (DataError, r"torch.float32 of shape \(2,\)", lambda: make()[0](X, torch.tensor([0.0, 1.0]))),
    "model": (ArgumentError, "VAE, which has no 'classes'", lambda: AmortizedConditional(VAE((6,), 2))),
    "in a fit": (
        DataError,
        "labels from 1 to 5",
        lambda: pyrovae.fit(*make(), (X, torch.tensor([1, 5])), epochs=1, progress=False),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    error, message, call = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call()
