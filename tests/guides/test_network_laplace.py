"""Laplace posteriors of weights against exact posteriors, evidences and Hessians; their structures compared."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.distributions import kl_divergence

import pyrovae
from pyrovae.errors import ArgumentError, DataError, ModelGuideError
from pyrovae.guides import Laplace, PointEstimate
from pyrovae.guides.curvature import information
from pyrovae.guides.network_laplace import NetworkGaussian, linearize, network_laplace
from pyrovae.models.bnn import BNN

STRUCTURES = ["full", "kronecker", "diagonal"]


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def maximise(model, x, y):
    """The mode, by L-BFGS."""
    weights = model.network.start().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-8)
    density = log_joint(model, x, y)

    def closure():
        optimizer.zero_grad()
        loss = -density(weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def regression(n=40, d=3, noise=0.3):
    x = torch.randn(n, d) * torch.tensor([1.0, 2.0, 0.5]) + 1.0
    y = 5.0 + x @ torch.tensor([1.0, -0.4, 2.0]) + noise * torch.randn(n)
    return x, y


def linear(prior=1.0):
    """A linear network, standardised inside, and its data, design matrix, noise scale and prior scales."""
    x, y = regression()
    model = BNN([3, 1], {"name": "normal", "scale": 0.3}, {"name": "normal", "scale": prior})
    model.standardize(x, y)
    design = torch.cat([(x - x.mean(0)) / x.std(0, correction=0), torch.ones(len(x), 1)], 1) * y.std(correction=0)
    return model, x, y, design, 0.3


def classification(classes=3, n=30, hidden=6):
    x = torch.randn(n, 2)
    y = (x @ torch.randn(2, classes) + 0.5 * torch.randn(n, classes)).argmax(-1)
    return BNN([2, hidden, classes], "categorical", activation="tanh"), x, y


def precision_of(posterior):
    """H, from the map that draws weights from noise."""
    if hasattr(posterior.covariance, "layers"):
        factor = posterior.covariance(torch.eye(len(posterior.loc))).mT
        return torch.linalg.inv(factor @ factor.mT)
    law = posterior.get_posterior()
    return law.precision_matrix if hasattr(law, "precision_matrix") else (law.variance**-1).diag()


def log_joint(model, x, y):
    def value(weights):
        return pyro.poutine.trace(pyro.condition(model, {"weights": weights})).get_trace(x, y).log_prob_sum()

    return value


# ---------------------------------------------------------------------------------------------------------------------
# A linear network with Gaussian noise: everything is exact


@pytest.mark.parametrize("scale", [0.7, {"*weight": 0.5, "*bias": 3.0}])
@pytest.mark.parametrize("structure", ["full", "kronecker"])
def test_exact_posterior_and_evidence_of_a_linear_network(structure, scale):
    model, x, y, design, noise = linear(scale)
    prior = torch.tensor([0.7] * 4 if scale == 0.7 else [0.5, 0.5, 0.5, 3.0])
    precision = design.mT @ design / noise**2 + (prior**-2).diag()
    mean = torch.linalg.solve(precision, design.mT @ (y - y.mean()) / noise**2)
    posterior = network_laplace(model, maximise(model, x, y), x, y, structure)
    torch.testing.assert_close(posterior.loc, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(precision_of(posterior), precision)
    torch.testing.assert_close(posterior.variance, torch.linalg.inv(precision).diagonal())
    covariance = noise**2 * torch.eye(len(x)) + (design * prior**2) @ design.mT
    evidence = dist.MultivariateNormal(y.mean().expand(len(x)), covariance).log_prob(y)
    torch.testing.assert_close(posterior.log_evidence, evidence, atol=1e-6, rtol=0)


@pytest.mark.parametrize("structure", ["full", "kronecker"])
def test_every_weight_of_an_exact_posterior_is_the_evidence(structure):
    """log p(y, w) − log q(w) is the same number for each draw, under a plate of particles."""
    model, x, y, design, noise = linear()
    precision = design.mT @ design / noise**2 + torch.eye(4)
    mean = torch.linalg.solve(precision, design.mT @ (y - y.mean()) / noise**2)
    posterior = network_laplace(model, mean, x, y, structure)
    log_w = pyrovae.log_weights(model, posterior, x, y, particles=20).log_w
    torch.testing.assert_close(log_w, posterior.log_evidence.expand(20), atol=1e-9, rtol=0)


def test_evidence_finds_the_prior_scale():
    """Where the exact evidence of a linear network, over a grid of prior scales, is largest."""
    x, y = regression()
    found, exact = [], []
    for scale in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0):
        model = BNN([3, 1], {"name": "normal", "scale": 0.3}, {"name": "normal", "scale": scale})
        found.append(float(network_laplace(model, maximise(model, x, y), x, y).log_evidence))
        design = torch.cat([x, torch.ones(len(x), 1)], 1)
        covariance = 0.09 * torch.eye(len(x)) + scale**2 * design @ design.mT
        exact.append(float(dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(y)))
    assert found == pytest.approx(exact, abs=1e-5)
    assert 0 < max(range(7), key=found.__getitem__) < 6


# ---------------------------------------------------------------------------------------------------------------------
# Curvature of each likelihood


@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson", "categorical"])
def test_hessian_of_generalized_linear_models_against_autograd(likelihood):
    x = torch.randn(50, 3)
    model = BNN([3, 4 if likelihood == "categorical" else 1], likelihood)
    model.standardize(x)
    with torch.no_grad():
        y = model(x)
    mode = maximise(model, x, y)
    posterior = network_laplace(model, mode, x, y)
    exact = -hessian(log_joint(model, x, y), mode)
    torch.testing.assert_close(precision_of(posterior), exact)
    guide = Laplace(model, init_loc_fn=init_to_value(values={"weights": mode}))
    torch.testing.assert_close(guide.approximation(x, y).scale_tril, posterior.covariance.scale_tril)
    torch.testing.assert_close(network_laplace(model, guide, x, y).loc, mode)


@pytest.mark.parametrize(
    "likelihood", ["heteroscedastic", "student-t", {"name": "student-t", "df": 3.5, "scale": 2.0}, "normal"]
)
def test_information_is_the_expected_hessian(likelihood):
    """Against the mean of the Hessian over 200 001 quantiles of y."""
    model = BNN([2, 2 if likelihood == "heteroscedastic" else 1], likelihood)
    model.y_loc, model.y_scale = torch.tensor(1.0), torch.tensor(3.0)
    out = torch.tensor([[0.3, -0.7]]) if likelihood == "heteroscedastic" else torch.tensor([0.4])
    law = model.response(out, model.y_loc, model.y_scale)
    levels = (torch.arange(200_001) + 0.5) / 200_001
    if isinstance(law, dist.StudentT):
        from scipy import stats

        y = law.loc + law.scale * torch.from_numpy(stats.t.ppf(levels.numpy(), law.df.item()))
    else:
        y = law.icdf(levels)

    def mean_log_prob(f):
        return model.response(f, model.y_loc, model.y_scale).log_prob(y).mean()

    expected = -hessian(mean_log_prob, out).reshape(out.numel(), out.numel())
    torch.testing.assert_close(information(model, out.clone())[0], expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("likelihood", ["normal", "bernoulli", "poisson", "categorical"])
def test_information_is_the_hessian_for_canonical_likelihoods(likelihood):
    model = BNN([2, 3 if likelihood == "categorical" else 1], likelihood)
    out = torch.randn(5, 3) if likelihood == "categorical" else torch.randn(5)
    y = model.response(out, model.y_loc, model.y_scale).sample()
    for row, found in zip(range(5), information(model, out.clone()), strict=True):
        exact = hessian(lambda f, row=row: -model.response(f, model.y_loc, model.y_scale).log_prob(y[row]), out[row])
        torch.testing.assert_close(found, exact.reshape(found.shape))


def test_full_curvature_of_a_network_against_one_jacobian():
    model, x, y = classification()
    weights = model.network.start()
    posterior = quiet(model, weights, x, y)
    J = jacobian(lambda w: model.outputs(w, x), weights)
    p = model.outputs(weights, x).softmax(-1)
    information = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.einsum("ncp,ncd,ndq->pq", J, information, J) + torch.eye(len(weights))
    torch.testing.assert_close(precision_of(posterior), exact)
    torch.testing.assert_close(precision_of(quiet(model, weights, x, y, "diagonal")), exact.diagonal().diag())


def quiet(*args, **kwargs):
    """Away from the mode on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the point is not the mode yet")
        return network_laplace(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Kronecker factors


def within_layers(model, precision):
    """Without what lies between layers."""
    layers = [block.layer for block in model.network.blocks for _ in range(block.size)]
    return precision * torch.tensor([[one == other for other in layers] for one in layers])


def blocks_agree(model, x, y, weights):
    """The Kronecker structure is the full one within layers."""
    full, kronecker = (precision_of(quiet(model, weights, x, y, name)) for name in ("full", "kronecker"))
    torch.testing.assert_close(kronecker, within_layers(model, full), atol=1e-9, rtol=1e-7)


def test_kronecker_is_exact_for_one_data_point():
    model, x, y = classification()
    blocks_agree(model, x[:1], y[:1], model.network.start())


def test_kronecker_is_exact_for_a_convolution_of_one_place():
    net = nn.Sequential(nn.Conv2d(2, 3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(3, 3))
    model = BNN(net, "categorical", prior={"name": "normal", "scale": 0.5})
    blocks_agree(model, torch.randn(1, 2, 4, 4), torch.tensor([2]), model.network.start())


def test_kronecker_factors_of_a_convolution():
    """(Σ a aᵀ over all patches) ⊗ (Σ g Λ gᵀ over all places) / number of patches, patch by patch."""
    conv = nn.Conv2d(2, 3, (2, 3), stride=2, padding=1)
    head = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 1))
    model = BNN(nn.Sequential(conv, head), "poisson", bayesian=["0.*"])
    x, y = torch.randn(4, 2, 5, 6), torch.tensor([0.0, 1.0, 3.0, 1.0])
    found = precision_of(quiet(model, model.network.start(), x, y, "kronecker"))
    padded, h = nn.functional.pad(x, (1, 1, 1, 1)), conv(x).detach()
    A, G, places = torch.zeros(13, 13), torch.zeros(3, 3), 0
    for n in range(4):
        rate = head(h[n : n + 1].clone()).exp().detach()
        g = jacobian(lambda h: head(h.clone()).squeeze(), h[n : n + 1])[0]
        for i in range(h.shape[2]):
            for j in range(h.shape[3]):
                a = torch.cat([padded[n, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 3].flatten(), torch.ones(1)])
                A, G, places = A + a.outer(a), G + rate * g[:, i, j].outer(g[:, i, j]), places + 1
    exact = torch.kron(G, A / places)  # of a matrix 3 x 13; the flat vector has 36 weights, then 3 biases
    order = torch.cat([torch.arange(39).view(3, 13)[:, :12].flatten(), torch.arange(39).view(3, 13)[:, 12]])
    torch.testing.assert_close(found, exact[order][:, order] + torch.eye(39))


