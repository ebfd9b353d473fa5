"""State-space models: Nile estimates, dense Gaussians, quadrature, and the amortized guide against exact evidence."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyrovae
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides import SparsePrecision
from pyrovae.guides.state_space import AmortizedMarkov
from pyrovae.models import VAE
from pyrovae.models.markov import MarkovChain, log_likelihood_on_grid
from pyrovae.models.nonlinear_state_space import DeepKalmanFilter, GrowthModel
from pyrovae.models.state_space import LinearGaussianStateSpace
from pyrovae.registry import GUIDES, MODELS, configuration
from pyrovae.training.programs import local_params, named_parameters

F64 = torch.float64


def nile():
    folder = os.environ.get("PYROVAE_DATA")
    if not folder:
        pytest.skip("needs PYROVAE_DATA")
    rows = csv.DictReader((Path(folder) / "stats" / "nile.csv").read_text().splitlines())
    return torch.tensor([float(row["value"]) for row in rows], dtype=F64).reshape(1, -1, 1)


def general(steps=7, **arguments):
    """Two states, three variables."""
    return LinearGaussianStateSpace(
        [[1.0, 0.4], [-0.2, 0.9]],
        [[1.0, 0.0], [0.5, 1.0], [0.0, -1.0]],
        [[0.3, 0.1], [0.1, 0.2]],
        [[0.5, 0.1, 0.0], [0.1, 0.4, 0.0], [0.0, 0.0, 0.3]],
        steps=steps,
        **({"initial_mean": [1.0, -1.0], "initial_covariance": [[2.0, 0.3], [0.3, 1.0]]} | arguments),
    ).double()


def dense(model, steps):
    """Mean and covariance of all states (flat), and the observation matrix of all of them, entry by entry."""
    d = model.latent_dim
    mean, cov = [model.initial_mean], [model.initial_tril @ model.initial_tril.mT]
    Q = model.state_tril @ model.state_tril.mT
    whole = torch.zeros(steps * d, steps * d, dtype=F64)
    for _ in range(steps - 1):
        mean.append(model.transition @ mean[-1])
        cov.append(model.transition @ cov[-1] @ model.transition.mT + Q)
    for t in range(steps):
        block = cov[t]
        for s in range(t, steps):
            whole[s * d : (s + 1) * d, t * d : (t + 1) * d] = block
            whole[t * d : (t + 1) * d, s * d : (s + 1) * d] = block.mT
            block = model.transition @ block
    H = torch.block_diag(*[model.observation] * steps)
    R = torch.block_diag(*[model.observation_tril @ model.observation_tril.mT] * steps)
    return torch.cat(mean), whole, H, R


@torch.no_grad()
def test_evidence_filter_and_smoother_against_the_dense_gaussian():
    model = general()
    x = model(size=4)
    mean, cov, H, R = dense(model, 7)
    flat = x.flatten(1)
    exact = dist.MultivariateNormal(H @ mean, H @ cov @ H.mT + R)
    torch.testing.assert_close(model.log_evidence(x), exact.log_prob(flat))
    filtered, smoothed = model.filter(x), model.smooth(x)
    for t in range(7):
        state = slice(2 * t, 2 * t + 2)
        for law, known in ((smoothed, 21), (filtered, 3 * t + 3)):
            seen = H[:known]
            gain = cov[state] @ seen.mT @ torch.linalg.inv(seen @ cov @ seen.mT + R[:known, :known])
            expected = mean[state] + (flat[:, :known] - seen @ mean) @ gain.mT
            torch.testing.assert_close(law.mean[:, t], expected)
            torch.testing.assert_close(law.covariance[t], cov[state, state] - gain @ seen @ cov[:, state])


@torch.no_grad()
def test_generates_its_own_law():
    torch.manual_seed(0)
    model = general(steps=3)
    x = model(size=40_000).flatten(1)
    mean, cov, H, R = dense(model, 3)
    exact = dist.MultivariateNormal(H @ mean, H @ cov @ H.mT + R)
    # Nine means and nine variances, within 4.5 standard errors: a false alarm in 8000 runs.
    variance = exact.covariance_matrix.diagonal()
    assert (abs(x.mean(0) - exact.mean) / (variance / 40_000).sqrt()).max() < 4.5
    assert (abs(x.var(0) / variance - 1) / (2 / 40_000) ** 0.5).max() < 4.5


def test_nile_by_maximum_likelihood_as_in_durbin_and_koopman():
    x = nile()
    model = LinearGaussianStateSpace.local_level(2000.0, 12_000.0, diffuse=True)
    log_likelihood = model.maximize_likelihood(x, iterations=25)
    assert model.observation_tril.item() ** 2 == pytest.approx(15_099, abs=1)
    assert model.state_tril.item() ** 2 == pytest.approx(1469.1, abs=0.2)
    # With the flat prior of density 1 for z_1; the convention without its 2π is lower by log(2π)/2, −633.4646.
    assert float(log_likelihood) == pytest.approx(-632.5456, abs=1e-3)
    with torch.no_grad():
        filtered, smoothed = model.filter(x), model.smooth(x)
    # Their table 2.1 and figure 2.1: the filter begins at the first datum, and its variance settles at 4032.
    assert float(filtered.mean[0, 0]) == pytest.approx(1120.0, rel=1e-12)
    assert float(filtered.covariance[0]) == pytest.approx(15_099, abs=1)
    assert float(filtered.covariance[-1]) == pytest.approx(4032, abs=1)
    assert float(smoothed.mean[0, 0]) == pytest.approx(1111, abs=1)


@torch.no_grad()
def test_diffuse_evidence_is_the_limit_of_a_wide_prior():
    wide, kappa = 1e6, torch.tensor(1e6, dtype=F64)
    near = general(initial_mean=[0.0, 0.0], initial_covariance=[[wide, 0.0], [0.0, wide]])
    diffuse = general(diffuse=True)
    x = general()(size=3)
    limit = near.log_evidence(x) + (2 * torch.pi * kappa).log()  # d = 2
    torch.testing.assert_close(diffuse.log_evidence(x), limit, rtol=0, atol=1e-4)
    torch.testing.assert_close(diffuse.smooth(x).mean, near.smooth(x).mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(diffuse.smooth(x).covariance, near.smooth(x).covariance, rtol=0, atol=1e-4)
    trend = LinearGaussianStateSpace(
        [[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0]], [[1.0, 0.0], [0.0, 0.1]], [[1.0]], diffuse=True
    )
    assert trend.filter(x[..., :1].float()).mean[:, 0].isnan().all()  # one datum determines no slope
    assert trend.filter(x[..., :1].float()).mean[:, 2:].isfinite().all()


@torch.no_grad()
def test_joint_density_with_particles():
    model = general(steps=5)
    x = model(size=3)
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    assert z.shape == (4, 3, 5, 2)
    mean, cov, _, _ = dense(model, 5)
    expected = dist.MultivariateNormal(mean, cov).log_prob(z.flatten(2))
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], expected)
    assert trace.nodes["x"]["log_prob"].shape == (4, 3)


@torch.no_grad()
def test_forecast_is_the_law_of_the_future():
    torch.manual_seed(0)
    model = general(steps=9)
    x = model(size=2)
    drawn = model.forecast(model.last_state(x[:, :6], draws=40_000), steps=3).flatten(2)
    mean, cov, H, R = dense(model, 9)
    whole = H @ cov @ H.mT + R
    gain = whole[18:, :18] @ torch.linalg.inv(whole[:18, :18])
    centre = H[18:] @ mean + (x[:, :6].flatten(1) - H[:18] @ mean) @ gain.mT
    variance = (whole[18:, 18:] - gain @ whole[:18, 18:]).diagonal()
    # 18 means and 18 variances, within 4.5 standard errors: a false alarm in 4000 runs.
    assert (abs(drawn.mean(0) - centre) / (variance / 40_000).sqrt()).max() < 4.5
    assert (abs(drawn.var(0) / variance - 1) / (2 / 40_000) ** 0.5).max() < 4.5


@torch.no_grad()
def test_growth_model_by_quadrature_against_importance_sampling():
    torch.manual_seed(0)
    model = GrowthModel(steps=3).double()
    x = model(size=2)
    z = model.chain(3).rsample((400_000, 1))
    log_w = model.observe(z).log_prob(x)
    estimate = log_w.logsumexp(0) - torch.tensor(400_000.0).log()
    w = (log_w - log_w.amax(0)).exp()
    error = w.std(0) / w.mean(0) / 400_000**0.5
    # Two series, within 4.5 standard errors: a false alarm in 70 000 runs.
    assert (abs(model.log_evidence(x) - estimate) < 4.5 * error).all()
    torch.testing.assert_close(model.log_evidence(x, points=1601), model.log_evidence(x), rtol=0, atol=1e-6)


@torch.no_grad()
def test_growth_forecast_goes_on_with_the_inputs():
    model = GrowthModel()
    torch.testing.assert_close(model.inputs(3, after=10)[:, 0], 8 * (1.2 * torch.tensor([11.0, 12.0, 13.0])).cos())
    torch.testing.assert_close(model.chain(20).inputs, model.inputs(19))
    torch.manual_seed(0)
    z = torch.full((20_000, 1, 4, 1), 2.0)
    drawn = model.forecast({"z": z}, steps=1)
    centre = 1.0 + 10.0 + 8 * torch.tensor(6.0).cos()  # t = 5
    expected = (centre**2 + 10.0) / 20
    assert abs(drawn.mean() - expected) < 4.5 * drawn.std() / 20_000**0.5


@torch.no_grad()
def test_grid_with_a_batch_of_chains():
    slopes = torch.tensor([[0.3, 0.8, 0.95], [0.0, -0.4, 0.5]], dtype=F64)
    grid = torch.linspace(-12, 12, 241, dtype=F64)
    x = torch.randn(3, 4, dtype=F64)
    first = dist.Normal(torch.zeros(2, 3, 1, dtype=F64), 1.0).to_event(1)
    chain = MarkovChain(first, lambda z, _: dist.Normal(slopes[..., None, None] * z, 0.7).to_event(1), 4)
    found = log_likelihood_on_grid(chain, dist.Normal(grid, 0.5).log_prob(x.unsqueeze(-1)), grid)
    for i in range(2):
        for j in range(3):
            one = LinearGaussianStateSpace([[float(slopes[i, j])]], [[1.0]], [[0.49]], [[0.25]]).double()
            one.transition.copy_(slopes[i, j])
            one.state_raw_tril.fill_(0.7).log_()
            torch.testing.assert_close(found[i, j], one.log_evidence(x[j].reshape(1, 4, 1))[0])


@pytest.mark.parametrize(
    "model", [DeepKalmanFilter(2, 3, hidden=(8,), steps=6), general(steps=6).float()], ids=["deep", "linear"]
)
@pytest.mark.parametrize("gradient", ["pathwise", "stl"])
def test_guide_and_model_get_gradients_and_agree_with_particles(model, gradient):
    torch.manual_seed(0)
    guide = AmortizedMarkov(model, hidden=5)
    with torch.no_grad():
        x = model(size=4)
        weights = pyrovae.log_weights(model, guide, x, particles=7)
    assert weights.log_w.shape == (7, 4)
    with local_params(model, guide):
        parameters = named_parameters(model, guide, x)
        pyrovae.ELBO(particles=3, gradient=gradient).differentiable_loss(model, guide, x).backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
        parameter.grad = None


def test_sticking_the_landing_has_the_pathwise_gradient_in_the_mean():
    torch.manual_seed(0)
    model = DeepKalmanFilter(1, 1, hidden=(4,), steps=3)
    guide = AmortizedMarkov(model, hidden=3)
    with torch.no_grad():
        x = model(size=1)
    found = {}
    for gradient in ("pathwise", "stl"):
        draws = []
        for _ in range(25):
            with local_params(model, guide):
                pyrovae.ELBO(particles=250, gradient=gradient).differentiable_loss(model, guide, x).backward()
            parts = [p.grad.flatten().clone() for p in (*model.parameters(), *guide.parameters())]
            draws.append(torch.cat(parts))
            model.zero_grad(), guide.zero_grad()
        found[gradient] = torch.stack(draws)
    error = (sum(draws.var(0) / 25 for draws in found.values())).sqrt()
    z = (found["pathwise"].mean(0) - found["stl"].mean(0)) / error.clamp(min=1e-6)
    # About 200 correlated numbers: mean z² is 1 ± 0.2 when they agree, and no |z| above 5 (once in 8000 runs).
    assert z.abs().max() < 5.0
    assert z.square().mean() < 2.0


@pytest.mark.slow
def test_amortized_guide_is_nearly_exact_where_factorized_ones_cannot_be():
    torch.manual_seed(0)
    model = LinearGaussianStateSpace.local_level(0.1, 1.0, steps=6, initial_covariance=[[0.5]], learn=())
    with torch.no_grad():
        x = model(size=200)
    guide = AmortizedMarkov(model, hidden=8)
    pyrovae.fit(
        model,
        guide,
        x,
        objective=pyrovae.ELBO(gradient="stl"),
        batch_size=200,
        epochs=400,
        lr=0.01,
        schedule="cosine",
        compile=False,
        progress=False,
    )
    with torch.no_grad():
        weights = pyrovae.log_weights(model, guide, x, particles=200).log_w
    error = float(weights.mean(0).std() / 200**0.5 / 200**0.5 + weights.std(0).mean() / 200)
    gap = float(model.log_evidence(x).mean() - weights.mean())
    # What the best factorized Gaussian leaves: KL = (log diag − logdet) / 2 of the posterior precision.
    step = torch.eye(6) - torch.diag(torch.ones(5), -1)
    precision = step.mT @ torch.diag(torch.tensor([2.0, *[10.0] * 5])) @ step + torch.eye(6)
    factorized = float(precision.diagonal().log().sum() - torch.logdet(precision)) / 2
    assert -4 * error < gap < 0.2 * factorized


@pytest.mark.slow
def test_sparse_precision_is_exact_on_the_nile():
    x = ((nile() - 900) / 100).float()
    model = LinearGaussianStateSpace.local_level(0.147, 1.51, initial_covariance=[[10.0]], learn=())
    guide = SparsePrecision(model)
    pyrovae.fit(
        model,
        guide,
        x,
        objective=pyrovae.ELBO(gradient="stl"),
        epochs=1500,
        lr=0.03,
        schedule="cosine",
        compile=False,
        progress=False,
    )
    with torch.no_grad():
        weights = pyrovae.log_weights(model, guide, x, particles=500).log_w
    assert len(guide.rows) == 99  # a chain
    assert abs(float(weights.mean() - model.log_evidence(x))) < 0.2  # nats, of about −140


@pytest.mark.slow
def test_growth_guide_improves_and_stays_below_the_evidence():
    torch.manual_seed(0)
    model = GrowthModel(steps=8)
    with torch.no_grad():
        x = model(size=300)
    guide = AmortizedMarkov(model)
    run = pyrovae.fit(
        model, guide, x, objective=pyrovae.ELBO(), epochs=100, lr=3e-3, schedule="cosine", compile=False, progress=False
    )
    assert run.history[-1]["bound"] > run.history[0]["bound"] + 20
    with torch.no_grad():
        evidence = float(model.log_evidence(x).mean())
        one = pyrovae.log_weights(model, guide, x, particles=1000).log_w
    several = one.reshape(50, 20, 300).logsumexp(1) - torch.tensor(20.0).log()
    all_of_them = one.logsumexp(0) - torch.tensor(1000.0).log()
    assert one.mean() < several.mean() < all_of_them.mean() < evidence + 0.1


@pytest.mark.slow
def test_variances_are_recovered_at_the_nominal_rate():
    covered = 0
    for seed in range(30):
        torch.manual_seed(seed)
        truth = LinearGaussianStateSpace.local_level(0.5, 1.0, steps=60)
        with torch.no_grad():
            x = truth(size=4).double()
        model = LinearGaussianStateSpace.local_level(0.5, 1.0)
        best = model.maximize_likelihood(x, iterations=30)
        covered += int(2 * (best - truth.double().log_evidence(x).sum()) < 5.991)  # 95% of χ² with 2 degrees
    # Binomial limits of 30 at 0.95: 23 or fewer in one run of 1000.
    assert covered >= 24


@pytest.mark.parametrize(
    "model", [DeepKalmanFilter(1, 1, hidden=(4,)), LinearGaussianStateSpace.local_level()], ids=["deep", "linear"]
)
def test_run_is_saved_and_loaded(tmp_path, model):
    torch.manual_seed(0)
    x = torch.randn(10, 3, 1)
    guide = AmortizedMarkov(model, hidden=3)
    run = pyrovae.fit(model, guide, x, epochs=2, compile=False, run_dir=tmp_path / "run", progress=False)
    again = pyrovae.load(tmp_path / "run")
    assert again.history == run.history
    for name, value in [*model.state_dict().items(), *guide.state_dict().items()]:
        other = {**again.model.state_dict(), **again.guide.state_dict()}[name]
        torch.testing.assert_close(other, value)


def test_refuses_bad_input():
    for arguments, said in (
        ({"transition": [[1.0, 0.0]]}, "transition"),
        ({"state_covariance": [[-1.0]]}, "positive definite"),
        ({"initial_mean": [0.0, 1.0]}, "initial_mean"),
        ({"learn": ["F"]}, "learn"),
        ({"steps": 0}, "steps"),
    ):
        given = dict(transition=[[1.0]], observation=[[1.0]], state_covariance=[[1.0]], observation_covariance=[[1.0]])
        with pytest.raises(ArgumentError, match=said):
            LinearGaussianStateSpace(**(given | arguments))
    diffuse = LinearGaussianStateSpace.local_level(diffuse=True)
    for refused in (lambda: diffuse(), lambda: diffuse.marginal(3), lambda: AmortizedMarkov(diffuse)):
        with pytest.raises(ArgumentError, match="diffuse"):
            refused()
    with pytest.raises(ArgumentError, match="AmortizedMarkov"):
        AmortizedMarkov(VAE(data_shape=(4,), latent_dim=1))
    with pytest.raises(DataError, match="series"):
        GrowthModel()(torch.zeros(3, 4))
    with pytest.raises(DataError, match="series"):
        AmortizedMarkov(GrowthModel())(torch.zeros(3, 4, 2))
    with pytest.raises(ArgumentError, match="state_variance"):
        GrowthModel(state_variance=-1.0)
    for model in (GrowthModel(steps=5), DeepKalmanFilter(1, 2)):
        again = MODELS.build(configuration(model))
        assert again.data_shape == model.data_shape
        assert GUIDES.build(configuration(AmortizedMarkov(model, hidden=4)), again).hidden == 4
