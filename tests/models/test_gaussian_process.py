"""Gaussian process regression against scikit-learn's, and its length-scale against the one that drew the data."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch
from scipy import stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel

import pyrovae
from pyrovae.errors import ArgumentError, DataError, NonFiniteError
from pyrovae.guides import PointEstimate
from pyrovae.models.gaussian_process import GaussianProcess, maximize_evidence

START = {"lengthscale": 1.5, "variance": 1.25, "noise": 0.25}  # exact in float32
REFERENCES = {
    "rbf": RBF(1.5),
    "matern-3/2": Matern(1.5, nu=1.5),
    "matern-5/2": Matern(1.5, nu=2.5),
}


@pytest.fixture(autouse=True)
def parameters_in_modules():
    with pyro.settings.context(module_local_params=True):
        yield


def drawn(n=50, features=1, seed=0, **truth):
    """Inputs in [0, 10] and outputs of a process with the given hyperparameters."""
    generator = torch.Generator().manual_seed(seed)
    x = 10 * torch.rand(n, features, generator=generator, dtype=torch.float64)
    process = GaussianProcess(features, **({"lengthscale": 1.0, "variance": 2.0, "noise": 0.1} | truth)).double()
    with torch.no_grad():
        return x, process.marginal(x).scale_tril @ torch.randn(n, generator=generator, dtype=torch.float64)


def reference(x, y, kernel=REFERENCES["rbf"], **arguments):
    """scikit-learn's regressor, whose noise is a kernel too."""
    kernel = ConstantKernel(1.25) * kernel + WhiteKernel(0.25)
    return GaussianProcessRegressor(kernel, alpha=1e-14, **arguments).fit(x.numpy(), y.numpy())


# Evidence and prediction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", REFERENCES)
@pytest.mark.parametrize("features", [1, 3])
def test_log_evidence_is_that_of_scikit_learn(kernel, features):
    x, y = drawn(features=features)
    model = GaussianProcess(features, kernel, **START).double()
    theirs = reference(x, y, REFERENCES[kernel], optimizer=None)
    ours = float(model.log_evidence(x, y).detach())
    assert abs(ours - theirs.log_marginal_likelihood(theirs.kernel_.theta)) < 1e-5
    objective = pyrovae.ELBO()
    bound = objective.estimate(model, lambda x, y: None, x, y).bound
    assert abs(float(bound.sum()) - ours) < 1e-9


def test_length_scales_of_each_column():
    x, y = drawn(features=2)
    model = GaussianProcess(2, ard=True, **START).double()
    with torch.no_grad():
        model.kernel.lengthscale = torch.tensor([0.5, 4.0]).double()
    theirs = reference(x, y, RBF([0.5, 4.0]), optimizer=None)
    assert abs(float(model.log_evidence(x, y).detach()) - theirs.log_marginal_likelihood(theirs.kernel_.theta)) < 1e-5


