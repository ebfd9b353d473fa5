"""Predictions: mixtures over posterior draws, against what is known of them exactly."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import pyrovae
from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.guides import MeanField, PointEstimate
from pyrovae.models import BNN, BayesianLinearRegression


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        yield


def mixture(samples: int = 50, n: int = 4) -> pyrovae.Prediction:
    parameters = {"loc": torch.randn(samples, n, dtype=torch.double), "scale": torch.rand(samples, n).double() + 0.1}
    return pyrovae.Prediction(dist.Normal, parameters)


def test_a_mixture_is_torchs() -> None:
    prediction, y = mixture(), torch.randn(4, dtype=torch.double)
    exact = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(4, 50)),
        torch.distributions.Normal(*(prediction.parameters[name].T for name in ("loc", "scale"))),
    )
    torch.testing.assert_close(prediction.mean, exact.mean)
    torch.testing.assert_close(prediction.variance, exact.variance)
    torch.testing.assert_close(prediction.log_prob(y), exact.log_prob(y))
    torch.testing.assert_close(prediction.cdf(y), exact.cdf(y))
    low, high = prediction.interval(0.8)
    torch.testing.assert_close(exact.cdf(low), torch.full((4,), 0.1).double())
    torch.testing.assert_close(exact.cdf(high), torch.full((4,), 0.9).double())
    torch.testing.assert_close(prediction.gaussian_log_prob(y), dist.Normal(exact.mean, exact.stddev).log_prob(y))


def test_quantiles_of_the_other_families() -> None:
    student = pyrovae.Prediction(dist.StudentT, {"df": torch.full((1, 1), 4.0).double(),
                                                 "loc": torch.full((1, 1), 1.0).double(),
                                                 "scale": torch.full((1, 1), 2.0).double()})  # fmt: skip
    assert float(student.quantile(0.975)) == pytest.approx(scipy.stats.t.ppf(0.975, 4, 1, 2), rel=1e-6)
    assert float(student.cdf(torch.tensor([3.0]).double())) == pytest.approx(scipy.stats.t.cdf(3, 4, 1, 2), rel=1e-6)
    counts = pyrovae.Prediction(dist.Poisson, {"rate": torch.full((1, 1), 3.5).double()})
    for level in (0.05, 0.5, 0.95):
        assert float(counts.quantile(level)) == scipy.stats.poisson.ppf(level, 3.5)


def test_classes() -> None:
    logits = torch.randn(20, 5, 3)
    prediction = pyrovae.Prediction(dist.Categorical, {"logits": logits})
    probs = logits.softmax(-1).mean(0)
    torch.testing.assert_close(prediction.probs, probs)
    y = torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(prediction.log_prob(y), probs[torch.arange(5), y].log())
    each = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(0)
    torch.testing.assert_close(prediction.mutual_information, -(probs * probs.log()).sum(-1) - each)
    binary = pyrovae.Prediction(dist.Bernoulli, {"logits": torch.randn(20, 5)})
    torch.testing.assert_close(binary.probs.sum(-1), torch.ones(5))
    torch.testing.assert_close(binary.probs[:, 1], binary.mean)
    with pytest.raises(ArgumentError, match="this response is a class"):
        prediction.interval()
    with pytest.raises(ArgumentError, match="this response is a number"):
        _ = mixture().probs


def test_rows_and_members() -> None:
    prediction = pyrovae.Prediction(dist.Categorical, {"logits": torch.randn(20, 2, 5, 3)})
    assert prediction.probs.shape == (2, 5, 3)
    assert prediction[1:3].probs.shape == (2, 2, 3)
    pooled = prediction.pooled()
    assert pooled.samples == 40
    torch.testing.assert_close(pooled.probs, prediction.probs.mean(0))
    assert len(prediction) == 5


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


def test_any_pyro_model_predicts_from_draws_and_from_guides() -> None:
    x = torch.linspace(-1, 1, 5)
    draws = torch.randn(30)
    prediction = pyrovae.predict(line, {"slope": draws}, x)
    torch.testing.assert_close(prediction.mean, draws.mean() * x)
    torch.testing.assert_close(prediction.epistemic, draws.var(correction=0) * x**2)
    guide = MeanField(line, init_scale=0.3)
    guide(x, x)
    by_guide = pyrovae.predict(line, guide, x, samples=4000)
    # The variance of 4000 draws has a relative error of √(2/4000) = 2.2 %.
    assert float(by_guide.epistemic[0]) == pytest.approx(0.09, rel=0.11)
    regression = BayesianLinearRegression(features=2)
    guide = MeanField(regression)
    inputs = torch.randn(7, 2)
    guide(inputs, torch.randn(7))
    assert pyrovae.predict(regression, guide, inputs, samples=6).mean.shape == (7,)


def test_chunks_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = BNN([2, 5, 1]), torch.randn(23, 2)
    draws = {"weights": torch.randn(11, model.network.size)}
    whole = pyrovae.predict(model, draws, x)
    monkeypatch.setattr("pyrovae.evaluation.prediction._NUMBERS", 3 * model.network.size)
    pieces = pyrovae.predict(model, draws, x, batch_size=7)
    for name, value in whole.parameters.items():
        torch.testing.assert_close(pieces.parameters[name], value)


def test_the_seed_decides_and_nothing_else_is_touched() -> None:
    model, x = BNN([2, 5, 1]), torch.randn(6, 2)
    guide = MeanField(model)
    guide(x, x[:, 0])
    state = torch.get_rng_state()
    first = pyrovae.predict(model, guide, x, samples=5, seed=1).mean
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, pyrovae.predict(model, guide, x, samples=5, seed=1).mean)
    assert not torch.equal(first, pyrovae.predict(model, guide, x, samples=5, seed=2).mean)


def test_dropout_stays_on_when_asked() -> None:
    model = BNN(nn.Sequential(nn.Linear(2, 30), nn.ReLU(), nn.Dropout(0.3), nn.Linear(30, 1)))
    x = torch.randn(6, 2)
    guide = PointEstimate(model)
    guide(x, x[:, 0])
    assert float(pyrovae.predict(model, guide, x, samples=20).epistemic.max()) < 1e-10
    assert float(pyrovae.predict(model, guide, x, samples=20, dropout=True).epistemic.min()) > 1e-6
    assert model.network.net[2].training
    with pytest.raises(ArgumentError, match="no dropout layer"):
        pyrovae.predict(BNN([2, 1]), {"weights": torch.zeros(1, 3)}, x, dropout=True)


def test_errors_say_what_to_do() -> None:
    x = torch.zeros(3)
    with pytest.raises(ArgumentError, match="no inputs to predict at"):
        pyrovae.predict(line, {"slope": torch.zeros(2)})
    with pytest.raises(ModelGuideError, match="the posterior has 'slop', which the model does not sample"):
        pyrovae.predict(line, {"slop": torch.zeros(2)}, x)
    with pytest.raises(ModelGuideError, match="found none"):
        pyrovae.predict(line, {"slope": torch.zeros(2), "y": torch.zeros(2, 3)}, x)
    with pytest.raises(ArgumentError, match="coverage is 1.0"):
        mixture().interval(1.0)
    with pytest.raises(ArgumentError, match="samples"):
        pyrovae.predict(line, {"slope": torch.zeros(2)}, x, samples=0)


def test_predictive_density_of_the_conjugate_model() -> None:
    """Exact posterior draws of a linear regression with known noise: log p(y* | D) in closed form."""
    x, sigma = torch.randn(30, 2), 0.4
    y = x @ torch.tensor([1.0, -1.0]) + sigma * torch.randn(30)
    model = BNN(nn.Linear(2, 1, bias=False), likelihood={"name": "normal", "scale": sigma})
    precision = x.mT @ x / sigma**2 + torch.eye(2)
    exact = dist.MultivariateNormal(torch.linalg.solve(precision, x.mT @ y / sigma**2), precision_matrix=precision)
    new, at = torch.randn(5, 2), torch.randn(5)
    samples = 20_000
    prediction = pyrovae.predict(model, {"weights": exact.sample((samples,))}, new)
    spread = ((new @ exact.covariance_matrix * new).sum(-1) + sigma**2).sqrt()
    expected = dist.Normal(new @ exact.mean, spread).log_prob(at)
    densities = prediction.components.log_prob(at).exp()
    error = densities.std(0) / densities.mean(0) / math.sqrt(samples)  # of the log of the mean density
    assert bool(((prediction.log_prob(at) - expected).abs() < 5 * error).all())
