"""Function-space variational Bayes and its score estimator, against Gaussians and exact Gaussian processes."""

from __future__ import annotations

import functools
import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.gp import kernels
from torch import nn

import pyrovae
from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.guides import FullRank, MeanField
from pyrovae.models import GaussianProcess
from pyrovae.models.bnn import BNN
from pyrovae.objectives import LinearWarmup
from pyrovae.objectives.function_priors import KERNELS, GaussianProcessPrior, fit_prior
from pyrovae.objectives.function_space import FunctionSpaceELBO
from pyrovae.objectives.spectral_stein import spectral_stein
from pyrovae.registry import OBJECTIVES, configuration
from pyrovae.training.programs import local_params


def gaussian_error(samples: int, factor: torch.Tensor, share: float) -> float:
    """Root mean square error of the estimated score over that of the score, for N(1, F Fᵀ), in ten sets of samples."""
    draws = 1.0 + torch.randn(10, samples, len(factor)) @ factor.mT
    exact = -torch.cholesky_solve((draws - 1.0).mT, factor).mT
    error = spectral_stein(draws, eigenfunctions=share) - exact
    return float((error.square().mean() / exact.square().mean()).sqrt())


CORRELATED = torch.linalg.cholesky(0.5 * torch.eye(5) + 0.5)


@pytest.mark.parametrize("factor", [torch.eye(5), CORRELATED], ids=["standard", "correlated"])
def test_score_of_a_gaussian_comes_closer_with_more_samples(factor):
    few, some, many = (gaussian_error(samples, factor, 0.95) for samples in (50, 150, 500))
    # Seen over ten seeds: 0.47 to 0.54, 0.33 to 0.38, 0.24 to 0.27.
    assert many < 0.3
    assert many < some < few


