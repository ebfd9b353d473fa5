"""Amortized posterior of the latent and of a label that may be missing, with its classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.guides.amortized import reshaped
from pyrovae.guides.conditional import AmortizedConditional, LabelledModel
from pyrovae.models.conditional_vae import require_labels
from pyrovae.models.networks import ConvEncoder, full_precision, mlp
from pyrovae.modes import device_of
from pyrovae.registry import GUIDES

__all__ = ["AmortizedSemiSupervised"]


@GUIDES.register
class AmortizedSemiSupervised(AmortizedConditional):
    r"""Posterior of a label by a classifier, and of the latent given data point and label by an encoder.

    .. math:: q_\phi(y, z \mid x) = \mathrm{Cat}(y \mid \pi_\phi(x)) \,
        \mathcal{N}(z \mid \mu_\phi(x, y), \mathrm{diag}\,\sigma_\phi^2(x, y))

    Where there is a label, q(y | x) has all its mass there. The classifier and the encoder are networks apart, of the
    same widths.

    Args:
        model: the model, a ``SemiSupervisedVAE``, as for :class:`~pyrovae.guides.conditional.AmortizedConditional`.
        hidden: widths of the hidden layers of encoder and classifier; ``None`` mirrors the model's.
        activation: name of the activation; ``None`` takes the model's.

    Raises:
        ArgumentError: the model is of another kind, or an argument is out of range.

    References:
        Kingma et al. 2014, section 3.1, https://arxiv.org/abs/1406.5298.

    Example:
        >>> from pyrovae.models.semi_supervised_vae import SemiSupervisedVAE
        >>> guide = AmortizedSemiSupervised(SemiSupervisedVAE(data_shape=(8, 8), latent_dim=2, classes=10, hidden=(9,)))
        >>> guide.classify(torch.zeros(5, 8, 8)).probs.shape
        torch.Size([5, 10])
    """

    def __init__(
        self, model: LabelledModel, hidden: Sequence[int] | None = None, activation: str | None = None
    ) -> None:
        super().__init__(model, hidden, activation)
        hidden = tuple(reversed(model.hidden)) if hidden is None else tuple(hidden)
        activation = activation or model.activation
        if model.network == "conv":
            levels = tuple(reversed(model.channels))
            self.classifier: nn.Module = ConvEncoder(model.image_shape, levels, hidden, self.classes, activation)
        else:
            self.classifier = mlp(math.prod(self.data_shape), hidden, self.classes, activation)

    def classify(self, x: Tensor) -> dist.Categorical:
        """q(y | x) for `*batch x *data_shape` data: batch shape `*batch`, its ``probs`` `*batch x classes`."""
        return dist.Categorical(logits=full_precision(self.classifier(reshaped(x, self.data_shape, self.image_shape))))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Samples the labels that are missing, then z; returns z.

        Args:
            x: A `n x *data_shape` tensor.
            y: whole numbers, `n`: labels, −1 where one is missing; ``None`` where all are.

        Returns:
            A `n x latent_dim` tensor (particles to the left).

        Raises:
            DataError: ``y`` does not label ``x``.
        """
        if y is None:
            y = torch.full((len(x),), -1, device=x.device)
        require_labels(y, len(x), self.classes, missing=True)
        certain = self.identity[y.clamp(min=0).long()].log()
        logits = torch.where((y >= 0).unsqueeze(-1), certain, self.classify(x).logits)
        with pyro.plate("data", len(x), device=device_of(self)):
            label = pyro.sample("y_unobserved", dist.Categorical(logits=logits))
            return pyro.sample("z", self.encode(x, label))
