"""Logistic distributions and their mixtures, rounded to the 256 intensities of an 8-bit image."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from pyrovae.distributions.categorical256 import Categorical256

__all__ = ["DiscretizedLogistic", "DiscretizedLogisticMixture"]

_TOP = 255  # the highest level; intensities are levels over it
_AT_ONCE = 15  # thresholds that a moment takes at a time, which bounds its memory


class DiscretizedLogistic(TorchDistribution):
    r"""Logistic distribution rounded to the intensities 0/255, …, 255/255; the two ends take all that is beyond them.

    .. math:: P(x) = \sigma\Big(\frac{x + h - \mu}{s}\Big) - \sigma\Big(\frac{x - h - \mu}{s}\Big),
        \qquad h = \tfrac{1}{510},

    without the second term at 0 and with 1 for the first at 1. With b and a for the two arguments, what is computed is

    .. math:: \log P(x) = \log\sigma(b) + \log\sigma(-a) + \log(1 - e^{-2h/s}),

    which is exact, and loses no digits where both sigmoids are near 0 or near 1. Nats per element.

    Args:
        loc: A tensor that broadcasts to `*batch`: the location μ, on the scale of the intensities.
        log_scale: likewise: log s, on the same scale; between −80 and 80 all is finite in float32.
        validate_args: whether to check arguments and values.

    References:
        Kingma et al. 2016, section 4.2.2, https://arxiv.org/abs/1606.04934; Salimans et al. 2017, "PixelCNN++",
        https://arxiv.org/abs/1701.05517.

    Example:
        >>> levels = torch.arange(256) / 255
        >>> x = DiscretizedLogistic(torch.tensor(0.3), torch.tensor(-5.0))
        >>> print(f"{x.log_prob(levels).exp().sum():.5f} {x.mean:.4f}")
        1.00000 0.3000
        >>> x.mode * 255, x.sample((2, 3)).shape
        (tensor(76.), torch.Size([2, 3]))
    """

    arg_constraints = {"loc": constraints.real, "log_scale": constraints.real}  # noqa: RUF012
    support = Categorical256.support

    def __init__(self, loc: Tensor, log_scale: Tensor, validate_args: bool | None = None) -> None:
        loc, log_scale = broadcast_all(loc, log_scale)
        half = loc.dtype in (torch.float16, torch.bfloat16)  # 8 bits leave none for the distance to an edge
        self.loc, self.log_scale = (loc.float(), log_scale.float()) if half else (loc, log_scale)
        super().__init__(self.loc.shape, torch.Size(), validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Expected intensity in [0, 1], `*batch`: exact."""
        return self._moment(lambda level: torch.ones_like(level)) / _TOP

    @property
    def variance(self) -> Tensor:
        """Variance of the intensity, `*batch`: exact."""
        return self._moment(lambda level: 2.0 * level - 1.0) / _TOP**2 - self.mean.square()

    @property
    def mode(self) -> Tensor:
        """The most probable intensity, `*batch`: the one nearest to the location, or an end."""
        nearest = (self.loc.detach().clamp(0.0, 1.0) * _TOP).round() / _TOP
        candidates = torch.stack([nearest, torch.zeros_like(nearest), torch.ones_like(nearest)])
        return candidates.gather(0, self.log_prob(candidates).argmax(0, keepdim=True)).squeeze(0)

    def _moment(self, growth: Any) -> Tensor:
        """E f(level) of an f that begins at f(0) = 0 and grows by ``growth`` at each level: by summation by parts."""
        levels = torch.arange(1, _TOP + 1, dtype=self.loc.dtype, device=self.loc.device)
        loc, precision = self.loc.unsqueeze(-1), self.log_scale.neg().exp().unsqueeze(-1)
        total = torch.zeros_like(self.loc)
        for level in levels.split(_AT_ONCE):
            reached = torch.sigmoid((loc - (level - 0.5) / _TOP) * precision)
            total = total + (growth(level) * reached).sum(-1)
        return total

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogistic:
        """A distribution of the given batch shape with the same parameters."""
        shape = torch.Size(batch_shape)
        return type(self)(self.loc.expand(shape), self.log_scale.expand(shape), validate_args=False)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Intensities in [0, 1], `*sample_shape x *batch`: logistic draws, rounded, what is beyond the ends at them."""
        shape = self._extended_shape(torch.Size(sample_shape))
        tiny = torch.finfo(self.loc.dtype).tiny
        uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).clamp(tiny)
        x = self.loc + self.log_scale.exp() * (uniform.log() - torch.log1p(-uniform))
        return (x.clamp(0.0, 1.0) * _TOP).round() / _TOP

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the levels ``value`` (intensities in [0, 1]), in nats per element."""
        if self._validate_args:
            self._validate_sample(value)
        level = (value * _TOP).round()
        precision = self.log_scale.neg().exp()
        upper = logsigmoid(((level + 0.5) / _TOP - self.loc) * precision)
        lower = logsigmoid((self.loc - (level - 0.5) / _TOP) * precision)
        between = torch.log(-torch.expm1(-precision / _TOP))
        at_0, at_1 = level == 0, level == _TOP
        zero = torch.zeros_like(upper)
        return torch.where(at_1, zero, upper) + torch.where(at_0, zero, lower) + torch.where(at_0 | at_1, zero, between)


class DiscretizedLogisticMixture(dist.MixtureSameFamily):
    r"""Mixture of K logistic distributions rounded to 8-bit intensities, for each element on its own.

    .. math:: P(x) = \sum_{k=1}^{K} \mathrm{softmax}(\text{logits})_k \, P_k(x)

    with the :class:`DiscretizedLogistic` of location k and log-scale k for P_k. Nats per element.

    Args:
        logits: A `*batch x K` tensor of unnormalised log-weights.
        loc: A `*batch x K` tensor of locations, on the scale of the intensities.
        log_scale: A `*batch x K` tensor of log-scales, on the same scale.
        validate_args: whether to check arguments and values.

    References:
        Salimans et al. 2017, "PixelCNN++", https://arxiv.org/abs/1701.05517 (of which this is the mixture of one
        channel: channels are independent here).

    Example:
        >>> x = DiscretizedLogisticMixture(torch.zeros(2), torch.tensor([0.2, 0.8]), torch.tensor([-6.0, -6.0]))
        >>> float(x.mean.round(decimals=4)), x.sample((3,)).shape
        (0.5, torch.Size([3]))
        >>> float(x.log_prob(torch.arange(256) / 255).exp().sum().round(decimals=5))
        1.0
    """

    support = Categorical256.support

    def __init__(self, logits: Tensor, loc: Tensor, log_scale: Tensor, validate_args: bool | None = None) -> None:
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        super().__init__(
            dist.Categorical(logits=logits, validate_args=False),
            DiscretizedLogistic(loc, log_scale, validate_args=False),
            validate_args=validate_args,
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogisticMixture:
        """A distribution of the given batch shape with the same parameters."""
        shape = (*batch_shape, self._num_component)
        parts = self.component_distribution
        logits = self.mixture_distribution.logits
        return type(self)(
            logits.expand(shape), parts.loc.expand(shape), parts.log_scale.expand(shape), validate_args=False
        )
