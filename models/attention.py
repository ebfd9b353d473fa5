"""A window on images: a grid of Gaussian filters that reads from them and writes into them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyrovae.models.networks import full_precision, mlp

__all__ = ["Attention", "Grid", "filterbank"]


class Grid(NamedTuple):
    """A grid of N x N Gaussian filters on each image of a batch; `*batch` each.

    Args:
        x: column of the centre, in pixels, where the first pixel is 1.
        y: row of the centre, likewise.
        stride: distance of two filters, in pixels.
        variance: of a filter, in squared pixels.
        intensity: factor on what is read, and divisor of what is written.
    """

    x: Tensor
    y: Tensor
    stride: Tensor
    variance: Tensor
    intensity: Tensor


def filterbank(center: Tensor, stride: Tensor, variance: Tensor, size: int, pixels: int) -> Tensor:
    r"""Gaussian filters along one axis of an image, each normalised over the pixels.

    .. math:: F_{ia} = \frac{1}{Z_i} \exp\left(-\frac{(a - \mu_i)^2}{2 \sigma^2}\right), \quad
        \mu_i = g + (i - N/2 - 0.5)\, \delta, \qquad i = 1 \ldots N, \quad a = 1 \ldots A, \quad \sum_a F_{ia} = 1

    Args:
        center: g, `*batch`, in pixels, where the first pixel is 1.
        stride: δ, `*batch`, in pixels.
        variance: σ², `*batch`, in squared pixels.
        size: number N of filters.
        pixels: number A of pixels of the axis.

    Returns:
        A `*batch x size x pixels` tensor.

    Example:
        >>> one = torch.ones(())
        >>> filterbank(2.5 * one, one, 1e-3 * one, size=2, pixels=4).round()   # centres 2 and 3
        tensor([[0., 1., 0., 0.],
                [0., 0., 1., 0.]])
    """
    place: dict[str, Any] = {"dtype": center.dtype, "device": center.device}
    offset = torch.arange(1, size + 1, **place) - size / 2 - 0.5
    mean = center.unsqueeze(-1) + offset * stride.unsqueeze(-1)
    distance = torch.arange(1, pixels + 1, **place) - mean.unsqueeze(-1)
    return (-0.5 * distance.square() / variance[..., None, None]).softmax(-1)


class Attention(nn.Module):
    r"""A window on images: a grid of N x N Gaussian filters, placed by a linear map of the decoder's output h.

    .. math:: (\tilde g_X, \tilde g_Y, \log \sigma^2, \log \tilde\delta, \log \gamma) = W h + b, \quad
        g_X = \frac{A + 1}{2} (\tilde g_X + 1), \quad g_Y = \frac{B + 1}{2} (\tilde g_Y + 1), \quad
        \delta = \frac{\max(A, B) - 1}{N - 1} \tilde\delta

    for images of A columns and B rows (one filter alone has no stride). The channels of an image share the grid. At
    first it covers the image, with filters half as wide as their distance. (From b = 0 they would be a pixel wide and
    reach from corner to corner: two of them see nothing of a digit of MNIST, and the latents stay unused for epochs.)

    Args:
        hidden: width of the decoder's output.
        image_shape: rows B and columns A of the image.
        size: number N of filters along each axis.

    References:
        Gregor et al. 2015, section 3.2, https://arxiv.org/abs/1502.04623.

    Example:
        >>> attention = Attention(16, (7, 9), size=3)
        >>> grid = attention(torch.zeros(5, 16))
        >>> attention.read(torch.zeros(5, 2, 7, 9), grid).shape
        torch.Size([5, 2, 3, 3])
        >>> attention.write(torch.zeros(5, 2, 3, 3), grid).shape
        torch.Size([5, 2, 7, 9])
    """

    def __init__(self, hidden: int, image_shape: tuple[int, int], size: int) -> None:
        super().__init__()
        self.image_shape, self.size = image_shape, size
        self.place = mlp(hidden, (), 5)
        (linear,) = self.place
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.bias[2] = 2 * math.log(max(image_shape) / (2 * size))
            linear.bias[3] = math.log(max(size - 1, 1) / size)

    def forward(self, output: Tensor) -> Grid:
        """The grid for `*batch x hidden` outputs of the decoder."""
        x, y, log_variance, log_stride, log_intensity = full_precision(self.place(output)).unbind(-1)
        rows, columns = self.image_shape
        widest = (max(rows, columns) - 1) / max(self.size - 1, 1)
        return Grid(
            x=(columns + 1) / 2 * (x + 1),
            y=(rows + 1) / 2 * (y + 1),
            stride=widest * log_stride.exp(),
            variance=log_variance.exp(),
            intensity=log_intensity.exp(),
        )

    def read(self, images: Tensor, grid: Grid) -> Tensor:
        """The patches γ F_Y x F_Xᵀ, `*batch x C x N x N`, of `*batch x C x B x A` images."""
        by_row, by_column = self._filters(grid)
        return grid.intensity[..., None, None, None] * (by_row @ images @ by_column.mT)

    def write(self, patches: Tensor, grid: Grid) -> Tensor:
        """The images F_Yᵀ w F_X / γ, `*batch x C x B x A`, of `*batch x C x N x N` patches."""
        by_row, by_column = self._filters(grid)
        return by_row.mT @ patches @ by_column / grid.intensity[..., None, None, None]

    def _filters(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """F_Y and F_X, `*batch x 1 x N x B` and `*batch x 1 x N x A`."""
        found = (
            filterbank(center, grid.stride, grid.variance, self.size, pixels).unsqueeze(-3)
            for center, pixels in zip((grid.y, grid.x), self.image_shape, strict=True)
        )
        by_row, by_column = found
        return by_row, by_column
