"""Amortized posteriors of the latent of a data point and its label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import ArgumentError
from pyrovae.guides.amortized import reshaped
from pyrovae.guides.families import DiagonalNormal
from pyrovae.models.conditional_vae import one_hot, require_labels
from pyrovae.models.networks import ConvEncoder, full_precision, mlp
from pyrovae.modes import device_of
from pyrovae.registry import GUIDES

__all__ = ["AmortizedConditional", "LabelledModel", "image_of", "require_labelled"]


class LabelledModel(Protocol):
    """What an amortized guide reads from a model of labelled data."""

    data_shape: tuple[int, ...]
    latent_dim: int
    classes: int
    hidden: tuple[int, ...]
    channels: tuple[int, ...]
    activation: str
    network: str
    image_shape: tuple[int, int, int]


@GUIDES.register
class AmortizedConditional(PyroModule):
    r"""Diagonal Gaussian posterior whose mean and scale an encoder computes from the data point and its label.

    .. math:: q_\phi(z \mid x, y) = \mathcal{N}(\mu_\phi(x, y), \mathrm{diag}\,\sigma_\phi^2(x, y))

    A fully connected encoder reads the label beside the data point; a convolutional one as one more constant channel
    for every class.

    Args:
        model: the model, a ``ConditionalVAE``, of which it reads ``data_shape``, ``latent_dim``, ``classes`` and, for
            what is not given here, the network; the model is not kept, and shares no parameters with the guide.
        hidden: widths of the encoder's hidden layers, from the data to the latent; ``None`` mirrors the model's.
        activation: name of the activation; ``None`` takes the model's.

    Raises:
        ArgumentError: the model is of another kind, or an argument is out of range.

    References:
        Sohn et al. 2015, "Learning structured output representation using deep conditional generative models",
        https://papers.nips.cc/paper/2015/hash/8d55a249e6baa5c06772297520da2051-Abstract.html.

    Example:
        >>> from pyrovae.models.conditional_vae import ConditionalVAE
        >>> guide = AmortizedConditional(ConditionalVAE(data_shape=(8, 8), latent_dim=2, classes=10, hidden=(32,)))
        >>> q = guide.encode(torch.zeros(5, 8, 8), torch.tensor([3, 1, 4, 1, 5]))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([2]))
    """

    def __init__(
        self, model: LabelledModel, hidden: Sequence[int] | None = None, activation: str | None = None
    ) -> None:
        super().__init__()
        require_labelled(self, model)
        hidden = tuple(reversed(model.hidden)) if hidden is None else tuple(hidden)
        activation = activation or model.activation
        self.data_shape, self.latent_dim, self.classes = model.data_shape, model.latent_dim, model.classes
        self.image_shape = image_of(model)
        self.family = DiagonalNormal(self.latent_dim)
        self.register_buffer("identity", torch.eye(self.classes), persistent=False)
        if model.network == "conv":
            channels, height, width = model.image_shape
            image = (channels + self.classes, height, width)
            levels = tuple(reversed(model.channels))
            self.encoder: nn.Module = ConvEncoder(image, levels, hidden, self.family.outputs, activation)
        else:
            self.encoder = mlp(math.prod(self.data_shape) + self.classes, hidden, self.family.outputs, activation)

    def encode(self, x: Tensor, y: Tensor) -> dist.TorchDistribution:
        """q(z | x, y).

        Args:
            x: A `*batch x *data_shape` tensor.
            y: whole numbers, `*batch`, or weights of the classes, `*batch x classes`; its batch dimensions and those of
                ``x`` broadcast against each other.

        Returns:
            A distribution of batch shape `*batch`, event shape (latent_dim,).
        """
        labels, image = one_hot(y, self.identity), reshaped(x, self.data_shape, self.image_shape)
        space = self.image_shape[1:]  # (H, W) of a convolution, nothing of a fully connected network
        batch = torch.broadcast_shapes(image.shape[: image.dim() - len(self.image_shape)], labels.shape[:-1])
        planes = labels.reshape(*labels.shape, *[1] * len(space)).expand(*batch, -1, *space)
        joined = torch.cat([image.expand(*batch, *self.image_shape), planes], dim=len(batch))
        return self.family(full_precision(self.encoder(joined)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Samples z for a batch `n x *data_shape` and its labels; returns `n x latent_dim` (particles to the left)."""
        require_labels(y, len(x), self.classes)
        with pyro.plate("data", len(x), device=device_of(self)):
            return pyro.sample("z", self.encode(x, y))


def image_of(model: LabelledModel) -> tuple[int, ...]:
    """The shape in which an encoder that mirrors the model's network reads a data point."""
    return model.image_shape if model.network == "conv" else (math.prod(model.data_shape),)


def require_labelled(guide: object, model: object) -> None:
    """Raises an error unless the model is one of labelled data."""
    for attribute in ("classes", "latent_dim", "network", "class_prior"):
        if not hasattr(model, attribute):
            raise ArgumentError(
                f"guide {type(guide).__name__} does not fit model {type(model).__name__}, which has no {attribute!r}."
                " Use it with a model of labelled data (ConditionalVAE, SemiSupervisedVAE), or another guide"
                " (AmortizedNormal for VAE)."
            )
