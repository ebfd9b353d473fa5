"""Posteriors: fitted against true contours in two dimensions, and ranks of a simulation-based calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError
from pyrovae.plots.style import PALETTE, axes_or_new, plain, tidy

__all__ = ["contour_panels", "ecdf_difference", "posterior_contours", "rank_histogram"]

LogDensity = Callable[[Tensor], Tensor]
Limits = tuple[tuple[float, float], tuple[float, float]]

MASSES = (0.95, 0.8, 0.5)
"""Probability inside each contour, from the outermost."""

GRID = 201
"""Points a side at which densities are computed."""


class Ranks(Protocol):
    """What :func:`pyrovae.evaluation.sbc` returns."""

    ranks: Tensor
    names: tuple[str, ...]
    draws: int
    bins: int

    @property
    def counts(self) -> Tensor:
        """Histogram of the ranks, `bins x latents`."""

    @property
    def ecdf(self) -> Tensor:
        """Share of the ranks below 1, …, L, `draws x latents`."""

    def envelope(self, coverage: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper edge of the band of the ECDF."""


def posterior_contours(
    log_density: LogDensity,
    guide: Any = None,
    ax: Axes | None = None,
    *,
    limits: Limits = ((-3.0, 3.0), (-3.0, 3.0)),
    color: str = PALETTE[2],
    title: str | None = None,
) -> Axes:
    """Contours of a two-dimensional density, filled, and those of a guide as lines, around the same probabilities.

    Both are normalised over ``limits``, so that a log-density may lack its constant.

    Args:
        log_density: from points `n x 2` to the log-density of the true posterior, `n`, up to a constant.
        guide: a distribution over vectors of two, such a log-density, or draws `n x 2` (at least 100, smoothed by a
            kernel; those of a Pyro guide are had from ``pyrovae.evaluation.posterior_samples``); ``None`` for the
            true contours alone.
        ax: the Axes to draw in; by default those of a new figure.
        limits: of the first and the second dimension.
        color: of the guide's lines.
        title: title of the Axes.

    Returns:
        The Axes.

    Raises:
        ArgumentError: ``limits`` are empty or the guide is of another kind.
        DataError: a density is not of shape `n`, or zero or not finite everywhere, or the draws are not `n x 2`.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from torch.distributions import Independent, Normal
        >>> true = Independent(Normal(torch.zeros(2), torch.tensor([1.0, 0.5])), 1)
        >>> ax = posterior_contours(true.log_prob, torch.randn(500, 2), Figure().subplots(), title="too wide")
        >>> ax.get_title()
        'too wide'
    """
    (left, right), (bottom, top) = limits
    if not (left < right and bottom < top):
        raise ArgumentError(f"limits is {limits!r}; it must be ((left, right), (bottom, top)), the lower one first")
    x, y = torch.linspace(left, right, GRID), torch.linspace(bottom, top, GRID)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
    true = _masses(_on_grid(log_density, points, "log_density"))
    ax = axes_or_new(ax, (4.2, 4.0))
    shades = [(0.8, 0.87, 0.95), (0.6, 0.76, 0.9), (0.4, 0.63, 0.85)]
    levels = [1.0 - mass for mass in MASSES]
    ax.contourf(x, y, true, [*levels, 1.0], colors=shades)
    if guide is not None:
        fitted = _masses(_guide_on_grid(guide, points, limits))
        ax.contour(x, y, fitted, levels, colors=color, linewidths=1.4)
    ax.set(xlim=limits[0], ylim=limits[1], xlabel="latent dimension 0", ylabel="latent dimension 1", aspect="equal")
    if title is not None:
        ax.set_title(plain(title))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def contour_panels(
    log_density: LogDensity, guides: Mapping[str, Any], axes: Any = None, *, limits: Limits = ((-3.0, 3.0), (-3.0, 3.0))
) -> np.ndarray:
    """Panels of :func:`posterior_contours`, side by side, one for each guide.

    Args:
        log_density: of the true posterior, as for :func:`posterior_contours`.
        guides: guides of the kinds that :func:`posterior_contours` takes, by the titles of their panels.
        axes: a sequence of as many Axes; by default those of a new figure in one row.
        limits: of the first and the second dimension, the same for all.

    Returns:
        An array of the Axes.

    Raises:
        ArgumentError: there are no guides, or another number of Axes.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from torch.distributions import Independent, Normal
        >>> true = Independent(Normal(torch.zeros(2), 1.0), 1)
        >>> guides = {"exact": true, "too wide": Independent(Normal(torch.zeros(2), 2.0), 1)}
        >>> contour_panels(true.log_prob, guides, Figure().subplots(1, 2)).shape
        (2,)
    """
    if not guides:
        raise ArgumentError("guides is empty; give at least one, by name")
    figure = None
    if axes is None:
        import matplotlib.pyplot as plt

        size = (max(4.2, 3.2 * len(guides) + 0.4), 3.9)
        figure, axes = plt.subplots(1, len(guides), figsize=size, layout="constrained", sharey=True, squeeze=False)
    panels = np.asarray(axes, dtype=object).reshape(-1)
    if len(panels) != len(guides):
        raise ArgumentError(f"axes holds {len(panels)} Axes for {len(guides)} guides; give one for each")
    for ax, (name, guide) in zip(panels, guides.items(), strict=True):
        posterior_contours(log_density, guide, ax, limits=limits, title=name)
    for ax in panels[1:]:
        ax.set_ylabel("")
    shown = ", ".join(f"{mass:.0%}" for mass in sorted(MASSES))
    keys = [
        Line2D([], [], color=(0.6, 0.76, 0.9), linewidth=8, label="posterior"),
        Line2D([], [], color=PALETTE[2], linewidth=1.4, label=f"guide ({shown} of the mass)"),
    ]
    if figure is not None:
        figure.legend(handles=keys, frameon=False, loc="outside lower center", ncols=min(2, len(panels)))
    else:  # below panels that are not ours there may be others
        panels[0].legend(handles=keys, loc="upper left", fontsize="small")
    return panels