def test_score_is_the_expansion_of_the_paper():
    """Eigenfunctions by their definition, their gradients by autograd."""
    samples, at = torch.randn(30, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    width, ridge, size = 1.7, 1e-3, 30

    def kernel(x, y):
        return (-(x[:, None] - y[None]).square().sum(-1) / (2 * width**2)).exp()

    values, vectors = torch.linalg.eigh(kernel(samples, samples) + ridge * torch.eye(size))

    def psi(x, j):
        return size**0.5 / values[j] * kernel(x, samples) @ vectors[:, j]

    expected = torch.zeros_like(at)
    for j in range(size - 7, size):
        slope = torch.autograd.functional.jacobian(lambda x, j=j: psi(x, j).sum(), samples)  # each row its own ψ
        expected += psi(at, j)[:, None] * -slope.mean(0)
    found = spectral_stein(samples, at, eigenfunctions=7, ridge=ridge, width=width)
    torch.testing.assert_close(found, expected)


def test_score_follows_shift_and_scale_and_batches():
    samples = torch.randn(2, 40, 3, dtype=torch.float64)
    score = spectral_stein(samples)
    torch.testing.assert_close(spectral_stein(5.0 + 3.0 * samples) * 3.0, score)
    torch.testing.assert_close(spectral_stein(samples[1]), score[1])
    torch.testing.assert_close(spectral_stein(samples, samples, width=1.0), spectral_stein(samples, width=1.0))


def test_share_takes_the_fewest_eigenfunctions_that_reach_it():
    samples = torch.randn(40, 2, dtype=torch.float64)
    distance = torch.cdist(samples, samples)
    values = torch.linalg.eigvalsh((-0.5 * distance.square()).exp()).flip(-1)
    needed = int((values.cumsum(-1) / values.sum() < 0.95).sum()) + 1
    exact = spectral_stein(samples, eigenfunctions=needed, width=1.0)
    torch.testing.assert_close(spectral_stein(samples, eigenfunctions=0.95, width=1.0), exact)
    assert not torch.allclose(spectral_stein(samples, eigenfunctions=needed - 1, width=1.0), exact)


@pytest.mark.parametrize("eigenfunctions", [0.99, 5, 1000])
def test_degenerate_samples_give_finite_scores(eigenfunctions):
    equal = spectral_stein(torch.ones(10, 3), torch.randn(4, 3), eigenfunctions=eigenfunctions)
    assert (equal == 0).all()
    line = torch.randn(20, 1)
    for samples in (
        torch.randn(2, 50),
        torch.randn(3, 1).repeat(10, 1),
        1e-12 * torch.randn(20, 2),
        line.expand(20, 4),
    ):
        assert spectral_stein(samples, eigenfunctions=eigenfunctions).isfinite().all()


@pytest.mark.parametrize(
    "bad",
    [
        {"eigenfunctions": 0},
        {"eigenfunctions": 1.0},
        {"eigenfunctions": -0.1},
        {"eigenfunctions": True},
        {"ridge": -1.0},
    ],
)
def test_score_names_a_bad_argument(bad):
    with pytest.raises(ArgumentError, match=next(iter(bad))):
        spectral_stein(torch.randn(5, 2), **bad)


def test_score_needs_two_samples():
    with pytest.raises(ArgumentError, match="at least 2"):
        spectral_stein(torch.randn(1, 2))


THEIRS = {
    "rbf": kernels.RBF,
    "matern-3/2": kernels.Matern32,
    "matern-5/2": kernels.Matern52,
    "periodic": functools.partial(kernels.Periodic, period=torch.tensor(3.0)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_kernels_are_those_of_pyro(name):
    x, scales = torch.randn(6, 2), torch.tensor([0.7, 1.4])
    options = {"period": 3.0} if name == "periodic" else {}
    ours = GaussianProcessPrior({"name": name, "variance": 2.0, "lengthscale": [0.7, 1.4], **options})(x)
    theirs = THEIRS[name](2, variance=torch.tensor(2.0), lengthscale=scales).forward(x)
    torch.testing.assert_close(ours, theirs.detach(), atol=2e-5, rtol=1e-4)
    batch = torch.stack([x, 2 * x])
    torch.testing.assert_close(GaussianProcessPrior(name)(batch)[0], GaussianProcessPrior(name)(x))


def test_kernels_sum():
    x = torch.randn(5, 3)
    both = GaussianProcessPrior(["rbf", {"name": "linear", "variance": 0.5, "offset": 2.0}])(x)
    torch.testing.assert_close(both, GaussianProcessPrior("rbf")(x) + 0.5 * (2.0 + x @ x.mT))
    assert set(KERNELS) == {*THEIRS, "linear"}


X = torch.linspace(-1.5, 1.5, 8)[:, None]
Y = torch.zeros(8)
LINEAR = {"name": "linear", "offset": 1.0}  # the process of a line with standard normal slope and bias


def linear(loc, scale):
    """A linear network, and a guide of independent Gaussian slope and bias."""
    model = BNN([1, 1], likelihood={"name": "normal", "scale": 1.0})
    guide = MeanField(model)
    with local_params(model, guide):
        guide(X, Y)
        with torch.no_grad():
            guide.locs.weights.copy_(torch.tensor(loc))
        guide.scales.weights = torch.tensor(scale)
    return model, guide


def exact_kl(loc, scale, noise):
    design = torch.cat([X, torch.ones(len(X), 1)], -1).double()
    eye = noise**2 * torch.eye(len(X)).double()
    q = torch.distributions.MultivariateNormal(design @ loc, (design * scale.square()) @ design.mT + eye)
    p = torch.distributions.MultivariateNormal(torch.zeros(len(X)).double(), design @ design.mT + eye)
    return torch.distributions.kl_divergence(q, p)


def kl_gradients(objective, loc, scale, repeats):
    """Estimates of the KL's gradient by location and logarithm of the scale of each weight."""
    model, guide = linear(loc, scale)
    draws = []
    with local_params(model, guide):
        raw = dict(guide.named_parameters())
        for seed in range(repeats):
            losses = []
            for objective.beta in (1.0, 0.0):
                torch.manual_seed(seed)
                losses.append(objective.estimate(model, guide, X, Y).loss)
            by_loc, by_raw = torch.autograd.grad(losses[0] - losses[1], list(raw.values()))
            (chain,) = torch.autograd.grad(guide.scales.weights.log().sum(), raw["scales.weights_unconstrained"])
            draws.append(torch.cat([by_loc, by_raw / chain]))
    return torch.stack(draws)


@pytest.mark.parametrize(("loc", "scale"), [([1.0, -0.5], [0.5, 0.5]), ([1.0, 1.0], [0.1, 0.1])])
@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_kl_gradient_of_a_linear_network_is_near_the_exact_one(loc, scale, noise):
    objective = FunctionSpaceELBO(LINEAR, particles=100, points=0, noise=noise)
    found = kl_gradients(objective, loc, scale, 30).mean(0)
    a = torch.tensor(loc, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(scale, dtype=torch.float64).log().requires_grad_()
    exact = torch.cat(torch.autograd.grad(exact_kl(a, b.exp(), noise), [a, b])).float()
    # The entropy's part comes out 3 to 6 % low; the standard error of the mean is 0.01.
    assert ((found - exact).abs() < 0.1 * exact.abs() + 0.03).all()


def test_kl_gradient_vanishes_where_q_is_the_prior():
    for prior in (LINEAR, "weights"):
        found = kl_gradients(FunctionSpaceELBO(prior, particles=100, points=0), [0.0, 0.0], [1.0, 1.0], 30)
        assert (
            found.mean(0).abs() < 0.15
        ).all()  # those above are about 1; standard errors 0.02 (process), 0.07 (weights)


def test_kl_value_is_exact_for_gaussian_functions():
    model, guide = linear([1.0, -0.5], [0.5, 0.3])
    with local_params(model, guide), torch.no_grad():
        objective = FunctionSpaceELBO(LINEAR, particles=300, points=0, noise=0.1)
        values = torch.stack([objective.estimate(model, guide, X, Y).kl["f"] for _ in range(40)])
    exact = exact_kl(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.5, 0.3]).double(), 0.1)
    assert abs(float(values.mean() - exact)) < 4 * float(values.std()) / 40**0.5 + 0.01  # the bias of 300 draws


def test_minibatches_scale_the_likelihood_alone():
    model, guide = linear([1.0, -0.5], [0.5, 0.5])
    objective = FunctionSpaceELBO(LINEAR, points=lambda x: X)
    parts = []
    with local_params(model, guide):
        for model.num_data in (8, 80):
            torch.manual_seed(0)
            parts.append(objective.estimate(model, guide, X, Y))
    torch.testing.assert_close(parts[1].log_likelihood, 10 * parts[0].log_likelihood)
    torch.testing.assert_close(parts[1].kl["f"], parts[0].kl["f"])
    torch.testing.assert_close(parts[1].loss, -parts[1].bound)


def test_beta_may_be_a_schedule():
    model, guide = linear([1.0, -0.5], [0.5, 0.5])
    objective = FunctionSpaceELBO(LINEAR, beta=LinearWarmup(10, 0.0, 2.0))
    with local_params(model, guide):
        for beta in (0.0, 1.0):
            estimate = objective.estimate(model, guide, X, Y)
            torch.testing.assert_close(estimate.loss, beta * estimate.kl["f"] - estimate.log_likelihood)
            objective.step += 5


def test_measurement_points_are_those_of_the_minibatch_and_of_the_box():
    x = torch.stack([torch.linspace(0, 1, 9), torch.linspace(10, 14, 9)], -1)
    around = FunctionSpaceELBO(points=2000, margin=0.25).measurement_points(x)
    assert torch.equal(around[:9], x)
    low, high = around[9:].amin(0), around[9:].amax(0)
    # Uniform: the most extreme of 2000 points is further than 1 % from the end once in 5e8 seeds.
    torch.testing.assert_close(low, torch.tensor([-0.25, 9.0]), atol=0.06, rtol=0)
    torch.testing.assert_close(high, torch.tensor([1.25, 15.0]), atol=0.06, rtol=0)
    assert (low >= torch.tensor([-0.25, 9.0])).all()
    assert (high <= torch.tensor([1.25, 15.0])).all()
    boxed = FunctionSpaceELBO(points=500, box=[[2.0, 3.0], [2.5, 5.0]]).measurement_points(x)[9:]
    assert (boxed >= torch.tensor([2.0, 3.0])).all()
    assert (boxed <= torch.tensor([2.5, 5.0])).all()
    assert float(FunctionSpaceELBO(points=500, box=[-1.0, 1.0]).measurement_points(x)[9:].abs().max()) <= 1.0
    assert torch.equal(FunctionSpaceELBO(points=0).measurement_points(x), x)
    assert torch.equal(FunctionSpaceELBO(points=lambda x: x[:3] + 1).measurement_points(x), x[:3] + 1)


def test_the_prior_is_of_standardised_functions():
    """x in thousandths and y in thousands, standardised away: the same KL as without."""
    parts = []
    for unit in (1.0, 1000.0):
        torch.manual_seed(0)
        x, y = torch.randn(15, 1), torch.randn(15)
        model = BNN([1, 10, 1])
        model.standardize(x / unit, unit * y)
        objective, guide = FunctionSpaceELBO("rbf"), MeanField(model)
        with local_params(model, guide):
            parts.append(objective.estimate(model, guide, x / unit, unit * y).kl["f"])
    torch.testing.assert_close(parts[0], parts[1], rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("prior", ["rbf", "weights"])
@pytest.mark.parametrize(
    ("options", "x", "y"),
    [
        ({"net": [2, 5, 4], "likelihood": "categorical"}, torch.randn(12, 2), torch.randint(4, (12,))),
        ({"net": [2, 5, 2], "likelihood": "heteroscedastic"}, torch.randn(12, 2), torch.randn(12)),
        ({"net": [2, 5, 1], "members": 3}, torch.randn(12, 2), torch.randn(12)),
        ({"net": [2, 5, 1], "members": 3, "own_data": True}, torch.randn(12, 3, 2), torch.randn(12, 3)),
        ({"net": nn.Sequential(nn.Flatten(), nn.Linear(6, 1))}, torch.randn(12, 2, 3), torch.randn(12)),
        ({"net": [2, 5, 1], "bayesian": "last"}, torch.randn(12, 2), torch.randn(12)),
    ],
    ids=["classes", "two-outputs", "members", "own-data", "images", "last-layer"],
)
def test_every_network_gets_a_gradient(prior, options, x, y):
    model = BNN(**options)
    guide = MeanField(model)
    with local_params(model, guide):
        estimate = FunctionSpaceELBO(prior, particles=16, points=5).estimate(model, guide, x, y)
        estimate.loss.backward()
    for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert estimate.loss.isfinite()


def test_members_are_the_sum_of_networks():
    """The KL of an ensemble of equal networks is their number times that of one."""
    single, guide = linear([1.0, -0.5], [0.5, 0.5])
    many = BNN([1, 1], likelihood={"name": "normal", "scale": 1.0}, members=3)
    guides = MeanField(many)
    objective = FunctionSpaceELBO(LINEAR, particles=400, points=0, noise=0.1)
    with local_params(many, guides, single, guide), torch.no_grad():
        guides(X, Y)
        guides.locs.weights.copy_(torch.tensor([1.0, -0.5]).expand(3, 1, 2))
        guides.scales.weights = torch.full((3, 1, 2), 0.5)
        one, three = objective.estimate(single, guide, X, Y), objective.estimate(many, guides, X, Y)
    torch.testing.assert_close(three.kl["f"], 3 * one.kl["f"], rtol=0.2, atol=0.0)  # seen: 3 %


def steps(x, draws):
    """Piecewise constant functions, with one jump."""
    jump, left, right = torch.randn(3, draws, 1)
    return torch.where(x[:, 0] < jump, left, right)


def data(n=24):
    x = torch.linspace(-1, 1, n)[:, None]
    return x, torch.sin(3 * x[:, 0]) + 0.1 * torch.randn(n)


@pytest.mark.parametrize("prior", ["rbf", "weights", steps], ids=["rbf", "weights", "steps"])
def test_fit_gets_better_in_minibatches(prior):
    model = BNN([1, 20, 1], activation="tanh")
    objective = FunctionSpaceELBO(prior, particles=30, points=10)
    run = pyrovae.fit(
        model, MeanField(model), data(), objective=objective, validation=data(), epochs=15, batch_size=12, lr=1e-2,
        compile=False, progress=False,
    )  # fmt: skip
    assert run.history[-1]["log_likelihood"] > run.history[0]["log_likelihood"] + 0.1
    assert model.num_data == 24


def test_saved_runs_load_and_configurations_rebuild(tmp_path):
    model = BNN([1, 8, 1])
    prior = [{"name": "rbf", "lengthscale": 0.5}, "linear"]
    objective = FunctionSpaceELBO(prior, particles=10, points=4, box=[-2.0, 2.0], beta=LinearWarmup(5))
    run = pyrovae.fit(
        model, MeanField(model), data(), objective=objective, epochs=2, compile=False, progress=False, run_dir=tmp_path
    )
    described = json.loads((tmp_path / "config.json").read_text())["objective"]
    described.pop("estimator")
    again = OBJECTIVES.build(described)
    assert configuration(again) == configuration(objective)
    torch.testing.assert_close(again.prior(X), objective.prior(X))
    loaded = pyrovae.load(tmp_path, example=data())
    found = [pyrovae.predict(run.model, run.guide, X, samples=5).mean for run in (run, loaded)]
    torch.testing.assert_close(*found)


def fitted(compile):
    torch.manual_seed(1)
    model = BNN([1, 8, 1])
    guide = MeanField(model)
    objective = FunctionSpaceELBO("rbf", particles=20, points=10, noise=0.1)
    run = pyrovae.fit(
        model, guide, data(), objective=objective, epochs=8, batch_size=12, lr=1e-2, compile=compile, progress=False
    )
    return torch.tensor([row["bound"] for row in run.history])


def test_the_step_has_a_static_structure():
    torch.testing.assert_close(fitted(True), fitted(False), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_fit_compiles():
    torch.testing.assert_close(fitted(True), fitted(False), rtol=1e-3, atol=1e-3)


def test_double_precision():
    model = BNN([1, 8, 1]).double()
    x, y = (part.double() for part in data())
    run = pyrovae.fit(
        model,
        MeanField(model),
        (x, y),
        objective=FunctionSpaceELBO(particles=10),
        epochs=1,
        compile=False,
        progress=False,
    )
    assert run.history[-1]["kl/f"] > 0


def test_fit_prior_is_the_process_of_highest_evidence():
    x, y = data(40)
    x, y = 100 + 10 * x, 5 * y - 3
    model = BNN([1, 8, 1])
    model.standardize(x, y)
    prior = fit_prior(model, x, y)
    standard = (x - x.mean()) / x.std(correction=0), (y - y.mean()) / y.std(correction=0)

    def evidence(factor):
        lengthscale = factor * prior["lengthscale"]
        noise = (0.1 / (y.std(correction=0) / 5)) ** 2  # near what the evidence finds
        return GaussianProcess(1, "rbf", False, lengthscale, prior["variance"], float(noise)).log_evidence(*standard)

    assert evidence(1.0) > evidence(1.5)
    assert evidence(1.0) > evidence(0.67)
    columns = torch.cat([x, torch.randn(40, 1)], -1)
    model = BNN([2, 8, 1])
    model.standardize(columns, y)
    each = fit_prior(model, columns, y, "matern-5/2", ard=True)["lengthscale"]
    assert each[0] < each[1]  # y does not depend on the second
    FunctionSpaceELBO(json.loads(json.dumps(fit_prior(model, columns, y, ard=True))))


@pytest.mark.slow
def test_posterior_is_near_the_gaussian_process_away_from_the_data_too():
    """Ten points in the middle fifth of the range; the network's posterior against the exact one, point by point."""
    noise, prior = 0.2, {"name": "rbf", "lengthscale": 1.0}
    x = 2 * torch.rand(10, 1) - 1
    y = torch.sin(2 * x[:, 0]) + noise * torch.randn(10)
    test = torch.linspace(-2.5, 2.5, 21)[:, None]
    process = GaussianProcess(lengthscale=1.0, variance=1.0, noise=noise**2)
    exact = process.predict(test, x, y)
    exact_mean, exact_sd = exact.mean.detach(), exact.stddev.detach()

    def posterior(guide_of, objective):
        torch.manual_seed(1)
        model = BNN([1, 20, 1], likelihood={"name": "normal", "scale": noise}, activation="tanh")
        guide = guide_of(model)
        pyrovae.fit(
            model, guide, (x, y), objective=objective, epochs=800, batch_size=10, lr=3e-2, schedule="cosine",
            compile=False, progress=False,
        )  # fmt: skip
        prediction = pyrovae.predict(model, guide, test, samples=1000)
        return prediction.mean, prediction.epistemic.sqrt()

    inside, away = test[:, 0].abs() < 1.01, test[:, 0].abs() >= 2.0
    objective = FunctionSpaceELBO(prior, points=15, box=[-2.5, 2.5])
    mean, sd = posterior(lambda model: FullRank(model, init_scale=0.2), objective)
    # Seen with this seed: means within 0.16 (0.03 among the data), of a function whose prior standard deviation is 1;
    # standard deviations 0.68 to 0.94 of the exact ones; they grow 5.4 times, the exact ones 6.6 times.
    assert (mean - exact_mean).abs().max() < 0.3
    assert (mean - exact_mean)[inside].abs().max() < 0.1
    assert ((sd / exact_sd > 0.5) & (sd / exact_sd < 1.2)).all()
    grown = float(sd[away].mean() / sd[inside].mean())
    assert grown > 0.6 * float(exact_sd[away].mean() / exact_sd[inside].mean()) > 3

    weights = pyrovae.ELBO(gradient="local", kl="analytic")
    other_mean, other_sd = posterior(lambda model: MeanField(model, init_scale=0.05), weights)
    assert other_sd[away].mean() < 0.6 * exact_sd[away].mean()  # too sure there,
    assert other_sd[inside].mean() > 1.5 * exact_sd[inside].mean()  # not sure enough at the data,
    assert float(other_sd[away].mean() / other_sd[inside].mean()) < 2  # so that it hardly grows
    assert (other_mean - exact_mean).abs().max() > (mean - exact_mean).abs().max()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prior": "rfb"}, "did you mean 'rbf'"),
        ({"prior": {"name": "rbf", "period": 1.0}}, "period"),
        ({"prior": {"name": "rbf", "lengthscale": -1.0}}, "lengthscale"),
        ({"prior": []}, "empty"),
        ({"particles": 1}, "particles"),
        ({"points": -1}, "points"),
        ({"box": [1.0, 0.0]}, "box"),
        ({"box": 3.0}, "box"),
        ({"box": [0.0, 1.0, 2.0]}, "box"),
        ({"box": [0.0, [1.0, 2.0]]}, "box"),
        ({"box": [0.0, float("inf")]}, "box"),
        ({"margin": -0.1}, "margin"),
        ({"beta": -1.0}, "beta"),
        ({"noise": 0.0}, "noise"),
        ({"eigenfunctions": 0}, "eigenfunctions"),
        ({"ridge": float("nan")}, "ridge"),
    ],
)
def test_bad_arguments_are_named(bad, said):
    with pytest.raises(ArgumentError, match=said):
        FunctionSpaceELBO(**bad)


def test_a_guide_without_a_pathwise_gradient_is_refused():
    model = BNN([1, 1])

    def guide(x, y):
        pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).has_rsample_(False).to_event(1))

    with pytest.raises(ArgumentError, match="'weights' cannot"):
        FunctionSpaceELBO().estimate(model, guide, X, Y)


def test_what_does_not_fit_is_named():
    model, guide = linear([0.0, 0.0], [1.0, 1.0])

    def estimate(**options):
        with local_params(model, guide):
            FunctionSpaceELBO(particles=10, **options).estimate(model, guide, X, Y)

    with pytest.raises(ModelGuideError, match="needs a BNN"):
        FunctionSpaceELBO().estimate(GaussianProcess(), lambda x, y: None, X, Y)
    with pytest.raises(ModelGuideError, match="first argument"):
        FunctionSpaceELBO().estimate(model, guide)
    with pytest.raises(ArgumentError, match="box has ends"):
        estimate(box=[[0.0, 0.0], [1.0, 1.0]])
    with pytest.raises(ArgumentError, match="lengthscale has 2"):
        estimate(prior={"name": "rbf", "lengthscale": [1.0, 2.0]})
    with pytest.raises(ModelGuideError, match="points returns"):
        estimate(points=lambda x: x[:, 0])
    with pytest.raises(ModelGuideError, match=r"must be \(10, 28\)"):
        estimate(prior=lambda x, draws: torch.randn(draws, 3))
