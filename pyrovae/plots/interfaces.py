"""What the plots ask of a model, a guide, a data split and a run: nothing else of them is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

__all__ = ["DecodedDistribution", "Decoder", "Encoder", "FittedRun", "History", "PosteriorDistribution", "Split"]

History = Sequence[Mapping[str, float]]
"""One row an epoch: ``epoch``, ``bound``, ``log_likelihood``, ``kl``, ``kl/<site>``, ``validation_bound``, …"""


class DecodedDistribution(Protocol):
    """A distribution over data points: batch shape ``*batch``, event shape ``data_shape``."""

    @property
    def mean(self) -> Tensor:
        """Pixel intensities or probabilities in [0, 1], `*batch x *data_shape`."""


class PosteriorDistribution(Protocol):
    """A distribution over latent vectors: batch shape ``n``, event shape ``(latent_dim,)``."""

    @property
    def mean(self) -> Tensor:
        """Means, `n x latent_dim`."""


class Decoder(Protocol):
    """A generative model whose latent variable is one vector per data point."""

    data_shape: tuple[int, ...]
    latent_dim: int

    def prior(self) -> Any:
        """The distribution of z: batch shape ``()``, event shape ``(latent_dim,)``."""

    def decode(self, z: Tensor) -> DecodedDistribution:
        """The distribution of x given z, for z of shape `*batch x latent_dim`."""


class Encoder(Protocol):
    """A guide with an amortized posterior."""

    def encode(self, x: Tensor) -> PosteriorDistribution:
        """The distribution of z given x, for x of shape `n x *data_shape`."""


class Split(Protocol):
    """A part of a data set."""

    @property
    def x(self) -> Tensor:
        """Data points, `n x *data_shape`."""

    @property
    def y(self) -> Tensor | None:
        """Labels, `n`, or none."""


class FittedRun(Protocol):
    """What a fit returns."""

    @property
    def model(self) -> Any:
        """The fitted model."""

    @property
    def guide(self) -> Any:
        """The fitted guide."""

    @property
    def history(self) -> History:
        """One row an epoch."""

    @property
    def config(self) -> Mapping[str, Any]:
        """What the run was asked to do, ready for JSON."""