def test_kronecker_law_is_the_gaussian_of_its_covariance():
    model, x, y = classification()
    posterior = quiet(model, model.network.start(), x, y, "kronecker")
    law, exact = (
        posterior.get_posterior(),
        dist.MultivariateNormal(posterior.loc, precision_matrix=precision_of(posterior)),
    )
    with pyro.plate("particles", 4, dim=-2):
        w = posterior()["weights"]
    assert w.shape == (4, 1, 39)
    torch.testing.assert_close(law.log_prob(w), exact.log_prob(w))
    torch.testing.assert_close(posterior.variance, exact.variance)
    vector = torch.randn(39)
    torch.testing.assert_close(
        posterior.covariance.whitened(vector).square().sum(), vector @ exact.covariance_matrix @ vector
    )


def test_kronecker_is_nearer_than_the_diagonal():
    """In KL divergence to the full posterior, and from the one that is full within each layer: at most half."""
    model, x, y = classification(n=60)
    mode = maximise(model, x, y)
    precisions = [precision_of(network_laplace(model, mode, x, y, name)) for name in STRUCTURES]
    full, kronecker, diagonal, layered = (
        dist.MultivariateNormal(mode, precision_matrix=given)
        for given in (*precisions, within_layers(model, precisions[0]))
    )
    assert kl_divergence(kronecker, full) < 0.5 * kl_divergence(diagonal, full)
    assert kl_divergence(layered, kronecker) < 0.5 * kl_divergence(layered, diagonal)


