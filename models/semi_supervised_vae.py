"""The variational autoencoder of partly labelled data, M2, and the bound that sums over the labels that are missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, DataError, ModelGuideError, unknown_name
from pyrovae.models.conditional_vae import ConditionalVAE, require_labels
from pyrovae.models.likelihoods import require_batch
from pyrovae.modes import device_of
from pyrovae.objectives.base import Estimate, Objective
from pyrovae.registry import MODELS, OBJECTIVES
from pyrovae.structure import Program

__all__ = ["SemiSupervisedELBO", "SemiSupervisedVAE"]

ClassPrior = Literal["uniform", "learnable"]
KL = Literal["sampled", "analytic"]


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


@OBJECTIVES.register
class SemiSupervisedELBO(Objective):
    r"""The bound of partly labelled data, each missing label summed out under q(y | x), with a loss of the classifier.

    .. math::
        \mathcal{L}(x, y) = \mathbb{E}_{q(z \mid x, y)} \log \frac{p(y)\, p(z)\, p(x \mid z, y)}{q(z \mid x, y)}, \qquad
        \mathcal{U}(x) = \sum_y q(y \mid x) \big(\mathcal{L}(x, y) - \log q(y \mid x)\big)

    .. math::
        \mathcal{J} = \sum_{n \text{ labelled}} \big(\mathcal{L}(x_n, y_n) + \alpha \log q(y_n \mid x_n)\big)
        + \sum_{n \text{ unlabelled}} \mathcal{U}(x_n)

    Without its last term the bound of a labelled data point would not train q(y | x). The paper's α, 0.1 of the number
    N of all data points, multiplies the *mean* over the N_l labelled ones: here that is ``alpha=0.1 * N / N_l``. The
    reported bound is the plain one, without this term, and has no parts.

    A minibatch may mix both kinds: every data point is run once under each class, as if labelled so, which costs
    ``classes`` times a data point of a VAE, has no branch on the labels and compiles. The guide offers
    ``classify(x)``; model and guide are called with ``(x, y)``.

    Args:
        particles: number of draws of z for each class.
        alpha: α, the weight of each labelled data point's log q(y | x), at least 0.
        kl: of z, ``"sampled"`` or ``"analytic"`` (in closed form).

    Raises:
        ArgumentError: an argument is out of range; and, at the first evaluation, data without labels.
        ModelGuideError: at the first evaluation, model and guide do not fit each other or have no labels.

    References:
        Kingma et al. 2014, equations 6 to 9, https://arxiv.org/abs/1406.5298.

    Example:
        >>> from pyrovae.guides.semi_supervised import AmortizedSemiSupervised
        >>> model = SemiSupervisedVAE(data_shape=(8, 8), latent_dim=2, classes=10, hidden=(32,))
        >>> guide = AmortizedSemiSupervised(model)
        >>> estimate = SemiSupervisedELBO().estimate(model, guide, torch.zeros(3, 8, 8), torch.tensor([3, -1, -1]))
        >>> estimate.loss > -estimate.bound   # by the loss of the classifier
        tensor(True)
    """

    def __init__(self, particles: int = 1, alpha: float = 1.0, kl: KL = "sampled") -> None:
        super().__init__(particles)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0.0 <= alpha < float("inf"):
            raise ArgumentError(f"alpha is {alpha!r}; it must be a finite number, at least 0")
        if kl not in get_args(KL):
            raise unknown_name("kl", kl, get_args(KL))
        self.alpha = float(alpha)
        self.analytic = kl

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Runs every data point under each class; see :class:`~pyrovae.objectives.base.Objective`."""
        x, y, classes = _labelled(model, guide, *args, **kwargs)
        every = torch.arange(classes, device=x.device)
        batch = x.repeat(classes, *[1] * (x.dim() - 1)), every.repeat_interleave(len(x))
        weights = self.weights(model, guide, batch, {}, "both", self.analytic)
        bounds = weights.log_w.mean(0).reshape(classes, len(x)).mT  # L(x, y) of each y, n x classes

        log_q = guide.classify(x).logits  # type: ignore[attr-defined]  # _labelled has asked for it
        unlabelled = (log_q.exp() * (bounds - log_q)).sum(-1)
        label = y.clamp(min=0).long().unsqueeze(-1)
        labelled, log_label = bounds.gather(-1, label).squeeze(-1), log_q.gather(-1, label).squeeze(-1)
        known = y >= 0
        bound = torch.where(known, labelled, unlabelled).sum()
        classifier = torch.where(known, log_label, torch.zeros_like(log_label)).sum()
        return Estimate(loss=-bound - self.alpha * classifier, bound=bound.detach())


def _labelled(model: Any, guide: Any, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """The batch and the number of classes, checked."""
    if not hasattr(model, "classes") or not hasattr(guide, "classify"):
        raise ModelGuideError(
            "SemiSupervisedELBO needs a model of labelled data with 'classes' and a guide with 'classify': use"
            f" SemiSupervisedVAE and AmortizedSemiSupervised, not {type(model).__name__} and {type(guide).__name__}"
        )
    if y is None:
        raise DataError("the data come without labels; give (x, y), with y = -1 where a label is missing")
    require_labels(y, len(x), model.classes, missing=True)
    return x, y, model.classes
