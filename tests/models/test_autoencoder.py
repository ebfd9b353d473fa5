"""Autoencoders: their contract, the linear one against PCA, deep, convolutional and denoising ones on digits."""

from __future__ import annotations

import copy
import html
import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy.linalg import subspace_angles
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA
from torch import nn

import pyrovae
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides import AmortizedNormal
from pyrovae.models import VAE
from pyrovae.models.autoencoder import Autoencoder, DeterministicEncoder
from pyrovae.models.likelihoods import LIKELIHOODS
from pyrovae.registry import GUIDES, MODELS, configuration
from pyrovae.training.programs import local_params, named_parameters

VARIANTS = {
    f"{likelihood}-{network}": dict(
        data_shape=shape, latent_dim=3, hidden=(16,), likelihood=likelihood, network=network, channels=(8, 4), blocks=1
    )
    for likelihood, (network, shape) in itertools.product(LIKELIHOODS, (("mlp", (5, 3)), ("conv", (2, 7, 9))))
}
QUIET = {"progress": False, "compile": False}


@pytest.fixture(params=VARIANTS)
def model(request):
    return Autoencoder(**VARIANTS[request.param])


def data(model, n=4):
    """Draws from the decoder at random codes, so that they lie in the likelihood's support."""
    with torch.no_grad():
        return model.decode(torch.randn(n, model.latent_dim).to(next(model.parameters()))).sample()


@pytest.fixture(scope="module")
def digits():
    return pyrovae.datasets.load("digits", binarization="none")


def test_codes_and_distributions_are_batch_polymorphic(model):
    x = data(model, 20).reshape(4, 5, *model.data_shape)
    z = model.encode(x)
    p = model.decode(z)
    assert z.shape == (4, 5, 3)
    assert (p.batch_shape, p.event_shape) == ((4, 5), model.data_shape)
    assert p.mean.shape == x.shape
    assert model.likelihood.support.check(p.sample()).all()
    one = torch.stack([model.decode(model.encode(row)).log_prob(row) for row in x])
    torch.testing.assert_close(p.log_prob(x), one, rtol=1e-4, atol=1e-4)


def test_the_bound_is_the_log_likelihood_of_the_reconstruction(model):
    x, guide = data(model), DeterministicEncoder(model)
    trace = poutine.trace(model).get_trace(x)
    assert trace.stochastic_nodes == ["data"]
    assert trace.nodes["x"]["is_observed"]
    wanted = model.decode(model.encode(x)).log_prob(x).sum()
    torch.testing.assert_close(trace.log_prob_sum(), wanted)
    for particles in (1, 4):
        estimate = pyrovae.ELBO(particles=particles).estimate(model, guide, x)
        torch.testing.assert_close(estimate.bound, wanted.detach())
        assert estimate.kl == {}
    found = pyrovae.evaluation.log_likelihood(model, guide, x, 3)
    assert found.mean == pytest.approx(float(wanted.detach()) / 4, rel=1e-4)


def test_every_parameter_gets_a_gradient(model):
    x, guide = data(model), DeterministicEncoder(model)
    with local_params(model, guide):
        parameters = named_parameters(model, guide, x)
        pyrovae.ELBO().differentiable_loss(model, guide, x).backward()
    assert parameters.keys() == {f"model.{name}" for name, _ in model.named_parameters()}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_fitted_saved_and_loaded_it_gives_the_same_numbers(model, tmp_path):
    x, guide = data(model, 8), DeterministicEncoder(model)
    run = pyrovae.fit(model, guide, x, epochs=2, batch_size=4, run_dir=tmp_path / "run", **QUIET)
    assert run.config["model"] == configuration(model)
    again = pyrovae.load(tmp_path / "run")
    assert isinstance(again.guide, DeterministicEncoder)
    assert torch.equal(again.guide.encode(x).mean, model.encode(x))
    assert torch.equal(again.model.decode(model.encode(x)).log_prob(x), model.decode(model.encode(x)).log_prob(x))
    assert MODELS.build(configuration(model)).data_shape == model.data_shape
    assert GUIDES.build(configuration(guide), model).encode(x).batch_shape == (8,)


def test_float64(model):
    x = data(model.double())
    assert x.dtype == torch.float64
    assert pyrovae.ELBO().estimate(model, DeterministicEncoder(model), x).bound.dtype == torch.float64


def test_output_starts_at_the_mean_of_the_data(model):
    x = 0.1 + 0.3 * torch.rand(500, *model.data_shape)
    model.initialize_output(x)
    with torch.no_grad():
        [m for m in model.decoder.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1].weight.zero_()
        mean = model.decode(torch.zeros(model.latent_dim)).mean
    wanted = x.mean(0)
    if model.network == "conv":
        wanted = wanted.mean((1, 2), keepdim=True).expand(model.data_shape)
    torch.testing.assert_close(mean, wanted, atol=1e-3, rtol=0)