def test_layers_without_kronecker_factors_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x):
            return self.two(self.one(self.one(x)))

    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    tied[1].weight = tied[0].weight
    x, y = torch.randn(5, 2), torch.randn(5)
    with pytest.raises(ArgumentError, match="layer '1' is LayerNorm"):
        NetworkGaussian(BNN(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))), "kronecker")
    with pytest.raises(ArgumentError, match="layer '0' is Conv2d.*groups=1"):
        NetworkGaussian(BNN(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Flatten(), nn.Linear(2, 1))), "kronecker")
    with pytest.raises(ArgumentError, match="not shared with another layer"):
        NetworkGaussian(BNN(tied), "kronecker")
    model = BNN(Twice())
    with pytest.raises(ArgumentError, match="layer 'one' is called 2 times"):
        network_laplace(model, model.network.start(), x, y, "kronecker")
    quiet(model, model.network.start(), x, y)  # the full structure needs no factors


# ---------------------------------------------------------------------------------------------------------------------
# The guide


@pytest.mark.parametrize("structure", STRUCTURES)
def test_chunks_add_up_and_state_is_kept(structure):
    model, x, y = classification()
    weights = model.network.start()
    whole = quiet(model, weights, x, y, structure)
    parts = quiet(model, weights, x, y, structure, batch_size=7)
    for name, value in whole.state_dict().items():
        if "basis" not in name:
            torch.testing.assert_close(parts.state_dict()[name], value)
    torch.testing.assert_close(precision_of(parts), precision_of(whole))
    fresh = NetworkGaussian(model, structure)
    torch.testing.assert_close(precision_of(fresh), torch.eye(39))
    fresh.load_state_dict(whole.state_dict())
    torch.testing.assert_close(fresh.log_evidence, whole.log_evidence)
    assert torch.equal(precision_of(fresh), precision_of(whole))
    assert not list(fresh.parameters())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_minibatch_counts_as_in_the_model(structure):
    model, x, y = classification(n=10)
    weights = model.network.start()
    twice = quiet(model, weights, torch.cat([x, x]), torch.cat([y, y]), structure)
    model.num_data = 20
    half = quiet(model, weights, x, y, structure)
    torch.testing.assert_close(precision_of(half), precision_of(twice))
    torch.testing.assert_close(half.log_joint, twice.log_joint)
    torch.testing.assert_close(half.log_joint, log_joint(model, x, y)(weights))


