"""Posterior means of the data points in two latent dimensions."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError
from pyrovae.modes import evaluating
from pyrovae.plots.interfaces import Encoder
from pyrovae.plots.state import encode_means, require_data
from pyrovae.plots.style import PALETTE, axes_or_new, tidy

__all__ = ["active_dimensions", "latent_scatter"]

MARKERS = "o^sD"
"""One for each round through the palette, so that 40 labels stay apart."""


def active_dimensions(means: Tensor) -> tuple[int, int]:
    """The two latent dimensions in which the posterior means vary most, the lower one first.

    Args:
        means: A `n x latent_dim` tensor of posterior means.

    Returns:
        Two dimensions, counted from 0.

    Raises:
        ArgumentError: the latent space has one dimension.

    Example:
        >>> import torch
        >>> active_dimensions(torch.tensor([[0.0, 3.0, 1.0], [0.1, -3.0, -1.0]]))
        (1, 2)
    """
    if means.shape[-1] < 2:
        raise ArgumentError(f"the latent space has latent_dim={means.shape[-1]}, but this plot needs at least 2")
    first, second = sorted(means.float().var(0, correction=0).topk(2).indices.tolist())
    return first, second


def latent_scatter(guide: Encoder, x: Tensor, y: Tensor | None = None, ax: Axes | None = None) -> Axes:
    """The posterior means of data points, in the two latent dimensions where they vary most.

    Args:
        guide: a guide with ``encode``.
        x: A `n x *data_shape` tensor of data points of any kind.
        y: A `n` tensor of labels, which colour the points: whole numbers get a legend, and real numbers (or
            more labels than stay apart) a colour bar.
        ax: the Axes to draw in; by default those of a new figure.

    Returns:
        The Axes.

    Raises:
        ArgumentError: the guide has no ``encode``, or the latent space has one dimension.
        DataError: ``x`` is empty, or ``y`` has another length.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from torch.distributions import Independent, Normal
        >>> class Scaled:  # the third dimension of z varies most
        ...     def encode(self, x):
        ...         return Independent(Normal(x * torch.tensor([2.0, 1.0, 3.0]), 1.0), 1)
        >>> ax = latent_scatter(Scaled(), torch.eye(3), ax=Figure().subplots())
        >>> print(ax.get_ylabel())
        posterior mean, latent dimension 2
        (of 3, one of the two most active)
    """
    require_data(x)
    if y is not None and tuple(y.shape) != (len(x),):
        raise DataError(f"y has shape {tuple(y.shape)}, but must be `n` with n={len(x)}, the length of x")
    with evaluating(guide) as device:
        means = encode_means(guide, x, device).cpu()
    across, up = active_dimensions(means)
    ax = axes_or_new(ax, (6.4, 5.2))
    points = means[:, [across, up]].numpy()
    # Points shrink as they grow in number; rasterized so that a vector file stays small.
    size = min(36.0, max(3.0, 6000.0 / len(points)))
    look: dict[str, Any] = {"s": size, "alpha": 0.75, "linewidths": 0.0, "rasterized": True}
    labels = None if y is None else y.detach().cpu()
    distinct = None if labels is None else labels.unique()
    if labels is None or distinct is None:
        ax.scatter(points[:, 0], points[:, 1], color=PALETTE[0], **look)
    elif labels.is_floating_point() or len(distinct) > len(PALETTE) * len(MARKERS):
        drawn = ax.scatter(points[:, 0], points[:, 1], c=labels.numpy(), cmap="viridis", **look)
        ax.figure.colorbar(drawn, ax=ax, label="label")
    else:
        for index, label in enumerate(distinct.tolist()):
            chosen = points[(labels == label).numpy()]
            colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index // len(PALETTE)]
            ax.scatter(chosen[:, 0], chosen[:, 1], color=colour, marker=marker, label=str(label), **look)
        _legend(ax, len(distinct))
    total = means.shape[1]
    note = f"\n(of {total}, one of the two most active)" if total > 2 else ""
    ax.set_xlabel(f"posterior mean, latent dimension {across}{note}")
    ax.set_ylabel(f"posterior mean, latent dimension {up}{note}")
    ax.set_title("Posterior means of the data")
    tidy(ax)
    return ax


def _legend(ax: Axes, labels: int) -> None:
    """Beside the points, never over them; the keys as large as the legend's text."""
    legend = ax.legend(
        title="label", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=math.ceil(labels / 15)
    )
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set(sizes=[36.0], alpha=1.0)
