"""One contract over all packaged models; a new one is covered by a line in MODELS."""

from __future__ import annotations

import itertools

import pyro
import pytest
import torch
from pyro import poutine

import pyrovae
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides import AmortizedNormal
from pyrovae.models import VAE
from pyrovae.models.likelihoods import LIKELIHOODS
from pyrovae.registry import MODELS as REGISTRY
from pyrovae.registry import configuration
from pyrovae.training.programs import local_params, named_parameters

VARIANTS = {
    f"vae-{likelihood}-{network}-{prior}": dict(
        data_shape=shape,
        latent_dim=3,
        hidden=(16,),
        likelihood=likelihood,
        network=network,
        prior=prior,
        channels=(8, 4),
    )
    for (likelihood, prior), (network, shape) in itertools.product(
        zip(LIKELIHOODS, ("standard", "learnable", "standard", "learnable"), strict=True),
        (("mlp", (5, 3)), ("conv", (2, 7, 9))),
    )
}


@pytest.fixture(params=VARIANTS)
def arguments(request):
    return VARIANTS[request.param]


@pytest.fixture
def model(arguments):
    return VAE(**arguments)


def data(model, n=4):
    """Draws from the model itself, so that they lie in the likelihood's support."""
    with torch.no_grad():
        return model(size=n)


def test_generates_and_conditions_on_the_same_shape(model):
    x = data(model)
    assert x.shape == (4, *model.data_shape)
    assert model.likelihood.support.check(x).all()
    assert model(x) is x


def test_decode_is_batch_polymorphic(model):
    z = torch.randn(5, 4, 3)
    many = model.decode(z)
    assert many.batch_shape == (5, 4)
    assert many.event_shape == model.data_shape
    x = data(model)
    one = torch.stack([model.decode(row).log_prob(x) for row in z])
    torch.testing.assert_close(many.log_prob(x), one, rtol=1e-4, atol=1e-4)
    assert many.mean.shape == (5, 4, *model.data_shape)


def test_every_parameter_gets_a_gradient(model):
    guide = AmortizedNormal(model)
    x = data(model)
    with local_params(model, guide):
        parameters = named_parameters(model, guide, x)
        pyrovae.ELBO(particles=2).differentiable_loss(model, guide, x).backward()
    assert parameters.keys() >= {f"model.{name}" for name, _ in model.named_parameters()}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_rebuilt_from_its_configuration_with_its_state(model, arguments):
    again = REGISTRY.build(configuration(model))
    again.load_state_dict(model.state_dict())
    z = torch.randn(2, 3)
    x = data(model, 2)
    torch.testing.assert_close(again.decode(z).log_prob(x), model.decode(z).log_prob(x))
    torch.testing.assert_close(again.prior().log_prob(z), model.prior().log_prob(z))


def test_float64(model):
    model = model.double()
    guide = AmortizedNormal(model).double()
    x = data(model)
    assert x.dtype == torch.float64
    assert pyrovae.ELBO().estimate(model, guide, x).bound.dtype == torch.float64


def test_the_joint_density_is_prior_times_likelihood(model):
    x = data(model)
    trace = poutine.trace(model).get_trace(x)
    z = trace.nodes["z"]["value"]
    expected = model.prior().log_prob(z).sum() + model.decode(z).log_prob(x).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_output_starts_at_the_mean_of_the_data(model):
    torch.manual_seed(1)
    x = 0.1 + 0.3 * torch.rand(500, *model.data_shape)  # intensities, not around the middle
    model.initialize_output(x)
    with torch.no_grad():
        layers = [m for m in model.decoder.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        layers[-1].weight.zero_()
        mean = model.decode(torch.zeros(3)).mean
    dims = tuple(range(1, len(model.data_shape))) if model.network == "conv" else ()
    wanted = x.mean(0)
    if dims:
        wanted = wanted.mean(dims, keepdim=True).expand(model.data_shape)
    torch.testing.assert_close(mean, wanted, atol=1e-3, rtol=0)


def test_learnable_prior_is_used_and_constrained():
    model = VAE(data_shape=(4,), latent_dim=2, hidden=(8,), prior="learnable")
    with torch.no_grad():
        model.prior_loc.fill_(3.0)
    assert model.prior().mean.tolist() == [3.0, 3.0]
    assert {"prior_loc", "prior_scale_unconstrained"} <= {name for name, _ in model.named_parameters()}


def test_half_precision_networks_keep_full_precision_densities():
    model = VAE(data_shape=(4,), latent_dim=2, hidden=(8,))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.decode(torch.zeros(3, 2)).base_dist.logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent_dim": 0}, r"latent_dim is \(0,\)"),
        ({"data_shape": ()}, r"data_shape is \(\)"),
        ({"data_shape": (4, -1)}, r"data_shape is \(4, -1\)"),
        ({"hidden": (0,)}, r"hidden is \(0,\)"),
        ({"activation": "tanhh"}, "unknown activation 'tanhh'.*did you mean 'tanh'"),
        ({"likelihood": "gaussian"}, "unknown likelihood 'gaussian'.*normal"),
        ({"prior": "flat"}, "unknown prior 'flat'"),
        ({"network": "resnet"}, "unknown network 'resnet'"),
        ({"network": "conv"}, r"data_shape is \(4,\); network='conv' needs images"),
        ({"network": "conv", "data_shape": (4, 4), "channels": ()}, "channels is"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ArgumentError, match=words):
        VAE(**{"data_shape": (4,), "latent_dim": 2, **change})


def test_data_of_another_shape_are_refused():
    with pytest.raises(DataError, match=r"x has shape \(5, 3\); this model takes batches of shape \(n, \*\(4,\)\)"):
        VAE(data_shape=(4,), latent_dim=2)(torch.zeros(5, 3))


def test_works_with_pyros_predictive():
    model = VAE(data_shape=(4,), latent_dim=2, hidden=(8,))
    drawn = pyro.infer.Predictive(model, num_samples=7)(size=3)
    assert drawn["x"].shape == (7, 3, 4)
