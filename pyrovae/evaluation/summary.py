"""What a fit says of each latent and each parameter, as a table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import require_count
from pyrovae.evaluation.calibration import posterior_samples
from pyrovae.structure import Program
from pyrovae.training.programs import local_params

__all__ = ["Marginal", "PosteriorSummary", "posterior_summary"]


@dataclass(frozen=True)
class Marginal:
    """One number of a latent under the guide.

    Args:
        name: the site, with the place of the number in it.
        mean: of the draws.
        sd: their standard deviation.
        low: their 5 % quantile.
        high: their 95 % quantile.
    """

    name: str
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class PosteriorSummary:
    """Marginals of latents, and learned parameters; as text, a table.

    Args:
        latents: one row a number.
        parameters: values by name.
        left_out: sites and parameters with too many numbers for a table, with their shapes.
    """

    latents: list[Marginal]
    parameters: dict[str, float]
    left_out: dict[str, tuple[int, ...]]

    def __str__(self) -> str:
        width = max(map(len, [*(row.name for row in self.latents), *self.parameters, "latent"]))
        lines = []
        if self.latents:
            lines.append(f"{'latent':{width}} {'mean':>11} {'sd':>11} {'5 %':>11} {'95 %':>11}")
            lines += [
                f"{row.name:{width}} " + " ".join(f"{value:11.4g}" for value in (row.mean, row.sd, row.low, row.high))
                for row in self.latents
            ]
        lines += [f"{name:{width}} {value:11.4g}  (learned)" for name, value in self.parameters.items()]
        lines += [f"{name}: {' x '.join(map(str, shape))} numbers, left out" for name, shape in self.left_out.items()]
        return "\n".join(lines)


def posterior_summary(
    model: Program, guide: Program, *args: Any, draws: int = 4000, largest: int = 12, seed: int = 0
) -> PosteriorSummary:
    """Means, standard deviations and quantiles of the latents under a guide, and the model's learned parameters.

    They are those of the *guide*: how near they are to the posterior's, :func:`pyrovae.evaluation.psis` and
    :func:`pyrovae.evaluation.sbc` tell. Parameters are those that the model holds itself (a model may name them by a
    method ``learned``), without the weights of its networks.

    Args:
        model: Pyro model.
        guide: Pyro guide, called with ``*args``.
        *args: the data, as for model and guide.
        draws: from the guide.
        largest: numbers of a latent or a parameter, above which it is left out.
        seed: of the draws.

    Returns:
        A :class:`PosteriorSummary`.

    Raises:
        ArgumentError: a count is out of range.

    Example:
        >>> import pyro.distributions as dist
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(torch.tensor([0.0, 5.0]), 1.0).to_event(1))
        >>> import pyro
        >>> [round(row.mean) for row in posterior_summary(guide, guide).latents]
        [0, 5]
    """
    require_count("draws", draws, 2)
    require_count("largest", largest)
    with torch.random.fork_rng(), torch.no_grad(), local_params(model, guide):
        torch.manual_seed(seed)
        latents = posterior_samples(guide, *args, draws=draws)
        learned = {name: value.detach().unsqueeze(0) for name, value in _parameters(model).items()}
    rows = []
    left_out: dict[str, tuple[int, ...]] = {}
    for name, column in _numbers(latents, largest, left_out):
        low, high = column.quantile(column.new_tensor([0.05, 0.95])).tolist()
        rows.append(Marginal(name, column.mean().item(), column.std().item(), low, high))
    parameters = {name: column.item() for name, column in _numbers(learned, largest, left_out)}
    return PosteriorSummary(rows, parameters, left_out)


def _parameters(model: Program) -> Mapping[str, Tensor]:
    if hasattr(model, "learned"):
        found: Mapping[str, Tensor] = model.learned()
        return found
    if not isinstance(model, nn.Module):
        return {}
    constrained = dict(model.named_pyro_params()) if isinstance(model, PyroModule) else {}
    own = [name for name, _ in model.named_parameters(recurse=False) if not name.endswith("_unconstrained")]
    # Pyro's name for a network's weight has the parts of it, as drift.0.weight
    held = {name: value for name, value in constrained.items() if not name.endswith((".weight", ".bias"))}
    return held | {name: getattr(model, name) for name in own}


def _numbers(
    values: Mapping[str, Tensor], largest: int, left_out: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """The draws of each number, by its name and place."""
    for name, value in values.items():
        shape = tuple(value.shape[1:])
        if math.prod(shape) > largest:
            left_out[name] = shape
            continue
        for place in itertools.product(*map(range, shape)):
            where = f"[{', '.join(map(str, place))}]" if place else ""
            column = value
            for index in place:
                column = column[:, index]
            yield name + where, column.double()
