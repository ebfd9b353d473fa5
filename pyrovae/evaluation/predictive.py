"""How good are predictions: proper scores, calibration, what lies outside the data, and whether chains agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyro.distributions as dist
import torch
from pyro.ops.stats import crps_empirical
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError, require_count
from pyrovae.evaluation.prediction import Prediction

__all__ = [
    "ClassificationScores",
    "RegressionScores",
    "Reliability",
    "classification_scores",
    "regression_scores",
]

_SEED = 0  # of the draws behind a CRPS, and of the randomized PIT of counts
_DRAWS = 1000  # a data point, behind a CRPS that has no closed form
_NUMBERS = 2**14  # of which a CRPS holds a few times as many at a time: they fit in a core's cache
_BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 under 1


@dataclass(frozen=True, eq=False)
class RegressionScores:
    """How well a predictive distribution of numbers fits targets; each tensor is `*members` but ``pit``.

    Args:
        rmse: root mean squared error of the predictive mean, in units of y.
        log_likelihood: of the mixture, mean over the points, in nats per point.
        gaussian_log_likelihood: of the Gaussian that has the mixture's mean and variance, in nats per point.
        crps: continuous ranked probability score, mean over the points, in units of y; lower is better.
        coverage: share of the targets inside the equal-tailed interval of probability ``level``.
        pit: probability integral transform of each target, `*members x n`: uniform where the prediction is right.
        level: probability of the interval.
    """

    rmse: Tensor
    log_likelihood: Tensor
    gaussian_log_likelihood: Tensor
    crps: Tensor
    coverage: Tensor
    pit: Tensor
    level: float

    def __repr__(self) -> str:
        return (
            f"RegressionScores({of_members(self.rmse)}RMSE {said(self.rmse)}, CRPS {said(self.crps)}, in units of y;"
            f" log-likelihood {said(self.log_likelihood)} nats per point"
            f" ({said(self.gaussian_log_likelihood)} as a Gaussian); {100 * self.level:g}% intervals hold"
            f" {said(100 * self.coverage)}% of y; {self.pit.shape[-1]} data points)"
        )


@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence and accuracy of the predicted class in equal bins of the confidence, each `*members x bins`.

    Args:
        confidence: mean probability of the predicted class; NaN in an empty bin.
        accuracy: share of the points whose predicted class is right; NaN in an empty bin.
        counts: number of points.
    """

    confidence: Tensor
    accuracy: Tensor
    counts: Tensor

    def __repr__(self) -> str:
        bins = self.counts.shape[-1]
        if self.counts.dim() > 1:
            return f"Reliability({bins} bins of {self.counts[..., 0].numel()} members)"
        rows = zip(self.confidence.tolist(), self.accuracy.tolist(), self.counts.tolist(), strict=True)
        lines = [f"{sure:10.3f}  {right:8.3f}  {count:6d}" for sure, right, count in rows if count]
        return "\n".join(["confidence  accuracy  points", *lines])


@dataclass(frozen=True, eq=False)
class ClassificationScores:
    """How well predicted probabilities of classes fit targets; each tensor is `*members`.

    Args:
        error: share of the points whose most probable class is wrong.
        nll: negative log-likelihood of the mixture, mean over the points, in nats per point.
        brier: squared distance of the probabilities from the target's indicator, summed over the classes and averaged
            over the points, between 0 and 2 (of two classes: twice the score of one class's probability).
        ece: expected calibration error: mean distance of confidence and accuracy over the points, by bins.
        mce: maximum calibration error: the largest such distance of a bin.
        entropy: of the predicted class, mean over the points, in nats.
        mutual_information: of class and weights, the epistemic part of the entropy, mean over the points, in nats.
        reliability: confidence and accuracy by bin.
        points: number of data points.
    """

    error: Tensor
    nll: Tensor
    brier: Tensor
    ece: Tensor
    mce: Tensor
    entropy: Tensor
    mutual_information: Tensor
    reliability: Reliability
    points: int

    def __repr__(self) -> str:
        return (
            f"ClassificationScores({of_members(self.error)}error {said(100 * self.error)}%; negative log-likelihood"
            f" {said(self.nll)} nats per point; Brier score {said(self.brier)} (sum over classes); calibration error"
            f" {said(self.ece)} expected, {said(self.mce)} maximum; entropy {said(self.entropy)} nats, of which"
            f" {said(self.mutual_information)} epistemic; {self.points} data points)"
        )


