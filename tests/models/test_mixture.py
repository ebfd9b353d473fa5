"""The Gaussian mixture: its explicit assignments, and expectation-maximization against scikit-learn."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy import stats
from sklearn.datasets import load_iris
from sklearn.mixture import GaussianMixture as Reference

import pyrovae
from pyrovae.errors import ArgumentError, DataError, NonFiniteError
from pyrovae.guides import MeanField
from pyrovae.models.expectation_maximization import expectation_maximization
from pyrovae.models.mixture import GaussianMixture
from pyrovae.training.programs import local_params

COVARIANCES = ["full", "diagonal", "tied"]
IRIS = torch.tensor(load_iris().data)


def old_faithful():
    """Duration and waiting time, both in minutes, of 272 eruptions."""
    path = Path(os.environ.get("PYROVAE_DATA", "")) / "stats" / "faithful.csv"
    if not path.is_file():
        pytest.skip("needs stats/faithful.csv under PYROVAE_DATA")
    with path.open() as file:
        return torch.tensor([[float(row["eruptions"]), float(row["waiting"])] for row in csv.DictReader(file)]).double()


def data(name):
    return (old_faithful(), 2) if name == "faithful" else (IRIS, 3)


def mixture(x, components, covariance="full", **arguments):
    """A prior in the units of the data."""
    arguments = {"concentration": 2.0, "mean": x.mean(0).tolist(), "scale": torch.cov(x.mT).tolist()} | arguments
    return GaussianMixture(components, x.shape[1], covariance, **arguments).double()


def random_start(n, components, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, components, generator=generator, dtype=torch.float64).softmax(-1)


# Assignments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("particles", [1, 5])
def test_enumerated_assignments_give_the_loss_of_the_summed_model(covariance, particles):
    summed, explicit = (mixture(IRIS, 3, covariance, assignments=which) for which in ("summed", "explicit"))
    guide = MeanField(summed)
    bounds = []
    with torch.no_grad(), local_params(summed, explicit, guide):
        guide(IRIS)
        for model, objective in ((summed, pyrovae.ELBO), (explicit, pyrovae.EnumeratedELBO)):
            torch.manual_seed(1)
            bounds.append(objective(particles=particles).estimate(model, guide, IRIS).bound.sum())
        torch.manual_seed(1)
        loss = TraceEnum_ELBO(particles, vectorize_particles=particles > 1, max_plate_nesting=1)
        bounds.append(-torch.as_tensor(loss.loss(explicit, config_enumerate(guide), IRIS)).double())
    torch.testing.assert_close(bounds[1], bounds[0])
    torch.testing.assert_close(bounds[2], bounds[0])


def test_a_guide_of_the_other_sites_fits_explicit_assignments(tmp_path):
    model = mixture(IRIS, 3, assignments="explicit").float()
    guide = MeanField(poutine.block(model, hide=["assignment"]))
    run = pyrovae.fit(
        model, guide, IRIS.float(), objective=pyrovae.EnumeratedELBO(), epochs=40, batch_size=150, lr=0.05,
        compile=False, progress=False, run_dir=tmp_path / "run",
    )  # fmt: skip
    assert run.history[-1]["bound"] > run.history[0]["bound"] + 1
    again = pyrovae.load(
        tmp_path / "run", guide=MeanField(poutine.block(model, hide=["assignment"])), example=IRIS.float()
    )
    assert again.model.assignments == "explicit"
    for name, value in guide.state_dict().items():
        torch.testing.assert_close(again.guide.state_dict()[name], value)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_explicit_assignments_generate_the_mixture(covariance):
    """Both forms draw from the same density: the empirical distribution of each feature is that of the mixture."""
    weights = torch.tensor([0.2, 0.5, 0.3]).double()
    means = torch.tensor([[-3.0, 0.0], [0.0, 1.0], [4.0, -2.0]]).double()
    scales = torch.tensor([[1.0, 0.5], [0.4, 1.0], [1.5, 0.7]]).double()
    scales = scales[:1].expand(3, 2) if covariance == "tied" else scales
    model = GaussianMixture(3, 2, covariance, assignments="explicit").double()
    precisions = scales**-2 if covariance == "diagonal" else torch.diag_embed(scales**-2)
    given = precisions[:1] if covariance == "tied" else precisions
    with torch.no_grad():
        assignment = dist.Categorical(weights).sample((4000,))
        draws = model.part(assignment, means, given).sample()
    for feature in range(2):

        def cdf(values, feature=feature):
            parts = stats.norm.cdf(values[:, None], means[:, feature].numpy(), scales[:, feature].numpy())
            return parts @ weights.numpy()

        # 6 tests at this level: a false alarm once in 1 700 seeds.
        assert stats.kstest(draws[:, feature].numpy(), cdf).pvalue > 1e-4


def test_generating_with_explicit_assignments_records_them():
    model = GaussianMixture(3, 2, assignments="explicit")
    trace = poutine.trace(model).get_trace(size=7)
    assert trace.nodes["assignment"]["value"].shape == (7,)
    assert trace.nodes["x"]["value"].shape == (7, 2)


def test_unknown_assignments():
    with pytest.raises(ArgumentError, match="explicit"):
        GaussianMixture(2, 2, assignments="implicit")


# Maximum likelihood ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("name", ["faithful", "iris"])
def test_maximum_likelihood_is_that_of_scikit_learn(name, covariance):
    x, components = data(name)
    model = mixture(x, components, covariance)
    start = expectation_maximization(model, x, estimate="ml", restarts=1, iterations=1)
    found = expectation_maximization(model, x, estimate="ml", start=start.responsibilities, tolerance=1e-12)
    first = expectation_maximization(model, x, estimate="ml", start=start.responsibilities, iterations=1)
    precisions = first.precisions[0] if covariance == "tied" else first.precisions
    kind = "diag" if covariance == "diagonal" else covariance
    reference = Reference(
        components, covariance_type=kind, reg_covar=0.0, tol=1e-12, max_iter=5000,
        weights_init=first.weights.numpy(), means_init=first.means.numpy(), precisions_init=precisions.numpy(),
    ).fit(x.numpy())  # fmt: skip
    assert found.converged
    assert abs(float(found.log_likelihood[-1]) / len(x) - reference.score(x.numpy())) < 1e-8  # nats per data point
    assert (found.log_likelihood.diff() > -1e-8).all()
    assert (found.log_prior == 0).all()
    np.testing.assert_allclose(found.means, reference.means_, rtol=1e-3)
    np.testing.assert_allclose(found.responsibilities, reference.predict_proba(x.numpy()), atol=1e-3)
    shared = found.covariances[0] if covariance == "tied" else found.covariances
    np.testing.assert_allclose(shared, reference.covariances_, rtol=1e-2, atol=1e-4)
    best = expectation_maximization(model, x, estimate="ml", restarts=5)
    assert best.log_likelihood[-1] > found.log_likelihood[-1] - 1e-3
    torch.testing.assert_close(best.density.log_prob(x).sum(), best.log_likelihood[-1])


def test_one_component_is_the_sample_mean_and_covariance():
    for covariance in COVARIANCES:
        found = expectation_maximization(mixture(IRIS, 1, covariance), IRIS, estimate="ml", restarts=1)
        torch.testing.assert_close(found.means[0], IRIS.mean(0))
        truth = torch.cov(IRIS.mT, correction=0)
        torch.testing.assert_close(found.covariances[0], truth.diagonal() if covariance == "diagonal" else truth)


def test_the_density_of_the_model_is_that_of_the_estimate():
    for covariance in COVARIANCES:
        model = mixture(IRIS, 3, covariance)
        found = expectation_maximization(model, IRIS, restarts=1)
        density = model.joint(found.weights, found.means, found.precisions).log_prob(IRIS)
        torch.testing.assert_close(density, found.density.log_prob(IRIS))
        torch.testing.assert_close(density.sum(), found.log_likelihood[-1])


# MAP ------------------------------------------------------------------------------------------------------------------


def log_posterior(model, x, weights, means, precisions):
    """Of π, μ and Λ, by scipy's Dirichlet, Wishart and Gamma."""
    degrees, scale = model.degrees_of_freedom, model.scale.numpy()
    log_p = stats.dirichlet.logpdf(weights.numpy(), model.concentration.numpy())
    if model.covariance == "diagonal":
        rate = degrees * scale.diagonal() / 2
        log_p += stats.gamma.logpdf(precisions.numpy(), degrees / 2, scale=1 / rate).sum()
    else:
        for precision in precisions.numpy():
            log_p += stats.wishart.logpdf(precision, degrees, np.linalg.inv(degrees * scale))
    log_p += float(model.mean_given(precisions).log_prob(means))
    return log_p + float(model.joint(weights, means, precisions).log_prob(x).sum())


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_map_is_a_mode_of_the_posterior(covariance):
    """Steps in random directions from it lower the log posterior, evenly in both senses to first order."""
    model = mixture(IRIS, 3, covariance, concentration=3.0)
    found = expectation_maximization(model, IRIS, tolerance=1e-13, iterations=3000, restarts=2)
    assert found.converged
    top = log_posterior(model, IRIS, found.weights, found.means, found.precisions)
    np.testing.assert_allclose(top, float(found.log_likelihood[-1] + found.log_prior[-1]), atol=1e-6)
    assert ((found.log_likelihood + found.log_prior).diff() > -1e-8).all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = [
            torch.randn(t.shape, generator=generator).double() for t in (found.weights, found.means, found.precisions)
        ]
        step[2] = (step[2] + step[2].mT) / 2 if covariance != "diagonal" else step[2]
        heights = []
        for size in (-1e-3, 1e-3):
            weights = (found.weights.log() + size * step[0]).softmax(-1)
            change = size * step[2] * (1.0 if covariance == "diagonal" else 0.1)
            heights.append(log_posterior(model, IRIS, weights, found.means + size * step[1], found.precisions + change))
        assert max(heights) < top
        assert abs(heights[0] - heights[1]) < 0.1 * (2 * top - sum(heights))


