"""What uncertainty is worth: points outside the data, risk against coverage, and whether chains agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError, unknown_name
from pyrovae.evaluation.prediction import Prediction
from pyrovae.evaluation.predictive import each_member, of_members, said, say_shape, targets

__all__ = ["OutOfDistribution", "RiskCoverage", "function_r_hat", "out_of_distribution", "risk_coverage"]

_FOUND = 0.95  # share of the outside points that must be found, for the false positive rate

_OF_CLASSES = ("max_prob", "entropy", "mutual_information")  # scores, the default one of risk_coverage first
_OF_NUMBERS = ("stddev", "epistemic")


@dataclass(frozen=True, eq=False)
class OutOfDistribution:
    """How well a score tells points outside the data (the positive ones) from those inside; tensors are `*members`.

    Args:
        auroc: area under the ROC curve: probability that a point outside has the higher score, ties as one half.
        fpr95: false positive rate at 95 % true positive rate: share of the points inside that are flagged by the
            threshold that flags 95 % of those outside.
        score: its name.
        inside: number of points inside.
        outside: number of points outside.
    """

    auroc: Tensor
    fpr95: Tensor
    score: str
    inside: int
    outside: int

    def __repr__(self) -> str:
        return (
            f"OutOfDistribution({of_members(self.auroc)}AUROC {said(self.auroc)}, false positive rate at 95% true"
            f" positive rate {said(self.fpr95)}, by {self.score}; {self.inside} points inside, {self.outside} outside)"
        )


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Loss of the points that a prediction is surest of, against their share.

    Args:
        coverage: share of the points that are kept, the surest first: 1/n, …, 1, `n`.
        risk: their mean loss, `*members x n`.
        area: mean of ``risk`` over all coverages, `*members`; in random order it would be the risk at coverage 1.
        loss: ``"error"`` (a share) or ``"squared error"`` (in squared units of y).
        score: name of the uncertainty by which the points are ordered.
    """

    coverage: Tensor
    risk: Tensor
    area: Tensor
    loss: str
    score: str

    def __repr__(self) -> str:
        return (
            f"RiskCoverage({of_members(self.area)}area {said(self.area)} under the {self.loss}, against"
            f" {said(self.risk[..., -1])} in random order; surest by {self.score}; {len(self.coverage)} data points)"
        )


@torch.no_grad()
def out_of_distribution(
    inside: Prediction | Tensor, outside: Prediction | Tensor, score: str = "entropy"
) -> OutOfDistribution:
    """How well a prediction's uncertainty tells points from elsewhere from points of the data's own distribution.

    Args:
        inside: the prediction at points of the data's distribution; or scores of them, `*members x n`, higher where a
            point looks more like one from outside.
        outside: the same at points from elsewhere, which are the positive ones.
        score: of classes ``"entropy"``, ``"mutual_information"`` or ``"max_prob"`` (low ones are suspect); of numbers
            ``"stddev"`` or ``"epistemic"``. Scores that are given are taken as they are.

    Returns:
        :class:`OutOfDistribution`, one value for each member.

    Raises:
        ArgumentError: there is no such score of this response, or ``inside`` or ``outside`` is something else.
        DataError: scores are NaN, missing, or of other members.

    References:
        Hendrycks & Gimpel 2017, https://arxiv.org/abs/1610.02136.

    Example:
        >>> found = out_of_distribution(torch.tensor([0.1, 0.2, 0.6, 0.3]), torch.tensor([0.5, 0.7]))
        >>> found.auroc, found.fpr95
        (tensor(0.8750), tensor(0.2500))
    """
    from torchmetrics.functional.classification import binary_auroc, binary_specificity_at_sensitivity

    parts = [_scores(name, part, score) for name, part in (("inside", inside), ("outside", outside))]
    if parts[0].shape[:-1] != parts[1].shape[:-1]:
        raise DataError(
            f"inside is of members {tuple(parts[0].shape[:-1])} and outside of {tuple(parts[1].shape[:-1])}; give both"
            " of the same networks"
        )
    joined = torch.cat(parts, -1)
    positive = (torch.arange(joined.shape[-1], device=joined.device) >= parts[0].shape[-1]).long()

    def rates(values: Tensor) -> Tensor:
        # Ranks: torchmetrics passes what lies outside [0, 1] through a sigmoid, in which large scores become equal.
        ranks = values.unique(return_inverse=True)[1].double()
        ranks /= ranks.max().clamp(min=1.0)
        specificity, _ = binary_specificity_at_sensitivity(ranks, positive, min_sensitivity=_FOUND)
        return torch.stack([binary_auroc(ranks, positive), 1.0 - specificity])

    found = torch.stack([rates(values) for values in joined.reshape(-1, joined.shape[-1])], -1)
    auroc, fpr95 = found.reshape(2, *joined.shape[:-1])
    named = score if isinstance(inside, Prediction) or isinstance(outside, Prediction) else "given scores"
    return OutOfDistribution(auroc, fpr95, named, parts[0].shape[-1], parts[1].shape[-1])