@torch.no_grad()
def regression_scores(prediction: Prediction, y: Tensor, coverage: float = 0.9) -> RegressionScores:
    r"""Accuracy, proper scores and calibration of a predictive distribution of numbers.

    .. math:: \mathrm{CRPS} = \mathrm{E}|Y - y| - \tfrac12 \mathrm{E}|Y - Y'|, \qquad
        Y, Y' \sim p(\cdot \mid x, \mathcal{D})

    The CRPS of Normal components is exact, in O(S²) for each point; of other families it is the unbiased estimate from
    1000 draws a point. The PIT is the predictive CDF at the target; of counts it is drawn uniformly between the CDF
    below and at the target. Both use a fixed seed, and the caller's random state is left as it was.

    Args:
        prediction: of numbers: Normal, Student's t or Poisson components.
        y: targets, `n`, or `*members x n` where each member has its own; in the units of y.
        coverage: probability of the equal-tailed interval, in (0, 1).

    Returns:
        :class:`RegressionScores`, one value for each member.

    Raises:
        ArgumentError: the prediction is of classes, or ``coverage`` is out of range.
        DataError: ``y`` has another shape, is not finite or, for counts, not a whole number; or the prediction is NaN.

    References:
        Gneiting & Raftery 2007, https://doi.org/10.1198/016214506000001437; Grimit et al. 2006 (CRPS of mixtures),
        https://doi.org/10.1256/qj.05.235; Czado et al. 2009 (PIT of counts),
        https://doi.org/10.1111/j.1541-0420.2009.01191.x.

    Example:
        >>> y = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> right = Prediction(dist.Normal, {"loc": torch.zeros(1, 1000), "scale": torch.ones(1, 1000)})
        >>> scores = regression_scores(right, y)
        >>> bool(0.87 < scores.coverage < 0.93)
        True
    """
    from torchmetrics.functional.regression import mean_squared_error

    if not 0.0 < coverage < 1.0:
        raise ArgumentError(f"coverage is {coverage!r}; it must lie between 0 and 1, as 0.9")
    y = targets(prediction, y)
    if prediction.classes is not None:
        raise ArgumentError("prediction is of classes; regression_scores is of numbers: see classification_scores")
    below, upto = _cdf_around(prediction, y)
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        pit = below + torch.rand_like(upto) * (upto - below)
        crps = _crps(prediction, y)
    tail = (1.0 - coverage) / 2.0
    return RegressionScores(
        rmse=each_member(partial(mean_squared_error, squared=False), prediction, prediction.mean.double(), y.double()),
        log_likelihood=prediction.log_prob(y).double().mean(-1),
        gaussian_log_likelihood=prediction.gaussian_log_prob(y).double().mean(-1),
        crps=crps.mean(-1),
        coverage=((upto >= tail) & (below < 1.0 - tail)).double().mean(-1),
        pit=pit,
        level=coverage,
    )


@torch.no_grad()
def classification_scores(prediction: Prediction, y: Tensor, bins: int = 15) -> ClassificationScores:
    r"""Error, proper scores and calibration of predicted probabilities of classes.

    .. math:: \mathrm{Brier} = \frac1n \sum_{i=1}^n \sum_c (p_{ic} - 1[y_i = c])^2, \qquad
        \mathrm{ECE} = \sum_b \frac{n_b}{n} |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    Args:
        prediction: of classes: Bernoulli or categorical components.
        y: classes, whole numbers from 0 on, `n`, or `*members x n` where each member has its own.
        bins: equal bins of the confidence, the probability of the most probable class.

    Returns:
        :class:`ClassificationScores`, one value for each member.

    Raises:
        ArgumentError: the prediction is of numbers, or ``bins`` is out of range.
        DataError: ``y`` has another shape or holds what is no class; or the prediction is NaN.

    References:
        Guo et al. 2017 (calibration error), https://arxiv.org/abs/1706.04599; Depeweg et al. 2018 (mutual information),
        https://arxiv.org/abs/1710.07283.

    Example:
        >>> sure = Prediction(dist.Bernoulli, {"logits": torch.tensor([[3.0, -3.0, 3.0]])})
        >>> scores = classification_scores(sure, torch.tensor([1, 0, 0]))
        >>> round(float(scores.error), 3), round(float(scores.ece), 3)
        (0.333, 0.286)
    """
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    require_count("bins", bins)
    y = targets(prediction, y)
    classes = prediction.classes
    if classes is None:
        raise ArgumentError("prediction is of numbers; classification_scores is of classes: see regression_scores")
    # torchmetrics gives a confidence of 1 a bin of its own, and takes what exceeds 1 by rounding for logits.
    probs = prediction.probs.clamp(0.0, _BELOW_ONE)
    accuracy = partial(multiclass_accuracy, num_classes=classes, average="micro")
    gap = partial(multiclass_calibration_error, num_classes=classes, n_bins=bins)
    target = y.to(probs.dtype) if prediction.family is dist.Bernoulli else y
    indicator = torch.nn.functional.one_hot(y, classes)
    return ClassificationScores(
        error=1.0 - each_member(accuracy, prediction, probs, y).double(),
        nll=-prediction.log_prob(target).double().mean(-1),
        brier=(probs - indicator).double().square().sum(-1).mean(-1),
        ece=each_member(partial(gap, norm="l1"), prediction, probs, y),
        mce=each_member(partial(gap, norm="max"), prediction, probs, y),
        entropy=prediction.entropy.double().mean(-1),
        mutual_information=prediction.mutual_information.double().mean(-1),
        reliability=_reliability(probs, y, bins),
        points=len(prediction),
    )


