"""Pareto-smoothed importance sampling: is the guide a good enough proposal for its posterior?"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyrovae.errors import ModelGuideError, require_count
from pyrovae.evaluation.likelihood import asking, mean_error, require_plain
from pyrovae.structure import Program, check, dry_run, independent_frames, sample_sites
from pyrovae.weights import log_weights

__all__ = ["PSIS", "pareto_smooth", "psis"]

_ELEMENTS = 2**22  # numbers that one chunk of samples holds at its widest
_LEAST_TAIL = 5  # weights that a tail fit needs (Vehtari et al. 2024, appendix)
_FEW_SAMPLES = 1000  # below, the standard error of k̂ exceeds 0.15
_MANY_DIMS = 100  # from here on k̂ tells the dimension rather than the fit
EQUAL = 64.0  # a tail narrower than this many rounding errors is flat


@dataclass(frozen=True)
class PSIS:
    """Pareto-smoothed importance sampling with a guide as the proposal.

    ``k`` estimates how heavy the tail of the weights is: they have about 1/k finite moments, so that above 0.7 no
    practical number of samples makes the estimates good. Negative is a bounded weight; −∞ says that the largest
    weights are all equal, as they are when the guide is the posterior.

    Args:
        k: Pareto shape k̂, `*plates` (a scalar where the latents are shared by all data).
        efficiency: effective sample size over number of samples, between 0 and 1, `*plates`.
        log_evidence: estimate of ``log p(x)`` from the smoothed weights, in nats, `*plates`.
        standard_error: of ``log_evidence`` by the delta method, in nats, `*plates`; not to be relied on where k̂ is
            above the threshold.
        samples: number S of samples.
        latent_dim: number of latent dimensions behind each weight.
        notes: what makes the figures misleading here, one sentence each.
    """

    k: Tensor
    efficiency: Tensor
    log_evidence: Tensor
    standard_error: Tensor
    samples: int
    latent_dim: int
    notes: tuple[str, ...] = ()

    @property
    def threshold(self) -> float:
        """Largest k̂ at which S samples are enough, ``min(1 − 1 / log10 S, 0.7)``."""
        return min(1.0 - 1.0 / math.log10(self.samples), 0.7)

    @property
    def k_error(self) -> Tensor:
        """Approximate standard error of k̂, that of maximum likelihood: ``(1 + k) / sqrt(tail size)``, `*plates`."""
        return (1.0 + self.k.clamp(min=-0.5)) / _tail_size(self.samples) ** 0.5

    @property
    def reliable(self) -> Tensor:
        """Whether k̂ is at most the threshold, `*plates`."""
        return self.k <= self.threshold

    @property
    def verdict(self) -> str:
        """What k̂ says in words; of data points, about the share of those above the threshold."""
        if self.k.dim():
            share = 1.0 - float(self.reliable.double().mean())
            return f"{share:.1%} of {self.k.numel()} data points above the threshold {self.threshold:.2f}"
        k, limit = float(self.k), f"threshold {self.threshold:.2f}"
        if k <= self.threshold:
            return f"good ({limit})"
        if k <= 0.7:
            return f"too few samples for this k̂ ({limit}; {math.ceil(10 ** (1 / (1 - k)))} samples would do)"
        if k <= 1.0:
            return f"poor ({limit}): estimates by importance sampling are biased, the guide misses mass"
        return f"very poor ({limit}): the weights have no finite mean that samples show"

    def __repr__(self) -> str:
        if self.k.dim():
            error = f"{mean_error(self.standard_error):.3f}"
            said = (
                f"k̂ median {_number(self.k.median())}, largest {_number(self.k.max())}; {self.verdict};"
                f" efficiency {float(self.efficiency.mean()):.3f} on average, {float(self.efficiency.min()):.3f} at"
                f" least; log-evidence {float(self.log_evidence.mean()):.3f} ± {error} nats per data point"
            )
        else:
            error = f" ± {float(self.k_error):.2f}" if self.k.isfinite() else ""
            said = (
                f"k̂ {_number(self.k)}{error}, {self.verdict}; efficiency"
                f" {float(self.efficiency):.3f}; log-evidence {float(self.log_evidence):.3f} ±"
                f" {float(self.standard_error):.3f} nats"
            )
        noted = "".join(f"\n  note: {note}" for note in self.notes)
        return f"PSIS({said}; {self.samples} samples){noted}"


def psis(model: Program, guide: Program, *args: Any, samples: int = 4000, seed: int = 0, **kwargs: Any) -> PSIS:
    r"""Pareto k̂ and importance-sampling efficiency of a guide, for any model.

    .. math:: w_s = \frac{p(x, z_s)}{q(z_s \mid x)}, \quad z_s \sim q, \qquad
        \mathrm{efficiency} = \frac{(\sum_s w_s)^2}{S \sum_s w_s^2}

    A generalized Pareto distribution is fitted to the largest weights; its shape is k̂, and its quantiles replace
    these weights in all other figures. Latents shared by all data give one joint k̂; where a plate encloses all sites
    (the latents of a VAE), there is one k̂ for each of its elements.

    Args:
        model: Pyro model, called with ``*args, **kwargs``, without subsampling.
        guide: Pyro guide, called with the same.
        *args: passed to both.
        samples: number S of draws from the guide; at least 25, and from 2155 on the threshold is 0.7. All weights are
            kept, `samples x *plates` doubles.
        seed: of the draws; the caller's random state is left as it was.
        **kwargs: passed to both.

    Returns:
        A :class:`PSIS`. What makes its figures misleading is warned of and kept in its ``notes``.

    Raises:
        ArgumentError: ``samples`` is out of range.
        ModelGuideError: model and guide do not fit each other, a plate is subsampled, a weight is not finite, or the
            guide is a point mass.

    References:
        Vehtari et al. 2024, https://jmlr.org/papers/v25/19-556.html; Yao et al. 2018 (for variational inference),
        https://arxiv.org/abs/1802.02538; Zhang & Stephens 2009 (the fit), https://doi.org/10.1198/tech.2009.08017.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # twice too narrow
        ...     pyro.sample("z", dist.Normal(x.sum() / (len(x) + 1), 0.5 / (len(x) + 1) ** 0.5))
        >>> found = psis(model, guide, torch.ones(3))
        >>> 0.5 < found.k < 0.9, found.efficiency < 0.5
        (tensor(True), tensor(True))
    """
    require_count("samples", samples, 25, " for a tail to fit")
    with asking(model, guide, seed=seed):
        fixed = point_masses(guide, *args, **kwargs)
        if fixed:
            raise ModelGuideError(
                f"the guide is a point mass at {', '.join(map(repr, fixed))}: it has no density, so there are no"
                " importance weights. Use a guide with a density, such as pyro.infer.autoguide.AutoNormal."
            )
        notes, latent_dim = weights_notes(model, guide, args, kwargs, samples)
        log_w, rounding = draw_log_weights(model, guide, args, kwargs, samples)
    found = smoothed(log_w, rounding, latent_dim, notes)
    light = int(((found.k > found.threshold) & (found.efficiency > 0.9)).sum())
    if light:
        of = f" for {light} of {found.k.numel()} data points" if found.k.dim() else ""
        note = (
            f"k̂ is above the threshold although the efficiency is above 0.9{of}: k̂ tells the shape of the weights'"
            " tail, whatever its share of their sum. The log-evidence suffers little as long as that share stays small."
        )
        found = replace(found, notes=(*notes, note))
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    return found


def smoothed(log_w: Tensor, rounding: float, latent_dim: int = 0, notes: tuple[str, ...] = ()) -> PSIS:
    """The figures of given log-weights, `samples x *plates`, of which each is right up to ``rounding``."""
    samples = len(log_w)
    log_w, k = pareto_smooth(log_w, EQUAL * rounding)
    efficiency = (2.0 * log_w.logsumexp(0) - (2.0 * log_w).logsumexp(0)).exp() / samples
    return PSIS(
        k=k,
        efficiency=efficiency.clamp(max=1.0),
        log_evidence=log_w.logsumexp(0) - math.log(samples),
        standard_error=((1.0 / efficiency - 1.0) / (samples - 1)).clamp(min=0.0).sqrt(),
        samples=samples,
        latent_dim=latent_dim,
        notes=notes,
    )


def pareto_smooth(log_w: Tensor, flat: float = 0.0) -> tuple[Tensor, Tensor]:
    r"""Replaces the largest weights by the expected order statistics of a generalized Pareto fit to them.

    .. math:: w_{(S-M+i)} \leftarrow \min\left(u + F^{-1}\left(\tfrac{i - 1/2}{M}; \hat k, \hat\sigma\right),
        w_{(S)}\right), \qquad i = 1, \ldots, M = \lceil \min(S/5, 3\sqrt{S}) \rceil

    Args:
        log_w: log-weights, `samples x *batch`.
        flat: width in nats up to which a tail counts as made of equal weights.

    Returns:
        The smoothed log-weights, `samples x *batch`, and k̂, `*batch`, both in double precision on the CPU. Where too
        few weights of the tail are above zero k̂ is ∞, where they are all equal −∞, and nothing is smoothed.

    Raises:
        ModelGuideError: a log-weight is NaN or +∞, or all are −∞.

    References:
        Vehtari et al. 2024, https://jmlr.org/papers/v25/19-556.html.

    Example:
        >>> uniform = torch.rand(10_000, 2, generator=torch.Generator().manual_seed(0))
        >>> _, k = pareto_smooth(-torch.tensor([0.2, 0.6]) * uniform.log())   # Pareto weights of these shapes
        >>> (k - torch.tensor([0.2, 0.6])).abs() < 0.2
        tensor([True, True])
    """
    log_w = log_w.detach().cpu().double()
    top = log_w.amax(0)
    if bool(log_w.isnan().any() | ~top.isfinite().all()):
        raise ModelGuideError(
            "some log-weights are NaN or +∞, or all of one data point are −∞: the guide draws latents at which the"
            " model or the guide has no finite density. Check the supports of both, and the data."
        )
    order = (log_w - top).reshape(len(log_w), -1).sort(0)
    # The columns are views: the smoothed tails are written into ``order.values``.
    shapes = [_smooth_tail(column, flat) for column in order.values.unbind(1)]
    smooth = torch.empty_like(order.values).scatter_(0, order.indices, order.values)
    return smooth.reshape(log_w.shape) + top, torch.tensor(shapes, dtype=torch.double).reshape(top.shape)


def _smooth_tail(ordered: Tensor, flat: float) -> float:
    """Smooths the tail of ascending log-weights, of which the last is 0, in place; returns k̂."""
    size = _tail_size(len(ordered))
    cutoff = ordered[-size - 1].clamp(min=math.log(torch.finfo(torch.double).tiny))
    if -float(cutoff) <= flat:
        return -math.inf
    tail = ordered[ordered > cutoff]
    if len(tail) < _LEAST_TAIL:
        return math.inf
    k, sigma = fit_generalized_pareto(tail.exp() - cutoff.exp())
    if not (math.isfinite(k) and math.isfinite(sigma)):
        return math.inf
    p = (torch.arange(len(tail), dtype=torch.double) + 0.5) / len(tail)
    excess = sigma * torch.expm1(-k * torch.log1p(-p)) / k if k else -sigma * torch.log1p(-p)
    ordered[-len(tail) :] = (cutoff.exp() + excess).log().clamp(max=0.0)
    return k


def _tail_size(samples: int) -> int:
    return math.ceil(min(0.2 * samples, 3.0 * math.sqrt(samples)))


def draw_log_weights(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int
) -> tuple[Tensor, float]:
    """Log-weights `samples x *independent plates` in double precision on the CPU, and their rounding error in nats.

    Call it inside :func:`asking`. Samples are drawn in chunks, whose memory does not grow with their number.
    """
    nesting = check(model, guide, *args, **kwargs).max_plate_nesting
    traces = dry_run(model, guide, *args, **kwargs)
    sites = [site for trace in traces for site in sample_sites(trace).values()]
    widest = max((site["value"].numel() for site in sites if isinstance(site["value"], Tensor)), default=1)
    chunk = max(1, min(samples, _ELEMENTS // max(widest, 1)))
    parts, rounding = [], 0.0
    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        weights = log_weights(model, guide, *args, particles=count, max_plate_nesting=nesting, **kwargs)
        require_plain(weights)
        log_w = weights.log_w
        terms = (*weights.log_likelihood.values(), *weights.log_prior.values(), *weights.log_guide.values())
        size = max((float(term.abs().max()) for term in terms), default=0.0)
        rounding = max(rounding, size * torch.finfo(log_w.dtype).eps)
        parts.append(log_w.expand(count, *log_w.shape[1:]).cpu().double())
    return torch.cat(parts), rounding


def point_masses(guide: Program, *args: Any, **kwargs: Any) -> list[str]:
    """Names of the latents that the guide draws from a Delta of its own, not as the transform of another site."""
    sites = sample_sites(dry_run(guide, guide, *args, **kwargs)[1]).values()
    if any(site["infer"].get("is_auxiliary") for site in sites):
        return []
    return [site["name"] for site in sites if _is_delta(site["fn"])]


def _is_delta(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def weights_notes(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int
) -> tuple[tuple[str, ...], int]:
    """What makes k̂ misleading for this model and guide; and the latent dimensions behind each weight."""
    check(model, guide, *args, **kwargs)
    model_sites, guide_sites = map(sample_sites, dry_run(model, guide, *args, **kwargs))
    frames = independent_frames([*model_sites.values(), *guide_sites.values()])
    latent = [site for site in model_sites.values() if not site["is_observed"]]
    latent_dim = sum(site["value"].numel() for site in latent) // math.prod(frame.size for frame in frames)
    notes = []
    if samples < _FEW_SAMPLES:
        notes.append(
            f"{samples} samples leave {_tail_size(samples)} weights in the tail and a standard error of k̂ of about"
            f" {1.5 / _tail_size(samples) ** 0.5:.2f} at k = 0.5; take samples=4000 or more."
        )
    if latent_dim >= _MANY_DIMS:
        notes.append(
            f"Each weight is over {latent_dim} latent dimensions: k̂ grows with their number however small the error in"
            " each, so a large one says little about marginals and predictions. Compare ELBOs, or predictions"
            " on held-out data."
        )
    discrete = [site["name"] for site in latent if getattr(getattr(site["fn"], "support", None), "is_discrete", False)]
    if discrete:
        notes.append(
            f"Latent sites {', '.join(map(repr, discrete))} are discrete: few or tied weights have no Pareto tail, and"
            " k̂ does not see values that were never drawn. Rely on the efficiency and the bound instead."
        )
    return tuple(notes), latent_dim


def _number(k: Tensor) -> str:
    return f"{float(k):.2f}".replace("inf", "∞").replace("-", "−")
