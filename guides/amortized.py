"""Amortized posteriors: an encoder network from a data point to the distribution of its latents."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides.families import BernoulliVector, DiagonalNormal, FactorNormal, Family, FlowNormal, FullRankNormal
from pyrovae.models.networks import ConvEncoder, full_precision, hidden_by_network, mlp
from pyrovae.modes import device_of
from pyrovae.registry import GUIDES

__all__ = ["AmortizedBernoulli", "AmortizedFactorCovariance", "AmortizedFlow", "AmortizedFullRank", "AmortizedNormal"]


Hidden = Sequence[int] | Sequence[Sequence[int]]


class LatentModel(Protocol):
    """What an amortized guide reads from a model."""

    data_shape: tuple[int, ...]
    latent_dim: int
    hidden: tuple[int, ...]
    channels: tuple[int, ...]
    activation: str
    network: str
    image_shape: tuple[int, int, int]


class Encoded(PyroModule):
    """What amortized guides of one latent vector share: the encoder, and the statement that samples the latent.

    ``propose(x)`` gives the numbers that describe the posterior, ``posterior(raw)`` the distribution that they
    describe, ``encode(x)`` is one after the other.

    Args:
        model: the model, of which it reads ``data_shape``, ``latent_dim`` and, for what is not given here, the network.
        family: makes the posterior family of a vector of ``latent_dim`` numbers.
        hidden: widths of the encoder's hidden layers; ``None`` mirrors the model's.
        activation: name of the activation; ``None`` takes the model's.
    """

    spherical = False  # whether the latent is a direction, a point of a sphere

    def __init__(
        self,
        model: LatentModel,
        family: Callable[[int], Family],
        hidden: Sequence[int] | None,
        activation: str | None,
    ) -> None:
        super().__init__()
        require(self, model, "latent_dim", "network")
        prior = model.prior() if hasattr(model, "prior") else None
        on_sphere = getattr(prior, "support", None) is constraints.sphere
        if on_sphere != self.spherical:
            where, other = ("on a sphere", "AmortizedVonMisesFisher") if on_sphere else ("real", "AmortizedNormal")
            raise ArgumentError(
                f"guide {type(self).__name__} does not fit model {type(model).__name__}, whose latent is {where}. Use"
                f" another guide ({other}), or another model (VAE for real latents, SphericalVAE for directions)."
            )
        hidden = tuple(reversed(model.hidden)) if hidden is None else tuple(hidden)
        activation = activation or model.activation
        self.data_shape = model.data_shape
        self.latent_dim = model.latent_dim
        self.family = family(self.latent_dim)
        if model.network == "conv":
            self.image_shape: tuple[int, ...] = model.image_shape
            channels = tuple(reversed(model.channels))
            blocks = getattr(model, "blocks", 0)
            self.encoder: nn.Module = ConvEncoder(
                model.image_shape, channels, hidden, self.family.outputs, activation, blocks
            )
        else:
            self.image_shape = (math.prod(self.data_shape),)
            self.encoder = mlp(math.prod(self.data_shape), hidden, self.family.outputs, activation)

    def propose(self, x: Tensor) -> Tensor:
        """The numbers that describe q(z | x), `*batch x outputs`, for `*batch x *data_shape` data."""
        return full_precision(self.encoder(reshaped(x, self.data_shape, self.image_shape)))

    def posterior(self, raw: Tensor) -> dist.TorchDistribution:
        """The distribution that `*batch x outputs` numbers describe: batch shape `*batch`, event (latent_dim,)."""
        return self.family(raw)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) for `*batch x *data_shape` data: batch shape `*batch`, event shape (latent_dim,)."""
        return self.posterior(self.propose(x))

    def forward(self, x: Tensor) -> Tensor:
        """Samples z for a batch `n x *data_shape`; returns `n x latent_dim` (particles to the left)."""
        return self.sample(self.encode(x))

    def sample(self, q: dist.TorchDistribution) -> Tensor:
        """The guide's sample statement, given the posterior of a batch of n data points."""
        with pyro.plate("data", q.batch_shape[-1], device=device_of(self)):
            return pyro.sample("z", q)


@GUIDES.register
class AmortizedNormal(Encoded):
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
        super().__init__(model, DiagonalNormal, hidden, activation)


