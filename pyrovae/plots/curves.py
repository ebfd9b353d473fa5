"""What happened during a fit: bounds and their parts against epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pyrovae.errors import ArgumentError, DataError
from pyrovae.plots.interfaces import History
from pyrovae.plots.style import PALETTE, axes_or_new, plain, tidy

__all__ = ["bound_parts", "learning_curves"]


def learning_curves(history: History, ax: Axes | None = None) -> Axes:
    """The training and the validation bound against epochs, the best validation epoch marked.

    Args:
        history: one row an epoch, as ``run.history``: ``epoch``, ``bound`` and, where there are validation
            data, ``validation_bound``, both in nats per data point, higher is better.
        ax: the Axes to draw in; by default those of a new figure.

    Returns:
        The Axes.

    Raises:
        DataError: there are no rows.
        ArgumentError: a row lacks the epoch, or no row has a bound.

    Example:
        >>> from matplotlib.figure import Figure
        >>> history = [{"epoch": 1, "bound": -120.5}, {"epoch": 2, "bound": -101.0, "validation_bound": -99.0}]
        >>> ax = learning_curves(history, Figure().subplots())
        >>> ax.get_ylabel()
        'bound, nats per data point'
    """
    epochs, bounds = _column(history, "bound")
    _, validation = _column(history, "validation_bound", needed=False)
    ax = axes_or_new(ax, (6.4, 4.0))
    ax.plot(epochs, bounds, color=PALETTE[0], label="training", **_marker(bounds))
    finite = [(value, -epoch) for epoch, value in zip(epochs, validation, strict=True) if math.isfinite(value)]
    if finite:
        shown = [(epoch, value) for epoch, value in zip(epochs, validation, strict=True) if value == value]
        ax.plot(*zip(*shown, strict=True), color=PALETTE[1], label="validation", **_marker(shown))
        best, epoch = max(finite)
        ax.plot(
            [-epoch],
            [best],
            linestyle="none",
            marker="o",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor="0.15",
            label=f"best validation: {_number(best)} in epoch {-epoch:g}",
        )
    _finish(ax, "bound, nats per data point", "Learning curves")
    ax.legend(frameon=False, loc="best")
    return ax


def bound_parts(history: History, ax: Axes | None = None) -> Axes:
    r"""The two parts of the bound against epochs: the expected log-likelihood, and each KL divergence.

    They differ in scale, so that the KL has an axis of its own on the right, a twin of the one returned.
    A KL that stays near zero says that the latent variable is not used (posterior collapse):

    .. math:: \mathrm{ELBO} = E_{q(z|x)}[\log p(x|z)] - \mathrm{KL}[q(z|x) \,\|\, p(z)]

    Args:
        history: one row an epoch, as ``run.history``: ``epoch``, ``log_likelihood``, ``kl`` and any
            ``kl/<site>``, in nats per data point.
        ax: the Axes to draw in; by default those of a new figure.

    Returns:
        The Axes of the expected log-likelihood.

    Raises:
        DataError: there are no rows.
        ArgumentError: a row lacks the epoch, or no row has the parts.

    Example:
        >>> from matplotlib.figure import Figure
        >>> history = [{"epoch": 1, "log_likelihood": -90.0, "kl": 11.0}]
        >>> ax = bound_parts(history, Figure().subplots())
        >>> [twin.get_ylabel().split(",")[0] for twin in ax.figure.axes]
        ['expected log-likelihood', 'KL divergence']
    """
    epochs, likelihood = _column(history, "log_likelihood")
    _, divergence = _column(history, "kl")
    sites = sorted({key for row in history for key in row if key.startswith("kl/")})
    ax = axes_or_new(ax, (6.4, 4.0))
    _finish(ax, "expected log-likelihood,\nnats per data point", "Parts of the bound")
    right = ax.twinx()
    right.spines[["top", "left"]].set_visible(False)
    right.set_ylabel("KL divergence,\nnats per data point")
    lines = ax.plot(epochs, likelihood, color=PALETTE[0], label="expected log-likelihood (left)", **_marker(likelihood))
    name = "KL divergence, all sites (right)" if len(sites) > 1 else "KL divergence (right)"
    lines += right.plot(epochs, divergence, color=PALETTE[2], label=name, **_marker(divergence))
    lowest = min(divergence)
    for index, site in enumerate(sites if len(sites) > 1 else []):
        _, values = _column(history, site)
        lowest = min(lowest, *values)
        label = plain(f"KL of {site.removeprefix('kl/')} (right)")
        dashes = (0, (1 + 2 * (index // 4), 1.5))
        colour = PALETTE[3 + index % 4]
        lines += right.plot(epochs, values, color=colour, linestyle=dashes, label=label, **_marker(values))
    # The KL below and the likelihood above: on scales of their own the two would often coincide.
    top = max(value for value in divergence if value == value)
    if not lowest < 0:
        # From zero, so that a collapsed posterior is seen as one; Monte Carlo estimates may fall below.
        right.set_ylim(0.0, 2.2 * top if top > 0 else 1.0)
    low, high = ax.get_ylim()
    ax.set_ylim(low - 1.1 * (high - low), high)
    # Above the curves: these two nearly always cross or fill the corners.
    ax.legend(handles=lines, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return ax


def _column(history: History, key: str, needed: bool = True) -> tuple[list[float], list[float]]:
    """Epochs and one value an epoch, NaN where a row has none."""
    if len(history) == 0:
        raise DataError("history has no rows, but needs one an epoch; fit for at least one epoch first")
    if any("epoch" not in row for row in history):
        raise ArgumentError("history has a row without 'epoch', but needs it in each; give run.history")
    if needed and all(row.get(key) is None for row in history):
        given = ", ".join(sorted({name for row in history for name in row}))
        raise ArgumentError(f"history has no {key!r}, which this plot needs; its rows hold: {given}")
    values = [row.get(key) for row in history]
    return [row["epoch"] for row in history], [math.nan if value is None else float(value) for value in values]


def _finish(ax: Axes, label: str, title: str) -> None:
    ax.set_xlabel("epoch")
    ax.set_ylabel(label)
    ax.set_title(title)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    tidy(ax)


def _marker(values: Sequence[object]) -> dict[str, Any]:
    """A dot at each epoch while there are few: one value alone would draw no line."""
    return {"marker": "o", "markersize": 4} if len(values) <= 20 else {}


def _number(value: float) -> str:
    text = f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"
    return text.replace("-", "−")  # as on the axis
