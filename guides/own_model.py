"""``amortize``: an amortized guide for a user's own model and encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, unknown_name
from pyrovae.guides.families import Categories, Family, make_family
from pyrovae.models.networks import full_precision, mlp
from pyrovae.modes import device_of, evaluating
from pyrovae.structure import Program, Site, independent_frames, sample_sites, say_plates

__all__ = ["AmortizedModel", "amortize"]

FamilyName = str | Callable[..., Family]


def amortize(
    model: Program,
    encoder: nn.Module,
    family: FamilyName | Mapping[str, FamilyName] = "normal",
    *,
    site: str | Sequence[str] | None = None,
    joint: bool = False,
    example: Tensor | Sequence[Tensor] | None = None,
    **options: Any,
) -> AmortizedModel:
    r"""An amortized guide for any Pyro model with latents of single data points, from an encoder of the data.

    .. math:: q_\phi(z \mid x) = \prod_s q_s(z_s \mid h_s(e_\phi(x))), \qquad h_s \text{ linear}

    One run of the model shows its latent sites, their shapes and supports, and the plate of the data. Each site gets a
    linear head on the encoder's features and its own family; a value whose support is not all of R^d is a transformed
    one (``torch.distributions.biject_to``). With ``joint=True`` one family covers all sites together, so that it can
    hold their correlations.

    Args:
        model: Pyro model. Its first argument is the batch of data, `n x …`; the latents lie in a plate over these
            (the one named ``"data"``, else the only one of size n around every observed site).
        encoder: module from the batch to `n x features`; it is trained with the guide.
        family: ``"normal"``, ``"full-rank"``, ``"factor-covariance"``, ``"flow"``, ``"bernoulli"``,
            ``"categorical"``, or a function from a dimension to a :class:`pyrovae.guides.families.Family`; or a
            dictionary of these by site.
        site: the latent site or sites to guide; ``None`` for all. A site that is left out needs a guide of its own.
        joint: whether one family covers all sites together, in place of one each.
        example: the arguments of one call of the model (or its first alone), to find the sites with; ``None`` waits
            for the first call of the guide (its heads exist only from then on).
        **options: of the family: ``rank``, or ``flow``, ``depth`` and ``context``.

    Returns:
        An :class:`AmortizedModel`, a Pyro guide with ``encode(x)``.

    Raises:
        ArgumentError: there are no latents of single data points, or others beside them, or the family does not fit a
            site (the message names the site and says what to do).

    References:
        Kingma & Welling 2014, https://arxiv.org/abs/1312.6114.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         rate = pyro.sample("rate", dist.Gamma(2.0, torch.ones(())))
        ...         pyro.sample("x", dist.Poisson(rate), obs=x[:, 0])
        >>> x = torch.poisson(torch.full((6, 1), 3.0))
        >>> guide = amortize(model, nn.Sequential(nn.Linear(1, 16), nn.Tanh()), example=x)
        >>> q = guide.encode(x)
        >>> q.batch_shape, bool((q.sample() > 0).all())
        (torch.Size([6]), True)
    """
    if not isinstance(encoder, nn.Module):
        raise ArgumentError(
            f"encoder is a {type(encoder).__name__}; it must be a torch.nn.Module from data to features"
        )
    wanted = (site,) if isinstance(site, str) else None if site is None else tuple(site)
    guide = AmortizedModel(model, encoder, family, wanted, joint, options)
    if example is not None:
        guide.build(*((example,) if isinstance(example, Tensor) else example))
    return guide


@dataclass(frozen=True)
class _Latent:
    """A latent site of one data point: its name, its shape, and how it lies in R^size."""

    name: str
    event_shape: torch.Size
    size: int
    transforms: tuple[Any, ...]

    def value(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The site's value at `… x size` unconstrained numbers, and the log-determinant, `…`."""
        total = flat.new_zeros(flat.shape[:-1])
        for transform in self.transforms:
            flat, before = transform(flat), flat
            total = total + transform.log_abs_det_jacobian(before, flat)
        return flat, total


