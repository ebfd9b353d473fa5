"""The checked pass: do model and guide fit each other, and do their batch dimensions fit their plates?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_site_shape
from torch import Tensor

from pyrovae.cost import SLOW, relative_cost
from pyrovae.errors import ModelGuideError

__all__ = ["Structure", "check", "check_enumerated"]

Program = Callable[..., Any]
Site = dict[str, Any]


@dataclass(frozen=True)
class Structure:
    """What one run of model and guide shows of their shape; static for the programs that pyrovae fits.

    Args:
        max_plate_nesting: number of batch dimensions that plates occupy.
        reparameterized: for each latent site of the guide, whether it can be sampled with a pathwise gradient.
        observed: names of the observed sites of the model.
        subsampled: names of the subsampled plates that some site is outside of, so that the weight of a particle is
            not a product over their elements alone.
        scoring: for each reparameterized latent site of the guide, the number of torch operations that ``log q`` at a
            given value takes, over that of drawing one; infinite where it has none there (a flow without an inverse).
        enumeration: for each latent site of finite support, of the model or the guide, how it is to be summed out:
            ``"parallel"`` unless its own ``infer={"enumerate": …}`` says otherwise.
    """

    max_plate_nesting: int
    reparameterized: dict[str, bool]
    observed: tuple[str, ...]
    subsampled: tuple[str, ...]
    scoring: dict[str, float] = field(default_factory=dict)
    enumeration: dict[str, str | None] = field(default_factory=dict)

    @property
    def quick(self) -> bool:
        """Whether every reparameterized site of the guide scores a given value at about the cost of drawing one."""
        return all(cost <= SLOW for cost in self.scoring.values())


def check(model: Program, guide: Program, *args: Any, **kwargs: Any) -> Structure:
    """Runs model and guide once, without particles and with validation, and says how they do not fit.

    The global random state is left as it was, so a checked fit draws the same numbers as an unchecked one.

    Args:
        model: Pyro model, called with ``*args, **kwargs``.
        guide: Pyro guide, called with the same.
        *args: passed to both.
        **kwargs: passed to both.

    Returns:
        The :class:`Structure` that the run showed.

    Raises:
        ModelGuideError: a latent site that the guide lacks, or the reverse; a latent whose shape differs between
            the two; a site whose batch dimensions do not fit its plates, or silently broadcast to N×N.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        >>> check(model, lambda: None)
        Traceback (most recent call last):
        pyrovae.errors.ModelGuideError: the guide lacks the model's latent site 'z' (the guide samples: nothing). ...
    """
    return _check(model, guide, args, kwargs, summing=False)


def check_enumerated(model: Program, guide: Program, *args: Any, **kwargs: Any) -> Structure:
    """Like :func:`check`, for a loss that sums discrete sites out: the guide may lack those of finite support.

    Args:
        model: Pyro model, called with ``*args, **kwargs``.
        guide: Pyro guide, called with the same.
        *args: passed to both.
        **kwargs: passed to both.

    Returns:
        The :class:`Structure` that the run showed.

    Raises:
        ModelGuideError: as for :func:`check`, and a discrete site that the guide lacks and that cannot be summed out.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
        >>> check_enumerated(model, lambda: None).enumeration
        {'z': 'parallel'}
    """
    return _check(model, guide, args, kwargs, summing=True)


def _check(model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], summing: bool) -> Structure:
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), pyro.validation_enabled(True), poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        guide_sites = sample_sites(guide_trace)
        with _CheckedReplay(guide_trace):
            model_trace = poutine.trace(model).get_trace(*args, **kwargs)
        model_sites = sample_sites(model_trace)
        both = [*model_sites.values(), *guide_sites.values()]
        enumeration = {site["name"]: site["infer"].get("enumerate", "parallel") for site in both if _finite(site)}
        _check_names(model_sites, guide_sites, enumeration if summing else None)
        for program, sites in (("model", model_sites), ("guide", guide_sites)):
            for site in sites.values():
                _check_site(program, site)
        latent = {name: site for name, site in guide_sites.items() if not site["is_observed"]}
        pathwise = {name: bool(getattr(site["fn"], "has_rsample", False)) for name, site in latent.items()}
        scoring = {name: relative_cost(site) for name, site in latent.items() if pathwise[name]}
    dims = [frame.dim for site in both for frame in site["cond_indep_stack"] if frame.vectorized]
    return Structure(
        max_plate_nesting=-min(dims, default=0),
        reparameterized=pathwise,
        observed=tuple(name for name, site in model_sites.items() if site["is_observed"]),
        subsampled=_subsampled_inside(both),
        scoring=scoring,
        enumeration=enumeration,
    )


def _finite(site: Site) -> bool:
    """Whether Pyro can list the values of a latent site."""
    if site["is_observed"] or not getattr(site["fn"], "has_enumerate_support", False):
        return False
    try:
        site["fn"].enumerate_support(expand=False)
    except NotImplementedError:  # Binomial with unequal counts
        return False
    return True


def _subsampled_inside(sites: list[Site]) -> tuple[str, ...]:
    common = independent_frames(sites)
    frames = {frame for site in sites for frame in site["cond_indep_stack"] if frame not in common}
    return tuple(sorted({f.name for f in frames if f.full_size is not None and f.full_size != f.size}))


class _CheckedReplay(ReplayMessenger):
    """Replays the guide's values, after comparing the shape of each with what the model draws there."""

    def _pyro_sample(self, msg: Site) -> None:
        super()._pyro_sample(msg)
        if msg["is_observed"] or msg["name"] not in self.trace or not hasattr(msg["fn"], "event_shape"):
            return
        guide_site = self.trace.nodes[msg["name"]]
        ours, theirs = _full_shape(msg["fn"]), _full_shape(guide_site["fn"])
        if ours != theirs:
            raise ModelGuideError(
                f"latent site {msg['name']!r} has shape {_say_shape(msg['fn'])} in the model"
                f" ({say_plates(msg)}) but {_say_shape(guide_site['fn'])} in the guide"
                f" ({say_plates(guide_site)}). Give both the same plates and the same .to_event(…)."
            )


