"""The variational autoencoder whose generative half is given the label of each data point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import is_validation_enabled
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, DataError, require_count, unknown_name
from pyrovae.models.likelihoods import LIKELIHOODS, by_element, require_batch, start_at_mean
from pyrovae.models.networks import ConvDecoder, as_image, full_precision, mlp
from pyrovae.modes import device_of
from pyrovae.registry import MODELS

__all__ = ["ConditionalVAE", "one_hot", "require_labels"]


@MODELS.register
class ConditionalVAE(PyroModule):
    r"""Latent-Gaussian model of data points given their labels: a :class:`~pyrovae.models.VAE` for every class at once.

    .. math:: z_n \sim \mathcal{N}(0, I), \qquad x_n \mid z_n, y_n \sim p(x \mid g_\theta(z_n, y_n))

    The latent holds what the label leaves open (style, not content), so that a label can be changed with the latent
    held fixed. ``forward(x, y)`` conditions on a batch and its labels; its bound is on log p(x | y), for labels have no
    distribution here. ``forward(y=y)`` generates a data point for each label, and ``forward(size=n)`` draws n labels
    uniformly first, as the site ``"y"``. ``AmortizedConditional`` is its guide; fit it to ``(x, y)``, such as
    ``(split.x, split.y)``. :class:`~pyrovae.models.semi_supervised_vae.SemiSupervisedVAE` infers labels.

    Labels are whole numbers 0 … classes − 1, or rows of ``classes`` floating-point numbers: one-hot ones, or weights
    between classes. Their values are checked where Pyro's validation is on: at the first minibatch of a fit.

    Args:
        data_shape: shape of one data point: ``(28, 28)``, ``(3, 32, 32)``, ``(7,)``, ….
        latent_dim: number of latent dimensions.
        classes: number of classes.
        hidden: widths of the fully connected hidden layers of the decoder, from the latent to the data (the guide's
            encoder mirrors them).
        activation: name of the activation, as for ``VAE``.
        likelihood: name of the likelihood, as for ``VAE``.
        network: ``"mlp"``, or ``"conv"`` for images ``(H, W)`` or ``(C, H, W)``.
        channels: of the convolutions, from the coarsest level to the finest.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    References:
        Sohn et al. 2015, "Learning structured output representation using deep conditional generative models",
        https://papers.nips.cc/paper/2015/hash/8d55a249e6baa5c06772297520da2051-Abstract.html; Kingma et al. 2014,
        section 2, https://arxiv.org/abs/1406.5298.

    Example:
        >>> model = ConditionalVAE(data_shape=(8, 8), latent_dim=2, classes=10, hidden=(32,))
        >>> model(y=torch.tensor([3, 1, 4])).shape
        torch.Size([3, 8, 8])
        >>> p = model.decode(torch.zeros(5, 1, 2), torch.arange(10))   # five latents, each as all ten classes
        >>> p.batch_shape, p.event_shape
        (torch.Size([5, 10]), torch.Size([8, 8]))
    """

    default_guide: ClassVar[str] = "AmortizedConditional"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {}}

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dim: int,
        classes: int,
        hidden: Sequence[int] = (200, 200),
        activation: str = "tanh",
        likelihood: str = "bernoulli",
        network: Literal["mlp", "conv"] = "mlp",
        channels: Sequence[int] = (64, 32),
    ) -> None:
        super().__init__()
        if not data_shape:
            raise ArgumentError("data_shape is empty; it must hold whole numbers, at least 1 each")
        self.data_shape = tuple(require_count("data_shape", size) for size in data_shape)
        self.latent_dim = require_count("latent_dim", latent_dim)
        self.classes = require_count("classes", classes, least=2)
        if likelihood not in LIKELIHOODS:
            raise unknown_name("likelihood", likelihood, LIKELIHOODS)
        if network not in ("mlp", "conv"):
            raise unknown_name("network", network, ("mlp", "conv"))
        self.hidden, self.channels = tuple(hidden), tuple(channels)
        self.activation, self.network = activation, network
        self.likelihood = LIKELIHOODS[likelihood]
        self.register_buffer("prior_loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("identity", torch.eye(classes), persistent=False)

        inputs, outputs = latent_dim + classes, self.likelihood.outputs
        if network == "mlp":
            self.decoder: nn.Module = mlp(inputs, self.hidden, math.prod(self.data_shape) * outputs, activation)
        else:
            image = self.image_shape
            self.decoder = ConvDecoder(inputs, self.hidden, self.channels, image, image[0] * outputs, activation)
        self.likelihood_scale = self.likelihood.scale()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a data point that is an image."""
        return as_image(self.data_shape, "network='conv'", "network='mlp'")

    def prior(self) -> dist.TorchDistribution:
        """p(z): batch shape (), event shape (latent_dim,)."""
        return dist.Normal(self.prior_loc, torch.ones_like(self.prior_loc)).to_event(1)

    def class_prior(self) -> dist.Categorical:
        """p(y): uniform, batch shape ()."""
        return dist.Categorical(logits=torch.zeros_like(self.identity[0]))

    def decode(self, z: Tensor, y: Tensor) -> dist.TorchDistribution:
        """p(x | z, y).

        Args:
            z: A `*batch x latent_dim` tensor.
            y: whole numbers, `*batch`, or weights of the classes, `*batch x classes`; its batch dimensions and those of
                ``z`` broadcast against each other.

        Returns:
            A distribution of batch shape `*batch`, event shape ``data_shape``.
        """
        labels = one_hot(y, self.identity)
        batch = torch.broadcast_shapes(z.shape[:-1], labels.shape[:-1])
        inputs = torch.cat([z.expand(*batch, -1), labels.expand(*batch, -1)], -1)
        out = full_precision(self.decoder(inputs))
        out = by_element(out, self.likelihood.outputs, self.data_shape, self.network == "conv")
        return self.likelihood.distribution(out, self.likelihood_scale).to_event(len(self.data_shape))

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Conditions on ``x`` and its labels, or generates when ``x`` is ``None``; returns the data.

        Args:
            x: A `n x *data_shape` tensor, or ``None``.
            y: labels, `n` or `n x classes`; ``None`` draws them uniformly, where there is no ``x`` either.
            size: number of data points to generate where no labels are given.

        Raises:
            DataError: ``x`` is not a batch of data points of this model's shape, or ``y`` does not label it.
        """
        if x is not None:
            require_batch(x, self.data_shape)
            if y is None:
                raise DataError(
                    "x comes without its labels y; fit to (x, y). SemiSupervisedVAE takes data whose labels are missing"
                )
        if y is not None:
            size = len(y)
            require_labels(y, size if x is None else len(x), self.classes)
        with pyro.plate("data", size, device=device_of(self)):
            if y is None:
                y = pyro.sample("y", self.class_prior())
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z, y), obs=x)

    def initialize_output(self, x: Tensor) -> ConditionalVAE:
        """Sets the decoder's last bias so that it starts at the mean of the data, and returns the model.

        Args:
            x: A `n x *data_shape` tensor of data (or of their intensities).
        """
        start_at_mean(self.decoder, self.likelihood, x.mean(0), self.network == "conv")
        return self


def one_hot(y: Tensor, identity: Tensor) -> Tensor:
    """Labels as weights of the classes.

    Args:
        y: whole numbers, `*batch`, or weights already, `*batch x classes`.
        identity: the `classes x classes` identity, of the dtype and on the device that the weights shall have.

    Returns:
        A `*batch x classes` tensor.

    Example:
        >>> one_hot(torch.tensor([2, 0]), torch.eye(3))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    return y.to(identity.dtype) if y.is_floating_point() else identity[y.long()]