def test_a_strong_prior_draws_the_estimate_to_its_mode():
    """A prior worth a million observations: means at m₀, covariances near Σ₀, weights equal."""
    model = mixture(IRIS, 3, concentration=1e6, mean_precision=1e6, degrees_of_freedom=1e6, scale=0.5)
    found = expectation_maximization(model, IRIS, restarts=1)
    torch.testing.assert_close(found.weights, torch.full((3,), 1 / 3).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.means, IRIS.mean(0).expand(3, 4), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.covariances, 0.5 * torch.eye(4).double().expand(3, 4, 4), atol=1e-3, rtol=0)


# Collapse -------------------------------------------------------------------------------------------------------------


def two_clusters_and_an_outlier():
    generator = torch.Generator().manual_seed(0)
    clusters = torch.randn(60, 2, generator=generator).double()
    clusters[30:] += 8
    return torch.cat([clusters, torch.tensor([[40.0, -40.0]]).double()])


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_maximum_likelihood_collapses_where_map_does_not(covariance):
    x = two_clusters_and_an_outlier()
    model = mixture(x, 3, covariance, scale=1.0)
    with pytest.raises(NonFiniteError, match=r"component \d became singular .*estimate='map'"):
        expectation_maximization(model, x, estimate="ml", restarts=3)
    found = expectation_maximization(model, x, estimate="map", restarts=3)
    assert found.converged
    smallest = found.covariances.amin() if covariance == "diagonal" else torch.linalg.eigvalsh(found.covariances).min()
    assert smallest > 0.5  # Σ₀ = I, with 4 observations against the one of the outlier
    torch.testing.assert_close(found.weights.sort().values[0], torch.tensor(2 / 64).double())  # (1 + 2 − 1) / (61 + 3)


