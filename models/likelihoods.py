"""Likelihoods p(x | z) that a decoder's output parametrizes, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae.distributions import Categorical256, DiscretizedLogistic, DiscretizedLogisticMixture
from pyrovae.errors import DataError

__all__ = ["LIKELIHOODS", "Likelihood", "by_element", "require_batch", "start_at_mean"]

_CLIP = 1e-3  # of the data mean before its logit is taken, as in Burda et al.'s code
_SHARPEST = -8.0  # log-scale of a discretized logistic, in intensities; then its likeliest level has 99.4 %
_COMPONENTS = 5  # of a mixture of these, which Salimans et al. 2017 find to be enough


@dataclass(frozen=True)
class Likelihood:
    """A family of element-wise distributions over the data.

    Args:
        outputs: numbers that the decoder gives for each element of a data point.
        distribution: builds the element-wise distribution from the raw output, `*batch x *event x outputs`
            (`*batch x *event` when ``outputs`` is 1), and the scale parameter where it has one.
        bias: the output that reproduces a data mean: `*event` to `*event x outputs` likewise.
        support: the values that a data point's elements may take.
        advice: what to do with data outside the support.
        scaled: whether the model has a scale parameter, one for all elements, that the decoder does not give.
    """

    outputs: int
    distribution: Callable[[Tensor, Tensor | None], dist.TorchDistribution]
    bias: Callable[[Tensor], Tensor]
    support: constraints.Constraint
    advice: str
    scaled: bool = False

    def scale(self) -> PyroParam | None:
        """A model's scale parameter, which starts at 1; ``None`` where it has none."""
        return PyroParam(torch.ones(()), constraints.softplus_positive) if self.scaled else None


def _logit(mean: Tensor) -> Tensor:
    return _clipped(mean).logit()


def _clipped(mean: Tensor) -> Tensor:
    return mean.clamp(_CLIP, 1.0 - _CLIP)


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
    slope = _solve(lambda slope: (slope.unsqueeze(-1) * levels).softmax(-1) @ levels, _clipped(mean), 2000.0)
    return slope.unsqueeze(-1) * levels


def _log_scale(out: Tensor, start: float) -> Tensor:
    """Log-scales above the sharpest, that start at ``start`` where the output is zero; none is without a gradient."""
    return _SHARPEST + softplus(out + (start - _SHARPEST))


def _logistic(out: Tensor) -> DiscretizedLogistic:
    """From `… x 2` outputs: zeros stand for the middle of the range, and for most of it."""
    loc, log_scale = out.unbind(-1)
    return DiscretizedLogistic(0.5 + loc, _log_scale(log_scale, -2.0))


def _logistic_mixture(out: Tensor) -> DiscretizedLogisticMixture:
    """From `… x 15` outputs: weights, locations, log-scales; zeros stand for components that share the range alike."""
    logits, loc, log_scale = out.unflatten(-1, (3, _COMPONENTS)).unbind(-2)
    centres = (torch.arange(_COMPONENTS, dtype=out.dtype, device=out.device) + 0.5) / _COMPONENTS
    return DiscretizedLogisticMixture(logits, centres + loc, _log_scale(log_scale, -3.0))


def _logistic_outputs(loc: Tensor) -> Tensor:
    return torch.stack([loc, torch.zeros_like(loc)], dim=-1)


def _logistic_mixture_outputs(loc: Tensor) -> Tensor:
    """The same shift of all components."""
    shift = loc.unsqueeze(-1).expand(*loc.shape, _COMPONENTS)
    return torch.cat([torch.zeros_like(shift), shift, torch.zeros_like(shift)], dim=-1)


def _logistic_bias(mean: Tensor) -> Tensor:
    return _logistic_outputs(_solve(lambda loc: _logistic(_logistic_outputs(loc)).mean, _clipped(mean), 5.0))


def _logistic_mixture_bias(mean: Tensor) -> Tensor:
    return _logistic_mixture_outputs(
        _solve(lambda loc: _logistic_mixture(_logistic_mixture_outputs(loc)).mean, _clipped(mean), 5.0)
    )


_EIGHT_BITS = "Round the intensities to 8 bits, (x * 255).round() / 255, or divide levels 0…255 by 255."

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
        scaled=True,
    ),
    "laplace": Likelihood(
        outputs=1,
        distribution=lambda out, scale: dist.Laplace(out, scale),
        bias=lambda mean: mean,
        support=constraints.real,
        advice="Remove or impute what is not finite.",
        scaled=True,
    ),
    "categorical-256": Likelihood(
        outputs=256,
        distribution=lambda out, scale: Categorical256(out),
        bias=_categorical_logits,
        support=Categorical256.support,
        advice=_EIGHT_BITS,
    ),
    "discretized-logistic": Likelihood(
        outputs=2,
        distribution=lambda out, scale: _logistic(out),
        bias=_logistic_bias,
        support=DiscretizedLogistic.support,
        advice=_EIGHT_BITS,
    ),
    "discretized-logistic-mixture": Likelihood(
        outputs=3 * _COMPONENTS,
        distribution=lambda out, scale: _logistic_mixture(out),
        bias=_logistic_mixture_bias,
        support=DiscretizedLogisticMixture.support,
        advice=_EIGHT_BITS,
    ),
}


def by_element(out: Tensor, outputs: int, data_shape: tuple[int, ...], convolutional: bool) -> Tensor:
    """A decoder's output with the numbers of each element of a data point in a row.

    Args:
        out: `*batch x features` of a fully connected decoder, or `*batch x channels x H x W` of a convolutional one,
            which puts the numbers of an element among the channels.
        outputs: of the likelihood.
        data_shape: shape of a data point.
        convolutional: which of the two the decoder is.

    Returns:
        `*batch x *data_shape` or, with several outputs, `… x outputs`, as :attr:`Likelihood.distribution` takes it.

    Example:
        >>> by_element(torch.zeros(5, 4, 3 * 2, 8, 9), 2, (3, 8, 9), convolutional=True).shape
        torch.Size([5, 4, 3, 8, 9, 2])
    """
    batch = out.shape[: -3 if convolutional else -1]
    if outputs == 1:
        return out.reshape(*batch, *data_shape)
    if convolutional:
        out = out.unflatten(-3, (-1, outputs)).movedim(-3, -1)
    return out.reshape(*batch, *data_shape, outputs)


@torch.no_grad()
def start_at_mean(decoder: nn.Module, likelihood: Likelihood, mean: Tensor, convolutional: bool) -> None:
    """Sets a decoder's last bias so that it starts at the mean of the data.

    Args:
        decoder: a network that ends with a linear layer or a convolution.
        likelihood: that the output parametrizes.
        mean: of the data, `*data_shape`.
        convolutional: whether the decoder is; it then has one bias a channel.

    References:
        Burda et al. 2016, appendix, https://arxiv.org/abs/1509.00519.
    """
    bias = [module for module in decoder.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1].bias
    assert bias is not None
    if convolutional:
        mean = mean.reshape(-1, *mean.shape[-2:]).mean((1, 2))
    bias.copy_(likelihood.bias(mean.to(bias)).reshape(-1))


def require_batch(x: Tensor, data_shape: tuple[int, ...]) -> None:
    """Raises an error unless ``x`` is a batch of data points of a model's shape."""
    if tuple(x.shape[1:]) != data_shape:
        raise DataError(
            f"x has shape {tuple(x.shape)}; this model takes batches of shape (n, *{data_shape})."
            " Reshape the data, or build the model with their data_shape."
        )
