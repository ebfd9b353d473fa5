"""Amortized posteriors: an encoder network from a data point to the distribution of its latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import DataError
from pyrovae.models.networks import ConvEncoder, full_precision, mlp
from pyrovae.registry import GUIDES

__all__ = ["AmortizedNormal"]

_LOG_SCALE_LIMIT = 10.0  # exp(±10): far outside any useful posterior, near enough to keep a first step finite


class LatentModel(Protocol):
    """What an amortized guide reads from a model."""

    data_shape: tuple[int, ...]
    latent_dim: int
    hidden: tuple[int, ...]
    channels: tuple[int, ...]
    activation: str
    network: str
    image_shape: tuple[int, int, int]


@GUIDES.register
class AmortizedNormal(PyroModule):
    r"""Diagonal Gaussian posterior whose mean and scale an encoder computes from the data point.

    .. math:: q_\phi(z \mid x) = \mathcal{N}(\mu_\phi(x), \mathrm{diag}\,\sigma_\phi^2(x))

    Args:
        model: the model, of which it reads ``data_shape``, ``latent_dim`` and, for what is not given here, the
            network; the model is not kept, and shares no parameters with the guide.
        hidden: widths of the encoder's hidden layers, from the data to the latent; ``None`` mirrors the model's.
        activation: name of the activation; ``None`` takes the model's.

    References:
        Kingma & Welling 2014, https://arxiv.org/abs/1312.6114.

    Example:
        >>> import torch
        >>> from pyrovae.models import VAE
        >>> guide = AmortizedNormal(VAE(data_shape=(8, 8), latent_dim=2, hidden=(32,)))
        >>> q = guide.encode(torch.zeros(5, 8, 8))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([2]))
    """

    def __init__(self, model: LatentModel, hidden: Sequence[int] | None = None, activation: str | None = None) -> None:
        super().__init__()
        hidden = tuple(reversed(model.hidden)) if hidden is None else tuple(hidden)
        activation = activation or model.activation
        self.data_shape = model.data_shape
        self.latent_dim = model.latent_dim
        if model.network == "conv":
            self.image_shape: tuple[int, ...] = model.image_shape
            channels = tuple(reversed(model.channels))
            self.encoder: nn.Module = ConvEncoder(model.image_shape, channels, hidden, 2 * self.latent_dim, activation)
        else:
            self.image_shape = (math.prod(self.data_shape),)
            self.encoder = mlp(math.prod(self.data_shape), hidden, 2 * self.latent_dim, activation)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) for `*batch x *data_shape` data: batch shape `*batch`, event shape (latent_dim,)."""
        event_dim = len(self.data_shape)
        if tuple(x.shape[x.dim() - event_dim :]) != self.data_shape:
            raise DataError(
                f"x has shape {tuple(x.shape)}; this guide encodes data of shape (…, *{self.data_shape})."
                " Reshape the data, or build model and guide with their data_shape."
            )
        batch = x.shape[: x.dim() - event_dim]
        out = full_precision(self.encoder(x.reshape(*batch, *self.image_shape)))
        loc, log_scale = out.chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.clamp(-_LOG_SCALE_LIMIT, _LOG_SCALE_LIMIT).exp()).to_event(1)

    def forward(self, x: Tensor) -> Tensor:
        """Samples z for a batch `n x *data_shape`; returns `n x latent_dim` (particles to the left)."""
        return self.sample(self.encode(x))

    def sample(self, q: dist.TorchDistribution) -> Tensor:
        """The guide's sample statement, given the posterior of a batch of n data points."""
        with pyro.plate("data", q.batch_shape[-1], device=q.mean.device):
            return pyro.sample("z", q)