def test_a_common_covariance_does_not_collapse():
    x = two_clusters_and_an_outlier()
    found = expectation_maximization(mixture(x, 3, "tied"), x, estimate="ml", restarts=3)
    assert found.log_likelihood.isfinite().all()


def test_a_restart_that_collapses_is_left_out_with_a_warning(monkeypatch):
    x = two_clusters_and_an_outlier()
    collapsing = torch.eye(2).double()[(torch.arange(61) == 60).long()]
    model = mixture(x[:60], 2, scale=1.0)
    with pytest.raises(NonFiniteError):
        expectation_maximization(model, x, estimate="ml", start=collapsing)
    labels = iter([collapsing[:, 1].numpy(), (x[:, 0] > 4).numpy()])

    class Clusterings:
        """k-means that finds the outlier first, and then the clusters."""

        def __init__(self, *args, **kwargs):
            pass

        def fit_predict(self, x):
            return next(labels)

    module = sys.modules["pyrovae.models.expectation_maximization"]  # the package has the function by this name
    monkeypatch.setattr(module, "KMeans", Clusterings)
    with pytest.warns(UserWarning, match="1 of 2 restarts"):
        found = expectation_maximization(model, x, estimate="ml", restarts=2)
    assert found.log_likelihood.isfinite().all()
    assert found.weights.min() > 0.4


def test_duplicates_collapse_and_map_survives_them():
    x = torch.cat([torch.zeros(20, 1), torch.linspace(3.0, 5.0, 20)[:, None]]).double()
    model = mixture(x, 2)
    with pytest.raises(NonFiniteError):
        expectation_maximization(model, x, estimate="ml")
    assert expectation_maximization(model, x).converged


