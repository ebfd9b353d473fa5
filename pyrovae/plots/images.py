"""Data points as pictures, and many pictures as one grid."""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError
from pyrovae.plots.style import axes_or_new

__all__ = ["grid_figsize", "image_grid", "image_shape", "intensities", "label_columns", "label_rows", "tile_center"]

PADDING = 1
"""Pixels of white between two pictures of a grid."""

TOLERANCE = 0.01
"""How far outside [0, 1] a pixel may lie before it is taken for data on another scale."""


def image_shape(data_shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of the picture of a data point.

    Args:
        data_shape: the event shape: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``.

    Returns:
        Height and width in pixels.

    Raises:
        ArgumentError: the data points are no images.

    Example:
        >>> image_shape((3, 32, 28))
        (32, 28)
    """
    shape = tuple(data_shape)
    if len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3)):
        return shape[-2], shape[-1]
    raise ArgumentError(
        f"data_shape is {shape}, but only images can be drawn: (H, W), (1, H, W) or (3, H, W); for other data "
        "draw learning_curves, bound_parts or latent_scatter"
    )


def intensities(images: Tensor, name: str = "images") -> Tensor:
    """Images as floats in [0, 1] on the CPU.

    Args:
        images: A `n x H x W`, `n x 1 x H x W` or `n x 3 x H x W` tensor: intensities or probabilities in
            [0, 1], or bytes (``torch.uint8``) in 0 … 255.
        name: what the caller calls ``images``.

    Returns:
        A tensor of the same shape.

    Raises:
        ArgumentError: the data points are no images.
        DataError: there are none, or a value is not finite or lies outside the range.

    Example:
        >>> import torch
        >>> intensities(torch.tensor([[[0, 51], [102, 255]]], dtype=torch.uint8))
        tensor([[[0.0000, 0.2000],
                 [0.4000, 1.0000]]])
    """
    image_shape(tuple(images.shape[1:]))
    if images.numel() == 0:
        raise DataError(f"{name} has shape {tuple(images.shape)} and no pixels; give at least one image")
    values = images.detach().cpu()
    values = values / 255.0 if values.dtype == torch.uint8 else values.float()
    low, high = values.aminmax()
    if not bool(torch.isfinite(values).all()):
        raise DataError(f"{name} has pixels that are not finite; leave those images out or replace the values")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise DataError(
            f"{name} has pixels from {low:.4g} to {high:.4g}, but they must lie in [0, 1] or be bytes "
            "(torch.uint8); rescale them first"
        )
    return values.clamp(0.0, 1.0)


def image_grid(images: Tensor, ax: Axes | None = None, columns: int | None = None, *, title: str | None = None) -> Axes:
    """Many pictures in one grid, row by row, one pixel apart.

    Args:
        images: A `n x H x W`, `n x 1 x H x W` or `n x 3 x H x W` tensor: intensities or probabilities in
            [0, 1], or bytes (``torch.uint8``).
        ax: the Axes to draw in; by default those of a new figure.
        columns: pictures a row; by default as many as make the grid square.
        title: title of the Axes.

    Returns:
        The Axes.

    Raises:
        ArgumentError: the data points are no images, or ``columns`` is below one.
        DataError: there are none, or their values are not finite or lie outside the range.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = image_grid(torch.rand(6, 8, 8), Figure().subplots(), columns=3)
        >>> ax.images[0].get_array().shape  # 2 rows of 8 pixels and 3 columns, with the gaps
        (17, 26)
    """
    values = intensities(images)
    if values.ndim == 4:  # channels last, as matplotlib wants them
        values = values[:, 0] if values.shape[1] == 1 else values.movedim(1, -1)
    pictures = values.numpy()
    columns = math.ceil(math.sqrt(len(pictures))) if columns is None else columns
    if columns < 1:
        raise ArgumentError(f"columns={columns}, but must be at least 1")
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    height, width = pictures.shape[1] + PADDING, pictures.shape[2] + PADDING
    canvas = np.ones((rows * height, columns * width, *pictures.shape[3:]), dtype=np.float32)
    for index, picture in enumerate(pictures):
        top, left = index // columns * height, index % columns * width
        canvas[top : top + height - PADDING, left : left + width - PADDING] = picture
    canvas = canvas[:-PADDING, :-PADDING]
    ax = axes_or_new(ax, grid_figsize(rows, columns, (pictures.shape[1], pictures.shape[2])))
    ax.imshow(canvas, cmap="gray", vmin=0.0, vmax=1.0)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if title is not None:
        ax.set_title(title)
    return ax


def tile_center(index: int, size: int) -> float:
    """Where the middle of the picture in row or column ``index`` lies, for pictures of ``size`` pixels."""
    return index * (size + PADDING) + (size - 1) / 2


def label_rows(ax: Axes, labels: dict[int, str], height: int) -> None:
    """Writes labels beside rows of a grid of pictures of ``height`` pixels, without ticks."""
    ax.set_yticks([tile_center(row, height) for row in labels], list(labels.values()))
    ax.tick_params(axis="y", length=0)


def label_columns(ax: Axes, labels: dict[int, str], width: int) -> None:
    """Writes labels beneath columns of a grid of pictures of ``width`` pixels, without ticks."""
    ax.set_xticks([tile_center(column, width) for column in labels], list(labels.values()))
    ax.tick_params(axis="x", length=0)


def grid_figsize(
    rows: int, columns: int, pixels: tuple[int, int], margins: tuple[float, float] = (0.1, 0.1)
) -> tuple[float, float]:
    """Width and height in inches that a grid fills: pictures of about 0.7 inch, 9 by 9 inches at most.

    Args:
        rows: rows of the grid.
        columns: columns of the grid.
        pixels: height and width of a picture.
        margins: inches for what is written on the left and beneath.
    """
    ratio = rows * (pixels[0] + PADDING) / (columns * (pixels[1] + PADDING))
    wide = min(9.0, max(3.0, 0.7 * columns), 9.0 / ratio)
    return max(2.0, wide) + margins[0], wide * ratio + margins[1] + 0.4