def require_labels(y: Tensor, size: int, classes: int, missing: bool = False) -> None:
    """Raises an error unless ``y`` labels a batch of data points.

    Args:
        y: the labels.
        size: number n of data points.
        classes: number of classes.
        missing: whether −1 is allowed, for a label that is not known; the labels must then be whole numbers.

    Raises:
        DataError: ``y`` has another shape or (where Pyro's validation is on) values that are no labels.
    """
    weights = y.is_floating_point() and not missing
    shape = (size, classes) if weights else (size,)
    if tuple(y.shape) != shape or (missing and y.is_floating_point()) or y.dtype == torch.bool:
        rows = "" if missing else f", or floating-point weights of shape ({size}, {classes})"
        raise DataError(f"y is {y.dtype} of shape {tuple(y.shape)}; it must hold whole numbers, shape ({size},){rows}")
    if not is_validation_enabled():
        return
    if weights:
        if bool((y < 0).any()) or not torch.allclose(y.sum(-1), torch.ones_like(y[:, 0]), atol=1e-4):
            raise DataError("y holds rows that are no weights of classes; each must be at least 0 and sum to 1")
    elif bool((y < -int(missing)).any()) or bool((y >= classes).any()):
        unknown = ", or −1 where it is not known" if missing else ""
        raise DataError(
            f"y holds labels from {int(y.min())} to {int(y.max())}; with classes={classes} a label must be one of"
            f" 0 … {classes - 1}{unknown}"
        )
