"""Autoencoders: the deterministic baseline of a variational autoencoder, and a guide for models without latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, require_count, unknown_name
from pyrovae.models.likelihoods import LIKELIHOODS, by_element, require_batch, start_at_mean
from pyrovae.models.networks import ConvDecoder, ConvEncoder, as_image, full_precision, mlp
from pyrovae.modes import device_of
from pyrovae.registry import GUIDES, MODELS

__all__ = ["Autoencoder", "DeterministicEncoder"]

Corruption = Literal["masking", "gaussian"]
Network = Literal["mlp", "conv"]


@MODELS.register
class Autoencoder(PyroModule):
    r"""A code of each data point and a distribution around its reconstruction; without a prior on the codes.

    .. math:: x_n \sim p(x \mid g_\theta(z_n)), \qquad z_n = f_\phi(\tilde x_n)

    The encoder is part of the model, which has no latent site: :class:`DeterministicEncoder`, a guide that samples
    nothing, goes with it, and what a fit reports as its bound is the reconstruction's log-likelihood in nats per data
    point, **not** a bound on log p(x). An autoencoder cannot generate.

    With ``noise``, the encoder sees a corrupted data point and reconstructs the clean one (a *denoising* autoencoder),
    in training mode alone: validation bounds are of clean data. Without hidden layers and with
    ``likelihood="normal"`` the optimum spans the principal subspace of the data.

    Args:
        data_shape: shape of one data point: ``(28, 28)``, ``(3, 32, 32)``, ``(7,)``, ….
        latent_dim: dimension of the code.
        hidden: widths of the decoder's fully connected hidden layers, from the code to the data (the encoder mirrors
            them); empty, with ``network="mlp"``, for linear maps.
        activation: name of the activation, one of ``pyrovae.models.networks.ACTIVATIONS``.
        likelihood: name of the likelihood, one of ``pyrovae.models.likelihoods.LIKELIHOODS``.
        network: ``"mlp"``, or ``"conv"`` for images ``(H, W)`` or ``(C, H, W)``.
        channels: of the convolutions, from the coarsest level to the finest (the encoder mirrors them).
        blocks: residual blocks at each level of the convolutions.
        noise: the probability that an element is set to zero (``"masking"``), or the standard deviation of what is
            added to it (``"gaussian"``, in units of the data); 0 for none.
        corruption: ``"masking"`` or ``"gaussian"``.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    References:
        Baldi & Hornik 1989 (linear), https://doi.org/10.1016/0893-6080(89)90014-2; Hinton & Salakhutdinov 2006,
        https://doi.org/10.1126/science.1127647; Vincent et al. 2008 (denoising),
        https://doi.org/10.1145/1390156.1390294.

    Example:
        >>> model = Autoencoder(data_shape=(8, 8), latent_dim=3, hidden=(32,), noise=0.3)
        >>> z = model.encode(torch.zeros(5, 8, 8))
        >>> z.shape, model.decode(z).mean.shape
        (torch.Size([5, 3]), torch.Size([5, 8, 8]))
        >>> import pyrovae
        >>> digits = pyrovae.datasets.load("digits")
        >>> run = pyrovae.fit(model, DeterministicEncoder(model), digits.train, epochs=2, progress=False)
        >>> run.history[1]["bound"] > run.history[0]["bound"]
        True
    """

    default_guide: ClassVar[str] = "DeterministicEncoder"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {}}

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dim: int,
        hidden: Sequence[int] = (200, 200),
        activation: str = "tanh",
        likelihood: str = "bernoulli",
        network: Network = "mlp",
        channels: Sequence[int] = (64, 32),
        blocks: int = 0,
        noise: float = 0.0,
        corruption: Corruption = "masking",
    ) -> None:
        super().__init__()
        self.data_shape, self.hidden, self.channels = tuple(data_shape), tuple(hidden), tuple(channels)
        self.latent_dim = require_count("latent_dim", latent_dim)
        self.activation, self.network = activation, network
        self.noise, self.corruption = noise, corruption
        self._check(likelihood)
        self.likelihood = LIKELIHOODS[likelihood]

        up, down = (self.hidden, self.channels), (self.hidden[::-1], self.channels[::-1])
        outputs = self.likelihood.outputs
        if network == "conv":
            image = self.image_shape
            self.encoder: nn.Module = ConvEncoder(image, down[1], down[0], latent_dim, activation, blocks)
            self.decoder: nn.Module = ConvDecoder(latent_dim, *up, image, image[0] * outputs, activation, blocks)
        else:
            size = math.prod(self.data_shape)
            self.encoder = mlp(size, down[0], latent_dim, activation)
            self.decoder = mlp(latent_dim, up[0], size * outputs, activation)
        self.likelihood_scale = self.likelihood.scale()

    def _check(self, likelihood: str) -> None:
        if not self.data_shape or any(not isinstance(size, int) or size < 1 for size in self.data_shape):
            raise ArgumentError(f"data_shape is {self.data_shape!r}; it must hold whole numbers, at least 1 each")
        for kind, name, allowed in (
            ("likelihood", likelihood, LIKELIHOODS),
            ("network", self.network, get_args(Network)),
            ("corruption", self.corruption, get_args(Corruption)),
        ):
            if name not in allowed:
                raise unknown_name(kind, name, allowed)
        most = 1.0 if self.corruption == "masking" else math.inf
        number = isinstance(self.noise, int | float) and not isinstance(self.noise, bool)
        if not number or not 0.0 <= self.noise < most:
            kind = "a probability below 1" if self.corruption == "masking" else "a finite standard deviation"
            raise ArgumentError(
                f"noise is {self.noise!r}; with corruption={self.corruption!r} it must be {kind}, at least 0"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a data point that is an image."""
        return as_image(self.data_shape, "network='conv'", "network='mlp'")

    def corrupt(self, x: Tensor) -> Tensor:
        """A draw of what the encoder sees of `*batch x *data_shape` data in training mode, whatever the mode is now."""
        if not self.noise:
            return x
        if self.corruption == "masking":
            return x * (torch.rand_like(x) >= self.noise).to(x.dtype)
        return x + self.noise * torch.randn_like(x)

    def encode(self, x: Tensor) -> Tensor:
        """The codes `*batch x latent_dim` of `*batch x *data_shape` data, as they are given: nothing is corrupted."""
        shape = self.image_shape if self.network == "conv" else (-1,)
        flat = x.reshape(*x.shape[: x.dim() - len(self.data_shape)], *shape)
        return full_precision(self.encoder(flat))

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for `*batch x latent_dim` codes: batch shape `*batch`, event shape ``data_shape``."""
        out = full_precision(self.decoder(z))
        raw = by_element(out, self.likelihood.outputs, self.data_shape, self.network == "conv")
        return self.likelihood.distribution(raw, self.likelihood_scale).to_event(len(self.data_shape))

    def forward(self, x: Tensor) -> Tensor:
        """Conditions on a batch `n x *data_shape`, given the codes of it, and returns it.

        Raises:
            DataError: ``x`` is not a batch of data points of this model's shape.
        """
        require_batch(x, self.data_shape)
        with pyro.plate("data", len(x), device=x.device):
            return pyro.sample("x", self.decode(self.encode(self.corrupt(x) if self.training else x)), obs=x)

    def initialize_output(self, x: Tensor) -> Autoencoder:
        """Sets the decoder's last bias so that it starts at the mean of the data, and returns the model.

        Args:
            x: A `n x *data_shape` tensor of data (or of their intensities).
        """
        start_at_mean(self.decoder, self.likelihood, x.mean(0), self.network == "conv")
        return self


@GUIDES.register
class DeterministicEncoder(PyroModule):
    r"""The guide of an :class:`Autoencoder`: it samples nothing and learns nothing, since the model has no latent site.

    .. math:: q(z \mid x) = \delta(z - f_\phi(x)), \qquad f_\phi \text{ the model's encoder}

    :meth:`encode` gives that point mass, so that whatever reads a guide's posterior means (plots, reports) works.

    Args:
        model: the autoencoder, which is not part of the guide.

    Raises:
        ArgumentError: the model has no ``encode``.

    Example:
        >>> model = Autoencoder(data_shape=(8, 8), latent_dim=3, hidden=(32,))
        >>> guide = DeterministicEncoder(model)
        >>> x = torch.rand(5, 8, 8)
        >>> bool((guide.encode(x).mean == model.encode(x)).all())
        True
    """

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        if not isinstance(model, nn.Module) or not hasattr(model, "encode"):
            raise ArgumentError(
                f"guide DeterministicEncoder does not fit model {type(model).__name__}, which has no encode(x). Use"
                " it with Autoencoder, and AmortizedNormal with VAE."
            )
        self._of = (model,)  # in a tuple, so that its parameters are saved once

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """The codes of `*batch x *data_shape` data as point masses: batch shape `*batch`, event shape (latent_dim,)."""
        (model,) = self._of
        return dist.Delta(model.encode(x.to(device_of(model))), event_dim=1)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Samples nothing."""
