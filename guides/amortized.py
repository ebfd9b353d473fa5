"""Amortized posteriors: an encoder network from a data point to the distribution of its latents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, DataError
from pyrovae.models.networks import ConvEncoder, full_precision, mlp
from pyrovae.registry import GUIDES

__all__ = ["AmortizedBernoulli", "AmortizedNormal"]

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

    Raises:
        ArgumentError: the model is of another kind, or an argument is out of range.

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
        _require(self, model, "latent_dim", "network")
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
        out = full_precision(self.encoder(_reshaped(x, self.data_shape, self.image_shape)))
        loc, log_scale = out.chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.clamp(-_LOG_SCALE_LIMIT, _LOG_SCALE_LIMIT).exp()).to_event(1)

    def forward(self, x: Tensor) -> Tensor:
        """Samples z for a batch `n x *data_shape`; returns `n x latent_dim` (particles to the left)."""
        return self.sample(self.encode(x))

    def sample(self, q: dist.TorchDistribution) -> Tensor:
        """The guide's sample statement, given the posterior of a batch of n data points."""
        with pyro.plate("data", q.batch_shape[-1], device=q.mean.device):
            return pyro.sample("z", q)


class BinaryModel(Protocol):
    """What an amortized guide of binary layers reads from a model."""

    data_shape: tuple[int, ...]
    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    activation: str


@GUIDES.register
class AmortizedBernoulli(PyroModule):
    r"""Posterior of layers of binary units, each computed by an encoder from the layer below it.

    .. math:: q_\phi(z \mid x) = \prod_{\ell=1}^{L} \mathrm{Bern}(z_\ell \mid \sigma(f_\ell(2 z_{\ell-1} - 1))),
        \qquad z_0 = x

    Binary units have no pathwise gradient: use ``IWAE(particles, gradient="vimco")``, ``ReweightedWakeSleep`` or
    ``ELBO(particles, gradient="score")``.

    Args:
        model: the model, of which it reads ``data_shape``, ``layers`` and, for what is not given here, the networks;
            the model is not kept, and shares no parameters with the guide.
        hidden: widths of each encoder's hidden layers, from below to above; ``None`` mirrors the model's.
        activation: name of the activation; ``None`` takes the model's.

    Raises:
        ArgumentError: the model is of another kind, or an argument is out of range.

    References:
        Dayan et al. 1995, https://doi.org/10.1162/neco.1995.7.5.889; Mnih & Gregor 2014,
        https://arxiv.org/abs/1402.0030.

    Example:
        >>> import torch
        >>> from pyrovae.models import SigmoidBeliefNet
        >>> guide = AmortizedBernoulli(SigmoidBeliefNet(data_shape=(8, 8), layers=(20, 10)))
        >>> guide.encode(torch.zeros(5, 8, 8)).event_shape
        torch.Size([20])
        >>> guide(torch.zeros(5, 8, 8)).shape   # the top layer
        torch.Size([5, 10])
    """

    def __init__(self, model: BinaryModel, hidden: Sequence[int] | None = None, activation: str | None = None) -> None:
        super().__init__()
        _require(self, model, "layers")
        hidden = tuple(reversed(model.hidden)) if hidden is None else tuple(hidden)
        self.data_shape = model.data_shape
        widths = (math.prod(self.data_shape), *model.layers)
        self.encoders = nn.ModuleList(
            mlp(below, hidden, above, activation or model.activation) for below, above in itertools.pairwise(widths)
        )

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z_1 | x) for `*batch x *data_shape` data: batch shape `*batch`, event shape (layers[0],)."""
        return self._above(0, _reshaped(x, self.data_shape, (-1,)))

    def _above(self, layer: int, units: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=full_precision(self.encoders[layer](2.0 * units - 1.0))).to_event(1)

    def forward(self, x: Tensor) -> Tensor:
        """Samples all layers for a batch `n x *data_shape`; returns the top one, `n x layers[-1]`."""
        return self.sample(self.encode(x))

    def sample(self, q: dist.TorchDistribution) -> Tensor:
        """The guide's sample statements, given the posterior of the first layer for n data points."""
        with pyro.plate("data", q.batch_shape[-1], device=q.mean.device):
            z = pyro.sample("z1", q)
            for layer in range(1, len(self.encoders)):
                z = pyro.sample(f"z{layer + 1}", self._above(layer, z))
            return z


_LATENTS = {
    "AmortizedNormal": "one real latent vector, as VAE",
    "AmortizedBernoulli": "layers of binary units, as SigmoidBeliefNet",
}


def _require(guide: object, model: object, *attributes: str) -> None:
    """Raises an error unless the model has what tells the guide's kind of model from others."""
    for attribute in attributes:
        if not hasattr(model, attribute):
            kinds = "; ".join(f"{name} takes models with {latents}" for name, latents in _LATENTS.items())
            raise ArgumentError(
                f"guide {type(guide).__name__} does not fit model {type(model).__name__}, which has no {attribute!r}."
                f" Use another guide: {kinds}."
            )


def _reshaped(x: Tensor, data_shape: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Data `*batch x *data_shape` as `*batch x *shape`, for an encoder."""
    batch = x.shape[: x.dim() - len(data_shape)]
    if tuple(x.shape[len(batch) :]) != data_shape:
        raise DataError(
            f"x has shape {tuple(x.shape)}; this guide encodes data of shape (…, *{data_shape})."
            " Reshape the data, or build model and guide with their data_shape."
        )
    return x.reshape(*batch, *shape)