@GUIDES.register
class AmortizedFullRank(Encoded):
    r"""Gaussian posterior with any covariance, whose mean and Cholesky factor an encoder computes from the data point.

    .. math:: q_\phi(z \mid x) = \mathcal{N}(\mu_\phi(x), L_\phi(x) L_\phi(x)^\top)

    Args:
        model: as for :class:`AmortizedNormal`.
        hidden: widths of the encoder's hidden layers, from the data to the latent; ``None`` mirrors the model's.
        activation: name of the activation; ``None`` takes the model's.

    Raises:
        ArgumentError: the model is of another kind, or an argument is out of range.

    References:
        Kingma & Welling 2019, section 2.5.1, https://arxiv.org/abs/1906.02691.

    Example:
        >>> import torch
        >>> from pyrovae.models import VAE
        >>> guide = AmortizedFullRank(VAE(data_shape=(8, 8), latent_dim=2, hidden=(32,)))
        >>> guide.encode(torch.zeros(5, 8, 8)).covariance_matrix.shape
        torch.Size([5, 2, 2])
    """

    def __init__(self, model: LatentModel, hidden: Sequence[int] | None = None, activation: str | None = None) -> None:
        super().__init__(model, FullRankNormal, hidden, activation)


@GUIDES.register
class AmortizedFactorCovariance(Encoded):
    r"""Gaussian posterior with a factor covariance, all of which an encoder computes from the data point.

    .. math:: q_\phi(z \mid x) = \mathcal{N}(\mu_\phi(x), B_\phi(x) B_\phi(x)^\top + \mathrm{diag}\,\sigma_\phi^2(x))

    Args:
        model: as for :class:`AmortizedNormal`.
        rank: number of factors, the columns of B.
        hidden: widths of the encoder's hidden layers, from the data to the latent; ``None`` mirrors the model's.
        activation: name of the activation; ``None`` takes the model's.

    Raises:
        ArgumentError: the model is of another kind, or an argument is out of range.

    References:
        Rezende et al. 2014, section 4.3 (rank 1), https://arxiv.org/abs/1401.4082; Ong et al. 2018,
        https://arxiv.org/abs/1701.03208.

    Example:
        >>> import torch
        >>> from pyrovae.models import VAE
        >>> guide = AmortizedFactorCovariance(VAE(data_shape=(8, 8), latent_dim=5, hidden=(32,)), rank=2)
        >>> guide.encode(torch.zeros(5, 8, 8)).event_shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: LatentModel,
        rank: int = 2,
        hidden: Sequence[int] | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__(model, lambda dim: FactorNormal(dim, rank), hidden, activation)


@GUIDES.register
class AmortizedFlow(Encoded):
    r"""Posterior by a flow on a diagonal Gaussian; an encoder computes the Gaussian and the flow's context.

    .. math:: z = f_\phi(z_0 \mid c_\phi(x)), \qquad z_0 \sim \mathcal{N}(\mu_\phi(x), \mathrm{diag}\,\sigma_\phi^2(x))

    A flow without an inverse (planar, radial) or with a sequential one (IAF) needs ``gradient="pathwise"``.

    Args:
        model: as for :class:`AmortizedNormal`.
        flow: name of a flow of ``pyrovae.flows``: ``"planar"``, ``"radial"``, ``"householder"``, ``"sylvester"``,
            ``"iaf"``, ``"maf"``, ``"coupling"``, ``"spline"``.
        depth: number of layers of the flow.
        context: number of features by which the data point steers the flow.
        hidden: widths of the encoder's hidden layers, from the data to the latent; ``None`` mirrors the model's.
        activation: name of the activation; ``None`` takes the model's.
        options: arguments of the flow's class, such as ``{"hidden": (320,)}`` for the widths of an autoregressive
            network; see :mod:`pyrovae.flows`.

    Raises:
        ArgumentError: the model is of another kind, or an argument is unknown or out of range.

    References:
        Rezende & Mohamed 2015, https://arxiv.org/abs/1505.05770; van den Berg et al. 2018,
        https://arxiv.org/abs/1803.05649.

    Example:
        >>> import torch
        >>> from pyrovae.models import VAE
        >>> guide = AmortizedFlow(VAE(data_shape=(8, 8), latent_dim=3, hidden=(32,)), flow="planar", depth=2)
        >>> guide(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        model: LatentModel,
        flow: str = "iaf",
        depth: int = 4,
        context: int = 64,
        hidden: Sequence[int] | None = None,
        activation: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, lambda dim: FlowNormal(dim, flow, depth, context, options), hidden, activation)


class LayeredModel(Protocol):
    """What an amortized guide of several layers of latents reads from a model."""

    data_shape: tuple[int, ...]
    layers: tuple[int, ...]
    hidden: tuple[int, ...] | tuple[tuple[int, ...], ...]
    activation: str