def targets(prediction: Prediction, y: Tensor) -> Tensor:
    """The targets in the shape of the prediction, `*members x n`: long for classes, else of the prediction's dtype."""
    if not isinstance(prediction, Prediction):
        raise ArgumentError(f"prediction is a {type(prediction).__name__}; give what pyrovae.predict returned")
    if any(bool(value.isnan().any()) for value in prediction.parameters.values()):
        raise DataError("prediction holds NaN; the fit or a chain behind its draws diverged")
    shape = prediction.components.batch_shape[1:]
    if not isinstance(y, Tensor) or y.shape not in (shape, shape[-1:]) or y.numel() == 0:
        wanted = " or ".join(str(tuple(size)) for size in dict.fromkeys((shape[-1:], shape)))
        raise DataError(f"y has {say_shape(y)}; for this prediction it must have shape {wanted}, not empty")
    if not bool(y.isfinite().all()):
        raise DataError("y holds NaN or infinite values; remove these points, and predict at the others")
    classes = prediction.classes
    if classes is not None or prediction.family is dist.Poisson:
        last = math.inf if classes is None else classes - 1
        if bool(((y != y.round()) | (y < 0) | (y > last)).any()):
            raise DataError(f"y holds {'no counts' if classes is None else f'other classes than 0, …, {last}'}")
    dtype = next(iter(prediction.parameters.values())).dtype if classes is None else torch.long
    return y.to(dtype).expand(shape)


def each_member(metric: Callable[..., Tensor], prediction: Prediction, *values: Tensor) -> Tensor:
    """A metric of the tensors of one network at a time, `*members x *metric`."""
    members = prediction.components.batch_shape[1:-1]
    flat = [value.reshape(-1, *value.shape[len(members) :]) for value in values]
    found = torch.stack([metric(*of_one) for of_one in zip(*flat, strict=True)])
    return found.reshape(members + found.shape[1:])


def _cdf_around(prediction: Prediction, y: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of less than y, and of at most y."""
    upto = prediction.cdf(y)
    return (prediction.cdf(y - 1.0), upto) if prediction.family is dist.Poisson else (upto, upto)


def _crps(prediction: Prediction, y: Tensor) -> Tensor:
    """CRPS of each point, `*members x n`, some points at a time."""
    flat = {name: value.flatten(1) for name, value in prediction.parameters.items()}
    exact = prediction.family is dist.Normal
    size = max(1, _NUMBERS // (prediction.samples if exact else _DRAWS))
    found = []
    for start in range(0, y.numel(), size):
        part = {name: value[:, start : start + size].double() for name, value in flat.items()}
        at = y.flatten()[start : start + size].double()
        found.append(_crps_of_normals(at, **part) if exact else _crps_of_draws(at, Prediction(prediction.family, part)))
    return torch.cat(found).reshape(y.shape)


def _crps_of_normals(at: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Grimit et al. 2006, equation 3, with equal weights; each shift pairs every component with another one."""
    samples, variance = len(loc), scale.square()
    between = _mean_abs(torch.zeros_like(loc), 2.0 * variance).sum(0)
    for shift in range(1, samples // 2 + 1):
        pairs = _mean_abs(loc - loc.roll(shift, 0), variance + variance.roll(shift, 0)).sum(0)
        between += pairs if 2 * shift == samples else 2.0 * pairs  # half way round each pair is met twice
    return _mean_abs(at - loc, variance).mean(0) - between / (2.0 * samples**2)


def _mean_abs(mean: Tensor, variance: Tensor) -> Tensor:
    """E|Z| of a Normal Z."""
    scale = variance.sqrt()
    z = mean / scale
    return scale * math.sqrt(2.0 / math.pi) * (-0.5 * z.square()).exp() + mean * torch.erf(z * math.sqrt(0.5))


def _crps_of_draws(at: Tensor, prediction: Prediction) -> Tensor:
    """Without bias, from draws of the mixture that are independent, also between points."""
    chosen = torch.randint(prediction.samples, (_DRAWS, len(at)), device=at.device)
    parameters = {name: value.gather(0, chosen) for name, value in prediction.parameters.items()}
    drawn = prediction.family(**parameters).sample()
    distance = (drawn - at).abs().mean(0)
    spread = distance - crps_empirical(drawn, at)  # which counts each draw's distance to itself
    return distance - spread * _DRAWS / (_DRAWS - 1)


def _reliability(probs: Tensor, y: Tensor, bins: int) -> Reliability:
    sure, chosen = probs.max(-1)
    edges = torch.linspace(0.0, 1.0, bins + 1, device=probs.device)
    at = torch.bucketize(sure.float(), edges, right=True) - 1

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(*values.shape[:-1], bins).scatter_add_(-1, at, values)

    counts = summed(torch.ones_like(at))
    return Reliability(summed(sure.double()) / counts, summed((chosen == y).double()) / counts, counts)


def say_shape(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"


def of_members(values: Tensor) -> str:
    return f"mean ± s.d. of {values.numel()} members: " if values.dim() else ""


def said(values: Tensor) -> str:
    if not values.dim():
        return f"{float(values):.4g}"
    return f"{float(values.double().mean()):.4g} ± {float(values.double().std()) if values.numel() > 1 else 0.0:.2g}"
