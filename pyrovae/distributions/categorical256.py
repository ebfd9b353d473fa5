"""A categorical distribution over the 256 intensities of an 8-bit image."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Categorical, constraints

__all__ = ["Categorical256"]

_LEVELS = 256


class _Intensities(constraints.Constraint):
    """The numbers 0/255, 1/255, …, 255/255."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        scaled = value * (_LEVELS - 1)
        return ((scaled - scaled.round()).abs() < 1e-2) & (value >= 0) & (value <= 1)


class Categorical256(TorchDistribution):
    r"""Categorical distribution over the intensities 0/255, …, 255/255, one probability per level.

    .. math:: \log p(x) = \log \mathrm{softmax}(\text{logits})_{255 x}

    The log-probability is that of the discrete level, in nats per element; divided by log 2 it is comparable with
    the bits per dimension of 8-bit images.

    Args:
        logits: A `*batch x 256` tensor of unnormalised log-probabilities.
        validate_args: whether to check arguments and values.

    References:
        van den Oord et al. 2016, "Pixel recurrent neural networks", https://arxiv.org/abs/1601.06759.

    Example:
        >>> flat = Categorical256(torch.zeros(256))
        >>> bool(torch.isclose(flat.log_prob(torch.tensor(51 / 255)), -torch.tensor(256.0).log()))
        True
        >>> float(flat.mean)
        0.5
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012
    support = _Intensities()

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self._categorical = Categorical(logits=logits, validate_args=False)
        super().__init__(logits.shape[:-1], torch.Size(), validate_args=validate_args)

    @property
    def logits(self) -> Tensor:
        """Normalised log-probabilities, `*batch x 256`."""
        return self._categorical.logits

    @property
    def mean(self) -> Tensor:
        """Expected intensity in [0, 1], `*batch`."""
        levels = torch.linspace(0.0, 1.0, _LEVELS, dtype=self.logits.dtype, device=self.logits.device)
        return self._categorical.probs @ levels

    @property
    def variance(self) -> Tensor:
        """Variance of the intensity, `*batch`."""
        levels = torch.linspace(0.0, 1.0, _LEVELS, dtype=self.logits.dtype, device=self.logits.device)
        return self._categorical.probs @ levels.square() - self.mean.square()

    def expand(self, batch_shape: Any, _instance: Any = None) -> Categorical256:
        """A distribution of the given batch shape with the same logits."""
        batch_shape = torch.Size(batch_shape)
        return type(self)(self.logits.expand(*batch_shape, _LEVELS), validate_args=False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Intensities in [0, 1], `*sample_shape x *batch`."""
        with torch.no_grad():
            return self._categorical.sample(sample_shape).to(self.logits.dtype) / (_LEVELS - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the levels ``value`` (intensities in [0, 1]), in nats per element."""
        if self._validate_args:
            self._validate_sample(value)
        level = (value * (_LEVELS - 1)).round().long()
        level, logits = torch.broadcast_tensors(level.unsqueeze(-1), self.logits)
        return logits.gather(-1, level[..., :1]).squeeze(-1)
