"""Predictions: bands of functions and of responses, and how far they are calibrated."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyro.distributions as dist
from matplotlib.axes import Axes
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError, require_count
from pyrovae.evaluation.prediction import Prediction
from pyrovae.evaluation.predictive import ClassificationScores, RegressionScores, Reliability
from pyrovae.evaluation.uncertainty import RiskCoverage
from pyrovae.plots.style import PALETTE, axes_or_new, plain, tidy

__all__ = ["pit_histogram", "predictive_band", "reliability_diagram", "risk_coverage_curve"]

_TAILS = (0.025, 0.975)  # of what chance alone does, 19 times out of 20
_EDGE = "0.55"
_CHANCE = "0.88"


def predictive_band(
    prediction: Prediction,
    x: Tensor,
    y: Tensor | tuple[Tensor, Tensor] | None = None,
    ax: Axes | None = None,
    *,
    draws: int = 10,
    coverage: float = 0.9,
    title: str = "Prediction",
) -> Axes:
    """Prediction against one input: draws of the function, the band of functions and the wider band of responses.

    The inner band is epistemic: it holds the component means with probability ``coverage`` at each x, and shrinks with
    more data. The outer one holds y; where y is a class, 0 or 1, there is none, and the functions are probabilities.

    Args:
        prediction: at ``x``, of numbers or of two classes, for one network.
        x: one number for each input, `n` or `n x 1`, in any order.
        y: data to show: targets at ``x``, `n`, or a pair of inputs and targets of any number of points.
        ax: the Axes to draw in; by default those of a new figure.
        draws: number of functions to draw, the means of as many components.
        coverage: probability inside each band, in (0, 1).
        title: title of the Axes.

    Returns:
        The Axes.

    Raises:
        ArgumentError: the prediction is of several networks or of more than two classes, or a number is out of range.
        DataError: x or y have another shape, or are not finite.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> x = torch.linspace(-1, 1, 50)
        >>> lines = torch.randn(100, 1) * x
        >>> prediction = Prediction(dist.Normal, {"loc": lines, "scale": torch.full_like(lines, 0.2)})
        >>> ax = predictive_band(prediction, x, ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['90% of y', '90% of functions (epistemic)', 'functions', 'mean']
    """
    require_count("draws", draws, 0)
    if not 0.0 < coverage < 1.0:
        raise ArgumentError(f"coverage is {coverage!r}; it must lie between 0 and 1, as 0.9")
    if prediction.family is dist.Categorical:
        raise ArgumentError("prediction is of a categorical response, which is no number: see reliability_diagram")
    functions = _array(prediction.components.mean)
    if functions.ndim != 2:
        raise ArgumentError(
            f"prediction is of members {functions.shape[1:-1]}; draw one network, or all as one mixture:"
            " prediction.pooled()"
        )
    places = _column("x", x, len(prediction))
    data = None if y is None else _points(y, x)
    order = places.argsort()
    places, functions = places[order], functions[:, order]
    tail = (1.0 - coverage) / 2.0
    ax = axes_or_new(ax, (6.4, 4.0))
    if prediction.classes is None:
        low, high = (_array(edge)[order] for edge in prediction.interval(coverage))
        ax.fill_between(places, low, high, color=PALETTE[0], alpha=0.18, linewidth=0, label=f"{100 * coverage:g}% of y")
    low, high = np.quantile(functions, [tail, 1.0 - tail], axis=0)
    label = f"{100 * coverage:g}% of functions (epistemic)"
    ax.fill_between(places, low, high, color=PALETTE[0], alpha=0.4, linewidth=0, label=label)
    shown = np.linspace(0, len(functions) - 1, min(draws, len(functions))).round().astype(int)
    for index, curve in enumerate(functions[shown]):
        label = "functions" if index == 0 else "_"
        ax.plot(places, curve, color=PALETTE[3], linewidth=0.7, alpha=0.6, label=label)
    ax.plot(places, functions.mean(0), color=PALETTE[2], linewidth=1.6, label="mean")
    if data is not None:
        ax.plot(*data, color="0.15", linestyle="none", marker=".", markersize=5, label="data")
    ax.set(xlabel="x", ylabel="y" if prediction.classes is None else "probability that y is 1")
    ax.set_title(plain(title))
    tidy(ax)
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    return ax


def reliability_diagram(found: ClassificationScores | Reliability, ax: Axes | None = None) -> Axes:
    """Accuracy against confidence, by bins, with the number of points on each bar.

    Bars below the diagonal: too sure; above it: not sure enough. The mark on each bar is where its accuracy lies 19
    times out of 20 when the confidence is right: it says how much of the distance is chance.

    Args:
        found: what :func:`pyrovae.evaluation.classification_scores` returned, of one network, or its ``reliability``.
        ax: the Axes to draw in; by default those of a new figure.

    Returns:
        The Axes.

    Raises:
        ArgumentError: it is of several networks, or something else.

    References:
        Guo et al. 2017, https://arxiv.org/abs/1706.04599.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> found = Reliability(torch.tensor([0.3, 0.8]), torch.tensor([0.5, 0.7]), torch.tensor([10, 20]))
        >>> len(reliability_diagram(found, Figure().subplots()).patches)
        2
    """
    from scipy.stats import binom

    reliability = found.reliability if isinstance(found, ClassificationScores) else found
    if not isinstance(reliability, Reliability):
        raise ArgumentError(f"found is a {type(found).__name__}; give what classification_scores returned")
    if reliability.counts.dim() != 1:
        raise ArgumentError(
            f"found is of members {tuple(reliability.counts.shape[:-1])}; draw one network, or score all as one"
            " mixture: prediction.pooled()"
        )
    bins, filled = len(reliability.counts), _array(reliability.counts) > 0
    counts = _array(reliability.counts)[filled].astype(int)
    sure, right = _array(reliability.confidence)[filled], _array(reliability.accuracy)[filled]
    middle = (np.arange(bins)[filled] + 0.5) / bins
    low, high = (binom.ppf(tail, counts, sure.clip(0.0, 1.0)) / counts for tail in _TAILS)
    ax = axes_or_new(ax, (4.8, 4.6))
    ax.bar(middle, right, 0.92 / bins, color=PALETTE[0], label="accuracy")
    ax.plot([0.0, 1.0], [0.0, 1.0], color=_EDGE, linewidth=1.0, zorder=2)
    ax.vlines(sure, low, high, color=PALETTE[1], linewidth=2.0, zorder=3, label="95% of bins, were it calibrated")
    for place, top, count in zip(middle, np.maximum(right, high), counts, strict=True):
        ax.text(place, top + 0.015, f"{count}", ha="center", va="bottom", fontsize="x-small", rotation=90, color="0.25")
    ax.set(xlim=(0.0, 1.0), ylim=(0.0, 1.14), xlabel="confidence", ylabel="accuracy", yticks=np.linspace(0.0, 1.0, 6))
    title = "Reliability"
    if isinstance(found, ClassificationScores):
        title += f": calibration error {float(found.ece):.3f}"
    ax.set_title(title)
    tidy(ax)
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    return ax


def risk_coverage_curve(found: RiskCoverage | Mapping[str, RiskCoverage], ax: Axes | None = None) -> Axes:
    """Loss of the points that a prediction is surest of, against their share; one curve for each prediction.

    The lower the curve on its left the better does the uncertainty tell where the prediction is wrong; dotted, the loss
    of all points, which points in random order have. Errors are shares, squared errors in squared units of y.

    Args:
        found: what :func:`pyrovae.evaluation.risk_coverage` returned, or several by name; of one network each.
        ax: the Axes to draw in; by default those of a new figure.

    Returns:
        The Axes.

    Raises:
        ArgumentError: there are none, their losses differ, or one is of several networks.

    References:
        Geifman & El-Yaniv 2017, https://arxiv.org/abs/1705.08500.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> half = torch.tensor([0.5, 1.0])
        >>> found = RiskCoverage(half, 0.2 * half, torch.tensor(0.15), "error", "max_prob")
        >>> risk_coverage_curve(found, Figure().subplots()).get_ylabel()
        'error of the points kept'
    """
    named = dict(found) if isinstance(found, Mapping) else {"": found}
    if not named:
        raise ArgumentError("found is empty; give at least one, by name")
    for one in named.values():
        if not isinstance(one, RiskCoverage):
            raise ArgumentError(f"found is a {type(one).__name__}; give what risk_coverage returned")
        if one.risk.dim() != 1:
            raise ArgumentError(
                f"found is of members {tuple(one.risk.shape[:-1])}; draw one network, or take all as one mixture:"
                " prediction.pooled()"
            )
    losses = sorted({one.loss for one in named.values()})
    if len(losses) > 1:
        raise ArgumentError(f"found has the losses {' and '.join(losses)}; draw them in Axes of their own")
    ax = axes_or_new(ax, (5.4, 3.8))
    for index, (name, one) in enumerate(named.items()):
        colour = PALETTE[index % len(PALETTE)]
        label = f"{plain(name) + ': ' if name else ''}by {plain(one.score)}, area {float(one.area):.3g}"
        ax.plot(_array(one.coverage), _array(one.risk), color=colour, linewidth=1.5, label=label)
        ax.axhline(float(one.risk[-1]), color=colour, linewidth=1.0, linestyle=":")
    ax.plot([], [], color=_EDGE, linewidth=1.0, linestyle=":", label="all points")
    ax.set(xlim=(0.0, 1.0), xlabel="share of points kept, the surest first")
    ax.set_ylabel("error of the points kept" if losses[0] == "error" else "squared error of the points kept")
    ax.set_ylim(bottom=0.0)
    ax.set_title("Risk and coverage")
    tidy(ax)
    ax.legend(frameon=False, loc="best")
    return ax


def pit_histogram(found: RegressionScores | Tensor, ax: Axes | None = None, *, bins: int = 20) -> Axes:
    """Histogram of the probability integral transform, with the band in which 19 of 20 bins lie when it is uniform.

    A ∪ shape says that predictions are too narrow, a ∩ shape too wide, a slope that they are biased.

    Args:
        found: what :func:`pyrovae.evaluation.regression_scores` returned, of one network; or PIT values, `n`.
        ax: the Axes to draw in; by default those of a new figure.
        bins: equal bins between 0 and 1.

    Returns:
        The Axes.

    Raises:
        ArgumentError: it is of several networks, or ``bins`` is out of range.
        DataError: the values do not lie between 0 and 1.

    References:
        Gneiting et al. 2007, https://doi.org/10.1111/j.1467-9868.2007.00587.x.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> pit_histogram(torch.rand(500), Figure().subplots()).get_ylabel()
        'points (of 500)'
    """
    from scipy.stats import binom

    require_count("bins", bins, 2)
    pit = found.pit if isinstance(found, RegressionScores) else found
    if not isinstance(pit, Tensor) or pit.numel() == 0:
        raise ArgumentError(f"found is a {type(found).__name__}; give what regression_scores returned, or PIT values")
    if pit.dim() != 1:
        raise ArgumentError(f"found is of members {tuple(pit.shape[:-1])}; draw one at a time, as scores.pit[0]")
    values = _array(pit)
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise DataError("found has PIT values that are NaN or do not lie between 0 and 1")
    low, high = (float(binom.ppf(tail, len(values), 1.0 / bins)) for tail in _TAILS)
    ax = axes_or_new(ax, (5.4, 3.6))
    ax.axhspan(low, high, color=_CHANCE, linewidth=0.0, label="95% of the bins of uniform values")
    ax.axhline(len(values) / bins, color=_EDGE, linewidth=1.0)
    counts, edges = np.histogram(values, bins, (0.0, 1.0))
    ax.bar(edges[:-1], counts, 0.92 / bins, align="edge", color=PALETTE[0], zorder=2)
    ax.set(xlim=(0.0, 1.0), ylim=(0.0, 1.25 * max(high, counts.max())))
    ax.set(xlabel="predictive CDF at y", ylabel=f"points (of {len(values)})", title="Probability integral transform")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="upper right")
    return ax


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


def _column(name: str, values: Tensor, count: int | None) -> np.ndarray:
    """One number a point."""
    flat = values.flatten() if isinstance(values, Tensor) and values.shape[1:] in ((), (1,)) and values.dim() else None
    if flat is None or (count is not None and len(flat) != count):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        wanted = "n" if count is None else count
        raise DataError(f"{name} has shape {shape}; this plot takes one number a point, ({wanted},) or ({wanted}, 1)")
    if not bool(flat.isfinite().all()):
        raise DataError(f"{name} holds NaN or infinite values; remove them first")
    return _array(flat)


def _points(y: Tensor | tuple[Tensor, Tensor], x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The data as inputs and targets."""
    inputs, targets = y if isinstance(y, tuple) else (x, y)
    places = _column("x of the data", inputs, None)
    return places, _column("y", targets, len(places))
