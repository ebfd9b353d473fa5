"""The variational autoencoder of partly labelled data, M2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyrovae.errors import unknown_name
from pyrovae.models.conditional_vae import ConditionalVAE, require_labels
from pyrovae.models.likelihoods import require_batch
from pyrovae.modes import device_of
from pyrovae.registry import MODELS

__all__ = ["SemiSupervisedVAE"]

ClassPrior = Literal["uniform", "learnable"]


@MODELS.register
class SemiSupervisedVAE(ConditionalVAE):
    r"""Latent-Gaussian model of data points and their labels, of which any may be missing: M2 of Kingma et al.

    .. math:: y_n \sim \mathrm{Cat}(\pi), \qquad z_n \sim \mathcal{N}(0, I), \qquad
        x_n \mid z_n, y_n \sim p(x \mid g_\theta(z_n, y_n))

    A missing label is −1. The label is two sites, of which a mask lets one count: ``"y_observed"`` where it is given,
    and the latent ``"y_unobserved"`` where it is missing; so bounds are on log p(x, y) of a labelled data point and on
    log p(x) of another. ``AmortizedSemiSupervised`` is the guide, and
    :class:`SemiSupervisedELBO` the objective; ``EnumeratedELBO`` has the same expectation for ``alpha=0``, and
    :func:`pyrovae.evaluation.log_likelihood` draws the missing labels. ``classify`` of the guide gives q(y | x).

    Args:
        data_shape: shape of one data point, as for ``ConditionalVAE``.
        latent_dim: number of latent dimensions.
        classes: number of classes.
        hidden: widths of the decoder's fully connected hidden layers.
        activation: name of the activation, as for ``VAE``.
        likelihood: name of the likelihood, as for ``VAE``.
        network: ``"mlp"``, or ``"conv"`` for images.
        channels: of the convolutions, from the coarsest level to the finest.
        class_prior: π: ``"uniform"``, or ``"learnable"`` for probabilities that are learnt.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    References:
        Kingma, Rezende, Mohamed & Welling 2014, "Semi-supervised learning with deep generative models", model M2,
        https://arxiv.org/abs/1406.5298.

    Example:
        >>> model = SemiSupervisedVAE(data_shape=(8, 8), latent_dim=2, classes=10, hidden=(32,))
        >>> model(size=5).shape
        torch.Size([5, 8, 8])
        >>> model(y=torch.tensor([3, -1])).shape   # a three, and a digit of any class
        torch.Size([2, 8, 8])
    """

    default_guide: ClassVar[str] = "AmortizedSemiSupervised"
    default_objective: ClassVar[dict[str, Any]] = {"name": "SemiSupervisedELBO", "arguments": {}}

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
        class_prior: ClassPrior = "uniform",
    ) -> None:
        super().__init__(data_shape, latent_dim, classes, hidden, activation, likelihood, network, channels)
        if class_prior not in get_args(ClassPrior):
            raise unknown_name("class_prior", class_prior, get_args(ClassPrior))
        if class_prior == "learnable":
            self.class_logits: Tensor = nn.Parameter(torch.zeros(classes))
        else:
            self.register_buffer("class_logits", torch.zeros(classes), persistent=False)

    def class_prior(self) -> dist.Categorical:
        """p(y), batch shape ()."""
        return dist.Categorical(logits=self.class_logits)

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Conditions on ``x`` and on the labels that there are, or generates when ``x`` is ``None``; returns the data.

        Args:
            x: A `n x *data_shape` tensor, or ``None``.
            y: whole numbers, `n`: labels, −1 where one is missing; ``None`` where all are.
            size: number of data points to generate where neither is given.

        Raises:
            DataError: ``x`` is not a batch of data points of this model's shape, or ``y`` does not label it.
        """
        if x is not None:
            require_batch(x, self.data_shape)
        given = x if x is not None else y
        size = size if given is None else len(given)
        if y is None:
            y = torch.full((size,), -1, device=device_of(self))
        require_labels(y, size, self.classes, missing=True)
        with pyro.plate("data", size, device=device_of(self)):
            y = self._classes(y)
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z, y), obs=x)

    def _classes(self, y: Tensor) -> Tensor:
        """The labels, and drawn ones where they are missing.

        As ``pyro.sample(…, obs_mask=…)`` does it, but without its third site, whose float32 density float64 rejects.
        """
        known = y >= 0
        with poutine.mask(mask=known):
            given = pyro.sample("y_observed", self.class_prior(), obs=y.clamp(min=0))
        with poutine.mask(mask=~known):
            drawn = pyro.sample("y_unobserved", self.class_prior())
        return torch.where(known, given, drawn)
