"""The Rényi bound."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from pyrovae.errors import ArgumentError
from pyrovae.objectives.multisample import MultiSample, log_mean_exp
from pyrovae.registry import OBJECTIVES

__all__ = ["Renyi"]


@OBJECTIVES.register
class Renyi(MultiSample):
    r"""Variational Rényi bound, estimated with K particles for each data point.

    .. math:: \mathcal{L}_\alpha = \frac{1}{1 - \alpha} \log \mathbb{E}_{q} w^{1 - \alpha}
        \approx \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_k w_k^{1 - \alpha}

    α = 0 is the IWAE bound, α → 1 the ELBO (taken as its limit at α = 1). For 0 ≤ α ≤ 1 the estimate is a lower bound
    on ``log p(x)`` in expectation; for α < 0 the exact bound is an upper one, which K particles estimate from below.

    Args:
        alpha: order, any finite number.
        particles: number K of particles.
        gradient: as for :class:`pyrovae.IWAE`.

    Raises:
        ArgumentError: an argument is out of range.
        ModelGuideError: at the first evaluation, a subsampled plate inside shared latents.

    References:
        Li & Turner 2016, https://arxiv.org/abs/1602.02311.

    Example:
        >>> import torch
        >>> log_w = torch.tensor([0.0, 1.0, 3.0])
        >>> bool(torch.isclose(Renyi(1.0, 3).bound(log_w), log_w.mean()))
        True
        >>> bool(Renyi(0.5, 3).bound(log_w) < Renyi(0.0, 3).bound(log_w))
        True
    """

    gradients: ClassVar[tuple[str, ...]] = ("dreg", "pathwise", "score", "vimco")

    def __init__(self, alpha: float, particles: int, gradient: str = "pathwise") -> None:
        super().__init__(particles, gradient)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ArgumentError(f"alpha is {alpha!r}; it must be a finite number (0 for IWAE, 1 for the ELBO)")
        self.alpha = float(alpha)

    def bound(self, log_w: Tensor) -> Tensor:
        """``log mean w^(1−α) / (1−α)``; the mean of log w at α = 1."""
        power = 1.0 - self.alpha
        return log_w.mean(0) if power == 0.0 else log_mean_exp(power * log_w) / power

    def sensitivities(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """``s_k`` and ``α s_k + (1−α) s_k²``, with s the softmax of (1−α) log w."""
        share = ((1.0 - self.alpha) * log_w).softmax(0)
        return share, self.alpha * share + (1.0 - self.alpha) * share.square()