class AmortizedModel(PyroModule):
    """The guide that :func:`amortize` makes; the arguments are those.

    ``propose(x)`` gives the numbers that describe the posterior, ``posterior(raw)`` the distribution (with several
    sites and ``joint=False`` a dictionary of them by site; with ``joint=True`` that of the unconstrained values of all
    sites in a row), ``encode(x)`` is one after the other, and ``sample(q)`` holds the guide's sample statements.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> guide = amortize(model, nn.Linear(2, 8), "full-rank", example=torch.zeros(3, 2))
        >>> guide(torch.zeros(3, 2))["z"].shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        model: Program,
        encoder: nn.Module,
        family: FamilyName | Mapping[str, FamilyName],
        site: Sequence[str] | None,
        joint: bool,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.joint = joint
        self._asked = (model, family, site, dict(options))  # the model is no part of the guide
        self.latents: tuple[_Latent, ...] = ()

    def build(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs the model once on these arguments, and makes the heads for the sites that it shows."""
        model, family, wanted, options = self._asked
        with evaluating(model, self.encoder), poutine.block():
            sites = sample_sites(poutine.trace(model).get_trace(x, *args, **kwargs))
            features = self.encoder(x)
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(x):
            got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise ArgumentError(
                f"encoder gives {got} for {len(x)} data points; it must give a tensor `n x features`. End it with"
                " nn.Flatten() where it gives more dimensions."
            )
        frame = _data_plate(sites, len(x))
        self.plate, self.dim, self.full_size = frame.name, frame.dim, frame.full_size
        # A plate as large as the data may be of a fixed size, or follow the data: another batch will show.
        self._follows = None if frame.full_size == frame.size else False
        chosen = _chosen(sites, frame, wanted)
        made = [_of_site(site, _family_of(family, site["name"], wanted), options, self.joint) for site in chosen]
        self.latents = tuple(latent for latent, _ in made)
        if self.joint:
            if isinstance(family, Mapping):
                raise ArgumentError("family is a dictionary by site; joint=True has one family for all sites")
            size = sum(latent.size for latent in self.latents)
            families = [make_family(family, size, **options)]
        else:
            families = [each for _, each in made if each is not None]
        self.families = nn.ModuleList(families).to(features)
        self.heads = nn.ModuleList(mlp(features.shape[1], (), each.outputs) for each in families).to(features)

    def propose(self, x: Tensor) -> Tensor:
        """The numbers that describe the posterior of each data point, `n x outputs`."""
        if not self.latents:
            raise ArgumentError(
                "the guide has not seen the model's sites yet: call it once, or pass example= to amortize"
            )
        features = full_precision(self.encoder(x))
        return torch.cat([head(features) for head in self.heads], dim=-1)

    def posterior(self, raw: Tensor) -> Any:
        """The distributions that `n x outputs` numbers describe; see the class."""
        raw = raw.reshape(*raw.shape[:-1], *(1,) * (-1 - self.dim), raw.shape[-1])
        parts = raw.split([family.outputs for family in self.families], dim=-1)
        posteriors = [family(part) for family, part in zip(self.families, parts, strict=True)]
        if self.joint:
            return posteriors[0]
        by_site = {latent.name: _shaped(q, latent) for latent, q in zip(self.latents, posteriors, strict=True)}
        return by_site if len(by_site) > 1 else next(iter(by_site.values()))

    def encode(self, x: Tensor) -> Any:
        """The posterior of each data point: batch shape (n,), the event shape of the site; see the class."""
        return self.posterior(self.propose(x))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every site for a batch `n x …` of data; returns the values by site. Only the data are encoded."""
        if not self.latents:
            self.build(x, *args, **kwargs)
        if self._follows is None and len(x) != self.full_size:
            model = self._asked[0]
            with evaluating(model), poutine.block():
                sites = sample_sites(poutine.trace(model).get_trace(x, *args, **kwargs))
            self._follows = _data_plate(sites, len(x)).full_size != self.full_size
        return self.sample(self.encode(x))

    def sample(self, q: Any) -> dict[str, Tensor]:
        """The guide's sample statements, given the posterior of a batch of n data points."""
        first = next(iter(q.values())) if isinstance(q, dict) else q
        with self._plate(first.batch_shape[self.dim]):
            if not self.joint:
                return {name: pyro.sample(name, each) for name, each in self._by_site(q).items()}
            flat = pyro.sample("_amortized_latent", q, infer={"is_auxiliary": True})
            values = {}
            for latent, part in zip(self.latents, flat.split([each.size for each in self.latents], -1), strict=True):
                value, ladj = latent.value(part)
                delta = dist.Delta(value, log_density=-ladj, event_dim=len(latent.event_shape))
                values[latent.name] = pyro.sample(latent.name, delta)
            return values

    def _by_site(self, q: Any) -> dict[str, Any]:
        return q if isinstance(q, dict) else {self.latents[0].name: q}

    def _plate(self, n: int) -> Any:
        """The model's plate of the data; a model that stands for more data than it is given scales them up."""
        device = device_of(self)
        if self._follows is not False:
            return pyro.plate(self.plate, n, dim=self.dim, device=device)
        rows = torch.arange(n, device=device)
        return pyro.plate(self.plate, self.full_size, subsample=rows, dim=self.dim)