@pytest.mark.parametrize("bayesian", ["last", ["1.weight", "3.bias"]])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_part_of_the_weights(structure, bayesian):
    torch.manual_seed(3)
    x = torch.randn(30, 2)
    model = BNN([2, 5, 1], "bernoulli", bayesian=bayesian, activation="tanh")
    with torch.no_grad():
        y = model(x)
    posterior = quiet(model, model.network.start(), x, y, structure)
    J = jacobian(lambda w: model.outputs(w, x), posterior.loc)
    p = model.outputs(posterior.loc, x).sigmoid().detach()
    exact = J.mT @ (p * (1 - p) * J.mT).mT + torch.eye(len(posterior.loc))
    if structure == "full":
        torch.testing.assert_close(precision_of(posterior), exact)
    elif structure == "diagonal":
        torch.testing.assert_close(precision_of(posterior).diagonal(), exact.diagonal())
    assert pyrovae.predict(model, posterior, x, samples=20).mean.shape == (30,)


def test_a_recurrent_network():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.RNN(2, 3, batch_first=True), nn.Linear(3, 1)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    model, x, y = BNN(Last()), torch.randn(4, 5, 2), torch.randn(4)
    weights = model.network.start()
    J = jacobian(lambda w: model.outputs(w, x), weights)
    with torch.no_grad():
        information = (model.y_scale / model.response.noise(model.y_scale)) ** 2
    exact = information * J.mT @ J + torch.eye(len(weights))
    torch.testing.assert_close(precision_of(quiet(model, weights, x, y)), exact)


def test_prediction_is_wider_away_from_the_data():
    """By far so in the linearized model; draws in the network itself are wide everywhere, and wider away."""
    x = torch.linspace(-1, 1, 50)[:, None]
    y = torch.sin(3 * x[:, 0]) + 0.1 * torch.randn(50)
    model = BNN([1, 10, 1], {"name": "normal", "scale": 0.1}, activation="tanh")
    mode = maximise(model, x, y)
    for structure in STRUCTURES:
        posterior = quiet(model, mode, x, y, structure)
        for program, factor in ((model, 1.2), (linearize(model, posterior), 4.0)):
            near, far, farther = pyrovae.predict(
                program, posterior, torch.tensor([[0.0], [2.0], [4.0]]), samples=400
            ).epistemic
            assert far > factor * near
            assert farther > factor * near


