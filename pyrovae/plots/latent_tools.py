"""Figures of walks through a latent space: strips of interpolations and attributes, analogies, neighbours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyrovae import latent
from pyrovae.errors import ArgumentError
from pyrovae.modes import device_of, evaluating
from pyrovae.plots.images import grid_figsize, image_grid, image_shape, intensities, label_columns
from pyrovae.plots.interfaces import Decoder, Encoder
from pyrovae.plots.state import attribute_of, decode_means, require_data
from pyrovae.plots.style import axes_or_new

if TYPE_CHECKING:
    from ipywidgets import VBox

__all__ = ["analogies", "attribute_slider", "attribute_strip", "interpolation_strips", "neighbours"]

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def interpolation_strips(
    model: Decoder,
    guide: Encoder,
    x0: Tensor,
    x1: Tensor,
    ax: Axes | None = None,
    *,
    steps: int = 10,
    path: latent.Path = "straight",
) -> Axes:
    """Decoded paths between the posterior means of pairs of data points, a row each, with the data at both ends.

    Args:
        model: a model with ``data_shape`` and ``decode``.
        guide: a guide with ``encode``.
        x0: A `n x *data_shape` tensor, the data points on the left.
        x1: A `n x *data_shape` tensor, those on the right.
        ax: the Axes to draw in; by default those of a new figure.
        steps: decoded points of each path, both ends included.
        path: ``"straight"`` or ``"great-circle"``; see :func:`pyrovae.latent.interpolate`.

    Returns:
        The Axes.

    Raises:
        ArgumentError: the data are no images, model or guide lack a method, ``steps`` is below two, or the path is
            unknown.
        DataError: the data are empty, of another shape or out of range, or the two differ in number.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from pyrovae.guides import AmortizedNormal
        >>> from pyrovae.models import VAE
        >>> model = VAE(data_shape=(4, 4), latent_dim=2, hidden=(8,))
        >>> x = torch.rand(6, 4, 4)
        >>> ax = interpolation_strips(model, AmortizedNormal(model), x[:3], x[3:], Figure().subplots(), steps=5)
        >>> ax.images[0].get_array().shape  # 3 rows, 5 steps and 2 data points of 4 pixels, with the gaps
        (14, 34)
    """
    height, width = _image_size(model)
    require_data(x0, tuple(model.data_shape), "x0")
    require_data(x1, tuple(model.data_shape), "x1")
    if len(x0) != len(x1):
        raise ArgumentError(f"x0 holds {len(x0)} data points and x1 {len(x1)}; give as many")
    z = latent.interpolate(_means(guide, x0), _means(guide, x1), steps, path)
    ends = intensities(x0, "x0").unsqueeze(1), intensities(x1, "x1").unsqueeze(1)
    rows = torch.cat([ends[0], _decoded(model, z), ends[1]], dim=1)
    ax = axes_or_new(ax, grid_figsize(len(rows), steps + 2, (height, width), (0.1, 0.25)))
    image_grid(rows.flatten(0, 1), ax, steps + 2, title=f"Interpolation along a {path.replace('-', ' ')} path")
    label_columns(ax, {0: "data", 1: "0 %", steps: "100 %", steps + 1: "data"}, width)
    return ax


def attribute_strip(
    model: Decoder,
    guide: Encoder,
    x: Tensor,
    vector: Tensor,
    ax: Axes | None = None,
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> Axes:
    """Data points moved along an attribute's direction, a row each, the data in the first column.

    Args:
        model: a model with ``data_shape`` and ``decode``.
        guide: a guide with ``encode``.
        x: A `n x *data_shape` tensor of images.
        vector: A `latent_dim` tensor, such as :func:`pyrovae.latent.attribute_vector` gives.
        ax: the Axes to draw in; by default those of a new figure.
        strengths: what the vector is multiplied by in each column.

    Returns:
        The Axes.

    Raises:
        ArgumentError: the data are no images, model or guide lack a method, there are no strengths, or the vector has
            another length.
        DataError: ``x`` is empty, of another shape, or out of range.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from pyrovae.guides import AmortizedNormal
        >>> from pyrovae.models import VAE
        >>> model = VAE(data_shape=(4, 4), latent_dim=2, hidden=(8,))
        >>> x, vector = torch.rand(3, 4, 4), torch.tensor([1.0, 0.0])
        >>> ax = attribute_strip(model, AmortizedNormal(model), x, vector, Figure().subplots(), strengths=(-1, 0, 1))
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['data', '−1', '0', '+1']
    """
    height, width = _image_size(model)
    require_data(x, tuple(model.data_shape))
    if len(strengths) == 0:
        raise ArgumentError("strengths is empty; give at least one number")
    moved = latent.move(_means(guide, x), vector, torch.tensor([float(strength) for strength in strengths]))
    rows = torch.cat([intensities(x, "x").unsqueeze(1), _decoded(model, moved)], dim=1)
    columns = rows.shape[1]
    ax = axes_or_new(ax, grid_figsize(len(rows), columns, (height, width), (0.1, 0.45)))
    image_grid(rows.flatten(0, 1), ax, columns, title="Along the direction of an attribute")
    label_columns(ax, {0: "data"} | {k + 1: _signed(s) for k, s in enumerate(strengths)}, width)
    ax.set_xlabel("strength")
    return ax


def attribute_slider(
    model: Decoder,
    guide: Encoder,
    x: Tensor,
    vector: Tensor,
    *,
    limits: tuple[float, float] = (-2.0, 2.0),
    step: float = 0.1,
    name: str = "strength",
) -> VBox:
    """A slider for a notebook that moves data points along an attribute's direction as it is dragged.

    Args:
        model: a model with ``data_shape`` and ``decode``.
        guide: a guide with ``encode``.
        x: A `n x *data_shape` tensor of images; the moved ones are shown in a row.
        vector: A `latent_dim` tensor, such as :func:`pyrovae.latent.attribute_vector` gives.
        limits: the least and the greatest strength; the slider starts at 0, or at the nearest to it.
        step: of the slider.
        name: what stands beside the slider.

    Returns:
        An ``ipywidgets.VBox`` of the slider and the picture; a notebook shows it where it is a cell's last line.

    Raises:
        ArgumentError: ipywidgets is not installed, the data are no images, model or guide lack a method, or an
            argument is out of range.
        DataError: ``x`` is empty or of another shape.

    Example:
        >>> from pyrovae.guides import AmortizedNormal
        >>> from pyrovae.models import VAE
        >>> model = VAE(data_shape=(8, 8), latent_dim=2, hidden=(16,))
        >>> box = attribute_slider(model, AmortizedNormal(model), torch.zeros(3, 8, 8), torch.ones(2))
        >>> box.children[0].value
        0.0
    """
    try:
        from ipywidgets import FloatSlider, Image, VBox
    except ImportError as error:
        raise ArgumentError(
            "attribute_slider needs ipywidgets, which is not installed: pip install 'pyrovae[notebooks]', or draw"
            " attribute_strip"
        ) from error
    _image_size(model)
    require_data(x, tuple(model.data_shape))
    if not limits[0] < limits[1] or not step > 0:
        raise ArgumentError(f"limits is {limits!r} and step {step!r}; a slider needs a range that rises and a step > 0")
    means = _means(guide, x)

    def picture(strength: float) -> bytes:
        return _png(_decoded(model, latent.move(means, vector, strength)))

    start = min(max(0.0, limits[0]), limits[1])
    slider = FloatSlider(start, min=limits[0], max=limits[1], step=step, description=name, continuous_update=True)
    shown = Image(value=picture(start), format="png")

    def redraw(change: dict[str, Any]) -> None:
        shown.value = picture(change["new"])

    slider.observe(redraw, names="value")
    return VBox([slider, shown])


def neighbours(
    guide: Encoder,
    queries: Tensor,
    data: Tensor,
    ax: Axes | None = None,
    *,
    k: int = 8,
    metric: latent.Metric = "euclidean",
) -> Axes:
    """Data points in the first column, and beside each those with the nearest posteriors, the nearest first.

    Args:
        guide: a guide with ``encode``.
        queries: A `q x *data_shape` tensor of images.
        data: A `n x *data_shape` tensor of images to search.
        ax: the Axes to draw in; by default those of a new figure.
        k: neighbours of each query.
        metric: ``"euclidean"`` or ``"kl"``; see :func:`pyrovae.latent.nearest_neighbours`.

    Returns:
        The Axes.

    Raises:
        ArgumentError: the data are no images, the guide has no ``encode``, or ``k`` or the metric is out of range.
        DataError: one of the two is empty, of another shape, or out of range.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from pyrovae.guides import AmortizedNormal
        >>> from pyrovae.models import VAE
        >>> guide = AmortizedNormal(VAE(data_shape=(4, 4), latent_dim=2, hidden=(8,)))
        >>> data = torch.rand(9, 4, 4)
        >>> neighbours(guide, data[:2], data, Figure().subplots(), k=3).images[0].get_array().shape
        (9, 19)
    """
    height, width = image_shape(tuple(data.shape[1:]))
    require_data(queries, tuple(data.shape[1:]), "queries")
    found = latent.nearest_neighbours(guide, queries, data, k, metric).indices.cpu()
    shown = torch.cat([intensities(queries, "queries").unsqueeze(1), intensities(data, "data")[found]], dim=1)
    ax = axes_or_new(ax, grid_figsize(len(shown), k + 1, (height, width), (0.1, 0.25)))
    image_grid(shown.flatten(0, 1), ax, k + 1, title="Nearest data points in the latent space")
    label_columns(ax, {0: "query"} | {rank: str(rank) for rank in range(1, k + 1)}, width)
    return ax


def analogies(
    model: Decoder,
    guide: Encoder,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    ax: Axes | None = None,
    *,
    labels: Sequence[str] = "abc",
) -> Axes:
    """What is to ``c`` as ``b`` is to ``a``: a row for each of three data points and the decoded answer.

    Args:
        model: a model with ``data_shape`` and ``decode``.
        guide: a guide with ``encode``.
        a: A `n x *data_shape` tensor of images.
        b: The same, of what ``a`` becomes.
        c: The same, of what shall change alike.
        ax: the Axes to draw in; by default those of a new figure.
        labels: names of the three columns.

    Returns:
        The Axes.

    Raises:
        ArgumentError: the data are no images, model or guide lack a method, or the three differ in number.
        DataError: the data are empty, of another shape, or out of range.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from pyrovae.guides import AmortizedNormal
        >>> from pyrovae.models import VAE
        >>> model = VAE(data_shape=(4, 4), latent_dim=2, hidden=(8,))
        >>> a, b, c = torch.rand(3, 2, 4, 4)
        >>> ax = analogies(model, AmortizedNormal(model), a, b, c, Figure().subplots())
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['a', 'b', 'c', 'c + b − a']
    """
    height, width = _image_size(model)
    for name, data in (("a", a), ("b", b), ("c", c)):
        require_data(data, tuple(model.data_shape), name)
    if not len(a) == len(b) == len(c):
        raise ArgumentError(f"a, b and c hold {len(a)}, {len(b)} and {len(c)} data points; give as many of each")
    answer = _decoded(model, latent.analogy(*(_means(guide, data) for data in (a, b, c))))
    given = [intensities(data, name) for name, data in (("a", a), ("b", b), ("c", c))]
    ax = axes_or_new(ax, grid_figsize(len(a), 4, (height, width), (0.1, 0.25)))
    image_grid(torch.stack([*given, answer], dim=1).flatten(0, 1), ax, 4, title="Analogies")
    first, second, third = labels
    label_columns(ax, {0: first, 1: second, 2: third, 3: f"{third} + {second} − {first}"}, width)
    return ax


def _image_size(model: Decoder) -> tuple[int, int]:
    return image_shape(tuple(attribute_of(model, "model", "data_shape")))


def _means(guide: Encoder, x: Tensor) -> Tensor:
    attribute_of(guide, "guide", "encode")
    return latent.posterior_means(guide, x)


def _decoded(model: Decoder, z: Tensor) -> Tensor:
    """Decoded means of `*batch x latent_dim` latents, `*batch x *data_shape` on the CPU."""
    with evaluating(model, seed=0):
        means = decode_means(model, z.to(device_of(model)).flatten(0, -2))
    return means.reshape(*z.shape[:-1], *means.shape[1:])


def _signed(strength: float) -> str:
    return f"{strength:+g}".replace("-", "−") if strength else "0"


def _png(images: Tensor) -> bytes:
    """A row of images as the bytes of a PNG, without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=grid_figsize(1, len(images), image_shape(tuple(images.shape[1:]))), layout="constrained")
    FigureCanvasAgg(figure)
    image_grid(images, figure.subplots(), len(images))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