def _data_plate(sites: Mapping[str, Site], n: int) -> Any:
    """The plate over the data points."""
    observed = [site for site in sites.values() if site["is_observed"]]
    frames = independent_frames(observed)
    named = [frame for frame in frames if frame.name == "data"] or [frame for frame in frames if frame.size == n]
    if len(named) != 1:
        told = ", ".join(f"{frame.name!r} of size {frame.size}" for frame in frames) or "none"
        raise ArgumentError(
            f"model has no plate that is plainly that of its {n} data points (plates around every observed site:"
            f' {told}). Put latents and observations in `with pyro.plate("data", len(x)):`.'
        )
    if named[0].size != n:
        raise ArgumentError(
            f"model's plate {named[0].name!r} has {named[0].size} elements for {n} data points. Give the model the"
            f" minibatch, and its plate as pyro.plate({named[0].name!r}, full_size, subsample=x) or with size len(x)."
        )
    return named[0]


def _chosen(sites: Mapping[str, Site], plate: Any, wanted: Sequence[str] | None) -> list[Site]:
    """The latent sites that the guide is for, each of them in the plate of the data and in no other."""
    latent = {name: site for name, site in sites.items() if not site["is_observed"]}
    inside = {name for name, site in latent.items() if plate in site["cond_indep_stack"]}
    for name in wanted or ():
        if name not in latent:
            raise unknown_name("latent site", name, latent)
        if name not in inside:
            raise ArgumentError(
                f"latent site {name!r} is outside of plate {plate.name!r}: all data points share it, so that there is"
                " nothing to encode it from. Leave it out of site= and give it a guide of its own."
            )
    shared = [name for name in latent if name not in inside]
    if not inside:
        raise ArgumentError(
            f"model has no latent site in plate {plate.name!r} (its latent sites:"
            f" {', '.join(map(repr, shared)) or 'none'}), so that there is nothing to encode. Use a guide for shared"
            " latents (pyro.infer.autoguide.AutoNormal), or move the latents of single data points into the plate."
        )
    if shared and wanted is None:
        names = sorted(inside)
        raise ArgumentError(
            f"latent site {shared[0]!r} is outside of plate {plate.name!r}: all data points share it. Pass"
            f" site={names!r} here, guide the rest by AutoNormal(poutine.block(model, hide={names!r})), and call both"
            " in one function: def guide(x): shared(x); local(x)."
        )
    chosen = [latent[name] for name in latent if name in (inside if wanted is None else wanted)]
    for site in chosen:
        if [frame for frame in site["cond_indep_stack"] if frame.vectorized] != [plate]:
            raise ArgumentError(
                f"latent site {site['name']!r} lies in more than the plate of the data ({say_plates(site)}). Declare"
                " the inner dimensions with .to_event(…), or write a guide for it and leave it out of site=."
            )
    return chosen


def _family_of(family: FamilyName | Mapping[str, FamilyName], name: str, wanted: Sequence[str] | None) -> FamilyName:
    if not isinstance(family, Mapping):
        return family
    if name not in family:
        left_out = "" if wanted is not None else ", or leave it out of site="
        raise ArgumentError(f"family has no entry for latent site {name!r}; add {name!r}: 'normal'{left_out}")
    return family[name]