class EncodedLayers(PyroModule):
    """What guides share that draw layers of latents upwards, each from the layer below it.

    Args:
        model: the model, of which it reads ``data_shape``, ``layers`` and, for what is not given here, the networks.
        family: makes the posterior family of a layer from its width.
        hidden: widths of each encoder's hidden layers, or a list of them for each; ``None`` mirrors the model's.
        activation: name of the activation; ``None`` takes the model's.
    """

    def __init__(
        self,
        model: LayeredModel,
        family: Callable[[int], Family],
        hidden: Hidden | None,
        activation: str | None,
    ) -> None:
        super().__init__()
        require(self, model, "layers")
        self.data_shape = model.data_shape
        families = [family(width) for width in model.layers]
        self.families = nn.ModuleList(families)
        widths = (math.prod(self.data_shape), *model.layers)
        self.encoders = nn.ModuleList(
            mlp(below, between, above.outputs, activation or model.activation)
            for below, between, above in zip(widths[:-1], widths_upwards(model, hidden), families, strict=True)
        )

    def inputs(self, units: Tensor) -> Tensor:
        """What an encoder sees of the layer below it."""
        return units

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z_1 | x) for `*batch x *data_shape` data: batch shape `*batch`, event shape (layers[0],)."""
        return self._above(0, reshaped(x, self.data_shape, (-1,)))

    def _above(self, layer: int, units: Tensor) -> dist.TorchDistribution:
        return self.families[layer](full_precision(self.encoders[layer](self.inputs(units))))

    def forward(self, x: Tensor) -> Tensor:
        """Samples all layers for a batch `n x *data_shape`; returns the top one, `n x layers[-1]`."""
        return self.sample(self.encode(x))

    def sample(self, q: dist.TorchDistribution) -> Tensor:
        """The guide's sample statements, given the posterior of the first layer for n data points."""
        with pyro.plate("data", q.batch_shape[-1], device=device_of(self)):
            z = pyro.sample("z1", q)
            for layer in range(1, len(self.encoders)):
                z = pyro.sample(f"z{layer + 1}", self._above(layer, z))
            return z


@GUIDES.register
class AmortizedBernoulli(EncodedLayers):
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

    def __init__(self, model: LayeredModel, hidden: Sequence[int] | None = None, activation: str | None = None) -> None:
        super().__init__(model, BernoulliVector, hidden, activation)

    def inputs(self, units: Tensor) -> Tensor:
        """Units as −1 and 1."""
        return 2.0 * units - 1.0


_LATENTS = {
    "AmortizedNormal": "one real latent vector, as VAE (and so do AmortizedFullRank, AmortizedFactorCovariance and"
    " AmortizedFlow)",
    "AmortizedBernoulli": "layers of binary units, as SigmoidBeliefNet",
    "BottomUp": "layers of real latents and below(layer, z) for their conditionals (and so does Ladder)",
}


def require(guide: object, model: object, *attributes: str) -> None:
    """Raises an error unless the model has what tells the guide's kind of model from others."""
    for attribute in attributes:
        if not hasattr(model, attribute):
            kinds = "; ".join(f"{name} takes models with {latents}" for name, latents in _LATENTS.items())
            raise ArgumentError(
                f"guide {type(guide).__name__} does not fit model {type(model).__name__}, which has no {attribute!r}."
                f" Use another guide: {kinds}."
            )


def reshaped(x: Tensor, data_shape: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Data `*batch x *data_shape` as `*batch x *shape`, for an encoder."""
    batch = x.shape[: x.dim() - len(data_shape)]
    if tuple(x.shape[len(batch) :]) != data_shape:
        raise DataError(
            f"x has shape {tuple(x.shape)}; this guide encodes data of shape (…, *{data_shape})."
            " Reshape the data, or build model and guide with their data_shape."
        )
    return x.reshape(*batch, *shape)


def widths_upwards(model: LayeredModel, hidden: Hidden | None) -> tuple[tuple[int, ...], ...]:
    """Widths of the hidden layers of each of a guide's networks, from below to above; ``None`` mirrors the model's."""
    if hidden is not None:
        return hidden_by_network(hidden, model.layers)
    return tuple(widths[::-1] for widths in hidden_by_network(model.hidden, model.layers))


@contextlib.contextmanager
def held(model: object, when: bool) -> Iterator[None]:
    """Within the block, if at all, what is computed from the model's parameters treats them as constants."""
    parameters = [p for p in model.parameters() if p.requires_grad] if when and isinstance(model, nn.Module) else []
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def replayed() -> bool:
    """Whether the running program is given its samples, as an objective does that scores draws it has made before."""
    return any(isinstance(handler, ReplayMessenger) for handler in _PYRO_STACK)
