"""Pyro traces → log-weights: the one tensor that every bound, gradient and diagnostic is computed from.

Nothing downstream of this file knows what a Pyro trace is.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.errors import ModelGuideError, require_count
from pyrovae.noise import Kind, Noise
from pyrovae.structure import Program, Site, check, independent_frames, is_real, sample_sites, say_plates

__all__ = ["LogWeights", "log_weights"]

Through = Literal["both", "path", "parameters"]


class PathGate:
    """The boundary between the guide's samples and all that is computed from them.

    The model and the φ-fixed guide see each sample through the gate; the gradient that comes back through it is
    multiplied by ``factor``, one number a particle and independent element. The guide's own sampling chain lies
    outside, so a factor is unbiased for hierarchical guides too.
    """

    def __init__(self) -> None:
        self.factor: Tensor | None = None
        """`particles x *independent plates`, set by an objective before the backward pass; ``None`` for 1."""
        self.layout: tuple[int, ...] = ()
        """The batch dimensions, counted from the right, that the dimensions of ``factor`` stand for."""

    def gated(self, trace: poutine.Trace, batch_dims: int) -> poutine.Trace:
        """A copy of a guide's trace in which every sample is seen through the gate.

        Args:
            trace: of the guide.
            batch_dims: number of batch dimensions of a site, the particles included.
        """
        trace = trace.copy()
        for site in trace.nodes.values():
            if site["type"] != "sample" or site["is_observed"] or not isinstance(site["value"], Tensor):
                continue
            if site["value"].requires_grad:
                site["value"] = self._through(site["value"], batch_dims, site["fn"].event_dim)
        return trace

    def _through(self, value: Tensor, batch_dims: int, event_dim: int) -> Tensor:
        seen = value.view_as(value)
        missing = batch_dims + event_dim - value.dim()

        def scaled(gradient: Tensor) -> Tensor:
            if self.factor is None:
                return gradient
            shape = [1] * batch_dims
            sizes = self.factor.shape if len(self.layout) == self.factor.dim() else self.factor.shape[1:]
            for dim, size in zip(self.layout, sizes, strict=True):
                shape[dim] = size
            return gradient * self.factor.reshape(*shape[missing:], *[1] * event_dim)

        seen.register_hook(scaled)
        return seen


@dataclass(frozen=True)
class LogWeights:
    r"""Log-densities of K particles, per site, and the log-weights that they add up to.

    .. math:: \log w_k = \log p(x, z_k) - \log q(z_k \mid x), \qquad z_k \sim q(z \mid x)

    Every tensor is `particles x *independent plates`: a plate that encloses every sample site of model and guide
    keeps its dimension (one weight per element), everything else is summed. Units are nats. Masks are applied;
    the scale of a subsampled plate is *not*: an objective multiplies by ``scale`` after its bound.

    Args:
        log_likelihood: ``log p(x | …)`` of each observed site.
        log_prior: ``log p(z | …)`` of each latent site of the model.
        log_guide: ``log q(z | …)`` of each latent site of the guide.
        analytic_kl: ``KL(q ‖ p)`` of the latent sites where a closed form was asked for and is valid; it stands
            for ``log_guide − log_prior`` of these sites in ``log_w`` and ``kl``. Where it is the same for all
            particles, it is computed once, and its first dimension is 1.
        scale: factor to apply after the bound: full size over subsample size of the independent plates, times a
            ``poutine.scale`` that all sites share.
        plates: names and (subsample) sizes of the independent plates, in the order of the tensors' dimensions.
        path: the gate that the gradient of each particle passes on its way back into the guide's samples.
    """

    log_likelihood: dict[str, Tensor]
    log_prior: dict[str, Tensor]
    log_guide: dict[str, Tensor]
    analytic_kl: dict[str, Tensor] = field(default_factory=dict)
    scale: float | Tensor = 1.0
    plates: tuple[tuple[str, int], ...] = ()
    path: PathGate = field(default_factory=lambda: PathGate())

    @property
    def log_w(self) -> Tensor:
        """The log-weights, `particles x *independent plates`, in nats (a closed-form KL stands for its sample)."""
        prior, guide = self._sampled(self.log_prior), self._sampled(self.log_guide)
        minus = [*guide.values(), *self.analytic_kl.values()]
        return _total([*self.log_likelihood.values(), *prior.values()]) - _total(minus)

    def _sampled(self, densities: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in densities.items() if _owner(name) not in self.analytic_kl}

    @property
    def log_q(self) -> Tensor:
        """The guide's log-density of each particle, `particles x *independent plates`, in nats."""
        return _total(self.log_guide.values())

    @property
    def reconstruction(self) -> Tensor:
        """``log p(x | z_k)`` summed over the observed sites, `particles x *independent plates`, in nats."""
        return _total(self.log_likelihood.values())

    def kl(self) -> dict[str, Tensor]:
        """The KL integrand of each latent site, ``log q − log p`` or its closed form, in nats.

        A guide that samples an auxiliary site for one model site (``AutoNormal``) has it counted there; one that
        samples an auxiliary site for all of them (``AutoDiagonalNormal``) gets the single entry ``"latent"``.
        """
        prior, guide = self._sampled(self.log_prior), self._sampled(self.log_guide)
        joint = {name: guide.get(name, 0.0) - log_p for name, log_p in prior.items()}
        auxiliary = {name: log_q for name, log_q in guide.items() if name not in prior}
        owners = {name: _owner(name) for name in auxiliary}
        if not all(owner in joint for owner in owners.values()):
            return {**self.analytic_kl, "latent": _total([*joint.values(), *auxiliary.values()])}
        for name, log_q in auxiliary.items():
            joint[owners[name]] = joint[owners[name]] + log_q
        return {**self.analytic_kl, **joint}