def test_the_linear_autoencoder_spans_the_principal_subspace():
    iris = load_iris().data
    iris -= iris.mean(0)  # far from the origin the encoder's bias and weights hold each other up
    pca = PCA(2).fit(iris)
    x = torch.as_tensor(iris, dtype=torch.float32)
    model = Autoencoder((4,), 2, hidden=(), likelihood="normal")
    pyrovae.fit(model, DeterministicEncoder(model), x, epochs=600, batch_size=150, lr=0.02, schedule="cosine", **QUIET)
    angles = subspace_angles(model.decoder[-1].weight.detach().numpy(), pca.components_.T)
    assert angles.max() < 1e-3  # radians
    with torch.no_grad():
        error = (model.decode(model.encode(x)).mean - x).square().sum(1).mean()
    left = np.square(iris - pca.inverse_transform(pca.transform(iris))).sum(1).mean()
    assert float(error) == pytest.approx(left, rel=1e-3)
    # The standard deviation is that of what PCA leaves, over all elements.
    assert float(model.likelihood_scale.detach()) == pytest.approx(math.sqrt(left / 4), rel=1e-3)


def fitted(digits, epochs=15, **arguments):
    torch.manual_seed(0)
    model = Autoencoder((8, 8), **{"latent_dim": 2, "likelihood": "normal", "activation": "relu", **arguments})
    model.initialize_output(digits.train.x)
    settings = dict(epochs=epochs, batch_size=100, lr=5e-3, schedule="cosine")
    return model, pyrovae.fit(model, DeterministicEncoder(model), digits.train, **settings, **QUIET)


@torch.no_grad()
def squared_error(model, x, seen=None):
    """Mean squared error an element of the reconstruction, from what the encoder sees."""
    return float((model.decode(model.encode(x if seen is None else seen)).mean - x).square().mean())


def test_a_deep_autoencoder_reconstructs_unseen_digits_better_than_pca(digits):
    model, run = fitted(digits, hidden=(64, 128))
    assert squared_error(model, digits.test.x) < 0.85 * pca_error(digits)
    assert run.history[-1]["bound"] > run.history[0]["bound"]


@pytest.mark.slow
def test_so_does_a_convolutional_one_with_residual_blocks(digits):
    model, _ = fitted(digits, 40, hidden=(), network="conv", channels=(16, 8), blocks=1, activation="silu")
    assert squared_error(model, digits.test.x) < 0.95 * pca_error(digits)


def pca_error(digits):
    """That of two principal components, on the same test data."""
    train, test = (part.x.flatten(1).numpy() for part in (digits.train, digits.test))
    pca = PCA(2).fit(train)
    return np.square(test - pca.inverse_transform(pca.transform(test))).mean()


@pytest.fixture(scope="module")
def plain(digits):
    return fitted(digits, latent_dim=20, hidden=(128,))[0]


@pytest.mark.parametrize(("corruption", "noise"), [("masking", 0.4), ("gaussian", 0.4)])
def test_a_denoising_autoencoder_restores_corrupted_digits_better_than_a_plain_one(digits, plain, corruption, noise):
    denoising, _ = fitted(digits, latent_dim=20, hidden=(128,), noise=noise, corruption=corruption)
    torch.manual_seed(1)
    seen = denoising.corrupt(digits.test.x)
    restored, left = squared_error(denoising, digits.test.x, seen), squared_error(plain, digits.test.x, seen)
    assert restored < 0.8 * left
    assert restored < 0.7 * float((seen - digits.test.x).square().mean())
    assert squared_error(plain, digits.test.x) < squared_error(denoising, digits.test.x)  # what it costs on clean data


def test_corruption_has_its_strength_and_is_of_training_alone():
    x = torch.ones(2000, 10)
    masking = Autoencoder((10,), 2, hidden=(), noise=0.3)
    hidden = masking.corrupt(x)
    assert set(hidden.unique().tolist()) == {0.0, 1.0}
    # Of 20 000 elements; four standard errors, a false alarm once in 16 000 seeds.
    assert abs(float((hidden == 0).double().mean()) - 0.3) < 4 * (0.3 * 0.7 / 20_000) ** 0.5
    gaussian = Autoencoder((10,), 2, hidden=(), noise=0.5, corruption="gaussian")
    added = gaussian.corrupt(x) - x
    assert abs(float(added.std()) - 0.5) < 4 * 0.5 / 40_000**0.5
    assert Autoencoder((10,), 2).corrupt(x) is x
    for model in (masking, gaussian):
        guide = DeterministicEncoder(model)

        def bounds(model=model, guide=guide):
            return [float(pyrovae.ELBO().estimate(model, guide, x).bound) for _ in range(2)]

        first, second = bounds()
        assert first != second
        model.eval()
        clean = float(model.decode(model.encode(x)).log_prob(x).sum().detach())
        assert bounds() == pytest.approx([clean, clean], rel=1e-6)


def test_validation_is_of_clean_data(digits):
    model = Autoencoder((8, 8), 5, hidden=(16,), likelihood="normal", noise=0.5)
    settings = dict(validation=digits.validation, epochs=1, **QUIET)
    run = pyrovae.fit(model, DeterministicEncoder(model), digits.train, **settings)
    x = digits.validation.x
    clean = model.decode(model.encode(x)).log_prob(x).mean()
    assert run.history[0]["validation_bound"] == pytest.approx(float(clean.detach()), rel=1e-4)