# Labels and arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_alignment_undoes_a_permutation(covariance):
    model = mixture(IRIS, 3, covariance)
    one = expectation_maximization(model, IRIS, restarts=1)
    other = expectation_maximization(model, IRIS, start=one.responsibilities[:, [2, 0, 1]])
    assert not torch.allclose(one.means, other.means, atol=0.1)
    back = other.aligned_to(one)
    torch.testing.assert_close(back.means, one.means, atol=1e-2, rtol=0)
    torch.testing.assert_close(back.weights, one.weights, atol=1e-2, rtol=0)
    torch.testing.assert_close(back.covariances, one.covariances, atol=1e-2, rtol=0)
    torch.testing.assert_close(back.responsibilities, one.responsibilities, atol=1e-2, rtol=0)
    torch.testing.assert_close(back.density.log_prob(IRIS), other.density.log_prob(IRIS))
    with pytest.raises(ArgumentError, match=r"\(2, 4\)"):
        one.aligned_to(expectation_maximization(mixture(IRIS, 2), IRIS, restarts=1))


def test_simulated_parameters_are_recovered():
    """4000 draws, components 6 standard deviations apart: means and weights within 4.5 standard errors.

    Nine comparisons: a false alarm once in 16 000 seeds.
    """
    model = GaussianMixture(3, 2, scale=1.0).double()
    weights = torch.tensor([0.5, 0.3, 0.2]).double()
    means = torch.tensor([[-6.0, 0.0], [0.0, 6.0], [6.0, -6.0]]).double()
    x = model.joint(weights, means, torch.eye(2).double().expand(3, 2, 2)).sample((4000,))
    truth = expectation_maximization(model, x, start=random_start(4000, 3), iterations=1)
    truth = type(truth)(weights, means, torch.eye(2).double().expand(3, 2, 2), *[truth.responsibilities] * 3, True)
    found = expectation_maximization(model, x, estimate="ml", restarts=3).aligned_to(truth)
    assert ((found.means - means).abs() < 4.5 / (4000 * weights[:, None]).sqrt()).all()
    assert ((found.weights - weights).abs() < 4.5 * (weights * (1 - weights) / 4000).sqrt()).all()


def test_intervals_of_the_means_cover_them():
    """80 data sets of 200 points, two means each; binomial limits at 1 in 1000 around 90 % of the 160 intervals."""
    low, high = stats.binom(160, 0.9).interval(0.999)
    model = GaussianMixture(2, 1).double()
    weights, means = torch.tensor([0.4, 0.6]).double(), torch.tensor([[-3.0], [3.0]]).double()
    density = model.joint(weights, means, torch.ones(2, 1, 1).double())
    covered = 0
    for seed in range(80):
        torch.manual_seed(seed)
        x = density.sample((200,))
        found = expectation_maximization(model, x, estimate="ml", restarts=1)
        order = found.means[:, 0].argsort()
        error = (found.covariances[:, 0, 0] / found.responsibilities.sum(0)).sqrt()[order]
        covered += int(((found.means[order] - means)[:, 0].abs() < stats.norm.ppf(0.95) * error).sum())
    assert low <= covered <= high, covered


def test_precision_of_float32_data_is_kept():
    found = expectation_maximization(mixture(IRIS, 3), IRIS.float(), restarts=2)
    double = expectation_maximization(mixture(IRIS, 3), IRIS, restarts=2)
    torch.testing.assert_close(found.log_likelihood[-1], double.log_likelihood[-1], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"estimate": "mle"}, "unknown estimate 'mle'.*ml"),
        ({"iterations": 0}, "iterations is 0"),
        ({"restarts": 0}, "restarts is 0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"start": torch.ones(150, 3)}, "start has shape"),
        ({"start": torch.ones(150, 2) / 2}, r"\(150, 3\)"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ArgumentError, match=match):
        expectation_maximization(mixture(IRIS, 3), IRIS, **arguments)


def test_a_prior_without_a_mode():
    for arguments in ({"concentration": 0.5}, {"degrees_of_freedom": 4.0}):
        model = mixture(IRIS, 3, **arguments)
        with pytest.raises(ArgumentError, match=f"{next(iter(arguments))}.*no mode"):
            expectation_maximization(model, IRIS)
        expectation_maximization(model, IRIS, estimate="ml", restarts=1)


def test_bad_data():
    model = mixture(IRIS, 3)
    for x in (IRIS[:, :3], IRIS[:2], IRIS * float("nan")):
        with pytest.raises(DataError):
            expectation_maximization(model, x)
    with pytest.raises(ArgumentError, match="GaussianMixture"):
        expectation_maximization(pyro.nn.PyroModule(), IRIS)
