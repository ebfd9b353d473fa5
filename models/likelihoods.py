"""Likelihoods p(x | z) that a decoder's output parametrizes, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrovae.distributions import Categorical256
from pyrovae.errors import DataError

__all__ = ["LIKELIHOODS", "Likelihood", "require_batch"]

_CLIP = 1e-3  # of the data mean before its logit is taken, as in Burda et al.'s code


@dataclass(frozen=True)
class Likelihood:
    """A family of element-wise distributions over the data.

    Args:
        outputs: numbers that the decoder gives for each element of a data point.
        distribution: builds the element-wise distribution from the raw output, `*batch x *event x outputs`
            (`*batch x *event` when ``outputs`` is 1), and the scale parameter (used by ``"normal"`` alone).
        bias: the output that reproduces a data mean: `*event` to `*event x outputs` likewise.
        support: the values that a data point's elements may take.
        advice: what to do with data outside the support.
    """

    outputs: int
    distribution: Callable[[Tensor, Tensor | None], dist.TorchDistribution]
    bias: Callable[[Tensor], Tensor]
    support: constraints.Constraint
    advice: str


def _logit(mean: Tensor) -> Tensor:
    return mean.clamp(_CLIP, 1.0 - _CLIP).logit()


def _solve(mean_of: Callable[[Tensor], Tensor], mean: Tensor, limit: float) -> Tensor:
    """The parameter in ±limit whose distribution has that mean, for a mean that rises with it: by bisection."""
    low, high = torch.full_like(mean, -limit), torch.full_like(mean, limit)
    for _ in range(60):
        middle = (low + high) / 2
        below = mean_of(middle) < mean
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _continuous_bernoulli_logit(mean: Tensor) -> Tensor:
    return _solve(lambda logit: dist.ContinuousBernoulli(logits=logit).mean, mean.clamp(0.02, 0.98), 50.0)


def _categorical_logits(mean: Tensor) -> Tensor:
    """Logits linear in the intensity: the broadest distribution over the levels that has the mean."""
    levels = torch.linspace(0.0, 1.0, 256, dtype=mean.dtype, device=mean.device)
    slope = _solve(
        lambda slope: (slope.unsqueeze(-1) * levels).softmax(-1) @ levels, mean.clamp(_CLIP, 1.0 - _CLIP), 2000.0
    )
    return slope.unsqueeze(-1) * levels


LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli": Likelihood(
        outputs=1,
        distribution=lambda out, scale: dist.Bernoulli(logits=out),
        bias=_logit,
        support=constraints.boolean,
        advice="Binarize the data, as datasets.load does with binarization='dynamic', or use"
        " likelihood='continuous-bernoulli' for intensities in [0, 1].",
    ),
    "continuous-bernoulli": Likelihood(
        outputs=1,
        distribution=lambda out, scale: dist.ContinuousBernoulli(logits=out),
        bias=_continuous_bernoulli_logit,
        support=constraints.unit_interval,
        advice="Scale the data to [0, 1], or use likelihood='normal'.",
    ),
    "normal": Likelihood(
        outputs=1,
        distribution=lambda out, scale: dist.Normal(out, scale),
        bias=lambda mean: mean,
        support=constraints.real,
        advice="Remove or impute what is not finite.",
    ),
    "categorical-256": Likelihood(
        outputs=256,
        distribution=lambda out, scale: Categorical256(out),
        bias=_categorical_logits,
        support=Categorical256.support,
        advice="Round the intensities to 8 bits, (x * 255).round() / 255, or divide levels 0…255 by 255.",
    ),
}


def require_batch(x: Tensor, data_shape: tuple[int, ...]) -> None:
    """Raises an error unless ``x`` is a batch of data points of a model's shape."""
    if tuple(x.shape[1:]) != data_shape:
        raise DataError(
            f"x has shape {tuple(x.shape)}; this model takes batches of shape (n, *{data_shape})."
            " Reshape the data, or build the model with their data_shape."
        )
