"""What models with layers of latents share: one layer below the other, down to the data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints

from pyrovae.models.likelihoods import require_batch
from pyrovae.modes import device_of

__all__ = ["Ancestral", "Layered"]


class Layered(PyroModule):
    r"""A model whose latents come layer by layer, each given the one above it.

    .. math:: p(x, z) = p(z_L)\, p(z_{L-1} \mid z_L) \cdots p(z_1 \mid z_2)\, p(x \mid z_1)

    A model says what :meth:`top`, :meth:`below` and :meth:`decode` are. The sites are ``"z1"`` (next to the data) to
    ``"zL"``.

    Example:
        >>> from pyrovae.models import SigmoidBeliefNet
        >>> isinstance(SigmoidBeliefNet(data_shape=(4,), layers=(3, 2)), Layered)
        True
    """

    data_shape: tuple[int, ...]
    layers: tuple[int, ...]

    @abstractmethod
    def top(self) -> dist.TorchDistribution:
        """p(z_L) of the top layer: batch shape (), event shape (layers[-1],)."""

    @abstractmethod
    def below(self, layer: int, z: Tensor) -> dist.TorchDistribution:
        """p(z_layer | z) for `*batch x layers[layer]` values z of the layer above: batch shape `*batch`."""

    @abstractmethod
    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z_1) for `*batch x layers[0]` values: batch shape `*batch`, event shape ``data_shape``."""

    def prior(self) -> dist.TorchDistribution:
        """p(z_1), for ``decode``: batch shape (), event shape (layers[0],); with several layers it has draws alone."""
        return self.top() if len(self.layers) == 1 else Ancestral(self)

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
            z = pyro.sample(f"z{len(self.layers)}", self.top())
            for layer in range(len(self.layers) - 1, 0, -1):
                z = pyro.sample(f"z{layer}", self.below(layer, z))
            return pyro.sample("x", self.decode(z), obs=x)


class Ancestral(dist.TorchDistribution):
    """p(z_1) below other layers, which cannot be summed out: draws, but neither density nor moments.

    Args:
        model: a model of several layers.

    Example:
        >>> from pyrovae.models import SigmoidBeliefNet
        >>> Ancestral(SigmoidBeliefNet(data_shape=(4,), layers=(3, 2))).sample((5,)).shape
        torch.Size([5, 3])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: Layered) -> None:
        self.model = model
        super().__init__(torch.Size(), torch.Size((model.layers[0],)))

    @property
    def support(self) -> constraints.Constraint:
        """That of each layer: a vector of binary or of real units."""
        return self.model.top().support

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws `*sample_shape x layers[0]` units, from the top layer down."""
        z: Tensor = self.model.top().sample(torch.Size(sample_shape))
        for layer in range(len(self.model.layers) - 1, 0, -1):
            z = self.model.below(layer, z).sample()
        return z