@torch.no_grad()
def risk_coverage(prediction: Prediction, y: Tensor, score: str | None = None) -> RiskCoverage:
    r"""Mean loss of the points that a prediction is surest of, for each share of them.

    .. math:: \mathrm{risk}_k = \frac1k \sum_{i=1}^k \ell_{(i)}, \qquad
        \mathrm{area} = \frac1n \sum_{k=1}^n \mathrm{risk}_k

    ℓ is the error of the most probable class, or the squared error of the predictive mean. Points with equal scores
    count as in random order, on average: where all are equal, the curve is flat.

    Args:
        prediction: of classes or numbers.
        y: targets, `n`, or `*members x n` where each member has its own.
        score: the uncertainty that orders the points: ``"max_prob"``, ``"entropy"`` or ``"mutual_information"`` of
            classes, ``"stddev"`` or ``"epistemic"`` of numbers; ``None`` takes the first of these.

    Returns:
        :class:`RiskCoverage`.

    Raises:
        ArgumentError: there is no such score of this response.
        DataError: as for :func:`regression_scores` and :func:`classification_scores`.

    References:
        Geifman & El-Yaniv 2017, https://arxiv.org/abs/1705.08500; Geifman et al. 2019 (the area),
        https://arxiv.org/abs/1805.08206.

    Example:
        >>> import pyro.distributions as dist
        >>> numbers = {"loc": torch.zeros(1, 4), "scale": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}
        >>> found = risk_coverage(Prediction(dist.Normal, numbers), torch.tensor([0.0, 1.0, 1.0, 2.0]))
        >>> found.risk.tolist()
        [0.0, 0.5, 0.6666666666666666, 1.5]
    """
    y = targets(prediction, y)
    classes = prediction.classes is not None
    score = _allowed(prediction)[0] if score is None else score
    uncertainty = _scores("prediction", prediction, score)
    losses = (prediction.probs.argmax(-1) != y).double() if classes else (prediction.mean - y).double().square()
    risk = each_member(_risk, prediction, uncertainty, losses)
    coverage = torch.arange(1, len(prediction) + 1, device=risk.device).double() / len(prediction)
    return RiskCoverage(coverage, risk, risk.mean(-1), "error" if classes else "squared error", score)


@torch.no_grad()
def function_r_hat(draws_by_chain: Tensor) -> Tensor:
    r"""Split R-hat of the function that a network computes, at each input.

    .. math:: \hat R = \sqrt{\frac{\tfrac{N - 1}{N} W + \tfrac1N B}{W}}

    W and B are the variances within and between the halves of the chains, of N draws each. It is taken of function
    values and not of weights, since weights are not identified: hidden units can be permuted, their signs or scales
    swapped, without any change of the function. Chains around different copies of one function have large R-hats of
    their weights although their predictions agree; and it is predictions that are asked for.

    Args:
        draws_by_chain: function values (as means of the components, in units of y), `chains x samples x *shape`, at
            least 4 samples. With draws of weights of all chains one after the other,
            ``prediction.components.mean.unflatten(0, (chains, samples))``.

    Returns:
        R-hat, `*shape`: near 1 where the chains agree (above about 1.01 they need to be longer), infinite where chains
        stand still at different values, NaN where all draws are equal.

    Raises:
        DataError: the tensor has another shape, or is not finite.

    References:
        Gelman & Rubin 1992, https://doi.org/10.1214/ss/1177011136; Vehtari et al. 2021 (split chains),
        https://doi.org/10.1214/20-BA1221; Izmailov et al. 2021 (in function space), https://arxiv.org/abs/2104.14421.

    Example:
        >>> chains = torch.randn(4, 500, 3, generator=torch.Generator().manual_seed(0))
        >>> chains[0, :, 2] += 2.0   # one chain is elsewhere at the last input
        >>> function_r_hat(chains) > 1.1
        tensor([False, False,  True])
    """
    if not isinstance(draws_by_chain, Tensor) or draws_by_chain.dim() < 3 or draws_by_chain.numel() == 0:
        raise DataError(f"draws_by_chain has {say_shape(draws_by_chain)}; it must be `chains x samples x n`, not empty")
    if draws_by_chain.shape[1] < 4:
        raise DataError(f"draws_by_chain has {draws_by_chain.shape[1]} samples of each chain; give at least 4")
    if not bool(draws_by_chain.isfinite().all()):
        raise DataError("draws_by_chain holds NaN or infinite values; a chain diverged")
    flat = draws_by_chain.double().flatten(2)
    return split_gelman_rubin(flat).reshape(draws_by_chain.shape[2:])


def _scores(name: str, given: Prediction | Tensor, score: str) -> Tensor:
    """Uncertainty of each point, `*members x n`."""
    if isinstance(given, Prediction):
        allowed = _allowed(given)
        if score not in allowed:
            raise unknown_name(f"score of {'numbers' if given.classes is None else 'classes'}", score, allowed)
        found = 1.0 - given.probs.amax(-1) if score == "max_prob" else getattr(given, score)
    elif isinstance(given, Tensor):
        found = given
    else:
        raise ArgumentError(f"{name} is a {type(given).__name__}; it must be a Prediction, or a tensor of scores")
    if found.dim() == 0 or found.numel() == 0 or bool(found.isnan().any()):
        raise DataError(f"{name} has scores of {say_shape(found)}; they must be `*members x n`, not empty and not NaN")
    return found


def _allowed(prediction: Prediction) -> tuple[str, ...]:
    return _OF_NUMBERS if prediction.classes is None else _OF_CLASSES


def _risk(uncertainty: Tensor, losses: Tensor) -> Tensor:
    """Mean loss of the surest 1, …, n points; points that are equally sure have their mean loss each."""
    _, place, counts = uncertainty.unique(return_inverse=True, return_counts=True)
    mean = losses.new_zeros(len(counts)).scatter_add_(0, place, losses) / counts
    ordered = mean.repeat_interleave(counts)
    return ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
