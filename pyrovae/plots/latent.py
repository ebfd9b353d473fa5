"""What the latent variable holds: reconstructions, samples, and views of the latent space."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.distributions import Normal

from pyrovae.errors import ArgumentError, DataError, require_count
from pyrovae.modes import evaluating
from pyrovae.plots.images import grid_figsize, image_grid, image_shape, intensities, label_columns, label_rows
from pyrovae.plots.interfaces import Decoder, Encoder
from pyrovae.plots.scatter import active_dimensions, latent_scatter
from pyrovae.plots.state import (
    attribute_of,
    decode_means,
    encode_means,
    is_discrete,
    prior_moments,
    require_data,
)
from pyrovae.plots.style import axes_or_new

__all__ = [
    "active_dimensions",
    "interpolation",
    "latent_scatter",
    "manifold",
    "reconstructions",
    "class_grid",
    "samples",
]


DRAWS = 100
"""Draws of a discrete code over which a reconstruction is averaged."""


def reconstructions(model: Decoder, guide: Encoder, x: Tensor, ax: Axes | None = None, *, count: int = 10) -> Axes:
    """Data points in the top row, the decoded means of their posteriors beneath.

    The mean of binary codes is no code, so draws are decoded where the posterior is discrete, and their means averaged.

    Args:
        model: a model with ``data_shape`` and ``decode``.
        guide: a guide with ``encode``.
        x: A `n x *data_shape` tensor of images; the first ``count`` are shown.
        ax: the Axes to draw in; by default those of a new figure.
        count: the most data points to show.

    Returns:
        The Axes.

    Raises:
        ArgumentError: the data are no images, the guide has no ``encode``, or ``count`` is below one.
        DataError: ``x`` is empty, of another shape, or out of range.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from torch.distributions import Independent, Normal
        >>> class Halves:  # model and guide in one: z holds the brightness of the upper and the lower half
        ...     data_shape, latent_dim = (4, 4), 2
        ...     def encode(self, x):
        ...         return Independent(Normal(x.reshape(-1, 2, 8).mean(-1), 0.1), 1)
        ...     def decode(self, z):
        ...         return Independent(Normal(z.repeat_interleave(8, -1).reshape(-1, 4, 4), 0.1), 2)
        >>> ax = reconstructions(Halves(), Halves(), torch.rand(5, 4, 4), Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['data', 'reconstruction']
    """
    height, width = _image_size(model)
    require_data(x, tuple(model.data_shape))
    require_count("count", count)
    x = x[:count]
    originals = intensities(x, "x")
    with evaluating(model, guide, seed=0) as device:
        posterior = attribute_of(guide, "guide", "encode")(x.to(device))
        if is_discrete(posterior):
            decoded = torch.stack([decode_means(model, posterior.sample()) for _ in range(DRAWS)]).mean(0)
        else:
            decoded = decode_means(model, posterior.mean)
    ax = axes_or_new(ax, grid_figsize(2, len(x), (height, width), (1.2, 0.0)))
    image_grid(torch.cat([originals, decoded]), ax, len(x), title="Reconstructions")
    label_rows(ax, {0: "data", 1: "reconstruction"}, height)
    return ax


def samples(model: Decoder, count: int = 64, ax: Axes | None = None, *, seed: int = 0) -> Axes:
    """Decoded means of draws from the prior.

    Args:
        model: a model with ``data_shape``, ``prior`` and ``decode``.
        count: how many draws.
        ax: the Axes to draw in; by default those of a new figure.
        seed: seeds the draws; the global generators stay as they are.

    Returns:
        The Axes.

    Raises:
        ArgumentError: the data are no images, the model has no ``prior`` or ``decode``, or ``count`` is below
            one.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from torch.distributions import Independent, Normal
        >>> class Halves:  # the upper and the lower half of an image have one brightness each
        ...     data_shape, latent_dim = (4, 4), 2
        ...     def prior(self):
        ...         return Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        ...     def decode(self, z):
        ...         return Independent(Normal(z.repeat_interleave(8, -1).reshape(-1, 4, 4), 0.1), 2)
        >>> samples(Halves(), 9, Figure().subplots()).get_title()
        'Samples from the prior'
    """
    _image_size(model)
    require_count("count", count)
    with evaluating(model, seed=seed):
        decoded = decode_means(model, attribute_of(model, "model", "prior")().sample((count,)))
    return image_grid(decoded, ax, title="Samples from the prior")


def class_grid(model: Any, columns: int = 10, ax: Axes | None = None, *, seed: int = 0) -> Axes:
    """What a label changes, and what it does not: a row each class, a column each latent.

    Args:
        model: a model with ``classes``, ``prior`` and ``decode(z, y)``, such as ``ConditionalVAE``.
        columns: number of latents, drawn from the prior.
        ax: the Axes to draw in; by default those of a new figure.
        seed: seeds the draws; the global generators stay as they are.

    Returns:
        The Axes.

    Raises:
        ArgumentError: the data are no images, the model has no classes, or ``columns`` is below one.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from pyrovae.models import ConditionalVAE
        >>> model = ConditionalVAE(data_shape=(4, 4), latent_dim=2, classes=3, hidden=(8,))
        >>> class_grid(model, 5, Figure().subplots()).get_title()
        'A row each class, a column each latent'
    """
    _image_size(model)
    require_count("columns", columns)
    classes = attribute_of(model, "model", "classes")
    with evaluating(model, seed=seed) as device:
        z = attribute_of(model, "model", "prior")().sample((columns,))
        y = torch.arange(classes, device=device)
        means = model.decode(z, y.unsqueeze(-1)).mean.float().cpu().flatten(0, 1).clamp(0.0, 1.0)
    return image_grid(means, ax, columns=columns, title="A row each class, a column each latent")


def manifold(model: Decoder, ax: Axes | None = None, size: int = 15, *, dims: tuple[int, int] = (0, 1)) -> Axes:
    r"""Decoded means over a grid in two latent dimensions, at Gaussian quantiles of the prior.

    Column and row ``k`` of ``size`` lie at the quantile of (k + ½) / size,

    .. math:: z_k = \mu + \sigma\, \Phi^{-1}\!\left(\frac{k + 1/2}{\text{size}}\right),

    with the mean and the standard deviation of the prior; other dimensions stay at the mean.

    Args:
        model: a model with ``data_shape``, ``prior`` and ``decode``.
        ax: the Axes to draw in; by default those of a new figure.
        size: rows and columns of the grid.
        dims: the dimensions that grow to the right and upwards, counted from 0.

    Returns:
        The Axes.

    Raises:
        ArgumentError: the data are no images, the latent space is discrete or lacks a dimension of ``dims``, or
            ``size`` is below two.

    References:
        D. P. Kingma and M. Welling, Auto-Encoding Variational Bayes, figure 4, https://arxiv.org/abs/1312.6114

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from torch.distributions import Independent, Normal
        >>> class Halves:  # the upper and the lower half of an image have one brightness each
        ...     data_shape, latent_dim = (4, 4), 2
        ...     def prior(self):
        ...         return Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        ...     def decode(self, z):
        ...         return Independent(Normal(z.repeat_interleave(8, -1).reshape(-1, 4, 4), 0.1), 2)
        >>> manifold(Halves(), Figure().subplots(), size=5).get_xlabel()
        'latent dimension 0'
    """
    height, width = _image_size(model)
    require_count("size", size, 2)
    across, up = _require_dims(dims, attribute_of(model, "model", "latent_dim"))
    with evaluating(model, seed=0):
        _require_real(attribute_of(model, "model", "prior")(), "prior")
        mean, scale = prior_moments(model)
        steps = (torch.arange(size, dtype=mean.dtype, device=mean.device) + 0.5) / size
        quantiles = Normal(torch.zeros_like(steps), torch.ones_like(steps)).icdf(steps)
        z = mean.expand(size, size, -1).clone()
        z[..., across] += scale[across] * quantiles
        # Row 0 is at the top, but a coordinate grows upwards.
        z[..., up] += scale[up] * quantiles.flip(0)[:, None]
        decoded = decode_means(model, z.flatten(0, 1))
    ax = axes_or_new(ax, grid_figsize(size, size, (height, width), (0.6, 0.5)))
    image_grid(decoded, ax, size, title="Decoded grid over the latent space")
    shown = (0, size // 2, size - 1) if size > 2 else (0, 1)
    label_columns(ax, {k: _coordinate(z[0, k, across]) for k in shown}, width)
    label_rows(ax, {k: _coordinate(z[k, 0, up]) for k in shown}, height)
    ax.set(xlabel=f"latent dimension {across}", ylabel=f"latent dimension {up}")
    return ax


def interpolation(
    model: Decoder, guide: Encoder, x0: Tensor, x1: Tensor, ax: Axes | None = None, steps: int = 10
) -> Axes:
    """The decoded straight line between the posterior means of two data points, these at both ends.

    Args:
        model: a model with ``data_shape`` and ``decode``.
        guide: a guide with ``encode``.
        x0: A `*data_shape` tensor, the data point on the left.
        x1: A `*data_shape` tensor, the data point on the right.
        ax: the Axes to draw in; by default those of a new figure.
        steps: decoded points of the line, both ends included.

    Returns:
        The Axes.

    Raises:
        ArgumentError: the data are no images, the guide has no ``encode``, the latent space is discrete, or ``steps``
            is below two.
        DataError: ``x0`` or ``x1`` has another shape or is out of range.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from torch.distributions import Independent, Normal
        >>> class Halves:  # model and guide in one: z holds the brightness of the upper and the lower half
        ...     data_shape, latent_dim = (4, 4), 2
        ...     def encode(self, x):
        ...         return Independent(Normal(x.reshape(-1, 2, 8).mean(-1), 0.1), 1)
        ...     def decode(self, z):
        ...         return Independent(Normal(z.repeat_interleave(8, -1).reshape(-1, 4, 4), 0.1), 2)
        >>> ax = interpolation(Halves(), Halves(), torch.zeros(4, 4), torch.ones(4, 4), Figure().subplots())
        >>> ax.images[0].get_array().shape  # 10 steps and 2 data points of 4 pixels, with the gaps
        (4, 59)
    """
    height, width = _image_size(model)
    require_count("steps", steps, 2)
    event = tuple(model.data_shape)
    for name, point in (("x0", x0), ("x1", x1)):
        if tuple(point.shape) != event:
            raise DataError(f"{name} has shape {tuple(point.shape)}, but must be data_shape, {event}")
    ends = torch.stack([intensities(x0[None], "x0")[0], intensities(x1[None], "x1")[0]])
    with evaluating(model, guide) as device:
        _require_real(attribute_of(guide, "guide", "encode")(x0[None].to(device)), "posterior")
        first, last = encode_means(guide, torch.stack([x0, x1.to(x0.device)]), device)
        weights = torch.linspace(0.0, 1.0, steps, device=first.device, dtype=first.dtype)[:, None]
        decoded = decode_means(model, torch.lerp(first, last, weights))
    row = torch.cat([ends[:1], decoded, ends[1:]])
    ax = axes_or_new(ax, grid_figsize(1, len(row), (height, width), (0.1, 0.25)))
    image_grid(row, ax, len(row), title="Interpolation between two posterior means")
    label_columns(ax, {0: "data", 1: "0 %", steps: "100 %", steps + 1: "data"}, width)
    return ax


def _image_size(model: Decoder) -> tuple[int, int]:
    return image_shape(attribute_of(model, "model", "data_shape"))


def _require_dims(dims: tuple[int, int], latent_dim: int) -> tuple[int, int]:
    if latent_dim < 2:
        raise ArgumentError(f"the latent space has latent_dim={latent_dim}, but this plot needs at least 2")
    if len(dims) != 2 or dims[0] == dims[1] or not all(0 <= dim < latent_dim for dim in dims):
        raise ArgumentError(
            f"dims={tuple(dims)}, but must be two different dimensions of 0 … {latent_dim - 1} (latent_dim="
            f"{latent_dim})"
        )
    return dims


def _require_real(distribution: object, name: str) -> None:
    if is_discrete(distribution):
        raise ArgumentError(
            f"the {name} is over discrete codes, with nothing to decode between them; draw reconstructions or samples"
        )


def _coordinate(value: Tensor) -> str:
    # −0.0 is what rounding leaves of the middle quantile.
    return f"{round(float(value), 1) + 0.0:.1f}".replace("-", "−")
