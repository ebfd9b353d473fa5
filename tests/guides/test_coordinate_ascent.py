"""Coordinate ascent, against closed forms, scikit-learn and SVI; and the two models that it is for."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from sklearn.datasets import load_iris
from sklearn.mixture import BayesianGaussianMixture
from torch import nn

import pyrovae
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides.coordinate_ascent import NormalWishart, coordinate_ascent
from pyrovae.guides.structured import ASVI
from pyrovae.models.linear_regression import BayesianLinearRegression
from pyrovae.models.mixture import GaussianMixture
from pyrovae.registry import MODELS, configuration
from pyrovae.training.programs import local_params

IRIS = torch.tensor(load_iris().data)
COVARIANCES = ["full", "diagonal", "tied"]


def regression(n=40, **arguments):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0]).double() + 0.5 + 0.7 * torch.randn(n, generator=generator, dtype=torch.float64)
    return BayesianLinearRegression(3, intercept=True, **arguments).double(), x, y


def mixture(covariance, features=4, concentration=5.0):
    mean = IRIS[:, :features].mean(0).tolist()
    model = GaussianMixture(3, features, covariance, concentration=concentration, mean=mean, scale=0.3)
    return model.double(), IRIS[:, :features]


def log_weights(model, guide, *data, particles=4000):
    with torch.no_grad(), local_params(model, guide):
        log_w = pyrovae.weights.log_weights(model, guide, *data, particles=particles).log_w
    return log_w.reshape(particles, -1).sum(-1)


def deviation(draws, exact):
    """Of the mean of draws from an exact value, in standard errors."""
    return abs(float((draws.mean() - exact) / (draws.std() / len(draws) ** 0.5)))


# Linear regression ----------------------------------------------------------------------------------------------------


def test_regression_evidence_is_that_of_the_students_t():
    model, x, y = regression(noise_concentration=1.5, noise_rate=0.8, prior_precision=0.3)
    X = model.design(x)
    scale = torch.eye(40).double() + X @ X.mT / 0.3
    tril = torch.linalg.cholesky(scale * 0.8 / 1.5)
    exact = pyro.distributions.MultivariateStudentT(torch.tensor(3.0).double(), torch.zeros(40).double(), tril)
    torch.testing.assert_close(model.log_evidence(x, y), exact.log_prob(y))


def test_regression_posterior_is_exact():
    """With the exact posterior as the guide, every log-weight is the evidence."""
    model, x, y = regression()
    after = model.posterior(x, y)

    def guide(x, y):
        tau = pyro.sample("noise_precision", dist.Gamma(after.concentration, after.rate))
        precision = tau[..., None, None] * after.precision
        pyro.sample("weights", dist.MultivariateNormal(after.loc, precision_matrix=precision))

    log_w = log_weights(model, guide, x, y, particles=10)
    torch.testing.assert_close(log_w, model.log_evidence(x, y).expand(10))


def test_regression_bound_rises_to_its_fixed_point():
    model, x, y = regression()
    q = coordinate_ascent(model, x, y, tolerance=1e-14)
    after = model.posterior(x, y)
    assert q.converged
    assert len(q.bounds) > 2
    assert (q.bounds.diff() > -1e-10).all()
    assert q.bounds[0] < q.bounds[-1] < model.log_evidence(x, y)
    # At the fixed point E τ is the exact posterior's, and the covariance of w is that at this τ.
    torch.testing.assert_close(q.loc, after.loc)
    torch.testing.assert_close(q.concentration / q.rate, after.concentration / after.rate)
    torch.testing.assert_close(q.covariance, torch.linalg.inv(after.precision * after.concentration / after.rate))


def test_regression_bound_is_the_elbo_of_the_guide():
    model, x, y = regression(n=8)
    q = coordinate_ascent(model, x, y)
    # Two comparisons at 4.5 standard errors: a false alarm once in 70 000 seeds.
    torch.manual_seed(0)
    assert deviation(log_weights(model, q, x, y), q.bounds[-1]) < 4.5
    # The bound after the first sweep too, away from the optimum.
    first = coordinate_ascent(model, x, y, sweeps=1)
    assert not first.converged
    assert deviation(log_weights(model, first, x, y), first.bounds[0]) < 4.5


@pytest.mark.slow
def test_regression_agrees_with_svi_over_the_same_family():
    model, x, y = regression()
    q = coordinate_ascent(model, x, y)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(3).double())
            self.tril = PyroParam(0.3 * torch.eye(3).double(), dist.constraints.lower_cholesky)
            self.concentration = PyroParam(torch.tensor(15.0).double(), dist.constraints.positive)
            self.rate = PyroParam(torch.tensor(15.0).double(), dist.constraints.positive)

        def forward(self, x, y):
            pyro.sample("noise_precision", dist.Gamma(self.concentration, self.rate))
            pyro.sample("weights", dist.MultivariateNormal(self.loc, scale_tril=self.tril))

    guide = Guide()
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    objective = pyrovae.ELBO(particles=32, gradient="stl")
    with local_params(model, guide):
        for _ in range(1500):
            optimizer.zero_grad()
            objective.differentiable_loss(model, guide, x, y).backward()
            optimizer.step()
            schedule.step()
        deviations = q.covariance.diagonal().sqrt()
        assert ((guide.loc - q.loc).abs() < 0.02 * deviations).all()
        variances = (guide.tril @ guide.tril.mT).diagonal()
        assert (variances / q.covariance.diagonal() - 1).abs().max() < 0.03
        assert abs(guide.concentration / guide.rate / (q.concentration / q.rate) - 1) < 0.01
        assert abs(guide.concentration / guide.rate**2 / (q.concentration / q.rate**2) - 1) < 0.05


# Gaussian mixture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_mixture_bound_rises_in_every_sweep(covariance):
    model, x = mixture(covariance)
    q = coordinate_ascent(model, x)
    assert q.converged
    assert len(q.bounds) > 10
    assert (q.bounds.diff() > -1e-9).all()
    counts = q.responsibilities(x).sum(0)
    torch.testing.assert_close(counts + 5.0, q.concentration, atol=0.01, rtol=0)
    assert counts.min() > 5


def test_full_mixture_agrees_with_scikit_learn():
    """Its bound leaves constants out, which depend on the prior and the number of data points alone."""
    constants = []
    for seed in range(2):
        model, x = mixture("full")
        chosen = torch.randperm(150, generator=torch.Generator().manual_seed(seed))[:120]
        x = x[chosen]
        ours = coordinate_ascent(model, x, tolerance=1e-13, sweeps=3000)
        theirs = BayesianGaussianMixture(
            n_components=3,
            tol=1e-12,
            max_iter=3000,
            weight_concentration_prior_type="dirichlet_distribution",
            weight_concentration_prior=5.0,
            mean_precision_prior=model.mean_precision,
            mean_prior=model.mean.numpy(),
            degrees_of_freedom_prior=model.degrees_of_freedom,
            covariance_prior=model.degrees_of_freedom * model.scale.numpy(),
            random_state=0,
        ).fit(x.numpy())
        order = np.argsort(theirs.means_[:, 0])
        q = ours.factors
        ranked = q.loc[:, 0].argsort()
        np.testing.assert_allclose(q.loc[ranked], theirs.means_[order], atol=1e-4)
        np.testing.assert_allclose(q.concentration[ranked], theirs.weight_concentration_[order], atol=1e-3)
        np.testing.assert_allclose(q.mean_precision[ranked], theirs.mean_precision_[order], atol=1e-3)
        covariances = q.scatter / q.degrees_of_freedom[:, None, None]
        np.testing.assert_allclose(covariances[ranked], theirs.covariances_[order], atol=1e-4)
        np.testing.assert_allclose(ours.responsibilities(x)[:, ranked], theirs.predict_proba(x)[:, order], atol=1e-3)
        constants.append(float(ours.bounds[-1]) - theirs.lower_bound_)
    assert abs(constants[0] - constants[1]) < 1e-4
    assert abs(float(ours.bounds[-1])) > 100


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("features", [1, 2, 4])
def test_mixture_bound_is_the_elbo_with_the_assignments(covariance, features):
    model, x = mixture(covariance, features)
    x = x[::5]
    q = coordinate_ascent(model, x, sweeps=3)
    torch.manual_seed(1)
    with local_params(q, model), torch.no_grad(), pyro.plate("particles", 3000, dim=-2):
        guide_trace = poutine.trace(q).get_trace(x)
        trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x)
    guide_trace.compute_log_prob()
    trace.compute_log_prob()
    both = trace.nodes["x"]["fn"]
    log_joint = both.mixture_distribution.logits + both.component_distribution.log_prob(x[:, None])
    r = q.responsibilities(x)
    draws = (r * (log_joint - r.log())).sum((-1, -2))
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample" and name != "particles":
            draws = draws + (trace.nodes[name]["log_prob"] - site["log_prob"]).reshape(3000)
    # Nine comparisons at 4.5 standard errors: a false alarm once in 16 000 seeds. Bounds are in the same order as the
    # responsibilities: both follow the last update of q(π) q(μ, Λ).
    assert deviation(draws, q.bounds[-1]) < 4.5
    assert draws.std() / 3000**0.5 < 0.2
    # The model sums the assignments out, which the factorized q(assignment) can only lose on.
    assert log_weights(model, q, x).mean() > q.bounds[-1] - 0.5


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_mixture_prior_as_factors_is_the_models_prior(covariance):
    """No data: the guide's density is the model's at every draw, and the KL is zero."""
    model, x = mixture(covariance)
    prior = NormalWishart.prior(model)
    assert abs(float(prior.kl(prior))) < 1e-9
    q = coordinate_ascent(model, x, sweeps=1)
    for name in ("concentration", "loc", "mean_precision", "degrees_of_freedom", "scatter"):
        setattr(q, name, getattr(prior, name).contiguous())
    trace = poutine.trace(q).get_trace(x)
    again = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x)
    trace.compute_log_prob()
    again.compute_log_prob()
    names = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
    assert len(names) == (3 if covariance == "diagonal" else 4)
    for name in names:
        torch.testing.assert_close(trace.nodes[name]["log_prob"], again.nodes[name]["log_prob"])


def test_precisions_of_the_model_have_the_moments_of_the_wishart():
    scale = [[1.0, 0.6], [0.6, 2.0]]
    model = GaussianMixture(1, 2, scale=scale, degrees_of_freedom=5.0).double()
    torch.manual_seed(0)
    with torch.no_grad(), local_params(model), pyro.plate("particles", 20_000, dim=-1):
        draws = model.precisions()[:, 0]
    wishart = torch.distributions.Wishart(torch.tensor(5.0).double(), torch.linalg.inv(5.0 * model.scale))
    # Seven comparisons at 4.5 standard errors: a false alarm once in 20 000 seeds.
    error = (draws.mean(0) - torch.linalg.inv(model.scale)).abs() / (wishart.variance / 20_000).sqrt()
    assert error.max() < 4.5
    squares = (draws - wishart.mean).square()
    assert ((squares.mean(0) - wishart.variance).abs() / (squares.std(0) / 20_000**0.5)).max() < 4.5


def test_empty_components_fall_back_to_the_prior():
    model = GaussianMixture(6, 2, concentration=0.01).double()
    torch.manual_seed(0)
    x = torch.cat([torch.randn(40, 2) - 4, torch.randn(40, 2) + 4]).double()
    q = coordinate_ascent(model, x, sweeps=3000)
    counts = q.responsibilities(x).sum(0)
    empty = counts < 0.01
    assert empty.sum() >= 3
    torch.testing.assert_close(q.degrees_of_freedom[empty], torch.full_like(counts[empty], 4.0), atol=0.01, rtol=0)


def test_repeated_points_do_not_collapse_a_component():
    model = GaussianMixture(2, 2).double()
    x = torch.cat([torch.zeros(20, 2), torch.full((20, 2), 5.0)]).double()
    q = coordinate_ascent(model, x)
    covariances = q.scatter / q.degrees_of_freedom[:, None, None]
    assert torch.linalg.eigvalsh(covariances).min() > 0.1
    assert q.bounds.isfinite().all()


# As models and guides -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("make", [AutoNormal, ASVI])
def test_mixture_is_fit_by_svi(covariance, make):
    model = GaussianMixture(2, 2, covariance, concentration=2.0)
    torch.manual_seed(0)
    x = torch.cat([0.5 * torch.randn(15, 2) - 2, 0.5 * torch.randn(15, 2) + 2])
    guide = make(model)
    objective = pyrovae.ELBO(particles=4)
    with local_params(model, guide):
        objective.differentiable_loss(model, guide, x)
        optimizer = torch.optim.Adam(guide.parameters(), lr=0.05)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = objective.differentiable_loss(model, guide, x)
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())
            optimizer.step()
            losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 20


@pytest.mark.parametrize(
    ("build", "data"),
    [
        (lambda: mixture("full"), (IRIS.float(),)),
        (lambda: mixture("diagonal"), (IRIS.float(),)),
        (regression, tuple(t.float() for t in regression()[1:])),
    ],
)
def test_model_and_posterior_in_float32_are_rebuilt_from_configuration_and_state(build, data):
    model = build()[0].float()
    again = MODELS.build(configuration(model))
    assert not again.state_dict()
    assert again(data[0]).dtype == torch.float32
    q = coordinate_ascent(again, *data)
    assert all(buffer.dtype == torch.float32 for buffer in q.buffers())
    trace = poutine.trace(q).get_trace(*data)
    other = coordinate_ascent(again, *(part[:50:2] for part in data), sweeps=1)
    other.load_state_dict(q.state_dict())
    same = poutine.trace(poutine.replay(other, trace=trace)).get_trace(*data)
    torch.testing.assert_close(same.log_prob_sum(), trace.log_prob_sum())
    estimate = pyrovae.ELBO(particles=500).estimate(again, q, *data)
    assert abs(float(estimate.bound) - float(q.bounds[-1])) < 0.02 * abs(float(q.bounds[-1]))


def test_the_posterior_has_the_data_type_of_the_model():
    """Whatever that of the data: it is a guide of the model, whose samples it must fit."""
    mixed = coordinate_ascent(GaussianMixture(3, 4), IRIS, sweeps=5)
    mixed(IRIS)
    assert mixed.loc.dtype == mixed.responsibilities(IRIS).dtype == torch.float32
    whole = coordinate_ascent(BayesianLinearRegression(2), torch.arange(12).reshape(6, 2), torch.arange(6))
    whole()
    assert whole.loc.dtype == torch.float32


def test_generated_data_have_the_moments_of_the_model():
    torch.manual_seed(0)
    model = GaussianMixture(2, 3, "tied")
    weights, means = torch.tensor([0.3, 0.7]), torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, -2.0]])
    values = {"weights": weights, "means": means}
    x = poutine.condition(model, data=values)(size=5000)
    assert x.shape == (5000, 3)
    error = (x.mean(0) - weights @ means).abs() / (x.std(0) / 5000**0.5)
    assert error.max() < 4.5  # three comparisons: a false alarm once in 49 000 seeds
    y = BayesianLinearRegression(2)(torch.ones(4, 2))
    assert y.shape == (4,)
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: GaussianMixture(0, 2), ArgumentError, "components is 0"),
        (lambda: GaussianMixture(2, 2, "spherical"), ArgumentError, "unknown covariance 'spherical'"),
        (lambda: GaussianMixture(2, 3, degrees_of_freedom=2.0), ArgumentError, "degrees_of_freedom is 2.0.*above 2"),
        (lambda: GaussianMixture(2, 2, concentration=-1.0), ArgumentError, "concentration is -1.0"),
        (lambda: GaussianMixture(2, 2, mean=[1.0]), ArgumentError, "mean is .* or 2 numbers"),
        (lambda: GaussianMixture(2, 2, scale=[[1.0, 2.0], [2.0, 1.0]]), ArgumentError, "scale is .* positive definite"),
        (lambda: GaussianMixture(2, 2)(torch.zeros(3, 4)), DataError, "x"),
        (lambda: BayesianLinearRegression(1, intercept=True), ArgumentError, "features is 1.*at least 2"),
        (lambda: BayesianLinearRegression(2, noise_rate=0.0), ArgumentError, "noise_rate is 0.0"),
        (lambda: BayesianLinearRegression(2)(torch.zeros(5)), DataError, r"inputs of shape \(n, 2\)"),
        (lambda: coordinate_ascent(AutoNormal, IRIS), ArgumentError, "exact updates of BayesianLinearRegression"),
        (lambda: coordinate_ascent(GaussianMixture(2, 4), IRIS, sweeps=0), ArgumentError, "sweeps is 0"),
        (lambda: coordinate_ascent(GaussianMixture(2, 4), IRIS, tolerance=-1), ArgumentError, "tolerance is -1"),
        (lambda: coordinate_ascent(GaussianMixture(2, 4), IRIS[:1]), DataError, "1 data points for 2 components"),
        (lambda: coordinate_ascent(GaussianMixture(2, 4), IRIS * math.nan), DataError, "not finite"),
        (lambda: coordinate_ascent(GaussianMixture(2, 4), IRIS, IRIS), DataError, "2 tensors of data.*conditions on 1"),
        (
            lambda: coordinate_ascent(BayesianLinearRegression(4), IRIS, IRIS),
            DataError,
            r"y has shape \(150, 4\); it must be \(150,\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.slow
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_compiled_steps_equal_eager_steps(covariance):
    model = GaussianMixture(2, 2, covariance, concentration=2.0)
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))

    def losses(compiled):
        pyro.clear_param_store()
        torch.manual_seed(0)
        optimizer = pyro.optim.Adam({"lr": 0.01})
        guide = AutoNormal(model)
        svi = pyrovae.SVI(model, guide, optimizer, loss=pyrovae.ELBO(particles=4), compile=compiled)
        return torch.tensor([svi.step(x) for _ in range(5)])

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-3, atol=1e-2)
