"""Householder flow, and the reflections that it is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrovae.errors import require_count
from pyrovae.flows.layers import SMALL, Parametrized
from pyrovae.flows.transforms import FlowTransform

__all__ = ["Householder", "paired_normals", "reflect"]


def reflect(x: Tensor, normals: Tensor, transpose: bool = False) -> Tensor:
    r"""Applies reflections one after another, the last normal first (with ``transpose``, the first one first).

    .. math:: Q x, \qquad Q = H_1 H_2 \cdots H_K, \qquad H_k = I - 2 v_k v_k^\top / \|v_k\|^2

    Args:
        x: `*batch x features` vectors.
        normals: the v, `*batch x K x features`.
        transpose: apply :math:`Q^\top`, which is the inverse.

    Example:
        >>> x, normals = torch.randn(5, 3), torch.randn(4, 3)
        >>> torch.allclose(reflect(reflect(x, normals), normals, transpose=True), x, atol=1e-5)
        True
    """
    units = F.normalize(normals, dim=-1).unbind(-2)
    for v in units if transpose else reversed(units):
        x = x - 2.0 * v * (v * x).sum(-1, keepdim=True)
    return x


def paired_normals(reflections: int, features: int) -> Tensor:
    """Initial normals, `reflections x features`: in pairs of nearly equal ones, whose reflections nearly cancel."""
    pairs = torch.randn((reflections + 1) // 2, features).repeat_interleave(2, dim=0)[:reflections]
    return pairs + SMALL * torch.randn(reflections, features)


class _HouseholderTransform(FlowTransform):
    def __init__(self, normals: Tensor) -> None:
        super().__init__()
        self.normals = normals

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = reflect(x, self.normals)
        return y, torch.zeros_like(y[..., 0])

    def pull(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = reflect(y, self.normals, transpose=True)
        return x, torch.zeros_like(x[..., 0])


class Householder(Parametrized):
    r"""Householder flow: a rotation, as a product of reflections; it preserves volume.

    .. math:: f(x) = H_1 H_2 \cdots H_K x, \qquad H_k = I - 2 v_k v_k^\top / \|v_k\|^2, \qquad |\det| = 1

    On a base with a scale for each dimension it gives correlations; an isotropic base it leaves as it is. Both
    directions are quick. An even number of reflections starts near the identity, an odd one near one reflection.

    Args:
        features: size of the vectors.
        context: size of the context from which a network computes the v; 0 to learn them.
        hidden: widths of that network; empty for a linear map.
        reflections: number K of reflections.

    References:
        Tomczak & Welling 2016, https://arxiv.org/abs/1611.09630.

    Example:
        >>> x = torch.randn(7, 3)
        >>> y = Householder(3)()(x)
        >>> torch.allclose(y.norm(dim=-1), x.norm(dim=-1))
        True
    """

    scores = "quick"
    kind = _HouseholderTransform

    def __init__(self, features: int, context: int = 0, hidden: Sequence[int] = (), reflections: int = 2) -> None:
        require_count("reflections", reflections)
        super().__init__(features, context, hidden, normals=paired_normals(reflections, features))
