"""The importance-weighted bound."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pyrovae.objectives.multisample import MultiSample, log_mean_exp
from pyrovae.registry import OBJECTIVES

__all__ = ["IWAE"]


@OBJECTIVES.register
class IWAE(MultiSample):
    r"""Importance-weighted bound, one for each data point.

    .. math:: \mathcal{L}_K = \mathbb{E}_{z_1 \dots z_K \sim q(z \mid x)}
        \log \frac{1}{K} \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)}

    It rises with K from the ELBO (K = 1) to ``log p(x)``. The mean over particles is taken inside the logarithm of
    each data point; the scale of a subsampled data plate multiplies the bound.

    Args:
        particles: number K of particles.
        gradient: ``"dreg"`` (doubly reparameterized), ``"pathwise"``, ``"vimco"`` or ``"score"`` (the last two for any
            guide, discrete too), or ``"auto"`` for the best that is defined; the formulas stand at
            :class:`pyrovae.objectives.MultiSample`.

    Raises:
        ArgumentError: an argument is out of range; at the first evaluation, a guide that the gradient is not defined
            for.
        ModelGuideError: at the first evaluation, a subsampled plate inside shared latents, where a minibatch gives no
            bound.

    References:
        Burda et al. 2016, https://arxiv.org/abs/1509.00519; Tucker et al. 2019 (DReG),
        https://arxiv.org/abs/1810.04152; Mnih & Rezende 2016 (VIMCO), https://arxiv.org/abs/1602.06725.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))   # too broad
        >>> x = torch.tensor([0.0, 2.0])
        >>> exact = dist.Normal(0.0, 2.0**0.5).log_prob(x).sum()
        >>> gap = [float(exact - IWAE(particles).estimate(model, guide, x).bound) for particles in (2, 2000)]
        >>> abs(gap[1]) < 0.05
        True
    """

    gradients: ClassVar[tuple[str, ...]] = ("dreg", "pathwise", "score", "vimco")

    def __init__(self, particles: int, gradient: str = "pathwise") -> None:
        super().__init__(particles, gradient)

    def bound(self, log_w: Tensor) -> Tensor:
        """``log (1/K) Σ w_k``."""
        return log_mean_exp(log_w)

    def sensitivities(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """``w̃_k`` and ``w̃_k²``, with w̃ the normalised weights."""
        normalised = log_w.softmax(0)
        return normalised, normalised.square()
