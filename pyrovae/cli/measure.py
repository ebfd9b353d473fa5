"""The figures of merit that ``evaluate``, ``report`` and ``demo`` share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pyrovae.datasets import Split
    from pyrovae.training import Run

__all__ = ["as_metrics", "as_rows", "measure"]

Measures = dict[str, Any]


def measure(
    run: Run,
    split: Split,
    *,
    particles: int,
    seed: int,
    compile: Literal["auto", True, False] = "auto",
    progress: bool = False,
) -> Measures:
    """Evaluates a run on a split; what does not apply to its model or guide is ``None``.

    Args:
        run: model and guide.
        split: the data.
        particles: of the log-likelihood, for each data point.
        seed: of the particles.
        compile: of the log-likelihood, as for :func:`pyrovae.evaluation.log_likelihood`.
        progress: whether to show a bar.

    Returns:
        Numbers by name with unit, ready for JSON. ``bits_per_dimension`` is ``None`` for a density, which is
        not comparable with the probability of pixel values.
    """
    from pyrovae import evaluation

    points = split.labelled() if hasattr(run.model, "classes") else split
    classifies = hasattr(run.guide, "classify")  # then labels are latents, which are not given
    found = evaluation.log_likelihood(
        run.model, run.guide, split if classifies else points, particles, seed=seed, compile=compile, progress=progress
    )
    support = getattr(getattr(run.model, "likelihood", None), "support", None)
    bits = -found.mean / (split.event_shape.numel() * math.log(2.0))
    encodes = hasattr(run.guide, "encode")
    return {
        "points": len(split),
        "particles": particles,
        "seed": seed,
        "log_likelihood_nats": found.mean,
        "standard_error_nats": found.mean_error,
        "elbo_nats": found.mean_elbo,
        "elbo_error_nats": found.mean_elbo_error,
        "bits_per_dimension": bits if getattr(support, "is_discrete", False) else None,
        "median_effective_sample_size": float(found.effective_sample_size.median()),
        "active_units": evaluation.active_units(run.guide, points).count if encodes else None,
        "latent_dim": getattr(run.model, "latent_dim", None),
        "kl_nats": _kl(run, points) if encodes and hasattr(run.model, "prior") else None,
        "accuracy": _accuracy(run, split) if classifies else None,
    }


def _kl(run: Run, split: Split) -> float | None:
    """Mean KL from prior to posterior in nats per data point; ``None`` without a closed form."""
    from pyrovae import evaluation
    from pyrovae.errors import ArgumentError

    try:
        return float(evaluation.kl_per_dimension(run.model, run.guide, split).sum())
    except ArgumentError:
        return None


def _accuracy(run: Run, split: Split) -> float:
    """Share of the labels that the guide's classifier gets right."""
    import torch

    from pyrovae.evaluation.likelihood import evaluating

    assert split.y is not None
    guide: Any = run.guide
    with evaluating(run.model, run.guide, seed=0) as device:
        given = [guide.classify(part.to(device)).probs.argmax(-1).cpu() for part in split.draw(split.x).split(1000)]
    return float((torch.cat(given) == split.y).float().mean())


def as_rows(found: Measures, split: str) -> list[tuple[str, str]]:
    """The measures for a reader, with units; what does not apply is left out."""
    size = f"{found['median_effective_sample_size']:,.0f} of {found['particles']:,} particles (median)"
    rows = [
        (f"{split} log-likelihood", _with_error(found, "log_likelihood_nats", "standard_error_nats")),
        ("evidence lower bound", _with_error(found, "elbo_nats", "elbo_error_nats")),
        ("effective sample size", size),
    ]
    if found["bits_per_dimension"] is not None:
        rows.insert(2, ("bits per dimension", f"{found['bits_per_dimension']:.4f}"))
    if found["active_units"] is not None:
        rows.append(("active units", f"{found['active_units']} of {found['latent_dim']} latent dimensions"))
    if found["kl_nats"] is not None:
        rows.append(("KL(posterior ‖ prior)", f"{found['kl_nats']:.3f} nats per data point"))
    if found["accuracy"] is not None:
        rows.append(("accuracy", f"{100 * found['accuracy']:.2f} % of the labels"))
    return rows


def _with_error(found: Measures, value: str, error: str) -> str:
    spread = f" ± {found[error]:.2g} (Monte Carlo standard error)" if math.isfinite(found[error]) else ""
    return f"{found[value]:.3f} nats per data point{spread}"


def as_metrics(found: Measures, split: str) -> dict[str, object]:
    """The measures as headlines of a report, each name with its unit."""
    named = {
        f"{split} log-likelihood, nats per data point ({found['particles']:,} particles)": "log_likelihood_nats",
        "Monte Carlo standard error, nats": "standard_error_nats",
        "evidence lower bound, nats per data point": "elbo_nats",
        "bits per dimension": "bits_per_dimension",
        f"median effective sample size, of {found['particles']:,}": "median_effective_sample_size",
        f"active units, of {found['latent_dim']}": "active_units",
        "KL from prior to posterior, nats per data point": "kl_nats",
        "accuracy, share of the labels": "accuracy",
    }
    return {name: found[key] for name, key in named.items() if found[key] is not None}