def rank_histogram(found: Ranks, latent: str | int = 0, ax: Axes | None = None) -> Axes:
    """Histogram of the ranks of one latent, with the band in which a bin of uniform ranks lies 19 times out of 20.

    Args:
        found: what :func:`pyrovae.evaluation.sbc` returned.
        latent: name of the latent, or its number.
        ax: the Axes to draw in; by default those of a new figure.

    Returns:
        The Axes.

    Raises:
        ArgumentError: there is no such latent.

    References:
        Talts et al. 2018, https://arxiv.org/abs/1804.06788.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from pyrovae.evaluation.calibration import SBC
        >>> found = SBC(torch.randint(100, (200, 1)), ("z",), draws=99, bins=20)
        >>> rank_histogram(found, "z", Figure().subplots()).get_xlabel()
        'rank among 99 posterior draws'
    """
    from scipy.stats import binom

    index = _index(found, latent)
    counts = found.counts[:, index].cpu().numpy()
    width = (found.draws + 1) / found.bins
    low, high = (float(binom.ppf(p, len(found.ranks), 1.0 / found.bins)) for p in (0.025, 0.975))
    ax = axes_or_new(ax, (5.4, 3.6))
    ax.axhspan(low, high, color="0.9", linewidth=0.0, label="95 % of the bins of uniform ranks")
    ax.axhline(len(found.ranks) / found.bins, color="0.55", linewidth=1.0)
    ax.bar(np.arange(found.bins) * width, counts, 0.92 * width, align="edge", color=PALETTE[0], zorder=2)
    ax.set(xlim=(0.0, found.draws + 1), ylim=(0.0, 1.25 * max(high, counts.max())))
    ax.set_xlabel(f"rank among {found.draws} posterior draws")
    ax.set_ylabel(f"simulations (of {len(found.ranks)})")
    ax.set_title(plain(f"Ranks of {found.names[index]}"))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="upper right")
    return ax