def _of_site(site: Site, family: FamilyName, options: Mapping[str, Any], joint: bool) -> tuple[_Latent, Family | None]:
    """A site as a vector of unconstrained numbers, and its family (``None`` where one family covers all sites)."""
    name, fn = site["name"], site["fn"]
    support = fn.support
    if support.is_discrete:
        return _of_discrete_site(name, fn, family, joint)
    to_support = torch.distributions.biject_to(_same_for_all(support, fn.batch_shape, name))
    shape = to_support.inverse_shape(fn.event_shape)
    size = shape.numel()
    transforms: list[Any] = []
    if tuple(shape) != (size,):
        transforms.append(torch.distributions.transforms.ReshapeTransform(torch.Size((size,)), shape))
    if not _is_real(support):
        transforms.append(to_support)
    latent = _Latent(name, fn.event_shape, size, tuple(transforms))
    if joint:
        return latent, None
    made = make_family(family, size, **options)
    if made.discrete:
        raise ArgumentError(
            f"family {family!r} is discrete, but latent site {name!r} is continuous ({type(fn).__name__}). Use"
            " family='normal', 'full-rank', 'factor-covariance' or 'flow', or a dictionary of families by site."
        )
    return latent, made


def _of_discrete_site(name: str, fn: Any, family: FamilyName, joint: bool) -> tuple[_Latent, Family]:
    base = fn
    while hasattr(base, "base_dist"):
        base = base.base_dist
    fitting = {
        dist.Bernoulli: "bernoulli",
        dist.OneHotCategorical: "categorical",
        dist.Categorical: "categorical",
    }
    named = next((word for kind, word in fitting.items() if isinstance(base, kind)), None)
    vector = named == "bernoulli" or len(fn.event_shape) == len(base.event_shape)
    if named is None or not vector:
        raise ArgumentError(
            f"latent site {name!r} is discrete ({type(base).__name__}{tuple(fn.event_shape)}); there are families for"
            " Bernoulli vectors, Categorical and OneHotCategorical. Write a guide for it and leave it out of site=."
        )
    if family != named or joint:
        raise ArgumentError(
            f"latent site {name!r} is discrete ({type(base).__name__}), which"
            f" {'joint=True' if joint else f'family={family!r}'} cannot be. Use family={{{name!r}: {named!r}, …}} with"
            f" joint=False (and a score gradient), or leave {name!r} out of site= and sum it out with"
            " pyrovae.EnumeratedELBO."
        )
    if named == "bernoulli":
        size = fn.event_shape.numel()
        return _Latent(name, fn.event_shape, size, ()), make_family("bernoulli", size)
    categories = base.logits.shape[-1]
    made = Categories(categories, one_hot=not isinstance(base, dist.Categorical))
    return _Latent(name, fn.event_shape, categories, ()), made


def _shaped(q: Any, latent: _Latent) -> Any:
    """The distribution of a site, from that of its unconstrained values in a row."""
    base = getattr(q, "base_dist", None)
    dims = len(latent.event_shape)
    if isinstance(base, dist.Bernoulli):
        return dist.Bernoulli(logits=base.logits.reshape(*q.batch_shape, *latent.event_shape)).to_event(dims)
    if not latent.transforms:
        return q
    real = all(isinstance(each, torch.distributions.transforms.ReshapeTransform) for each in latent.transforms)
    if real and isinstance(base, dist.Normal):  # keeps its closed-form KL
        shape = (*q.batch_shape, *latent.event_shape)
        return dist.Normal(base.loc.reshape(shape), base.scale.reshape(shape)).to_event(dims)
    # Each posterior has caches of its own: by them a flow without an inverse recognises its draw.
    return dist.TransformedDistribution(q, [transform.with_cache() for transform in latent.transforms])


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


def _same_for_all(support: Any, batch_shape: torch.Size, name: str) -> Any:
    """A support without the batch dimensions of its bounds, which must be the same for all data points."""
    if isinstance(support, constraints.independent):
        return constraints.independent(
            _same_for_all(support.base_constraint, batch_shape, name), support.reinterpreted_batch_ndims
        )
    fixed = copy.copy(support)
    for side in ("lower_bound", "upper_bound"):
        bound = getattr(support, side, None)
        if isinstance(bound, Tensor) and bound.dim() >= len(batch_shape) > 0:
            one = bound.detach()[(0,) * len(batch_shape)]
            if not bool((bound == one).all()):
                raise ArgumentError(
                    f"the support of latent site {name!r} differs between data points ({support}). Sample it on a"
                    " fixed range and scale it in the model."
                )
            setattr(fixed, side, one)
    return fixed
