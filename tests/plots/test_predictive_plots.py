"""Plots of predictions: what is drawn is what was computed."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

from pyrovae.errors import ArgumentError, DataError
from pyrovae.evaluation.prediction import Prediction
from pyrovae.evaluation.predictive import Reliability, classification_scores, regression_scores
from pyrovae.evaluation.uncertainty import risk_coverage
from pyrovae.plots.predictive import pit_histogram, predictive_band, reliability_diagram, risk_coverage_curve


def lines(samples=40, n=15, members=()):
    """Straight lines through 0, and their inputs in no order."""
    x = torch.randperm(n).double() / n - 0.4
    slope = torch.randn(samples, *members, 1, dtype=torch.double)
    return x, Prediction(dist.Normal, {"loc": slope * x, "scale": torch.full_like(slope * x, 0.3)})


def edges(drawn):
    """Lower and upper edge of a band at each place."""
    vertices = drawn.get_paths()[0].vertices
    places = np.unique(vertices[:, 0])
    ends = [vertices[vertices[:, 0] == place, 1] for place in places]
    return places, np.array([[end.min(), end.max()] for end in ends])


def texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_bands_are_those_of_functions_and_of_y():
    x, prediction = lines()
    y = torch.randn(15)
    ax = predictive_band(prediction, x[:, None], y, Figure().subplots(), draws=3, coverage=0.8)
    total, epistemic = ax.collections
    order = x.argsort()
    for drawn, (low, high) in {
        total: prediction.interval(0.8),
        epistemic: prediction.components.mean.quantile(torch.tensor([0.1, 0.9], dtype=torch.double), 0),
    }.items():
        places, ends = edges(drawn)
        np.testing.assert_allclose(places, x[order])
        np.testing.assert_allclose(ends, torch.stack([low, high], -1)[order], atol=1e-9)
    *functions, mean, data = ax.get_lines()
    assert len(functions) == 3
    for drawn, component in zip(functions, (0, 20, 39), strict=True):
        np.testing.assert_allclose(drawn.get_ydata(), prediction.components.mean[component, order])
    np.testing.assert_allclose(mean.get_ydata(), prediction.mean[order])
    np.testing.assert_allclose(sorted(data.get_ydata()), y.sort().values)
    assert texts(ax) == ["80% of y", "80% of functions (epistemic)", "functions", "mean", "data"]


def test_data_may_lie_elsewhere_and_classes_have_no_outer_band():
    x, prediction = lines()
    ax = predictive_band(prediction, x, (torch.zeros(3, 1), torch.ones(3)), Figure().subplots(), draws=0)
    assert len(ax.get_lines()) == 2
    assert len(ax.get_lines()[-1].get_xdata()) == 3
    binary = Prediction(dist.Bernoulli, {"logits": prediction.parameters["loc"]})
    ax = predictive_band(binary, x, ax=Figure().subplots())
    assert len(ax.collections) == 1
    assert ax.get_ylabel() == "probability that y is 1"
    counts = Prediction(dist.Poisson, {"rate": prediction.parameters["loc"].exp()})
    _, ends = edges(predictive_band(counts, x, ax=Figure().subplots()).collections[0])
    np.testing.assert_array_equal(ends, ends.round())


def test_reliability_shows_accuracy_counts_and_chance():
    confidence = torch.tensor([0.2, torch.nan, 0.5, 0.9])
    found = Reliability(confidence, torch.tensor([0.3, torch.nan, 0.4, 1.0]), torch.tensor([10, 0, 25, 4]))
    ax = reliability_diagram(found, Figure().subplots())
    assert [round(bar.get_height(), 3) for bar in ax.patches] == [0.3, 0.4, 1.0]
    assert [round(bar.get_x() + bar.get_width() / 2, 3) for bar in ax.patches] == [0.125, 0.625, 0.875]
    assert [text.get_text() for text in ax.texts] == ["10", "25", "4"]
    chance = ax.collections[0].get_segments()
    assert chance[1][:, 0].tolist() == pytest.approx([0.5, 0.5])
    assert chance[1][:, 1].tolist() == [stats.binom.ppf(p, 25, 0.5) / 25 for p in (0.025, 0.975)]


def test_reliability_of_scores_says_the_calibration_error():
    logits = torch.randn(3, 100, 4)
    scores = classification_scores(Prediction(dist.Categorical, {"logits": logits}), torch.randint(4, (100,)))
    ax = reliability_diagram(scores, Figure().subplots())
    assert f"{float(scores.ece):.3f}" in ax.get_title()


def test_risk_curves():
    _, prediction = lines()
    y = torch.randn(15)
    found = {score: risk_coverage(prediction, y, score) for score in ("stddev", "epistemic")}
    ax = risk_coverage_curve(found, Figure().subplots())
    first, all_points, *_ = ax.get_lines()
    np.testing.assert_allclose(first.get_ydata(), found["stddev"].risk)
    np.testing.assert_allclose(first.get_xdata(), found["stddev"].coverage)
    assert list(all_points.get_ydata()) == pytest.approx([float((prediction.mean - y).square().mean())] * 2)
    assert texts(ax)[0].startswith("stddev: by stddev, area ")
    assert texts(ax)[-1] == "all points"


def test_pit_histogram():
    _, prediction = lines(n=200)
    scores = regression_scores(prediction, prediction.draw()[0])
    ax = pit_histogram(scores, Figure().subplots(), bins=10)
    heights = [bar.get_height() for bar in ax.patches if bar.get_width() < 0.5]
    assert heights == np.histogram(scores.pit, 10, (0, 1))[0].tolist()
    band = next(bar for bar in ax.patches if bar.get_width() >= 0.5)
    assert band.get_y() == stats.binom.ppf(0.025, 200, 0.1)
    assert band.get_y() + band.get_height() == stats.binom.ppf(0.975, 200, 0.1)


def test_make_figures_of_their_own():
    x, prediction = lines()
    scores = regression_scores(prediction, torch.zeros(15))
    some = Reliability(torch.tensor([0.4]), torch.tensor([0.5]), torch.tensor([3]))
    drawn = [
        predictive_band(prediction, x, title="costs in $"),
        reliability_diagram(some),
        risk_coverage_curve(risk_coverage(prediction, torch.zeros(15))),
        pit_histogram(scores.pit),
    ]
    assert drawn[0].get_title() == r"costs in \$"
    for ax in drawn:
        ax.figure.canvas.draw()
        plt.close(ax.figure)


x, prediction = lines()
_, several = lines(members=(2,))
categories = Prediction(dist.Categorical, {"logits": torch.zeros(2, 15, 3)})
zeros = torch.zeros(15)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda ax: predictive_band(several, x, ax=ax), ArgumentError, "pooled"),
        (lambda ax: predictive_band(categories, x, ax=ax), ArgumentError, "categorical"),
        (lambda ax: predictive_band(prediction, x, ax=ax, coverage=0.0), ArgumentError, "coverage is 0.0"),
        (lambda ax: predictive_band(prediction, x, ax=ax, draws=-1), ArgumentError, "draws is -1"),
        (lambda ax: predictive_band(prediction, x[:4], ax=ax), DataError, "x has shape"),
        (lambda ax: predictive_band(prediction, torch.zeros(15, 2), ax=ax), DataError, "x has shape"),
        (lambda ax: predictive_band(prediction, zeros.log(), ax=ax), DataError, "x holds NaN"),
        (lambda ax: predictive_band(prediction, x, torch.zeros(4), ax=ax), DataError, "y has shape"),
        (lambda ax: reliability_diagram(zeros, ax), ArgumentError, "found is a Tensor"),
        (lambda ax: reliability_diagram(Reliability(*[torch.ones(2, 3)] * 3), ax), ArgumentError, "pooled"),
        (lambda ax: risk_coverage_curve({}, ax), ArgumentError, "found is empty"),
        (lambda ax: risk_coverage_curve(zeros, ax), ArgumentError, "found is a Tensor"),
        (lambda ax: risk_coverage_curve(risk_coverage(several, zeros), ax), ArgumentError, "pooled"),
        (
            lambda ax: risk_coverage_curve(
                {"a": risk_coverage(prediction, zeros), "b": risk_coverage(categories, zeros)}, ax
            ),
            ArgumentError,
            "losses",
        ),
        (lambda ax: pit_histogram(regression_scores(several, zeros), ax), ArgumentError, r"scores.pit\[0\]"),
        (lambda ax: pit_histogram(zeros - 1.0, ax), DataError, "PIT values"),
        (lambda ax: pit_histogram(zeros, ax, bins=1), ArgumentError, "bins is 1"),
        (lambda ax: pit_histogram([0.5], ax), ArgumentError, "found is a list"),
    ],
)
def test_refuses_what_it_cannot_draw(call, error, said):
    with pytest.raises(error, match=said):
        call(Figure().subplots())