def test_plots_and_reports_read_the_codes(digits, tmp_path):
    model = Autoencoder((8, 8), 2, hidden=(16,), likelihood="normal")
    guide = DeterministicEncoder(model)
    run = pyrovae.fit(model, guide, digits.train, epochs=1, **QUIET)
    page = pyrovae.plots.report(run, digits.test, tmp_path / "report.html").read_text(encoding="utf-8")
    for drawn in ("Reconstructions", "Learning curves"):
        assert drawn in page.split("Left out")[0]
    assert "no 'prior'" in html.unescape(page)
    assert pyrovae.evaluation.active_units(guide, digits.test).activity.shape == (2,)
    twin_model, twin_guide = copy.deepcopy((model, guide))
    assert torch.equal(twin_guide.encode(digits.test.x).mean, twin_model.encode(digits.test.x))
    assert twin_guide._of[0] is twin_model


def test_half_precision_networks_keep_full_precision_densities(digits):
    for likelihood in ("normal", "laplace"):
        model = Autoencoder((8, 8), 2, hidden=(16,), likelihood=likelihood)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.encode(digits.test.x).dtype == torch.float32
            assert model.decode(torch.zeros(3, 2)).mean.dtype == torch.float32
        settings = dict(epochs=1, precision="bf16", **QUIET)
        run = pyrovae.fit(model, DeterministicEncoder(model), digits.train, **settings)
        assert math.isfinite(run.history[0]["bound"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [dict(noise=0.3), dict(likelihood="discretized-logistic-mixture")], ids=["denoising", "eight-bit"]
)
def test_compiled_it_learns_the_same(digits, arguments, request):
    if "noise" not in arguments:
        request.getfixturevalue("inductor")
    x = (digits.train.x[:400] * 255).round() / 255
    histories = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Autoencoder((8, 8), **{"latent_dim": 4, "hidden": (32,), "likelihood": "normal", **arguments})
        guide = DeterministicEncoder(model)
        run = pyrovae.fit(model, guide, x, epochs=3, batch_size=100, compile=compiled, progress=False)
        histories.append([row["bound"] for row in run.history])
    assert histories[1] == pytest.approx(histories[0], rel=1e-3)


SMALL = {"data_shape": (4,), "latent_dim": 2, "hidden": (8,)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_shape": ()}, r"data_shape is \(\)"),
        ({"data_shape": (4, -1)}, r"data_shape is \(4, -1\)"),
        ({"latent_dim": 0}, "latent_dim is 0"),
        ({"hidden": (0,)}, r"hidden is \(0,\)"),
        ({"activation": "tanhh"}, "unknown activation 'tanhh'.*did you mean 'tanh'"),
        ({"likelihood": "gaussian"}, "unknown likelihood 'gaussian'.*normal"),
        ({"network": "resnet"}, "unknown network 'resnet'"),
        ({"network": "conv"}, r"data_shape is \(4,\); network='conv' needs images"),
        ({"network": "conv", "data_shape": (4, 4), "channels": ()}, "channels is"),
        ({"network": "conv", "data_shape": (4, 4), "blocks": -1}, "blocks is -1"),
        ({"corruption": "salt"}, "unknown corruption 'salt'"),
        ({"noise": 1.0}, "noise is 1.0; with corruption='masking' it must be a probability below 1"),
        ({"noise": -0.1, "corruption": "gaussian"}, "noise is -0.1; .*a finite standard deviation"),
        ({"noise": math.nan}, "noise is nan"),
        ({"noise": True}, "noise is True"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ArgumentError, match=words):
        Autoencoder(**SMALL | change)


def test_what_does_not_fit_is_refused():
    model = Autoencoder(**SMALL)
    with pytest.raises(DataError, match=r"x has shape \(5, 3\); this model takes batches of shape \(n, \*\(4,\)\)"):
        model(torch.zeros(5, 3))
    with pytest.raises(ArgumentError, match=r"does not fit model VAE.*AmortizedNormal with VAE"):
        DeterministicEncoder(VAE(**SMALL))
    with pytest.raises(pyrovae.errors.ModelGuideError, match="guide samples 'z', which is no latent site"):
        pyrovae.fit(model, AmortizedNormal(VAE(**SMALL)), torch.ones(6, 4), epochs=1, **QUIET)
    eight_bit = Autoencoder(**SMALL, likelihood="discretized-logistic")
    with pytest.raises(DataError, match="outside the support.*Round the intensities to 8 bits"):
        pyrovae.fit(eight_bit, DeterministicEncoder(eight_bit), torch.full((6, 4), 0.5), epochs=1, **QUIET)


def test_works_in_pyros_own_svi():
    model = Autoencoder(**SMALL, likelihood="normal")
    adam = pyro.optim.Adam({"lr": 0.02})
    svi = pyro.infer.SVI(model, DeterministicEncoder(model), adam, loss=pyro.infer.Trace_ELBO())
    x = torch.randn(50, 2) @ torch.randn(2, 4)
    losses = [svi.step(x) for _ in range(100)]
    assert losses[-1] < losses[0]
