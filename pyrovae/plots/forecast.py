"""Forecasts: a series, and bands of what comes next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError
from pyrovae.plots.style import PALETTE, axes_or_new, plain, tidy

__all__ = ["forecast_bands"]


def forecast_bands(
    series: Tensor,
    draws: Tensor,
    ax: Axes | None = None,
    *,
    masses: Sequence[float] = (0.95, 0.8, 0.5),
    future: Tensor | None = None,
    start: float = 1.0,
    title: str = "Forecast",
) -> Axes:
    """A series as a line, and behind it the forecast: its median, and central bands of given probability.

    Args:
        series: `T` observed values.
        draws: `samples x steps` draws of the values that follow, as a model's ``forecast`` gives them for one series
            and one variable.
        ax: the Axes to draw in; by default those of a new figure.
        masses: probability inside each band, in (0, 1).
        future: the `steps` values (or fewer) that did follow; ``None`` where they are not known.
        start: the time of the first observed value; the others follow at distances of 1.
        title: title of the Axes.

    Returns:
        The Axes.

    Raises:
        ArgumentError: ``masses`` are not probabilities in (0, 1).
        DataError: a tensor has another shape, or is empty or not finite.

    Example:
        >>> from matplotlib.figure import Figure
        >>> level = torch.randn(60).cumsum(0)
        >>> ax = forecast_bands(level, level[-1] + torch.randn(500, 12).cumsum(1), Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['observed', 'median', '50%', '80%', '95%']
    """
    if not masses or not all(0.0 < mass < 1.0 for mass in masses):
        raise ArgumentError(f"masses is {masses!r}; it must hold probabilities between 0 and 1, both excluded")
    _check("series", series, 1)
    _check("draws", draws, 2)
    if future is not None:
        _check("future", future, 1)
        if len(future) > draws.shape[1]:
            raise DataError(f"future has {len(future)} values, and draws {draws.shape[1]} steps; cut off the rest")
    series, draws = series.detach().double().cpu(), draws.detach().double().cpu()
    ax = axes_or_new(ax, (7.2, 3.6))
    past = start + torch.arange(len(series))
    ahead = past[-1] + torch.arange(draws.shape[1] + 1)  # the last observed value too, so that the bands join on
    ax.plot(past, series, color=PALETTE[0], linewidth=1.2, label="observed")
    joined = torch.cat([series[-1:].expand(len(draws), 1), draws], dim=1)
    ax.plot(ahead, joined.quantile(0.5, dim=0), color=PALETTE[2], linewidth=1.6, label="median")
    for place, mass in enumerate(sorted(masses)):
        low, high = joined.quantile(torch.tensor([0.5 - mass / 2, 0.5 + mass / 2], dtype=joined.dtype), dim=0)
        shade = 0.42 * (1 - place / len(masses)) + 0.05
        label = f"{100 * mass:g}%"
        ax.fill_between(ahead, low, high, color=PALETTE[2], alpha=shade, linewidth=0, zorder=1.5, label=label)
    if future is not None:
        known = future.detach().double().cpu()
        ax.plot(ahead[1 : len(known) + 1], known, color="0.15", linestyle="none", marker=".", label="what followed")
    ax.set(xlabel="time", ylabel="value")
    ax.set_title(plain(title))
    tidy(ax)
    # Below the axes: the observed line and the bands fill every corner in turn.
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=6)
    return ax


def _check(name: str, tensor: Tensor, dims: int) -> None:
    if not isinstance(tensor, Tensor) or tensor.dim() != dims or tensor.numel() == 0:
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        wanted = "one series of one variable, (T,)" if dims == 1 else "(samples, steps) of one series and one variable"
        raise DataError(f"{name} has shape {shape}; this plot takes {wanted}, not empty")
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{name} holds NaN or infinite values; remove them first")
