"""The bound of partly labelled data, which sums over the labels that are missing."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError, ModelGuideError, unknown_name
from pyrovae.objectives.base import Estimate, Objective
from pyrovae.registry import OBJECTIVES
from pyrovae.structure import Program

__all__ = ["SemiSupervisedELBO"]

KL = Literal["sampled", "analytic"]


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
        >>> from pyrovae.guides import AmortizedSemiSupervised
        >>> from pyrovae.models import SemiSupervisedVAE
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
    from pyrovae.models.conditional_vae import require_labels  # models import objectives

    if not hasattr(model, "classes") or not hasattr(guide, "classify"):
        raise ModelGuideError(
            "SemiSupervisedELBO needs a model of labelled data with 'classes' and a guide with 'classify': use"
            f" SemiSupervisedVAE and AmortizedSemiSupervised, not {type(model).__name__} and {type(guide).__name__}"
        )
    if y is None:
        raise DataError("the data come without labels; give (x, y), with y = -1 where a label is missing")
    require_labels(y, len(x), model.classes, missing=True)
    return x, y, model.classes