def ecdf_difference(found: Ranks, ax: Axes | None = None, *, coverage: float = 0.95) -> Axes:
    """Distribution function of the ranks of each latent minus the uniform one, with the band that it should stay in.

    The band holds a whole curve of uniform ranks with probability ``coverage``. A curve that rises, then falls below
    zero: the posterior is too narrow; the other way around: too wide; all on one side: biased.

    Args:
        found: what :func:`pyrovae.evaluation.sbc` returned.
        ax: the Axes to draw in; by default those of a new figure.
        coverage: between 0 and 1.

    Returns:
        The Axes.

    Raises:
        ArgumentError: ``coverage`` is out of range.

    References:
        Säilynoja et al. 2022, https://doi.org/10.1007/s11222-022-10090-6.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from pyrovae.evaluation.calibration import SBC
        >>> found = SBC(torch.randint(100, (200, 2)), ("a", "b"), draws=99, bins=20)
        >>> len(ecdf_difference(found, Figure().subplots()).lines)
        3
    """
    uniform = torch.arange(1, found.draws + 1).double() / (found.draws + 1)
    low, high = (edge.double() - uniform for edge in found.envelope(coverage))
    curves = (found.ecdf.cpu() - uniform[:, None]).mT
    ax = axes_or_new(ax, (7.0, 3.8))
    ax.fill_between(uniform, low, high, step="mid", color="0.9", linewidth=0.0, label=f"{coverage:.0%} of such curves")
    ax.axhline(0.0, color="0.55", linewidth=1.0)
    few = len(found.names) <= len(PALETTE)
    for index, (name, curve) in enumerate(zip(found.names, curves, strict=True)):
        outside = bool(((curve < low) | (curve > high)).any())
        look: dict[str, Any] = {"color": PALETTE[index], "label": plain(name)} if few else {"color": PALETTE[0]}
        if not few and outside:
            look = {"color": PALETTE[2], "zorder": 3}
        ax.step(uniform, curve, where="mid", linewidth=1.4, **look)
    if not few:
        ax.plot([], [], color=PALETTE[0], label=f"{len(found.names)} latents")
        ax.plot([], [], color=PALETTE[2], label="those that leave the band")
    ax.set(xlim=(0.0, 1.0), xlabel="rank, as a share of the draws", ylabel="ECDF minus uniform")
    ax.set_title("Calibration")
    tidy(ax)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def _index(found: Ranks, latent: str | int) -> int:
    if isinstance(latent, str) and latent in found.names:
        return found.names.index(latent)
    if isinstance(latent, int) and 0 <= latent < len(found.names):
        return latent
    raise ArgumentError(f"latent is {latent!r}; there are: {', '.join(found.names)}")


def _guide_on_grid(guide: Any, points: Tensor, limits: Limits) -> Tensor:
    """Probability of each cell of the grid under a guide in any of its forms, `GRID x GRID`."""
    if isinstance(guide, Tensor):
        return _smoothed(guide, limits)
    density = getattr(guide, "log_prob", guide)
    if callable(density):
        return _on_grid(density, points, "guide")
    raise ArgumentError(
        f"guide is a {type(guide).__name__}; it must be a distribution with log_prob, a function from points `n x 2` to"
        " log-densities, or a tensor of draws `n x 2`"
    )


def _smoothed(draws: Tensor, limits: Limits) -> Tensor:
    """Counts of draws in the cells of the grid, smoothed by a Normal kernel; its size costs no time with n."""
    from scipy.ndimage import gaussian_filter

    if draws.dim() != 2 or draws.shape[1] != 2 or len(draws) < 100 or not bool(draws.isfinite().all()):
        raise DataError(f"the draws have shape {tuple(draws.shape)}; they must be finite and `n x 2`, n at least 100")
    values = draws.detach().cpu().double().numpy()
    steps = [(high - low) / (GRID - 1) for low, high in limits]
    edges = [low + step * (np.arange(GRID + 1) - 0.5) for (low, _), step in zip(limits, steps, strict=True)]
    counts, *_ = np.histogram2d(values[:, 1], values[:, 0], bins=[edges[1], edges[0]])
    if not counts.any():
        raise DataError(f"no draw lies within limits {limits!r}")
    # Half of Scott's bandwidth, which is made for a Normal and blurs what is curved; of what each dimension varies by
    # when the other is known, so that correlated draws stay apart.
    known = np.sqrt(max(1e-6, 1.0 - np.corrcoef(values.T)[0, 1] ** 2))
    width = 0.5 * len(values) ** (-1 / 6) * known * values.std(0)
    smooth = gaussian_filter(counts, [width[1] / steps[1], width[0] / steps[0]], mode="constant")
    return torch.as_tensor(smooth / smooth.sum())


@torch.no_grad()
def _on_grid(log_density: LogDensity, points: Tensor, name: str) -> Tensor:
    """Probability of each cell of the grid, `GRID x GRID`."""
    values = log_density(points)
    if tuple(values.shape) != (len(points),):
        raise DataError(
            f"{name} gives log-densities of shape {tuple(values.shape)} for points `{len(points)} x 2`; they must have"
            f" shape ({len(points)},)"
        )
    values = values.cpu().double()
    if bool(values.isnan().any()) or not math.isfinite(float(values.max())):
        raise DataError(f"{name} has log-densities that are NaN or +∞, or −∞ at every point within limits")
    return values.softmax(0).reshape(GRID, GRID)


def _masses(probability: Tensor) -> np.ndarray:
    """For each cell one minus the probability of all that are denser: between 0 far out and 1 at the mode."""
    flat = probability.flatten()
    order = flat.argsort(descending=True)
    denser = torch.empty_like(flat)
    denser[order] = flat[order].cumsum(0) - flat[order]
    return (1.0 - denser).clamp(0.0, 1.0).reshape(probability.shape).numpy()