def test_the_linearized_model_has_the_exact_moments():
    """Mean f(x; ŵ) and covariance J Σ Jᵀ; the mode is its own; 4 standard errors of 4000 draws (false alarm 1e-3)."""
    x, y = regression()
    model = BNN([3, 6, 1], {"name": "normal", "scale": 0.3}, activation="tanh")
    model.standardize(x, y)
    posterior = network_laplace(model, maximise(model, x, y), x, y)
    tangent = linearize(model, posterior)
    rows = x[:5]
    J = jacobian(lambda w: model.outputs(w, rows), posterior.loc) * model.y_scale
    exact = (J @ posterior.get_posterior().covariance_matrix @ J.mT).diagonal()
    found = pyrovae.predict(tangent, posterior, rows, samples=4000)
    centre = model.y_loc + model.y_scale * model.outputs(posterior.loc, rows)
    assert ((found.mean - centre).abs() < 4 * (exact / 4000).sqrt()).all()
    assert ((found.epistemic / exact - 1).abs() < 4 * math.sqrt(2 / 4000)).all()
    curvature = -hessian(log_joint(tangent, x, y), posterior.loc)
    torch.testing.assert_close(precision_of(posterior), curvature)  # and the Gauss-Newton matrix is its Hessian
    assert not any(parameter.requires_grad for parameter in tangent.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_whole_way_in_single_precision():
    torch.set_default_dtype(torch.float32)
    x, y = (part.float() for part in regression())
    model = BNN([3, 8, 1], activation="tanh")
    model.standardize(x, y)
    guide = PointEstimate(model)
    options = {"batch_size": 40, "compile": False, "progress": False}
    for lr in (0.05, 0.005):
        pyrovae.fit(model, guide, (x, y), epochs=300, lr=lr, **options)
    for structure in STRUCTURES:
        posterior = network_laplace(model, guide, x, y, structure)
        prediction = pyrovae.predict(linearize(model, guide), posterior, x, samples=200)
        assert posterior.loc.dtype == torch.float32
        assert float((prediction.mean - y).square().mean().sqrt()) < 0.5 * float(y.std())
        assert float(prediction.log_prob(y).mean()) > float(dist.Normal(y.mean(), y.std()).log_prob(y).mean())


def test_the_mode_of_a_guide_and_of_its_state():
    model, x, y = classification()
    weights = model.network.start() + 0.1
    for kind in (PointEstimate, Laplace):
        guide = kind(model, init_loc_fn=init_to_value(values={"weights": weights}))
        assert torch.equal(quiet(model, guide, x, y).loc, weights)
        fresh = kind(model)
        fresh.load_state_dict(guide.state_dict())
        assert torch.equal(quiet(model, fresh, x, y, "diagonal").loc, weights)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_bad_arguments():
    model, x, y, *_ = linear()
    weights = model.network.start()
    with pytest.raises(ArgumentError, match="unknown structure 'kroneker' .did you mean 'kronecker'"):
        network_laplace(model, weights, x, y, "kroneker")
    with pytest.raises(ArgumentError, match="must be a pyrovae.models.BNN of one network"):
        network_laplace(BNN([3, 1], members=2), weights, x, y)
    with pytest.raises(ArgumentError, match="must be a pyrovae.models.BNN of one network"):
        linearize(lambda x: x, weights)
    with pytest.raises(ArgumentError, match="batch_size is 0"):
        network_laplace(model, weights, x, y, batch_size=0)
    with pytest.raises(ArgumentError, match=r"weights of shape \(3,\); they must be \(4,\)"):
        network_laplace(model, weights[:3], x, y)
    with pytest.raises(ArgumentError, match="finite numbers"):
        network_laplace(model, weights * torch.nan, x, y)
    with pytest.raises(ArgumentError, match="mode is None; it must be a fitted PointEstimate"):
        network_laplace(model, None, x, y)
    with pytest.raises(DataError, match="needs data"):
        network_laplace(model, weights, x, None)
    with pytest.raises(DataError, match="y has shape"):
        network_laplace(model, weights, x, y[:3])
    with pytest.warns(UserWarning, match="not the mode yet: a Newton step raises the log density by about"):
        network_laplace(model, weights, x, y)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_priors_that_do_not_go(structure):
    x, y = torch.randn(5, 2), torch.randn(5)

    def laplace(prior):
        model = BNN([2, 1], prior=prior)
        return quiet(model, torch.full((3,), 2.5), x, y, structure)

    with pytest.raises(ModelGuideError, match="second derivative 0 at one of the weights.*use a normal prior"):
        laplace("laplace")
    with pytest.raises(ModelGuideError, match="latents of its own .prior_scale"):
        laplace({"name": "normal", "latent": "layer"})
    with pytest.raises(ModelGuideError, match="latents of its own .global_scale, local_scale"):
        laplace("horseshoe")
    tied = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    with pytest.raises(ModelGuideError, match="ties weights to each other"):
        laplace(lambda name, shape: tied.expand(shape[:-1]) if len(shape) > 1 else dist.Normal(0.0, 1.0).expand(shape))


def test_a_prior_without_kronecker_factors():
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    model = BNN(
        [2, 2], "categorical", lambda n, s: dist.Normal(torch.zeros(s), scales if len(s) > 1 else torch.ones(s))
    )
    x, y = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    with pytest.raises(ArgumentError, match="no product of a number for each output and one for each input"):
        quiet(model, model.network.start(), x, y, "kronecker")
    quiet(model, model.network.start(), x, y, "diagonal")
