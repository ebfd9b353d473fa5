"""Point estimates against direct optimisation, Laplace's approximation against exact and asymptotic covariances."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_value
from scipy import optimize

import pyrovae
from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.guides.point import GaussianAtMode, Laplace, PointEstimate, WithoutPrior
from pyrovae.training.programs import local_params

COUNTS = torch.tensor([3.0, 0.0, 5.0, 2.0, 4.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def parameters_in_modules():
    with pyro.settings.context(module_local_params=True):
        yield


def poisson(y):
    """Gamma(3, 2) prior of a Poisson rate: MAP (3 − 1 + Σy) / (2 + n), MLE Σy / n."""
    rate = pyro.sample("rate", dist.Gamma(y.new_tensor(3.0), 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def weibull(y):
    """Two positive latents and no closed form; priors that matter."""
    scale = pyro.sample("scale", dist.LogNormal(y.new_zeros(()), 1.0))
    shape = pyro.sample("shape", dist.Gamma(y.new_tensor(4.0), 4.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Weibull(scale, shape), obs=y)


def gaussian():
    pyro.sample("z", dist.MultivariateNormal(torch.tensor([1.0, -1.0]).double(), COVARIANCE))


COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)


def logistic(X, y):
    w = pyro.sample("w", dist.Normal(X.new_zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=(X * w.unsqueeze(-2)).sum(-1)), obs=y)


def logistic_data():
    X = torch.randn(200, 3).double()
    return X, torch.bernoulli(torch.sigmoid(X @ torch.tensor([1.0, -1.0, 0.5]).double()))


def fit(model, guide, *args, steps=200):
    """L-BFGS: the loss of a point is not random."""
    objective = pyrovae.ELBO()
    with local_params(model, guide):
        guide(*args)
        optimizer = torch.optim.LBFGS(
            guide.parameters(),
            max_iter=steps,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-10,
            tolerance_change=1e-16,
        )

        def closure():
            optimizer.zero_grad()
            loss = objective.differentiable_loss(model, guide, *args)
            loss.backward()
            return loss

        optimizer.step(closure)
    return guide


# ---------------------------------------------------------------------------------------------------------
# Point estimates


def test_map_and_mle_of_a_poisson_rate():
    n, total = len(COUNTS), float(COUNTS.sum())
    found = fit(poisson, PointEstimate(poisson), COUNTS)
    assert float(found.median()["rate"]) == pytest.approx((2 + total) / (2 + n), rel=1e-6)
    likelihood = WithoutPrior(poisson)
    found = fit(likelihood, PointEstimate(likelihood, kind="mle"), COUNTS)
    assert float(found.median()["rate"]) == pytest.approx(total / n, rel=1e-6)


@pytest.mark.parametrize("kind", ["map", "mle"])
def test_equal_to_direct_optimisation(kind):
    """Against scipy's Nelder–Mead on the densities written out, over the constrained values."""
    y = torch.distributions.Weibull(2.0, 1.5).sample((30,)).double()
    model = weibull if kind == "map" else WithoutPrior(weibull)
    guide = fit(model, PointEstimate(model, kind=kind), y)

    def negative(values):
        if (values <= 0).any():
            return np.inf
        lam, k = values
        log_p = (np.log(k / lam) + (k - 1) * np.log(y.numpy() / lam) - (y.numpy() / lam) ** k).sum()
        if kind == "map":
            log_p += -np.log(lam) - 0.5 * np.log(lam) ** 2 + 3 * np.log(k) - 4 * k
        return -log_p

    direct = optimize.minimize(negative, [1.0, 1.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    found = guide.median()
    assert [float(found["scale"]), float(found["shape"])] == pytest.approx(list(direct.x), rel=1e-5)


def test_bound_is_the_log_joint_or_the_log_likelihood():
    y = COUNTS
    guide = PointEstimate(poisson)
    guide(y)
    rate = guide.median()["rate"]
    prior, likelihood = dist.Gamma(y.new_tensor(3.0), 2.0).log_prob(rate), dist.Poisson(rate).log_prob(y).sum()
    torch.testing.assert_close(pyrovae.ELBO(3).estimate(poisson, guide, y).bound, prior + likelihood)
    estimate = pyrovae.ELBO(3).estimate(WithoutPrior(poisson), guide, y)
    torch.testing.assert_close(estimate.bound, likelihood)
    assert float(estimate.kl["rate"]) == 0.0


def test_constrained_supports_are_kept():
    def model():
        pyro.sample("p", dist.Dirichlet(torch.tensor([5.0, 3.0, 2.0]).double()))
        pyro.sample("q", dist.Beta(torch.tensor(3.0).double(), 2.0))

    found = fit(model, PointEstimate(model)).median()
    torch.testing.assert_close(found["p"], torch.tensor([4.0, 2.0, 1.0]).double() / 7, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["q"], torch.tensor(2 / 3).double(), atol=1e-5, rtol=0)


def test_minibatches_of_local_latents():
    y = torch.randn(6).double()

    def model(y, index):
        with pyro.plate("data", 6, subsample=index):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = PointEstimate(model, create_plates=lambda y, index: pyro.plate("data", 6, subsample=index))
    guide(y, torch.arange(6))
    index = torch.tensor([4, 1])
    pyrovae.ELBO().differentiable_loss(model, guide, y[index], index).backward()
    (parameter,) = guide.parameters()
    assert parameter.shape == (6,)
    assert (parameter.grad.nonzero().flatten() == torch.tensor([1, 4])).all()


def test_a_model_without_prior_keeps_its_parameters_and_its_return_value():
    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(2))

        def forward(self):
            return pyro.sample("z", dist.Normal(self.w, 1.0).to_event(1))

    model = Model()
    wrapped = WithoutPrior(model)
    assert list(wrapped.parameters()) == list(model.parameters())
    assert wrapped().shape == (2,)


def test_kind_and_model_must_go_together():
    with pytest.raises(ArgumentError, match=r"kind='mle' needs a model without prior.*WithoutPrior\(model\)"):
        PointEstimate(poisson, kind="mle")
    with pytest.raises(ArgumentError, match="no MAP estimate: give kind='mle'"):
        PointEstimate(WithoutPrior(poisson))
    with pytest.raises(ArgumentError, match="unknown kind 'mpa' .did you mean 'map'"):
        PointEstimate(poisson, kind="mpa")


@pytest.mark.parametrize("guide", [PointEstimate, Laplace, GaussianAtMode, WithoutPrior])
def test_what_is_no_model_is_refused(guide):
    with pytest.raises(ArgumentError, match="model is None; it must be a Pyro model"):
        guide(None)


def test_discrete_latents_are_refused():
    for guide in (PointEstimate, Laplace):
        with pytest.raises(ModelGuideError, match="latent site 'k' .Poisson. is discrete"):
            guide(lambda: pyro.sample("k", dist.Poisson(torch.ones(()))))()


@pytest.mark.parametrize("guide", [PointEstimate, Laplace])
def test_particles_gradients_state_and_precision(guide):
    y = COUNTS
    first, second = guide(poisson), guide(poisson)
    with torch.no_grad():
        first(y)
        next(first.parameters()).add_(0.3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(y)["rate"], first(y)["rate"])
    assert first(y)["rate"].dtype == torch.float64
    pyrovae.IWAE(5).differentiable_loss(poisson, first, y).backward()
    assert all((parameter.grad != 0).all() for parameter in first.parameters())
    with pyro.plate("particles", 5, dim=-2):
        site = poutine.trace(first).get_trace(y).nodes["rate"]
    assert site["fn"].batch_shape == (5, 1)
    assert (site["value"] == second(y)["rate"]).all()


# ---------------------------------------------------------------------------------------------------------
# Laplace's approximation


def test_laplace_is_exact_for_a_gaussian():
    q = fit(gaussian, Laplace(gaussian)).approximation().get_posterior()
    torch.testing.assert_close(q.mean, torch.tensor([1.0, -1.0]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(q.covariance_matrix, COVARIANCE)


def test_laplace_elbo_is_the_evidence_of_a_gaussian():
    guide = fit(gaussian, Laplace(gaussian)).approximation()
    log_w = pyrovae.log_weights(gaussian, guide, particles=20).log_w
    torch.testing.assert_close(log_w, torch.zeros_like(log_w), atol=1e-5, rtol=0)


def test_laplace_is_the_asymptotic_covariance_of_a_logistic_regression():
    """(Xᵀ diag(p (1 − p)) X + I / 4)⁻¹ at the mode that Newton's method finds, in numpy."""
    X, y = logistic_data()
    q = fit(logistic, Laplace(logistic), X, y).approximation(X, y).get_posterior()
    A, b, w = X.numpy(), y.numpy(), np.zeros(3)
    for _ in range(30):
        p = 1 / (1 + np.exp(-A @ w))
        information = A.T @ (A * (p * (1 - p))[:, None]) + np.eye(3) / 4
        w = w + np.linalg.solve(information, A.T @ (b - p) - w / 4)
    torch.testing.assert_close(q.mean, torch.from_numpy(w), atol=1e-6, rtol=0)
    torch.testing.assert_close(q.covariance_matrix, torch.from_numpy(np.linalg.inv(information)), atol=1e-8, rtol=1e-5)


def test_laplace_works_in_unconstrained_space():
    """Gamma(a, b) in u = log z: density ∝ exp(a u − b eᵘ), mode log(a / b), curvature a."""
    guide = fit(poisson, Laplace(poisson), COUNTS)
    a, b = 3 + float(COUNTS.sum()), 2 + len(COUNTS)
    approximation = guide.approximation(COUNTS)
    q = approximation.get_posterior()
    assert float(q.mean) == pytest.approx(np.log(a / b), abs=1e-6)
    assert float(q.variance) == pytest.approx(1 / a, rel=1e-5)
    assert float(approximation.median()["rate"]) == pytest.approx(a / b, rel=1e-5)
    upper = float(approximation.quantiles([0.5, 0.9])["rate"][1])
    assert upper == pytest.approx(a / b * np.exp(1.2815515655 * a**-0.5), rel=1e-5)
    assert list(approximation.parameters()) == []


def test_the_gaussian_at_the_mode_is_saved_and_loaded():
    guide = fit(gaussian, Laplace(gaussian)).approximation()
    other = GaussianAtMode(gaussian)
    other.load_state_dict(guide.state_dict())
    other()
    torch.testing.assert_close(other.get_posterior().covariance_matrix, COVARIANCE)


def test_a_point_that_is_not_the_mode_is_told():
    guide = Laplace(gaussian, init_loc_fn=init_to_value(values={"z": torch.zeros(2).double()}))
    with pytest.warns(UserWarning, match="not the mode yet: a Newton step raises the log density by about"):
        guide.approximation()

    def hollow():  # log density of two wells, with a hill between them
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 10.0))
        pyro.factor("wells", -((z**2 - 4.0) ** 2))

    with pytest.raises(ModelGuideError, match="not positive definite .its smallest eigenvalue is -"):
        Laplace(hollow, init_loc_fn=init_to_value(values={"z": torch.tensor(0.1)})).approximation()
