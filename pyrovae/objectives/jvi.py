"""The jackknife of the importance-weighted bound."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import torch
from torch import Tensor

from pyrovae.errors import ArgumentError
from pyrovae.objectives.multisample import MultiSample
from pyrovae.registry import OBJECTIVES

__all__ = ["JVI"]

_MOST_SUBSETS = 10_000


@OBJECTIVES.register
class JVI(MultiSample):
    r"""Jackknife variational inference: the order-m jackknife of the IWAE bound, for each data point.

    .. math:: \mathcal{L}_{K,m} = \sum_{j=0}^m c_j \, \bar{\mathcal{L}}_{K-j}, \qquad
        c_j = (-1)^j \frac{(K - j)^m}{(m - j)!\, j!}

    where the bar is the mean of the IWAE bound over all subsets of K − j of the particles. Its bias is O(K^−(m+1))
    instead of the O(1/K) of IWAE (m = 0). For m > 0 it is no longer a lower bound, and a guide that is trained on it
    can raise it without limit by weights of heavy tails: train on IWAE, and use the jackknife to evaluate (in Nowozin's
    table 1 training on it is not better either).

    Args:
        particles: number K of particles, above ``order``.
        order: order m of the jackknife; the subsets of K − m particles number K over m.
        gradient: as for :class:`pyrovae.IWAE`.

    Raises:
        ArgumentError: an argument is out of range, or the subsets are too many.
        ModelGuideError: at the first evaluation, a subsampled plate inside shared latents.

    References:
        Nowozin 2018, https://openreview.net/forum?id=HyZoi-WRb.

    Example:
        >>> log_w = torch.tensor([0.0, 1.0, 3.0])
        >>> iwae = [float(JVI(3, order=0).bound(log_w)), float(JVI(3, order=1).bound(log_w))]
        >>> iwae[1] > iwae[0]   # the jackknife removes a bias that is downward
        True
    """

    gradients: ClassVar[tuple[str, ...]] = ("dreg", "pathwise", "score", "vimco")

    def __init__(self, particles: int, order: int = 1, gradient: str = "pathwise") -> None:
        super().__init__(particles, gradient)
        if not isinstance(order, int) or isinstance(order, bool) or not 0 <= order < particles:
            raise ArgumentError(
                f"order is {order!r}; it must be a whole number from 0 to {particles - 1}, one below particles"
            )
        subsets = sum(math.comb(particles, left_out) for left_out in range(order + 1))
        if subsets > _MOST_SUBSETS:
            raise ArgumentError(
                f"particles={particles} and order={order} make {subsets} subsets, more than {_MOST_SUBSETS}; lower one"
            )
        self.order = order
        keep = [
            [k not in removed for k in range(particles)]
            for left_out in range(order + 1)
            for removed in itertools.combinations(range(particles), left_out)
        ]
        coefficient = []
        for j in range(order + 1):
            c = (-1) ** j * (particles - j) ** order / (math.factorial(order - j) * math.factorial(j))
            coefficient += [c / math.comb(particles, j)] * math.comb(particles, j)
        self._keep = torch.tensor(keep)
        self._coefficient = torch.tensor(coefficient, dtype=torch.float64)

    def to(self, device: torch.device | str) -> JVI:
        """Moves the subsets, too, to a device."""
        self._keep, self._coefficient = self._keep.to(device), self._coefficient.to(device)
        super().to(device)
        return self

    def _subsets(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Log-weights of every subset, `particles x subsets x …`, −∞ where left out; and the subsets' coefficients."""
        ones = (1,) * (log_w.dim() - 1)
        keep = self._keep.T.reshape(*self._keep.T.shape, *ones)
        left = log_w.unsqueeze(1).masked_fill(~keep, -math.inf)
        return left, self._coefficient.to(log_w.dtype).reshape(-1, *ones)

    def bound(self, log_w: Tensor) -> Tensor:
        """The jackknife of ``log mean w``."""
        left, coefficient = self._subsets(log_w)
        sizes = self._keep.sum(1).to(log_w.dtype).log().reshape(-1, *(1,) * (log_w.dim() - 1))
        return (coefficient * (left.logsumexp(0) - sizes)).sum(0)

    def sensitivities(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Both are those of IWAE, summed over the subsets with their coefficients."""
        left, coefficient = self._subsets(log_w)
        normalised = left.softmax(0)
        return (coefficient * normalised).sum(1), (coefficient * normalised.square()).sum(1)