def _owner(name: str) -> str:
    """The model's site that an auxiliary site of Pyro's ``AutoNormal`` and its like stands for."""
    return name.removesuffix("_unconstrained")


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return sum(tensors, start=torch.zeros(()))


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    particles: int = 1,
    through: Through = "both",
    kl: Literal["sampled", "analytic"] = "sampled",
    noise: Kind | None = None,
    max_plate_nesting: int | None = None,
    **kwargs: Any,
) -> LogWeights:
    r"""Runs guide and model once, all particles in one vectorized pass, and returns their log-weights.

    Particles are one more plate, outside all others, so model and guide must be batch-polymorphic on the left
    (with ``particles=1`` there is no such plate and any program works).

    Args:
        model: Pyro model, called with ``*args, **kwargs``.
        guide: Pyro guide, called with the same.
        *args: passed to both.
        particles: number K of particles.
        through: the routes by which the guide's parameters φ get a gradient. ``"both"``: the sampled path and
            ``log q`` itself (pathwise); ``"path"``: the path only, with φ held fixed inside ``log q`` (sticking
            the landing); ``"parameters"``: ``log q`` only, with the samples held fixed (score function).
        kl: ``"analytic"`` replaces ``log q − log p`` of a latent site by ``KL(q ‖ p)`` where torch or Pyro
            registers one and where it is unbiased: every latent that precedes the site in the model must precede
            it in the guide too, and both must have the same scale and mask.
        noise: where the model's linear and convolutional layers draw the noise of their weights: ``"local"`` or
            ``"flipout"``, see :mod:`pyrovae.noise`; ``None`` for the weights themselves.
        max_plate_nesting: number of batch dimensions in use; when ``None``, model and guide are run once more
            to find it and to check that they fit (see :func:`check`).
        **kwargs: passed to both.

    Returns:
        A :class:`LogWeights` whose tensors are `particles x *independent plates`.

    Raises:
        ModelGuideError: model and guide do not fit each other (the message names the site), or ``noise`` finds no
            latent site that it is defined for.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))   # the exact posterior
        >>> weights = log_weights(model, guide, torch.tensor([0.0, 2.0]), particles=3)
        >>> weights.log_w.shape, weights.plates
        (torch.Size([3, 2]), (('data', 2),))
        >>> exact = dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor([0.0, 2.0]))
        >>> torch.allclose(weights.log_w, exact.expand(3, 2))
        True
    """
    require_count("particles", particles)
    if max_plate_nesting is None:
        max_plate_nesting = check(model, guide, *args, **kwargs).max_plate_nesting

    def particle_plate() -> contextlib.AbstractContextManager[Any]:
        if particles == 1:
            return contextlib.nullcontext()
        return pyro.plate("particles", particles, dim=-max_plate_nesting - 1)

    q, p = _Distributions(), _Distributions()
    with _HoldSamples() if through == "parameters" else contextlib.nullcontext(), particle_plate(), q:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    path = PathGate()
    if through == "path":
        guide_trace = path.gated(guide_trace, batch_dims=max_plate_nesting + (particles > 1))
    posteriors = {_owner(name): fn for name, fn in q.found.items() if not _is_delta(fn)}
    layers = Noise(noise, posteriors) if noise else contextlib.nullcontext()
    with particle_plate(), p, layers:
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    if isinstance(layers, Noise) and not layers.mode.tracked:
        raise ModelGuideError(
            f"noise={noise!r} needs a latent site whose posterior is a factorized Gaussian with a closed-form KL to its"
            " prior, and there is none: use MeanField(model) and a Normal or Laplace prior, or gradient='pathwise'"
        )
    model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
    if through == "path":
        with _held_fixed(_parameters(guide, guide_trace)), particle_plate():
            replayed = poutine.replay(guide, trace=guide_trace)
            guide_sites = sample_sites(poutine.trace(replayed).get_trace(*args, **kwargs))
            for site in guide_sites.values():  # scored in here: a transform may read its parameters only now
                site["scored"] = _scored(site)
    closed = _closed_form_kl(model_sites, guide_sites, p.found, q.found) if kl == "analytic" else {}
    return _collect(
        model_sites, guide_sites, closed, path, particles, max_plate_nesting, need_log_q=through == "parameters"
    )


