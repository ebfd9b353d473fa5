"""The thermodynamic variational objective."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pyrovae.errors import ArgumentError, require_count, unknown_name
from pyrovae.objectives.base import Estimate
from pyrovae.objectives.multisample import MultiSample, elbo_parts
from pyrovae.registry import OBJECTIVES
from pyrovae.structure import Program

__all__ = ["TVO"]


@OBJECTIVES.register
class TVO(MultiSample):
    r"""Thermodynamic variational objective: a left Riemann sum of the thermodynamic integral of ``log p(x)``.

    .. math:: \log p(x) = \int_0^1 \mathbb{E}_{\pi_\beta} \log w \, d\beta \;\ge\;
        \sum_{j=0}^{P-1} (\beta_{j+1} - \beta_j) \, \mathbb{E}_{\pi_{\beta_j}} \log w, \qquad
        \pi_\beta \propto q^{1-\beta} p^\beta

    with the expectations by self-normalised importance sampling with K particles (weights ∝ w^β), for each data point.
    One partition is the ELBO. The gradient is the covariance estimator

    .. math:: \nabla \mathbb{E}_{\pi_\beta} f = \mathbb{E}_{\pi_\beta} \nabla f
        + \mathrm{Cov}_{\pi_\beta}(\nabla \log \tilde\pi_\beta, f), \qquad \tilde\pi_\beta = q^{1-\beta} p^\beta,

    which needs no reparameterization, so that discrete guides are as welcome as others.

    Args:
        particles: number K of particles, at least 2.
        partitions: number P of intervals of [0, 1].
        schedule: ``"log"`` puts β_1 … β_P at equal distances in logarithm from ``beta_min`` to 1, ``"linear"`` at equal
            distances in β; β_0 is 0.
        beta_min: β_1 under the ``"log"`` schedule, between 0 and 1.

    Raises:
        ArgumentError: an argument is out of range.
        ModelGuideError: at the first evaluation, a subsampled plate inside shared latents.

    References:
        Masrani et al. 2019, https://arxiv.org/abs/1907.00031.

    Example:
        >>> log_w = torch.tensor([0.0, 1.0, 3.0])
        >>> bool(torch.isclose(TVO(3, partitions=1).bound(log_w), log_w.mean()))
        True
        >>> bool(TVO(3, partitions=5).bound(log_w) > log_w.mean())
        True
    """

    gradients: ClassVar[tuple[str, ...]] = ("score",)

    def __init__(
        self,
        particles: int,
        partitions: int = 5,
        schedule: Literal["log", "linear"] = "log",
        beta_min: float = 0.025,
    ) -> None:
        super().__init__(particles, "score")
        if particles < 2:
            raise ArgumentError("particles is 1; the covariance gradient of TVO needs particles=2 or more")
        require_count("partitions", partitions)
        if schedule not in ("log", "linear"):
            raise unknown_name("schedule of TVO", schedule, ("log", "linear"))
        if not 0.0 < beta_min < 1.0:
            raise ArgumentError(f"beta_min is {beta_min!r}; it must lie between 0 and 1")
        if schedule == "linear" or partitions == 1:
            betas = torch.linspace(0.0, 1.0, partitions + 1)
        elif partitions == 2:
            betas = torch.tensor([0.0, beta_min, 1.0])
        else:
            betas = torch.cat([torch.zeros(1), torch.logspace(math.log10(beta_min), 0.0, partitions)])
        self._betas = betas

    def to(self, device: torch.device | str) -> TVO:
        """Moves the schedule, too, to a device."""
        self._betas = self._betas.to(device)
        super().to(device)
        return self

    def _shares(self, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """β_j, the widths of the intervals, and the weights of π_β: `particles x partitions x …`."""
        betas = self._betas.to(log_w.dtype)
        shape = (-1, *(1,) * (log_w.dim() - 1))
        left, width = betas[:-1].reshape(shape), betas.diff().reshape(shape)
        return left, width, (left * log_w.unsqueeze(1)).softmax(0)

    def bound(self, log_w: Tensor) -> Tensor:
        """The left Riemann sum."""
        _, width, share = self._shares(log_w)
        return (width * (share * log_w.unsqueeze(1)).sum(0)).sum(0)

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Draws the particles once and returns the loss, the bound and its parts; see :class:`Objective`."""
        weights = self.weights(model, guide, args, kwargs, "parameters")
        log_w = weights.log_w
        held = log_w.detach()
        left, width, share = self._shares(held)
        bound = self.bound(held)
        deviation = held.unsqueeze(1) - (share * held.unsqueeze(1)).sum(0)
        correction = self.particles / (self.particles - 1)  # at β = 0 the sample covariance is then unbiased
        # log π̃_β = log q + β log w; each factor in front is a constant of the gradient.
        tempered = weights.log_q.unsqueeze(1) + left * log_w.unsqueeze(1)
        gradient = (share * (log_w.unsqueeze(1) + correction * deviation * tempered)).sum(0)
        surrogate = (width * gradient).sum(0)
        return Estimate(
            loss=-(weights.scale * (bound + surrogate - surrogate.detach())).sum(),
            bound=(weights.scale * bound).sum(),
            **elbo_parts(weights),
        )
