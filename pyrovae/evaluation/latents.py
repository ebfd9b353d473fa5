"""Which latent dimensions an amortized posterior uses, and how much each costs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae.errors import ArgumentError
from pyrovae.evaluation.likelihood import asking
from pyrovae.modes import device_of
from pyrovae.training.data import Data, batches

__all__ = ["ActiveUnits", "active_units", "kl_per_dimension"]


@dataclass(frozen=True)
class ActiveUnits:
    """Activity of each latent dimension.

    Args:
        activity: variance over the data of the posterior mean, `latent_dim`.
        threshold: above which a dimension counts as active.
    """

    activity: Tensor
    threshold: float

    @property
    def mask(self) -> Tensor:
        """Which dimensions are active, `latent_dim`."""
        return self.activity > self.threshold

    @property
    def count(self) -> int:
        """Number of active dimensions."""
        return int(self.mask.sum())


def active_units(guide: Any, data: Data, threshold: float = 0.01) -> ActiveUnits:
    r"""Latent dimensions whose posterior mean varies with the data.

    .. math:: A_j = \mathrm{Var}_{x}\, \mathbb{E}_{q(z \mid x)} z_j > \text{threshold}

    Args:
        guide: an amortized guide with ``encode(x)``.
        data: as for :func:`pyrovae.fit`; as many of its tensors are encoded as ``encode`` takes.
        threshold: on the variance, in squared units of the latent; at least 0.

    Returns:
        An :class:`ActiveUnits` with ``activity``, ``mask`` and ``count``.

    Raises:
        ArgumentError: the guide has no ``encode``, or the threshold is negative.

    References:
        Burda et al. 2016, section 5.1 (threshold 0.01), https://arxiv.org/abs/1509.00519.

    Example:
        >>> import pyrovae
        >>> from pyrovae.models import VAE
        >>> from pyrovae.guides import AmortizedNormal
        >>> guide = AmortizedNormal(VAE(data_shape=(8, 8), latent_dim=3, hidden=(16,)))
        >>> active_units(guide, pyrovae.datasets.load("digits").test).activity.shape
        torch.Size([3])
    """
    if not threshold >= 0.0:
        raise ArgumentError(f"threshold is {threshold!r}; it must be at least 0")
    with asking(guide, seed=0):  # the mean of a flow is estimated
        means = torch.cat([q.mean for q in _posteriors(guide, data)])
    return ActiveUnits(means.double().var(0, correction=0), threshold)


@torch.no_grad()
def kl_per_dimension(model: Any, guide: Any, data: Data) -> Tensor:
    r"""Mean KL from prior to posterior of each latent dimension, in nats per data point.

    .. math:: \frac{1}{N} \sum_n \mathrm{KL}(q(z_j \mid x_n) \,\|\, p(z_j))

    Args:
        model: a model with ``prior()``.
        guide: an amortized guide with ``encode(x)``; both distributions must factorise over the dimensions.
        data: as for :func:`pyrovae.fit`; as many of its tensors are encoded as ``encode`` takes.

    Returns:
        A `latent_dim` tensor in nats.

    Raises:
        ArgumentError: a distribution does not factorise, or has no closed-form KL.

    Example:
        >>> import pyrovae
        >>> from pyrovae.models import VAE
        >>> from pyrovae.guides import AmortizedNormal
        >>> model = VAE(data_shape=(8, 8), latent_dim=3, hidden=(16,))
        >>> bool((kl_per_dimension(model, AmortizedNormal(model), pyrovae.datasets.load("digits").test) >= 0).all())
        True
    """
    prior = model.prior()
    total, points = torch.zeros(()), 0
    with asking(guide, seed=0):
        for q in _posteriors(guide, data):
            if getattr(q, "reinterpreted_batch_ndims", 0) != 1 or getattr(prior, "reinterpreted_batch_ndims", 0) != 1:
                raise ArgumentError(
                    f"posterior {type(q).__name__} and prior {type(prior).__name__} must factorise over the latent"
                    " dimensions (Normal(…).to_event(1)) for a KL per dimension"
                )
            try:
                expanded = prior.base_dist.expand(q.base_dist.batch_shape)  # some of torch's KLs need it
                kl = torch.distributions.kl_divergence(q.base_dist, expanded)
            except NotImplementedError as error:
                raise ArgumentError(f"no closed-form KL: {error}") from error
            total, points = total + kl.double().sum(0), points + len(kl)
    return total / points


def _posteriors(guide: Any, data: Data) -> Iterator[Any]:
    """The posterior of each minibatch, in turn: one of a flow keeps what it draws."""
    if not hasattr(guide, "encode"):
        raise ArgumentError(f"guide is a {type(guide).__name__} without encode(x); give an amortized guide")
    source = batches(data, None, device_of(guide), None)
    takes = len(inspect.signature(guide.encode).parameters)  # the labels too, of a guide of labelled data
    return (guide.encode(*batch[:takes]) for batch in source.epoch(0))