def _collect(
    model: dict[str, Site],
    guide: dict[str, Site],
    closed: dict[str, Tensor],
    path: PathGate,
    particles: int,
    nesting: int,
    need_log_q: bool,
) -> LogWeights:
    """Adds up each site's log-density over everything but the particles and the independent plates."""
    sites = [*model.values(), *guide.values()]
    frames = independent_frames(sites)
    plate_scale = 1.0
    for frame in frames:
        plate_scale *= (frame.full_size or frame.size) / frame.size
    residual = _residual_scales(sites, plate_scale)
    scale: float | Tensor = plate_scale
    first = next(iter(residual.values()), 1.0)
    if all(other is first or (isinstance(other, float) and other == first) for other in residual.values()):
        # Shared by all sites: a factor of the bound, not of a density.
        scale, residual = plate_scale * first, {}

    batch_dims = nesting + (particles > 1)
    kept = sorted(frame.dim for frame in frames if frame.name != "particles")
    keep = ([-batch_dims] if particles > 1 else []) + kept

    def reduce(log_prob: Tensor, site: Site) -> Tensor:
        log_prob = scale_and_mask(log_prob, residual.get(id(site), 1.0), site["mask"])
        if log_prob.dim() > batch_dims:
            raise ModelGuideError(_too_many_dims(site, log_prob, batch_dims))
        log_prob = log_prob.reshape((1,) * (batch_dims - log_prob.dim()) + tuple(log_prob.shape))
        drop = [dim for dim in range(-batch_dims, 0) if dim not in keep]
        log_prob = log_prob.sum(drop) if drop else log_prob
        return log_prob if particles > 1 else log_prob.unsqueeze(0)

    path.layout = tuple(keep)

    def density(site: Site) -> Tensor:
        return reduce(site["scored"] if "scored" in site else _scored(site), site)

    latent = {name: site for name, site in model.items() if not site["is_observed"] and name not in closed}
    return LogWeights(
        log_likelihood={name: density(site) for name, site in model.items() if site["is_observed"]},
        log_prior={name: density(site) for name, site in latent.items()},
        log_guide={name: density(site) for name, site in guide.items() if need_log_q or _owner(name) not in closed},
        analytic_kl={name: reduce(value, guide[name]) for name, value in closed.items()},
        path=path,
        scale=scale,
        plates=tuple((frame.name, frame.size) for frame in sorted(frames, key=lambda frame: frame.dim)),
    )


def _scored(site: Site) -> Tensor:
    """The log-density of a site's value, by batch element."""
    try:
        log_prob: Tensor = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except (NotImplementedError, KeyError) as error:  # torch's transforms say the one, Pyro's the other
        raise ModelGuideError(
            f"site {site['name']!r} has no density at a given value ({type(site['fn']).__name__}: {error}); a flow"
            " without an inverse knows that of its own draws alone. Use gradient='pathwise', which needs no other."
        ) from error
    return log_prob


