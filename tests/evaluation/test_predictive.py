"""Scores of predictions against closed forms, quadrature, hand computations and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from sklearn import metrics

import pyrovae
from pyrovae.errors import ArgumentError, DataError
from pyrovae.evaluation import predictive
from pyrovae.evaluation.prediction import Prediction
from pyrovae.evaluation.predictive import classification_scores, regression_scores
from pyrovae.evaluation.uncertainty import function_r_hat, out_of_distribution, risk_coverage


def normals(samples, *shape):
    loc = torch.randn(samples, *shape, dtype=torch.double)
    return Prediction(dist.Normal, {"loc": loc, "scale": 0.2 + torch.rand(samples, *shape, dtype=torch.double)})


def students(samples, *shape):
    values = normals(samples, *shape).parameters
    return Prediction(dist.StudentT, {**values, "df": torch.full((samples, *shape), 5.0, dtype=torch.double)})


def poissons(samples, *shape):
    return Prediction(dist.Poisson, {"rate": 6.0 * torch.rand(samples, *shape, dtype=torch.double)})


def categorical(*probs):
    """Of one draw and given probabilities."""
    return Prediction(dist.Categorical, {"logits": torch.tensor([probs], dtype=torch.double).log()})


def targets(prediction, seed=1):
    """One y from the mixture at each point."""
    return prediction.draw(seed)[torch.randint(prediction.samples, ()).item()]


def crps_by_quadrature(cdf, y):
    below = integrate.quad(lambda t: cdf(t) ** 2, -60.0, y, limit=400, epsabs=1e-11)[0]
    return below + integrate.quad(lambda t: (1.0 - cdf(t)) ** 2, y, 60.0, limit=400, epsabs=1e-11)[0]


def test_crps_of_one_normal_is_the_closed_form():
    prediction, y = normals(1, 7), torch.randn(7, dtype=torch.double)
    loc, scale = (prediction.parameters[name][0].numpy() for name in ("loc", "scale"))
    z = (y.numpy() - loc) / scale
    exact = scale * (z * (2.0 * stats.norm.cdf(z) - 1.0) + 2.0 * stats.norm.pdf(z) - 1.0 / math.sqrt(math.pi))
    np.testing.assert_allclose(predictive._crps(prediction, y), exact, rtol=1e-12)
    torch.testing.assert_close(regression_scores(prediction, y).crps, torch.tensor(exact.mean()))


@pytest.mark.parametrize("samples", [1, 2, 3, 8])
def test_crps_of_mixtures_is_the_integral(samples, monkeypatch):
    monkeypatch.setattr(predictive, "_NUMBERS", 2 * samples)  # two points at a time
    prediction, y = normals(samples, 5), torch.randn(5, dtype=torch.double)
    for n, crps in enumerate(predictive._crps(prediction, y)):
        loc, scale = (prediction.parameters[name][:, n].numpy() for name in ("loc", "scale"))
        exact = crps_by_quadrature(lambda t, loc=loc, scale=scale: stats.norm.cdf(t, loc, scale).mean(), float(y[n]))
        assert float(crps) == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize("draws", [8, 1000])
def test_crps_from_draws_is_unbiased(draws, monkeypatch):
    monkeypatch.setattr(predictive, "_DRAWS", draws)
    points = 400_000 // draws  # all alike, so that their spread is the Monte Carlo error
    t = {"df": [4.0, 6.0, 5.0], "loc": [-1.0, 0.5, 2.0], "scale": [0.5, 1.0, 0.7]}
    rate = np.array([1.0, 3.0, 8.0])
    counts = np.arange(200)
    steps = stats.poisson.cdf(counts[:, None], rate).mean(1)
    exact = {
        dist.StudentT: crps_by_quadrature(
            lambda at: stats.t.cdf(at, *(np.array(value) for value in t.values())).mean(), 2.0
        ),
        dist.Poisson: ((steps - (counts >= 2)) ** 2).sum(),
    }
    for family, parameters in {dist.StudentT: t, dist.Poisson: {"rate": rate}}.items():
        values = {
            name: torch.as_tensor(np.array(value))[:, None].expand(3, points) for name, value in parameters.items()
        }
        found = predictive._crps(Prediction(family, values), torch.full((points,), 2.0))
        # 4 standard errors: a false alarm once in 16 000 seeds; of 8 draws the biased estimate is 20 of them away
        assert abs(float(found.mean()) - exact[family]) < 4.0 * float(found.std()) / points**0.5


@pytest.mark.parametrize("made", [normals, students, poissons])
def test_regression_scores_by_scipy(made):
    prediction = made(6, 50)
    y = targets(prediction)
    scores = regression_scores(prediction, y)
    values = {name: value.numpy() for name, value in prediction.parameters.items()}
    mixture = {
        dist.Normal: lambda: stats.norm(values["loc"], values["scale"]),
        dist.StudentT: lambda: stats.t(values["df"], values["loc"], values["scale"]),
        dist.Poisson: lambda: stats.poisson(values["rate"]),
    }[prediction.family]()
    density = mixture.pmf(y) if made is poissons else mixture.pdf(y)
    mean = mixture.mean().mean(0)
    variance = mixture.var().mean(0) + mixture.mean().var(0)
    assert float(scores.rmse) == pytest.approx(((mean - y.numpy()) ** 2).mean() ** 0.5)
    assert float(scores.log_likelihood) == pytest.approx(np.log(density.mean(0)).mean())
    gaussian = stats.norm.logpdf(y, mean, variance**0.5).mean()
    assert float(scores.gaussian_log_likelihood) == pytest.approx(gaussian)
    low, high = prediction.interval(0.9)
    assert float(scores.coverage) == pytest.approx(float(((y >= low) & (y <= high)).double().mean()))
    upto, below = mixture.cdf(y).mean(0), mixture.cdf(y - 1 if made is poissons else y).mean(0)
    assert bool(((scores.pit.numpy() <= upto + 1e-12) & (scores.pit.numpy() >= below - 1e-12)).all())


@pytest.mark.parametrize("made", [normals, students, poissons])
def test_right_predictions_are_calibrated(made):
    prediction = made(5, 1500)
    chosen = torch.randint(5, (1, 1500))
    y = prediction.draw(3).gather(0, chosen)[0]
    scores = regression_scores(prediction, y, coverage=0.8)
    assert stats.kstest(scores.pit.numpy(), "uniform").pvalue > 1e-4  # once in 10 000 seeds
    low, high = prediction.interval(0.8)
    held = (prediction.cdf(high) - prediction.cdf(low - 1.0 if made is poissons else low)).mean()
    assert float(held) == pytest.approx(0.8, abs=1e-6) or (made is poissons and float(held) > 0.8)
    # 4 binomial standard errors: once in 16 000 seeds
    assert abs(float(scores.coverage) - float(held)) < 4.0 * (0.8 * 0.2 / 1500) ** 0.5


def test_wrong_predictions_are_not():
    y = torch.randn(2000)
    narrow = Prediction(dist.Normal, {"loc": torch.zeros(1, 2000), "scale": torch.full((1, 2000), 0.5)})
    scores = regression_scores(narrow, y)
    assert stats.kstest(scores.pit.numpy(), "uniform").pvalue < 1e-10
    exact = 1.0 - 2.0 * stats.norm.cdf(-0.5 * stats.norm.ppf(0.95))
    assert abs(float(scores.coverage) - exact) < 4.0 * (exact * (1 - exact) / 2000) ** 0.5  # once in 16 000 seeds


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("made", [normals, students])
def test_regression_scores_of_members_are_those_of_each(made, own):
    prediction = made(4, 3, 20)
    y = torch.randn(3, 20) if own else torch.randn(20)
    together = regression_scores(prediction, y)
    assert together.pit.shape == (3, 20)
    for member in range(3):
        alone = Prediction(prediction.family, {name: v[:, member] for name, v in prediction.parameters.items()})
        scores = regression_scores(alone, y[member] if own else y)
        for name in ("rmse", "log_likelihood", "gaussian_log_likelihood", "coverage"):
            torch.testing.assert_close(getattr(together, name)[member], getattr(scores, name))
        torch.testing.assert_close(together.pit[member], scores.pit)
        # draws of 20 points: their standard error is about 0.6 / sqrt(20 000); 10 of them
        tolerance = 1e-9 if made is normals else 0.04
        torch.testing.assert_close(together.crps[member], scores.crps, atol=tolerance, rtol=0.0)


def test_one_member_and_one_point():
    one = Prediction(dist.Normal, {"loc": torch.tensor([[[0.0]], [[5.0]]]), "scale": torch.ones(2, 1, 1)})
    scores = regression_scores(one, torch.zeros(1))
    torch.testing.assert_close(scores.pit, torch.tensor([[0.25]]), atol=1e-6, rtol=0.0)
    assert scores.rmse.tolist() == [2.5]


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    prediction = poissons(3, 10)
    after = torch.get_rng_state()
    first = regression_scores(prediction, torch.ones(10))
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(before, after)
    assert torch.equal(first.pit, regression_scores(prediction, torch.ones(10)).pit)


def test_calibration_error_by_hand():
    prediction = categorical([0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55])
    scores = classification_scores(prediction, torch.tensor([0, 1, 1, 1]), bins=4)
    # bin (0.5, 0.75]: confidence 0.625, accuracy 1; bin (0.75, 1]: confidence 0.85, accuracy 0.5
    assert float(scores.ece) == pytest.approx(0.5 * 0.375 + 0.5 * 0.35)
    assert float(scores.mce) == pytest.approx(0.375)
    assert float(scores.error) == 0.25
    assert scores.reliability.counts.tolist() == [0, 0, 2, 2]
    torch.testing.assert_close(scores.reliability.confidence[2:], torch.tensor([0.625, 0.85]).double())
    assert scores.reliability.accuracy[2:].tolist() == [1.0, 0.5]
    assert bool(scores.reliability.accuracy[:2].isnan().all())


def test_a_confidence_of_one_shares_the_last_bin():
    scores = classification_scores(categorical([1.0, 0.0], [0.96, 0.04]), torch.tensor([1, 0]), bins=10)
    assert scores.reliability.counts.tolist() == [0] * 9 + [2]
    assert float(scores.ece) == pytest.approx(0.48)  # as a bin of its own it would be 0.52
    assert float(scores.nll) == math.inf


@pytest.mark.parametrize("members", [(), (3,)])
def test_classification_scores_by_scikit_learn(members):
    logits = 2.0 * torch.randn(7, *members, 300, 4)
    prediction = Prediction(dist.Categorical, {"logits": logits})
    y = torch.randint(4, (300,))
    scores = classification_scores(prediction, y)
    each = logits.double().reshape(7, -1, 300, 4).softmax(-1)
    for member in range(each.shape[1]):
        probs = each[:, member].mean(0).numpy()
        mine = (member,) if members else ()
        assert float(scores.nll[mine]) == pytest.approx(metrics.log_loss(y, probs), rel=1e-5)
        assert float(scores.error[mine]) == pytest.approx(1.0 - metrics.accuracy_score(y, probs.argmax(1)), rel=1e-6)
        brier = sum(metrics.brier_score_loss((y == c).long(), probs[:, c]) for c in range(4))
        assert float(scores.brier[mine]) == pytest.approx(brier, rel=1e-5)
        entropy = stats.entropy(probs, axis=1).mean()
        assert float(scores.entropy[mine]) == pytest.approx(entropy, rel=1e-5)
        epistemic = entropy - stats.entropy(each[:, member].numpy(), axis=-1).mean()
        assert float(scores.mutual_information[mine]) == pytest.approx(epistemic, rel=1e-4)
        found = scores.reliability
        gap = (found.confidence - found.accuracy)[mine].abs().nan_to_num()
        assert int(found.counts[mine].sum()) == 300
        assert float(scores.ece[mine]) == pytest.approx(float((gap * found.counts[mine]).sum() / 300), rel=1e-5)
        assert float(scores.mce[mine]) == pytest.approx(float(gap.max()), rel=1e-5)


def test_two_classes_are_scored_alike_in_either_form():
    logit, y = torch.randn(5, 200), torch.randint(2, (200,))
    bernoulli = classification_scores(Prediction(dist.Bernoulli, {"logits": logit}), y.float())
    both = torch.stack([torch.zeros_like(logit), logit], -1)
    categories = classification_scores(Prediction(dist.Categorical, {"logits": both}), y)
    for name in ("error", "nll", "brier", "ece", "mce", "entropy", "mutual_information"):
        torch.testing.assert_close(getattr(bernoulli, name), getattr(categories, name), rtol=1e-5, atol=1e-6)
    positive = logit.sigmoid().mean(0).numpy()
    assert float(bernoulli.brier) == pytest.approx(2.0 * metrics.brier_score_loss(y, positive), rel=1e-5)


def test_out_of_distribution_by_hand():
    # of 4 · 2 pairs, the outside point is higher in 6, and equal in 1
    found = out_of_distribution(torch.tensor([1.0, 2.0, 3.0, 60.0]), torch.tensor([3.0, 80.0]))
    assert float(found.auroc) == pytest.approx(6.5 / 8)
    assert float(found.fpr95) == pytest.approx(0.5)  # the threshold 3 finds both, and flags 3 and 60
    apart = out_of_distribution(torch.tensor([100.0, 101.0]), torch.tensor([102.0, 103.0]))
    assert (float(apart.auroc), float(apart.fpr95)) == (1.0, 0.0)
    equal = out_of_distribution(torch.ones(3), torch.ones(5))
    assert (float(equal.auroc), float(equal.fpr95)) == (0.5, 1.0)


def test_out_of_distribution_by_scikit_learn():
    inside, outside = torch.randn(2, 300).round(decimals=1), torch.randn(2, 500).round(decimals=1) + 1.0
    found = out_of_distribution(inside, outside)
    for member in range(2):
        truth = np.r_[np.zeros(300), np.ones(500)]
        scores = torch.cat([inside[member], outside[member]]).numpy()
        assert float(found.auroc[member]) == pytest.approx(metrics.roc_auc_score(truth, scores), rel=1e-5)
        false, true, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
        assert float(found.fpr95[member]) == pytest.approx(false[true >= 0.95].min(), abs=1e-6)


def test_out_of_distribution_of_predictions():
    sure, unsure = categorical([0.9, 0.1], [0.2, 0.8]), categorical([0.5, 0.5], [0.4, 0.6], [0.7, 0.3])
    for score in ("entropy", "max_prob"):
        found = out_of_distribution(sure, unsure, score)
        assert float(found.auroc) == 1.0
        assert (found.score, found.inside, found.outside) == (score, 2, 3)
    agreed = Prediction(dist.Bernoulli, {"logits": torch.zeros(2, 4)})
    split = Prediction(dist.Bernoulli, {"logits": torch.tensor([[5.0], [-5.0]]).expand(2, 6)})
    assert float(out_of_distribution(agreed, split, "mutual_information").auroc) == 1.0
    assert float(out_of_distribution(agreed, split).auroc) == pytest.approx(0.5)
    near, far = normals(5, 2, 30), normals(5, 2, 10)
    far.parameters["loc"].mul_(50.0)
    for score in ("stddev", "epistemic"):
        assert out_of_distribution(near, far, score).auroc.tolist() == pytest.approx([1.0, 1.0], abs=0.05)


def test_risk_and_coverage_by_hand():
    numbers = {"loc": torch.zeros(1, 4), "scale": torch.tensor([[3.0, 1.0, 4.0, 2.0]])}
    found = risk_coverage(Prediction(dist.Normal, numbers), torch.tensor([2.0, 0.0, 1.0, -1.0]))
    assert found.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert found.risk.tolist() == pytest.approx([0.0, 0.5, 5 / 3, 1.5])
    assert float(found.area) == pytest.approx((0.5 + 5 / 3 + 1.5) / 4)
    assert (found.loss, found.score) == ("squared error", "stddev")
    # equally sure points count as their mean: errors 1 and 0 at 0.9, in either order, then 1 at 0.6
    for first, second in ((0, 1), (1, 0)):
        classes = risk_coverage(categorical([0.9, 0.1], [0.9, 0.1], [0.6, 0.4]), torch.tensor([first, second, 1]))
        assert classes.risk.tolist() == pytest.approx([0.5, 0.5, 2 / 3])
        assert (classes.loss, classes.score) == ("error", "max_prob")


def test_risk_and_coverage_of_members():
    prediction, y = normals(4, 3, 15), torch.randn(15)
    found = risk_coverage(prediction, y, "epistemic")
    assert found.risk.shape == (3, 15)
    assert found.area.shape == (3,)
    for member in range(3):
        alone = Prediction(dist.Normal, {name: v[:, member] for name, v in prediction.parameters.items()})
        order = alone.epistemic.argsort()
        losses = (alone.mean - y).square()[order]
        torch.testing.assert_close(found.risk[member], losses.cumsum(0) / torch.arange(1, 16))


def test_r_hat_of_functions():
    chains = torch.randn(4, 400, 20)
    # R-hat of independent draws exceeds 1 by about 1 / 400; 1.03 is far outside what 20 inputs show
    assert float(function_r_hat(chains).max()) < 1.03
    chains[0] += 1.5
    assert float(function_r_hat(chains).min()) > 1.1
    assert function_r_hat(chains[..., :1]).shape == (1,)
    assert function_r_hat(torch.randn(1, 50, 3, 2)).shape == (3, 2)
    drifting = torch.randn(1, 400, 2) + torch.linspace(0, 3, 400)[:, None]
    assert float(function_r_hat(drifting).min()) > 1.1
    stuck = function_r_hat(torch.tensor([[0.0], [1.0]]).expand(2, 10)[..., None])
    assert stuck.tolist() == [math.inf]
    assert bool(function_r_hat(torch.zeros(2, 10, 1)).isnan())


def test_r_hat_by_hand():
    chains = torch.randn(3, 30, 1, dtype=torch.double)
    halves = chains.reshape(6, 15).numpy()
    within = halves.var(1, ddof=1).mean()
    exact = ((14 / 15 * within + halves.mean(1).var(ddof=1)) / within) ** 0.5
    assert float(function_r_hat(chains)) == pytest.approx(exact)


def test_permuted_hidden_units_agree_as_functions():
    x = torch.linspace(-2, 2, 9)
    first, second = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([2.0, 0.5, -1.0])
    order = torch.tensor([[0, 1, 2], [2, 0, 1]])  # the second chain has its units in another order
    inner = first[order][:, None] + 0.1 * torch.randn(2, 300, 3)
    outer = second[order][:, None] + 0.1 * torch.randn(2, 300, 3)
    functions = (outer[..., None, :] * torch.tanh(inner[..., None, :] * x[:, None])).sum(-1)
    off = x.abs() > 0.1  # at 0 every function is 0
    assert float(function_r_hat(functions[..., off]).max()) < 1.05
    assert float(function_r_hat(inner).min()) > 2.0


def test_scores_of_trained_networks_together():
    from pyrovae.guides import MeanField
    from pyrovae.models.bnn import BNN

    x = torch.linspace(-2, 2, 40)[:, None]
    y = torch.sin(x[:, 0]) + 0.1 * torch.randn(40)
    model = BNN([1, 10, 1], members=2)
    model.standardize(x, y)
    run = pyrovae.fit(model, MeanField(model), (x, y), epochs=2, compile=False, progress=False)
    prediction = pyrovae.predict(model, run.guide, x, samples=20)
    scores = regression_scores(prediction, y)
    assert scores.rmse.shape == scores.crps.shape == scores.coverage.shape == (2,)
    assert bool((scores.crps > 0).all())
    pooled = regression_scores(prediction.pooled(), y)
    assert float(pooled.rmse) <= float(scores.rmse.square().mean().sqrt()) + 1e-6  # Jensen's inequality
    assert float(pooled.log_likelihood) >= float(scores.log_likelihood.mean()) - 1e-6
    assert risk_coverage(prediction, y).area.shape == (2,)
    chains = prediction.components.mean[:, 0].unflatten(0, (2, 10))
    assert function_r_hat(chains).shape == (40,)


def test_scores_say_what_they_are():
    said = repr(regression_scores(normals(3, 10), torch.randn(10)))
    assert "nats per point" in said
    assert "units of y" in said
    assert "90% intervals" in said
    assert "mean ± s.d. of 2 members: " in repr(regression_scores(normals(3, 2, 10), torch.randn(10)))
    scores = classification_scores(categorical([0.9, 0.1], [0.2, 0.8]), torch.tensor([0, 1]))
    assert "error 0%" in repr(scores)
    assert repr(scores.reliability).splitlines() == [
        "confidence  accuracy  points",
        "     0.800     1.000       1",
        "     0.900     1.000       1",
    ]
    assert "AUROC 1," in repr(out_of_distribution(torch.zeros(2), torch.ones(2)))
    assert "by max_prob" in repr(risk_coverage(categorical([0.9, 0.1]), torch.tensor([0])))


numbers = Prediction(dist.Normal, {"loc": torch.zeros(2, 3), "scale": torch.ones(2, 3)})
counts = Prediction(dist.Poisson, {"rate": torch.ones(2, 3)})
diverged = Prediction(dist.Normal, {"loc": torch.full((2, 3), torch.nan), "scale": torch.ones(2, 3)})
classes = categorical([0.5, 0.5], [0.5, 0.5], [0.5, 0.5])


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: regression_scores(torch.zeros(3), torch.zeros(3)), ArgumentError, "prediction is a Tensor"),
        (lambda: regression_scores(classes, torch.zeros(3)), ArgumentError, "see classification_scores"),
        (lambda: regression_scores(numbers, torch.zeros(3), 1.0), ArgumentError, "coverage is 1.0"),
        (lambda: regression_scores(numbers, torch.zeros(4)), DataError, "y has shape"),
        (lambda: regression_scores(numbers, torch.zeros(3, 1)), DataError, "y has shape"),
        (lambda: regression_scores(normals(2, 4, 3), torch.zeros(3, 4)), DataError, r"\(3,\) or \(4, 3\)"),
        (lambda: regression_scores(numbers, [0.0] * 3), DataError, "y has type list"),
        (lambda: regression_scores(numbers, torch.tensor([0.0, 1.0, torch.nan])), DataError, "y holds NaN"),
        (lambda: regression_scores(diverged, torch.zeros(3)), DataError, "prediction holds NaN"),
        (lambda: regression_scores(counts, torch.full((3,), 0.5)), DataError, "y holds no counts"),
        (lambda: regression_scores(counts, torch.full((3,), -1.0)), DataError, "y holds no counts"),
        (lambda: classification_scores(numbers, torch.zeros(3)), ArgumentError, "see regression_scores"),
        (lambda: classification_scores(classes, torch.zeros(3).long(), bins=0), ArgumentError, "bins is 0"),
        (lambda: classification_scores(classes, torch.tensor([0, 1, 2])), DataError, "y holds other classes"),
        (lambda: classification_scores(classes, torch.tensor([0.0, 0.5, 1.0])), DataError, "y holds other classes"),
        (lambda: out_of_distribution(classes, classes, "stddev"), ArgumentError, "score of classes 'stddev'"),
        (lambda: out_of_distribution(numbers, numbers), ArgumentError, "score of numbers 'entropy'"),
        (lambda: out_of_distribution([0.1], torch.ones(1)), ArgumentError, "inside is a list"),
        (lambda: out_of_distribution(torch.ones(1), torch.zeros(0)), DataError, "outside has scores"),
        (lambda: out_of_distribution(torch.ones(1), torch.full((1,), torch.nan)), DataError, "outside has scores"),
        (lambda: out_of_distribution(torch.ones(2, 3), torch.ones(3)), DataError, "members"),
        (lambda: risk_coverage(numbers, torch.zeros(3), "entropy"), ArgumentError, "score of numbers 'entropy'"),
        (lambda: risk_coverage(classes, torch.zeros(2)), DataError, "y has shape"),
        (lambda: function_r_hat(torch.zeros(2, 10)), DataError, "draws_by_chain has shape"),
        (lambda: function_r_hat(torch.zeros(2, 3, 5)), DataError, "draws_by_chain has 3 samples"),
        (lambda: function_r_hat(torch.full((2, 8, 5), torch.inf)), DataError, "draws_by_chain holds NaN"),
    ],
)
def test_refuses_what_it_cannot_score(call, error, said):
    with pytest.raises(error, match=said):
        call()
