"""Two binary variables with one latent, against numerical integrals and tables of frequencies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.special import expit

import pyrovae
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides import AmortizedNormal
from pyrovae.models.two_bernoulli import TwoBernoulli

VALUES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)))
PARAMETERS = [
    ((0.25, -1.0), (1.0, 0.5)),
    ((0.5, 0.0), (2.0, -1.5)),
    ((-1.0, 1.5), (3.0, 3.0)),
    ((0.5, 0.5), (0.0, 2.0)),
]


def exact(a, b, x):
    """p(x) by adaptive quadrature."""

    def integrand(z):
        p = expit(np.array(a) + np.array(b) * z)
        return np.prod(np.where(x, p, 1 - p)) * stats.norm.pdf(z)

    return integrate.quad(integrand, -12, 12, epsabs=1e-13, limit=200)[0]


def table(x):
    """Frequencies of the four values of `n x 2` data."""
    return (x @ x.new_tensor([2.0, 1.0])).long().bincount(minlength=4).double().reshape(2, 2) / len(x)


@pytest.mark.parametrize(("a", "b"), PARAMETERS)
def test_the_table_is_the_integral(a, b):
    model = TwoBernoulli(a, b).double()
    truth = np.array([[exact(a, b, (i, j)) for j in (0, 1)] for i in (0, 1)])
    with torch.no_grad():
        np.testing.assert_allclose(model.joint().numpy(), truth, rtol=0, atol=1e-8)
        np.testing.assert_allclose(model.log_likelihood(VALUES).numpy(), np.log(truth).ravel(), rtol=0, atol=1e-7)
        covariance = truth[1, 1] - truth[1].sum() * truth[:, 1].sum()
        log_odds_ratio = np.log(truth[1, 1] * truth[0, 0] / truth[1, 0] / truth[0, 1])
        np.testing.assert_allclose(model.covariance().numpy(), covariance, atol=1e-8)
        np.testing.assert_allclose(model.log_odds_ratio().numpy(), log_odds_ratio, atol=1e-6)
        assert np.sign(covariance.round(10)) == np.sign(b[0] * b[1])


def test_more_nodes_reach_steep_slopes():
    truth = exact((0.5, -1.0), (8.0, 8.0), (1, 1))
    errors = [
        abs(TwoBernoulli((0.5, -1.0), (8.0, 8.0), nodes).double().joint()[1, 1].item() - truth) for nodes in (32, 200)
    ]
    assert errors[1] < 1e-5 < errors[0]


def test_generated_data_have_the_frequencies_of_the_table():
    model = TwoBernoulli(*PARAMETERS[1])
    with torch.no_grad():
        p = model.joint().double()
        seen = table(model(size=50_000))
    # 4 frequencies at 4.2 standard errors: a false alarm once in 9 000 seeds.
    assert ((seen - p).abs() < 4.2 * (p * (1 - p) / 50_000).sqrt()).all()


@pytest.mark.parametrize(("a", "b"), PARAMETERS)
def test_importance_sampling_agrees_with_quadrature(a, b):
    model = TwoBernoulli(a, b)
    found = pyrovae.evaluation.log_likelihood(model, AmortizedNormal(model), VALUES, particles=20_000)
    # 4 data points at 4.2 standard errors: a false alarm once in 9 000 seeds.
    assert ((found.values - model.log_likelihood(VALUES).detach()).abs() < 4.2 * found.standard_error).all()
    assert found.standard_error.max() < 0.05


def test_bound_with_vectorized_particles_is_below_the_likelihood():
    model = TwoBernoulli(*PARAMETERS[0])
    guide = AmortizedNormal(model)
    with torch.no_grad():
        bound = pyrovae.ELBO(particles=4000).estimate(model, guide, VALUES).bound
        tight = pyrovae.IWAE(particles=4000).estimate(model, guide, VALUES).bound
        truth = model.log_likelihood(VALUES).sum()
    assert bound < truth
    assert abs(tight - truth) < 0.05


@pytest.mark.parametrize("b", [(2.0, 1.5), (2.0, -1.5)])
def test_quadrature_maximum_likelihood_is_the_table_of_frequencies(b):
    """The model has enough parameters for these tables, from one start for both signs of the dependence."""
    with torch.no_grad():
        x = TwoBernoulli((0.5, -0.5), b)(size=2000).double()
    model = TwoBernoulli().double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=1e-15
    )

    def closure():
        optimizer.zero_grad()
        loss = -(table(x).flatten() * model.log_likelihood(VALUES)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(model.joint().detach(), table(x), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("b", [(2.0, 1.5), (2.0, -1.5)])
def test_maximum_likelihood_by_svi_recovers_the_table(b):
    true = TwoBernoulli((0.5, -0.5), b)
    with torch.no_grad():
        x = true(size=4000)
        p = true.joint().double()
    model = TwoBernoulli()
    guide = AmortizedNormal(model)
    pyrovae.fit(
        model, guide, x, objective=pyrovae.IWAE(particles=50), epochs=30, batch_size=200, lr=0.02, schedule="cosine",
        compile=False, progress=False,
    )  # fmt: skip
    with torch.no_grad():
        found = model.joint().double()
        best = (table(x) * table(x).log()).sum()
        reached = (table(x) * found.log()).sum()
    assert best - reached < 5e-4  # nats per data point below the highest likelihood that any table has
    # 4 frequencies at 4.2 standard errors of the data, and 0.005 for the bound and its noise.
    assert ((found - p).abs() < 4.2 * (p * (1 - p) / 4000).sqrt() + 0.005).all()
    held = pyrovae.evaluation.log_likelihood(model, guide, VALUES, particles=2000)
    gap = model.log_likelihood(VALUES).detach() - held.elbo
    assert gap.max() < 0.1  # of a Gaussian posterior from the exact one


def test_a_run_is_saved_and_loaded(tmp_path):
    model = TwoBernoulli((0.5, -0.5), (2.0, 1.5), nodes=40)
    x = model(size=60).detach()
    guide = AmortizedNormal(model)
    pyrovae.fit(model, guide, x, epochs=2, batch_size=30, compile=False, progress=False, run_dir=tmp_path / "run")
    again = pyrovae.load(tmp_path / "run")
    assert type(again.model) is TwoBernoulli
    torch.testing.assert_close(again.model.joint(), model.joint())


def test_bad_arguments_and_data():
    for arguments in ({"a": (0.0,)}, {"b": (1.0, float("nan"))}, {"a": (0.0, 1.0, 2.0)}, {"nodes": 0}):
        with pytest.raises(ArgumentError, match=next(iter(arguments))):
            TwoBernoulli(**arguments)
    for call in (TwoBernoulli().forward, TwoBernoulli().log_likelihood):
        with pytest.raises(DataError, match=r"\(5, 3\)"):
            call(torch.ones(5, 3))
