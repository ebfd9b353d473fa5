"""Amortized posteriors of latents on the sphere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyrovae.distributions.von_mises_fisher import VonMisesFisher
from pyrovae.errors import ArgumentError
from pyrovae.guides.amortized import Encoded, LatentModel
from pyrovae.guides.families import Family
from pyrovae.registry import GUIDES

__all__ = ["AmortizedVonMisesFisher", "Direction"]

# From all but uniform to a spread of 0.007 radians: outside any useful posterior, and a first step stays finite.
_LOG_CONCENTRATION = (-10.0, 10.0)
_OFFSET = 1e-3  # of the first coordinate, so that an encoder's zero (a blank image, at first) has a direction too


class Direction(Family):
    r"""A unit vector, by von Mises and Fisher's distribution.

    .. math:: q(z) = \mathrm{vMF}(\mu, e^{h_{n+1}}), \qquad
        \mu = \frac{h_{1:n} + \epsilon e_1}{\lVert h_{1:n} + \epsilon e_1 \rVert}, \quad \epsilon = 10^{-3}

    Args:
        dim: dimension n of the ambient space, at least 2; the family has n + 1 outputs.

    Raises:
        ArgumentError: ``dim`` is out of range.

    Example:
        >>> q = Direction(3)(torch.tensor([0.0, 3.0, 4.0, 2.0]))
        >>> q.loc, q.concentration
        (tensor([2.0000e-04, 6.0000e-01, 8.0000e-01]), tensor(7.3891))
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim + 1)
        if dim < 2:
            raise ArgumentError(f"dim is {dim!r}; directions need an ambient space of at least 2 dimensions")

    def forward(self, raw: Tensor) -> VonMisesFisher:
        """q(z) for `*batch x outputs` numbers: batch shape `*batch`, event shape (dim,)."""
        offset = _OFFSET * (torch.arange(self.dim, device=raw.device) == 0).to(raw.dtype)
        loc = normalize(raw[..., :-1] + offset, dim=-1)
        return VonMisesFisher(loc, raw[..., -1].clamp(*_LOG_CONCENTRATION).exp())


@GUIDES.register
class AmortizedVonMisesFisher(Encoded):
    r"""Von Mises–Fisher posterior whose mean direction and concentration an encoder computes from the data point.

    .. math:: q_\phi(z \mid x) = \mathrm{vMF}(\mu_\phi(x), \kappa_\phi(x))

    ``ELBO(kl="analytic")`` takes its KL to the uniform prior in closed form.

    Args:
        model: the model, a ``SphericalVAE`` or another with a prior on the sphere, of which it reads ``data_shape``,
            ``latent_dim`` and, for what is not given here, the network; the model is not kept, and shares no
            parameters with the guide.
        hidden: widths of the encoder's hidden layers, from the data to the latent; ``None`` mirrors the model's.
        activation: name of the activation; ``None`` takes the model's.

    Raises:
        ArgumentError: the model is of another kind, or an argument is out of range.

    References:
        Davidson et al. 2018, "Hyperspherical variational auto-encoders", https://arxiv.org/abs/1804.00891.

    Example:
        >>> from pyrovae.models.spherical_vae import SphericalVAE
        >>> guide = AmortizedVonMisesFisher(SphericalVAE(data_shape=(8, 8), latent_dim=3, hidden=(32,)))
        >>> q = guide.encode(torch.zeros(5, 8, 8))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([3]))
    """

    spherical = True

    def __init__(self, model: LatentModel, hidden: Sequence[int] | None = None, activation: str | None = None) -> None:
        super().__init__(model, Direction, hidden, activation)