@pytest.mark.parametrize("noise", [False, True])
def test_prediction_is_that_of_scikit_learn(noise):
    x, y = drawn()
    model = GaussianProcess(**START).double()
    new = torch.linspace(-5, 15, 41)[:, None].double()
    theirs = reference(x, y, optimizer=None)
    mean, deviation = theirs.predict(new.numpy(), return_std=True)  # of y*, since the noise is a kernel
    with torch.no_grad():
        found = model.predict(new, x, y, noise=noise)
    np.testing.assert_allclose(found.mean.numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(found.variance.numpy(), deviation**2 - (0 if noise else 0.25), atol=1e-6)


def test_far_from_the_data_the_prediction_is_the_prior():
    x, y = drawn()
    with torch.no_grad():
        found = GaussianProcess(**START).double().predict(torch.tensor([[1e3]]).double(), x, y)
    torch.testing.assert_close(found.mean, torch.zeros(1).double())
    torch.testing.assert_close(found.stddev, torch.tensor([1.25]).double().sqrt())


def test_bands_hold_nine_tenths_of_new_observations():
    """At the true hyperparameters, 100 processes with one new observation each: binomial limits at 1 in 1000."""
    low, high = stats.binom(100, 0.9).interval(0.999)
    truth = {"lengthscale": 1.0, "variance": 2.0, "noise": 0.125}
    model, inside = GaussianProcess(**truth).double(), 0
    with torch.no_grad():
        for seed in range(100):
            x, y = drawn(21, seed=seed, **truth)
            band = model.predict(x[20:], x[:20], y[:20], noise=True)
            ends = band.icdf(torch.tensor([[0.05], [0.95]]).double())
            inside += bool(ends[0] < y[20] < ends[1])
    assert low <= inside <= high


def test_generated_data_have_the_covariance():
    model = GaussianProcess(**START).double()
    x = torch.tensor([[0.0], [1.0]]).double()
    with torch.no_grad():
        y = model.marginal(x).sample((4000,))
        exact = model.marginal(x).covariance_matrix
    # The standard error of a covariance of normals; 3 entries at 4.5: a false alarm once in 49 000 seeds.
    error = ((exact**2 + exact[0, 0] * exact[1, 1]) / 4000).sqrt()
    assert ((torch.cov(y.mT) - exact).abs() < 4.5 * error).all()


# Maximum likelihood of type II ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", REFERENCES)
def test_optimum_is_that_of_scikit_learn(kernel):
    x, y = drawn()
    model = GaussianProcess(kernel=kernel, **START).double()
    found = maximize_evidence(model, x, y)
    theirs = reference(x, y, REFERENCES[kernel], n_restarts_optimizer=2, random_state=0)
    assert abs(found.log_evidence - theirs.log_marginal_likelihood_value_) < 1e-5
    assert abs(found.log_evidence - float(model.log_evidence(x, y).detach())) < 1e-9
    ours = [float(found.estimate[name]) for name in ("variance", "lengthscale", "noise")]
    np.testing.assert_allclose(np.log(ours), theirs.kernel_.theta, atol=1e-3)
    assert model.kernel.lengthscale.item() == pytest.approx(found.estimate["lengthscale"].item())


def test_standard_errors_are_the_curvature():
    """Against differences of scikit-learn's gradient."""
    x, y = drawn()
    model = GaussianProcess(**START).double()
    found = maximize_evidence(model, x, y)
    theirs = reference(x, y, n_restarts_optimizer=0)
    names, step, rows = ("variance", "lengthscale", "noise"), 1e-4, []
    top = np.log([float(found.estimate[name]) for name in names])
    for index in range(3):
        ends = [top + sign * step * np.eye(3)[index] for sign in (-1, 1)]
        low, high = (theirs.log_marginal_likelihood(end, eval_gradient=True)[1] for end in ends)
        rows.append((low - high) / (2 * step))
    errors = np.sqrt(np.linalg.inv(np.array(rows)).diagonal())
    np.testing.assert_allclose([float(found.log_error[name]) for name in names], errors, rtol=1e-3)
    low, high = found.interval("lengthscale", 0.95)
    assert float((high / low).log()) == pytest.approx(2 * 1.959964 * errors[1], rel=1e-3)


def test_restarts_leave_a_local_maximum():
    """From a long length-scale the quasi-Newton method stays where all is noise; other starts find the signal."""
    x, y = drawn(60, noise=0.01)
    bad = {"lengthscale": 100.0, "variance": 0.01, "noise": 2.0}
    one = maximize_evidence(GaussianProcess(**bad).double(), x, y, restarts=1)
    many = maximize_evidence(GaussianProcess(**bad).double(), x, y, restarts=8)
    assert many.log_evidence >= one.log_evidence
    best = maximize_evidence(GaussianProcess(**START).double(), x, y)
    assert many.log_evidence == pytest.approx(best.log_evidence, abs=1e-4)


def test_a_start_where_the_covariance_is_singular():
    x, y = drawn(20)
    singular = {"lengthscale": 1e4, "variance": 1.0, "noise": 1e-16}
    with pytest.raises(NonFiniteError, match="larger noise"):
        maximize_evidence(GaussianProcess(**singular).double(), x, y, restarts=1)
    found = maximize_evidence(GaussianProcess(**singular).double(), x, y, restarts=10, iterations=20)
    assert np.isfinite(found.log_evidence)


def test_one_model_does_not_read_the_parameters_of_another():
    """Also where Pyro keeps parameters in its global store by name."""
    x, y = drawn()
    with pyro.settings.context(module_local_params=False):
        first, second = GaussianProcess(**START).double(), GaussianProcess(lengthscale=3.0).double()
        first(x)
        evidence = second.log_evidence(x, y)
        predicted = second.predict(x[:3], x, y).mean
    torch.testing.assert_close(evidence, GaussianProcess(lengthscale=3.0).double().log_evidence(x, y))
    torch.testing.assert_close(predicted, GaussianProcess(lengthscale=3.0).double().predict(x[:3], x, y).mean)


def test_float32_data_are_fitted_in_double_precision():
    x, y = drawn()
    model, double = GaussianProcess(**START), GaussianProcess(**START).double()
    found, exact = maximize_evidence(model, x.float(), y.float()), maximize_evidence(double, x, y)
    assert model.noise.dtype == torch.float32
    assert found.log_evidence == pytest.approx(exact.log_evidence, abs=1e-3)


@pytest.mark.slow
def test_svi_reaches_the_same_optimum(tmp_path):
    x, y = drawn()
    best = maximize_evidence(GaussianProcess(**START).double(), x, y)
    model = GaussianProcess(**START).double()
    guide = PointEstimate(model)  # of no latents
    run = pyrovae.fit(
        model, guide, (x, y), epochs=300, batch_size=len(x), lr=0.1, schedule="cosine", compile=False, progress=False,
        run_dir=tmp_path / "run",
    )  # fmt: skip
    assert abs(run.history[-1]["bound"] * len(x) - best.log_evidence) < 1e-4
    assert model.kernel.lengthscale.item() == pytest.approx(float(best.estimate["lengthscale"]), rel=1e-2)
    again = pyrovae.load(tmp_path / "run").model
    assert again.kernel.lengthscale.item() == pytest.approx(model.kernel.lengthscale.item())


@pytest.mark.slow
def test_intervals_of_the_length_scale_cover_it():
    """90 data sets of 60 points over ten length-scales: binomial limits at 1 in 1000 around 90 %."""
    low, high = stats.binom(90, 0.9).interval(0.999)
    truth = {"lengthscale": 1.0, "variance": 2.0, "noise": 0.125}
    covered, logs = 0, []
    for seed in range(90):
        x, y = drawn(60, seed=seed, **truth)
        found = maximize_evidence(GaussianProcess(**START).double(), x, y, restarts=1)
        ends = found.interval("lengthscale", 0.9)
        covered += bool(ends[0] < truth["lengthscale"] < ends[1])
        logs.append(float(found.estimate["lengthscale"].log()))
    assert low <= covered <= high, covered
    assert abs(np.median(logs)) < 0.1  # 10 % of the true length-scale


# Bad input ------------------------------------------------------------------------------------------------------------


def test_bad_arguments_and_data():
    for arguments, match in (
        ({"features": 0}, "features is 0"),
        ({"kernel": "rfb"}, "unknown kernel 'rfb' .*'rbf'"),
        ({"lengthscale": 0.0}, "lengthscale is 0.0"),
        ({"variance": -1.0}, "variance is -1.0"),
        ({"noise": float("nan")}, "noise is nan"),
    ):
        with pytest.raises(ArgumentError, match=match):
            GaussianProcess(**arguments)
    x, y = drawn(10)
    model = GaussianProcess().double()
    for given in ((x[:, 0], y), (x.expand(10, 2), y), (x, y[:5]), (x, y[:, None])):
        with pytest.raises(DataError, match="has shape"):
            model(*given)
        with pytest.raises(DataError, match="has shape"):
            maximize_evidence(model, *given)
    with pytest.raises(DataError, match="not finite"):
        maximize_evidence(model, x, y * float("nan"))
    with pytest.raises(ArgumentError, match="restarts is 0"):
        maximize_evidence(model, x, y, restarts=0)
    found = maximize_evidence(model, x, y, restarts=1)
    with pytest.raises(ArgumentError, match="unknown hyperparameter 'scale'"):
        found.interval("scale")
    with pytest.raises(ArgumentError, match="level is 1"):
        found.interval("noise", 1)
