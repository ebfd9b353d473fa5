"""A variational autoencoder's generative half with a latent on the sphere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import pyro.distributions as dist

from pyrovae.distributions.von_mises_fisher import SphericalUniform
from pyrovae.models.vae import VAE
from pyrovae.registry import MODELS

__all__ = ["SphericalVAE"]


@MODELS.register
class SphericalVAE(VAE):
    r"""A :class:`VAE` whose latent is a direction: a unit vector of R^n, uniform a priori.

    .. math:: z_n \sim \mathcal{U}(S^{n-1}), \qquad x_{n} \mid z_n \sim p(x \mid g_\theta(z_n))

    The sphere has no centre for posteriors to crowd around and no end, so that it suits data that come back to where
    they began, and the prior leaves all directions alike. ``AmortizedVonMisesFisher`` is its guide.

    Args:
        data_shape: shape of one data point, as for :class:`VAE`.
        latent_dim: dimension n of the ambient space, at least 2: a latent has n coordinates and n − 1 degrees of
            freedom.
        hidden: widths of the decoder's fully connected hidden layers, as for :class:`VAE`.
        activation: name of the activation, as for :class:`VAE`.
        likelihood: name of the likelihood, as for :class:`VAE`.
        network: ``"mlp"`` or ``"conv"``, as for :class:`VAE`.
        channels, blocks: of the convolutions, as for :class:`VAE`.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    References:
        Davidson et al. 2018, "Hyperspherical variational auto-encoders", https://arxiv.org/abs/1804.00891.

    Example:
        >>> model = SphericalVAE(data_shape=(8, 8), latent_dim=3, hidden=(32,))
        >>> model(size=5).shape
        torch.Size([5, 8, 8])
        >>> model.prior().sample().norm().round(decimals=4)
        tensor(1.)
    """

    default_guide: ClassVar[str] = "AmortizedVonMisesFisher"

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dim: int,
        hidden: Sequence[int] = (200, 200),
        activation: str = "tanh",
        likelihood: str = "bernoulli",
        network: Literal["mlp", "conv"] = "mlp",
        channels: Sequence[int] = (64, 32),
        blocks: int = 0,
    ) -> None:
        super().__init__(data_shape, latent_dim, hidden, activation, likelihood, "standard", network, channels, blocks)
        self.prior()  # it refuses a latent of one dimension

    def prior(self) -> dist.TorchDistribution:
        """p(z): uniform on the sphere, batch shape (), event shape (latent_dim,)."""
        return SphericalUniform(self.latent_dim, dtype=self.prior_loc.dtype, device=self.prior_loc.device)