def _full_shape(fn: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    batch = list(fn.batch_shape)
    while batch and batch[0] == 1:
        batch.pop(0)
    return tuple(batch), tuple(fn.event_shape)


def _say_shape(fn: Any) -> str:
    return f"batch {tuple(fn.batch_shape)} event {tuple(fn.event_shape)}"


def say_plates(site: Site) -> str:
    frames = [f"{f.name!r} of size {f.size} at dim {f.dim}" for f in site["cond_indep_stack"]]
    return f"plates: {', '.join(frames)}" if frames else "no plates"


def _check_names(
    model: dict[str, Site], guide: dict[str, Site], enumeration: dict[str, str | None] | None = None
) -> None:
    """Model and guide sample the same sites, but for those that are summed out in the model where that is allowed."""
    latent = [name for name, site in model.items() if not site["is_observed"]]
    sampled = [name for name, site in guide.items() if not site["is_observed"]]
    listed = ", ".join(map(repr, sampled)) or "nothing"
    for name in latent:
        if name not in guide and (enumeration is None or enumeration.get(name) != "parallel"):
            advice = f"Add pyro.sample({name!r}, …) to the guide, or observe the site in the model."
            if enumeration is not None:
                advice = _why_not_summed(model[name], enumeration) + advice
            elif getattr(model[name]["fn"], "has_enumerate_support", False):
                advice += " A discrete site can also be summed out: use pyrovae.EnumeratedELBO as the objective."
            raise ModelGuideError(
                f"the guide lacks the model's latent site {name!r} (the guide samples: {listed}). {advice}"
            )
    for name in sampled:
        if name not in latent and not guide[name]["infer"].get("is_auxiliary"):
            observed = " (it is observed there)" if name in model else ""
            raise ModelGuideError(
                f"the guide samples {name!r}, which is no latent site of the model{observed}; the model's are:"
                f" {', '.join(map(repr, latent)) or 'none'}. Rename it, or mark it"
                " infer={'is_auxiliary': True} if the guide alone needs it."
            )


def _why_not_summed(site: Site, enumeration: dict[str, str | None]) -> str:
    """Why a discrete site that the guide lacks cannot be summed out in the model; nothing about a continuous one."""
    name, fn = site["name"], site["fn"]
    if name in enumeration:
        return f"Its infer={{'enumerate': {enumeration[name]!r}}} must be 'parallel' for it to be summed out. "
    if not getattr(getattr(fn, "support", None), "is_discrete", False):
        return ""
    if getattr(getattr(fn, "base_dist", None), "has_enumerate_support", False):
        return "Its values cannot be summed over jointly: put them in a pyro.plate in place of .to_event(…). "
    return (
        f"A {type(fn).__name__} has no finite list of values to sum over: the guide must sample it, under an objective"
        " with gradient='score' or 'vimco'. "
    )


def _check_site(program: str, site: Site) -> None:
    """Batch dimensions fit the plates, and an observation has the shape of its distribution."""
    fn, value = site["fn"], site["value"]
    if site["is_observed"] and isinstance(value, Tensor) and getattr(fn, "event_shape", None) is not None:
        _check_observation(site, fn, value)
    site["log_prob"] = fn.log_prob(value, *site["args"], **site["kwargs"])
    try:
        check_site_shape(site, max_plate_nesting=float("inf"))
    except ValueError as error:
        raise ModelGuideError(
            f"site {site['name']!r} of the {program} has log-density of shape {tuple(site['log_prob'].shape)},"
            f" which its plates do not explain ({say_plates(site)}); its distribution is {_say_shape(fn)}, its"
            f" value {tuple(value.shape)}. Enclose every batch dimension in a pyro.plate, or declare it with"
            " .to_event(…); two batch dimensions of the same size are usually an accidental broadcast of"
            " (N,) against (N, 1)."
        ) from error


def _check_observation(site: Site, fn: Any, value: Tensor) -> None:
    if isinstance(fn, pyro.distributions.Unit):  # pyro.factor
        return
    event = tuple(fn.event_shape)
    batch = tuple(value.shape[: value.dim() - len(event)])
    value_event = tuple(value.shape[value.dim() - len(event) :])
    fits = value.dim() >= len(event) and all(
        ours in (1, theirs) for ours, theirs in zip(event, value_event, strict=True)
    )
    if fits:
        try:
            fits = torch.broadcast_shapes(batch, fn.batch_shape) == torch.Size(fn.batch_shape)
        except RuntimeError:
            fits = False
    # One observation shared by N plate elements is legitimate; N numbers read as one event of size N are not.
    accident = not batch and event and fn.batch_shape and fn.batch_shape[-1] == event[-1] > 1
    if not fits or accident:
        raise ModelGuideError(
            f"observed site {site['name']!r} of the model gets a value of shape {tuple(value.shape)}, but its"
            f" distribution is {_say_shape(fn)} ({say_plates(site)}): they would broadcast against each other"
            " instead of matching element by element. Reshape one of them (often .squeeze(-1) or .unsqueeze(-1))."
        )


def dry_run(model: Program, guide: Program, *args: Any, **kwargs: Any) -> tuple[poutine.Trace, poutine.Trace]:
    """One unvalidated run of both; the traces of the model and of the guide."""
    with poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return model_trace, guide_trace


def data_size(model: Program, guide: Program, *args: Any, **kwargs: Any) -> int | None:
    """Full size of the data plate: the one named ``"data"``, else the only one that encloses every observed site.

    Returns:
        The size, or ``None`` when there is no such plate.
    """
    frame = _data_frame(dry_run(model, guide, *args, **kwargs)[0])
    return None if frame is None else frame.full_size or frame.size


def shared_latents(model: Program, guide: Program, *args: Any, **kwargs: Any) -> list[str]:
    """Names of the model's latent sites that lie outside its data plate; none where there is no such plate."""
    trace = dry_run(model, guide, *args, **kwargs)[0]
    frame = _data_frame(trace)
    latent = [site for site in sample_sites(trace).values() if not site["is_observed"]]
    return [site["name"] for site in latent if frame is not None and frame not in site["cond_indep_stack"]]


def _data_frame(model_trace: poutine.Trace) -> Any:
    observed = [site for site in sample_sites(model_trace).values() if site["is_observed"]]
    named = [frame for site in observed for frame in site["cond_indep_stack"] if frame.name == "data"]
    frames = named[:1] or independent_frames(observed)
    return frames[0] if len(frames) == 1 else None


def sample_sites(trace: poutine.Trace) -> dict[str, Site]:
    """The sample statements of a trace by name, without the subsampling of plates."""
    trace = prune_subsample_sites(trace)
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def is_real(support: Any) -> bool:
    """Whether a distribution's support is the whole real line, in each element."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is torch.distributions.constraints.real


def independent_frames(sites: list[Site]) -> list[Any]:
    """The vectorized plates, other than the particles, that enclose every site."""
    stacks = [frozenset(f for f in site["cond_indep_stack"] if f.vectorized) for site in sites]
    common = frozenset.intersection(*stacks) if stacks else frozenset()
    return [frame for frame in common if frame.name != "particles"]
