"""The deep latent-Gaussian model: the generative half of a variational autoencoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, unknown_name
from pyrovae.models.likelihoods import LIKELIHOODS, by_element, require_batch, start_at_mean
from pyrovae.models.networks import ACTIVATIONS, ConvDecoder, as_image, full_precision, mlp
from pyrovae.modes import device_of
from pyrovae.registry import MODELS

__all__ = ["VAE"]

_GAUSSIANS = ("standard", "learnable", "full")
_PRIORS = (*_GAUSSIANS, "coupling", "maf", "radial", "spline")


@MODELS.register
class VAE(PyroModule):
    r"""Latent-Gaussian model of independent data points, with a network from the latent to the likelihood.

    .. math:: z_n \sim p_\theta(z), \qquad x_{n} \mid z_n \sim p(x \mid g_\theta(z_n))

    The elements of a data point are independent given the latent. ``forward(x)`` conditions on a batch
    `n x *data_shape`; ``forward(size=n)`` generates one.

    Args:
        data_shape: shape of one data point: ``(28, 28)``, ``(3, 32, 32)``, ``(7,)``, ….
        latent_dim: number of latent dimensions.
        hidden: widths of the fully connected hidden layers of the decoder, from the latent to the data (the
            guide's encoder mirrors them).
        activation: ``"tanh"``, ``"relu"``, ``"gelu"``, ``"silu"``, ….
        likelihood: ``"bernoulli"`` (data 0 or 1), ``"continuous-bernoulli"`` (data in [0, 1]), ``"normal"`` and
            ``"laplace"`` (real data; one learnable scale for all elements), ``"categorical-256"``,
            ``"discretized-logistic"`` and ``"discretized-logistic-mixture"`` (8-bit intensities k/255).
        prior: ``"standard"`` for N(0, I); ``"learnable"`` for N(μ, diag σ²) and ``"full"`` for N(μ, Σ), with parameters
            that are learnt; or a flow that learns its shape, ``"coupling"``, ``"maf"``, ``"radial"`` or ``"spline"``
            (:class:`pyrovae.flows.FlowPrior`).
        blocks: number of residual blocks at each level of the convolutions.
        prior_options: arguments of the flow of the prior, such as ``{"depth": 6, "hidden": (128,)}``.
        network: ``"mlp"``, or ``"conv"`` for images ``(H, W)`` or ``(C, H, W)``.
        channels: of the convolutions, from the coarsest level to the finest (the encoder mirrors them).

    Raises:
        ArgumentError: an argument is unknown or out of range.

    References:
        Kingma & Welling 2014, https://arxiv.org/abs/1312.6114; Rezende et al. 2014,
        https://arxiv.org/abs/1401.4082; Loaiza-Ganem & Cunningham 2019 (continuous Bernoulli),
        https://arxiv.org/abs/1907.06845.

    Example:
        >>> model = VAE(data_shape=(8, 8), latent_dim=2, hidden=(32,))
        >>> model(size=5).shape
        torch.Size([5, 8, 8])
        >>> p = model.decode(torch.zeros(3, 4, 2))
        >>> p.batch_shape, p.event_shape
        (torch.Size([3, 4]), torch.Size([8, 8]))
    """

    default_guide: ClassVar[str] = "AmortizedNormal"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {}}

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dim: int,
        hidden: Sequence[int] = (200, 200),
        activation: str = "tanh",
        likelihood: str = "bernoulli",
        prior: str = "standard",
        network: Literal["mlp", "conv"] = "mlp",
        channels: Sequence[int] = (64, 32),
        blocks: int = 0,
        prior_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.data_shape = tuple(data_shape)
        self.latent_dim = latent_dim
        self.hidden = tuple(hidden)
        self.channels = tuple(channels)
        self.blocks = blocks
        self.activation = activation
        self.network = network
        self._check(likelihood, prior, prior_options)
        self.likelihood = LIKELIHOODS[likelihood]

        outputs = self.likelihood.outputs
        if network == "mlp":
            self.decoder: nn.Module = mlp(latent_dim, self.hidden, math.prod(self.data_shape) * outputs, activation)
        else:
            image = self.image_shape
            self.decoder = ConvDecoder(
                latent_dim, self.hidden, self.channels, image, image[0] * outputs, activation, blocks
            )
        self._make_prior(prior, prior_options or {})
        self.likelihood_scale = self.likelihood.scale()

    def _make_prior(self, prior: str, options: Mapping[str, Any]) -> None:
        loc, scale = torch.zeros(self.latent_dim), torch.ones(self.latent_dim)
        self.prior_flow: nn.Module | None = None
        if prior == "standard":
            self.register_buffer("prior_loc", loc, persistent=False)
            self.register_buffer("prior_scale", scale, persistent=False)
        elif prior == "learnable":
            self.prior_loc = nn.Parameter(loc)
            self.prior_scale = PyroParam(scale, constraints.softplus_positive)
        elif prior == "full":
            self.prior_loc = nn.Parameter(loc)
            self.prior_tril = PyroParam(scale.diag(), constraints.softplus_lower_cholesky)
        else:
            from pyrovae import flows  # it loads zuko, which only this prior needs

            self.prior_flow = flows.FlowPrior(self.latent_dim, prior, **options)

    def _check(self, likelihood: str, prior: str, options: Mapping[str, Any] | None) -> None:
        for argument, given in (("data_shape", self.data_shape), ("latent_dim", (self.latent_dim,))):
            if not given or any(not isinstance(size, int) or size < 1 for size in given):
                raise ArgumentError(f"{argument} is {given!r}; it must hold whole numbers, at least 1 each")
        if likelihood not in LIKELIHOODS:
            raise unknown_name("likelihood", likelihood, LIKELIHOODS)
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)
        if prior not in _PRIORS:
            raise unknown_name("prior", prior, _PRIORS)
        if options and prior in _GAUSSIANS:
            raise ArgumentError(f"prior_options is {dict(options)!r}, but prior {prior!r} has none; leave them out")
        if self.network not in ("mlp", "conv"):
            raise unknown_name("network", self.network, ("mlp", "conv"))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a data point that is an image."""
        return as_image(self.data_shape, "network='conv'", "network='mlp'")

    def prior(self) -> dist.TorchDistribution:
        """p(z): batch shape (), event shape (latent_dim,)."""
        if self.prior_flow is not None:
            return self.prior_flow()
        if hasattr(self, "prior_tril"):
            return dist.MultivariateNormal(self.prior_loc, scale_tril=self.prior_tril)
        return dist.Normal(self.prior_loc, self.prior_scale).to_event(1)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for `*batch x latent_dim` latents: batch shape `*batch`, event shape ``data_shape``."""
        out = full_precision(self.decoder(z))
        out = by_element(out, self.likelihood.outputs, self.data_shape, self.network == "conv")
        return self.likelihood.distribution(out, self.likelihood_scale).to_event(len(self.data_shape))

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Conditions on ``x``, or generates ``size`` data points when it is ``None``; returns the data.

        Args:
            x: A `n x *data_shape` tensor, or ``None``.
            size: number of data points to generate.

        Raises:
            DataError: ``x`` is not a batch of data points of this model's shape.
        """
        if x is not None:
            require_batch(x, self.data_shape)
        with pyro.plate("data", size if x is None else len(x), device=device_of(self)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z), obs=x)

    def initialize_output(self, x: Tensor) -> VAE:
        """Sets the decoder's last bias so that it starts at the mean of the data, and returns the model.

        Args:
            x: A `n x *data_shape` tensor of data (or of their intensities).
        """
        start_at_mean(self.decoder, self.likelihood, x.float().mean(0), self.network == "conv")
        return self