def _residual_scales(sites: list[Site], plate_scale: float) -> dict[int, float | Tensor]:
    """Each site's scale without that of the independent plates."""
    return {id(site): site["scale"] if plate_scale == 1.0 else site["scale"] / plate_scale for site in sites}


def _closed_form_kl(
    model: dict[str, Site], guide: dict[str, Site], p: dict[str, Any], q: dict[str, Any]
) -> dict[str, Tensor]:
    """``KL(q ‖ p)`` of each latent site that has one and where it is unbiased for the sampled log-ratio.

    The prior of a site may depend on every latent that the model draws before it. Averaging ``log q − log p``
    over the site alone is right only if all of those are drawn before it by the guide as well.
    """
    model_order = [name for name, site in model.items() if not site["is_observed"]]
    guide_order = list(guide)
    closed = {}
    for name in model_order:
        drawn = _drawn_as(name, guide, p[name])
        if drawn is None:
            continue
        before_in_guide = {_owner(other) for other in guide_order[: guide_order.index(drawn)]}
        same_order = set(model_order[: model_order.index(name)]) <= before_in_guide
        prior, posterior = model[name], guide[drawn]
        scales = prior["scale"], posterior["scale"]
        same_scale = scales[0] is scales[1] or (isinstance(scales[0], float) and scales[0] == scales[1])
        if not (same_order and same_scale and prior["mask"] is posterior["mask"]):
            continue
        with contextlib.suppress(NotImplementedError):
            shape = torch.broadcast_shapes(q[drawn].batch_shape, p[name].batch_shape)  # some of torch's KLs need it
            closed[name] = torch.distributions.kl_divergence(q[drawn].expand(shape), p[name].expand(shape))
    return closed


def _drawn_as(name: str, guide: dict[str, Site], prior: Any) -> str | None:
    """The guide's site whose distribution is that of the latent, or ``None`` where there is none.

    Pyro's KL of a Delta leaves out its log-density, so a Delta has no closed form. ``AutoNormal`` and its like sample
    an unconstrained auxiliary site and put a Delta at its transform; on real support the transform is the identity.
    """
    if name in guide and not _is_delta(guide[name]["fn"]):
        return name
    auxiliary = f"{name}_unconstrained"
    return auxiliary if auxiliary in guide and is_real(prior.support) else None


def _is_delta(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, pyro.distributions.Delta)


class _Distributions(Messenger):
    """Notes the distribution of each site before the particle plate, outside, expands it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}

    def _pyro_sample(self, msg: Site) -> None:
        self.found[msg["name"]] = msg["fn"]


class _HoldSamples(Messenger):
    """Detaches every value as the guide samples it, so that no gradient takes the sampled path."""

    def _pyro_post_sample(self, msg: Site) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def _parameters(program: Program, trace: poutine.Trace) -> list[Tensor]:
    """The unconstrained parameters of a program, whether they live in a module or in the param store."""
    values = [node["value"] for node in trace.nodes.values() if node["type"] == "param"]
    found = [value.unconstrained() if hasattr(value, "unconstrained") else value for value in values]
    if isinstance(program, torch.nn.Module):
        found += program.parameters()
    return list({id(p): p for p in found if p is not None and p.is_leaf}.values())


@contextlib.contextmanager
def _held_fixed(parameters: list[Tensor]) -> Iterator[None]:
    """Within the block, what is computed from ``parameters`` treats them as constants."""
    active = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in active:
        parameter.requires_grad_(False)
    try:
        with warnings.catch_warnings():  # pyro.module, which registered them a moment ago, would warn of each
            warnings.filterwarnings("ignore", message=".*was not registered in the param store")
            yield
    finally:
        for parameter in active:
            parameter.requires_grad_(True)


def _too_many_dims(site: Site, log_prob: Tensor, batch_dims: int) -> str:
    return (
        f"site {site['name']!r} has a log-density of shape {tuple(log_prob.shape)}, more than the {batch_dims}"
        f" batch dimensions of its plates and the particles ({say_plates(site)}). With more than one particle,"
        " model and guide must index their tensors from the right (x[..., i], sum(-1)), since particles are one"
        " more dimension on the left."
    )
