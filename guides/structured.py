"""Structured posteriors that keep the dependence graph of the model's prior."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to, transform_to

from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.registry import GUIDES
from pyrovae.structure import Program, Site

__all__ = ["ASVI"]

Wrap = Callable[[Any], Any]

# The parameters that are combined, by family; all others (a number of trials) stay the prior's.
_FAMILIES: dict[type, tuple[str, ...]] = {
    dist.Normal: ("loc", "scale"),
    dist.LogNormal: ("loc", "scale"),
    dist.MultivariateNormal: ("loc", "scale_tril"),
    dist.StudentT: ("df", "loc", "scale"),
    dist.Cauchy: ("loc", "scale"),
    dist.Laplace: ("loc", "scale"),
    dist.Gumbel: ("loc", "scale"),
    dist.HalfNormal: ("scale",),
    dist.HalfCauchy: ("scale",),
    dist.Exponential: ("rate",),
    dist.Gamma: ("concentration", "rate"),
    dist.InverseGamma: ("concentration", "rate"),
    dist.Weibull: ("scale", "concentration"),
    dist.Beta: ("concentration1", "concentration0"),
    dist.Dirichlet: ("concentration",),
    dist.Bernoulli: ("logits",),
    dist.Binomial: ("total_count", "logits"),
    dist.Geometric: ("logits",),
    dist.Categorical: ("logits",),
    dist.OneHotCategorical: ("logits",),
    dist.Poisson: ("rate",),
}
_FIXED = {"total_count"}
_INITIAL_SCALE = 0.1  # of an independent Normal, in unconstrained units


@GUIDES.register
class ASVI(PyroModule):
    r"""Automatic structured posterior: each latent's prior, moved a learnable step towards parameters of its own.

    .. math:: q(z) = \prod_j p_j\bigl(z_j \mid
        \lambda_j \odot \theta_j(z_{\mathrm{pa}(j)}) + (1 - \lambda_j) \odot \alpha_j\bigr)

    Here p_j is the family of the prior of site j and θ_j are its parameters given the sampled parents. The prior
    weight λ_j in (0, 1) and α_j, in the domain of θ_j, are learned, one of each per element of θ_j. With λ = 1 the
    guide is the prior, with λ = 0 it is a mean-field posterior. The number of parameters and the cost are those of
    the prior times a constant.

    The guide runs the model itself, observations hidden, so that plates, loops and deterministic code between latents
    are the model's. Gaussians are combined by location and scale, Gamma and Beta by their concentrations and rate,
    discrete families by logits, a Uniform as the Beta(1, 1) on its interval. A continuous site of another family
    gets an independent Normal in unconstrained space (at the site's support, without λ), as in Pyro's ``AutoNormal``,
    and so does each site named in ``mean_field``.

    Parameters are made at the first call, or by ``load_state_dict``. α starts at θ given the prior medians of the
    parents. The latents of a subsampled plate (``pyro.plate(name, size, subsample_size)``) have a λ and an α for
    each element of the full plate; a plate without a full size holds the same elements at each call, so that
    minibatches of different data need a subsampled plate. Parameters of the model's prior are shared, not copied:
    they get a gradient through the guide too.

    Args:
        model: Pyro model whose sites are the same at every call; it is not a submodule of the guide.
        prior_weight: λ of every element before training, in (0, 1).
        mean_field: names of sites that get the independent Normal; of use for a prior of one parameter
            (``HalfCauchy``), whose family cannot move its mode.

    Raises:
        ArgumentError: an argument is out of range; at the first call, a site whose family and support are neither
            among those above, or no latent site at all.
        ModelGuideError: at a later call, a site that the first call did not show, or of another size.

    References:
        Ambrogioni et al. 2021, https://arxiv.org/abs/2002.00643; its authors' implementation, of which the initial
        prior weight is the default here:
        https://www.tensorflow.org/probability/api_docs/python/tfp/experimental/vi/build_asvi_surrogate_posterior.

    Example:
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 10.0))
        ...     with pyro.plate("groups", 3):
        ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> guide = ASVI(model)
        >>> guide(torch.zeros(3))["z"].shape
        torch.Size([3])
        >>> guide.prior_weights()["z"]["loc"]
        tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, model: Program, prior_weight: float = 0.5, mean_field: Sequence[str] = ()) -> None:
        super().__init__()
        if isinstance(prior_weight, bool) or not isinstance(prior_weight, int | float) or not 0 < prior_weight < 1:
            raise ArgumentError(f"prior_weight is {prior_weight!r}; it must be a number between 0 and 1, both excluded")
        if isinstance(mean_field, str) or not all(isinstance(name, str) for name in mean_field):
            raise ArgumentError(f"mean_field is {mean_field!r}; it must be a list of names of sites, such as ['tau']")
        self._model = (model,)  # in a tuple, so that the model is not a submodule
        self.prior_weight = prior_weight
        self.mean_field = tuple(mean_field)
        self.weights = nn.ParameterDict()  # logits of λ, by "site:parameter"
        self.alphas = nn.ParameterDict()  # α in unconstrained space

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every latent site of the model at these arguments; returns the values by site."""
        if not len(self.alphas):
            self._discover(args, kwargs)
        with _ConvexUpdates(self) as updates:
            self._model[0](*args, **kwargs)
        return updates.values

    def prior_weights(self) -> dict[str, dict[str, Tensor]]:
        """λ of each element of each parameter, by site and parameter; empty before the first call."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, logit in self.weights.items():
            site, parameter = key.rsplit(":", 1)
            found.setdefault(site.replace("/", "."), {})[parameter] = logit.detach().sigmoid()
        return found

    @torch.no_grad()
    def _discover(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes the parameters: one run of the model at the prior medians, unseen by any handler outside."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices), poutine.block(), _Discovery(self) as discovery:
            self._model[0](*args, **kwargs)
        if not discovery.sites:
            raise ArgumentError("the model has no latent site at these arguments. Call the guide as the model is fit.")
        missing = sorted(set(self.mean_field) - discovery.sites)
        if missing:
            raise ArgumentError(
                f"mean_field names {', '.join(map(repr, missing))}, which is no latent site of the model; there are:"
                f" {', '.join(sorted(discovery.sites))}"
            )
        self.train(self.training)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Makes the parameters of a saved guide that has not been called yet; the values are loaded afterwards."""
        if not len(self.alphas):
            for name in ("weights", "alphas"):
                start = f"{prefix}{name}."
                for key in [key for key in state_dict if key.startswith(start)]:
                    getattr(self, name)[key.removeprefix(start)] = nn.Parameter(torch.empty_like(state_dict[key]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _is_updated(self, site: Site) -> bool:
        """Whether a site's own family is kept (else it gets an independent Normal)."""
        return site["name"] not in self.mean_field and _family(site["fn"]) is not None

    def _create(self, site: Site, start: Tensor) -> None:
        """λ and α of a site, of its full plates' sizes; ``start`` is a value of the site."""
        fn, name = site["fn"], site["name"]
        if self._is_updated(site):
            for parameter, theta, constraint in _parameters(fn):
                alpha = transform_to(constraint).inv(theta)
                self._store(site, parameter, alpha)
                logit = torch.full_like(self._whole(site, theta), self.prior_weight).logit()
                self.weights[_key(name, parameter)] = nn.Parameter(logit)
            return
        loc = _to_reals(site).inv(start)
        self._store(site, "unconstrained_loc", loc)
        self._store(site, "unconstrained_log_scale", torch.full_like(loc, _INITIAL_SCALE).log())

    def _store(self, site: Site, parameter: str, value: Tensor) -> None:
        self.alphas[_key(site["name"], parameter)] = nn.Parameter(self._whole(site, value))

    def _whole(self, site: Site, value: Tensor) -> Tensor:
        """A parameter of a minibatch's elements, as one for every element of the subsampled plates (their mean)."""
        event_dim = value.dim() - len(site["fn"].batch_shape)
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and frame.full_size not in (None, frame.size):
                dim = frame.dim - event_dim
                sizes = list(value.shape)
                sizes[dim] = frame.full_size
                value = value.mean(dim, keepdim=True).expand(sizes)
        return value.detach().clone()


def _key(site: str, parameter: str) -> str:
    """Under which the parameters of a site are kept; torch allows no dot there."""
    return f"{site.replace('.', '/')}:{parameter}"


class _Discovery(Messenger):
    """Sets every latent to its prior median (a draw, where it is discrete) and has its parameters made."""

    def __init__(self, guide: ASVI) -> None:
        super().__init__()
        self.guide = guide
        self.sites: set[str] = set()

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if not self.guide._is_updated(msg):
            _to_reals(msg)  # refuses a site that has no posterior before a draw of it is tried
        start = _start(msg)
        self.guide._create(msg, start)
        self.sites.add(msg["name"])
        msg["value"], msg["done"] = start, True


class _ConvexUpdates(Messenger):
    """Replaces the distribution of each latent by the variational conditional, and hides the observed sites."""

    def __init__(self, guide: ASVI) -> None:
        super().__init__()
        self.guide = guide
        self.weights, self.alphas = guide.weights, guide.alphas  # one look at each: it registers them with Pyro
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"]:
            msg["stop"] = True
        elif not site_is_subsample(msg):
            msg["fn"] = self._conditional(msg)

    def _pyro_post_sample(self, msg: Site) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            self.values[msg["name"]] = msg["value"]

    def _conditional(self, site: Site) -> Any:
        fn = site["fn"]
        if not self.guide._is_updated(site):
            return self._independent(site)
        base, wrap = _family(fn)  # type: ignore[misc]
        combined = {}
        for parameter, theta, constraint in _parameters(fn):
            event_dim = theta.dim() - len(fn.batch_shape)
            alpha = transform_to(constraint)(self._elements(self.alphas, site, parameter, event_dim))
            logit = self._elements(self.weights, site, parameter, event_dim)
            combined[parameter] = logit.sigmoid() * theta + (-logit).sigmoid() * alpha
        fixed = {name: getattr(base, name) for name in _FAMILIES[type(base)] if name in _FIXED}
        return wrap(type(base)(**fixed, **combined))

    def _independent(self, site: Site) -> Any:
        transform = _to_reals(site)
        event_dim = site["fn"].event_dim - transform.codomain.event_dim + transform.domain.event_dim
        loc = self._elements(self.alphas, site, "unconstrained_loc", event_dim)
        scale = self._elements(self.alphas, site, "unconstrained_log_scale", event_dim).exp()
        return dist.TransformedDistribution(dist.Normal(loc, scale).to_event(event_dim), [transform])

    def _elements(self, store: nn.ParameterDict, site: Site, parameter: str, event_dim: int) -> Tensor:
        """A parameter of the elements that the plates hold at this call."""
        key = _key(site["name"], parameter)
        if key not in store:
            raise ModelGuideError(
                f"ASVI has no parameters for the latent site {site['name']!r}: the first call did not show it, or the"
                " saved guide was of another model. The model must sample the same sites, of the same families, at"
                " every call (a pyro.plate in place of a loop over random elements)."
            )
        whole = store[key]
        for frame in site["cond_indep_stack"]:
            dim = frame.dim - event_dim if frame.vectorized else 0
            size = whole.shape[dim] if 0 < -dim <= whole.dim() else 1
            if size not in (1, frame.full_size or frame.size):
                raise ModelGuideError(
                    f"latent site {site['name']!r} has parameters for {size} elements of the plate {frame.name!r},"
                    f" which now has {frame.full_size or frame.size}. ASVI keeps parameters for every element: for"
                    f" minibatches use pyro.plate({frame.name!r}, full_size, subsample=indices), or an amortized"
                    " guide."
                )
        chosen: Tensor = pyro.subsample(whole, event_dim=event_dim)
        return chosen


def _family(fn: Any) -> tuple[Any, Wrap] | None:
    """The distribution of a known family inside ``fn``, and what turns one like it into one like ``fn``."""
    if type(fn) in _FAMILIES:
        return fn, lambda q: q
    if type(fn) is dist.Uniform:
        low, width = fn.low, fn.high - fn.low
        base = dist.Beta(torch.ones_like(low), torch.ones_like(low))
        return base, lambda q: dist.TransformedDistribution(q, [dist.transforms.AffineTransform(low, width)])
    inner = _family(fn.base_dist) if hasattr(fn, "base_dist") else None
    if inner is None:
        return None
    base, wrap = inner
    if isinstance(fn, torch.distributions.Independent):
        return base, lambda q: dist.Independent(wrap(q), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return base, lambda q: wrap(q).mask(fn._mask)
    if type(fn) is dist.TransformedDistribution:
        return base, lambda q: dist.TransformedDistribution(wrap(q), fn.transforms)
    return None


def _parameters(fn: Any) -> Iterator[tuple[str, Tensor, Any]]:
    """Name, value and constraint of each parameter that is combined."""
    base, _ = _family(fn)  # type: ignore[misc]
    for name in _FAMILIES[type(base)]:
        if name not in _FIXED:
            yield name, getattr(base, name), base.arg_constraints[name]


def _start(site: Site) -> Tensor:
    """The prior median, or a draw of a discrete site."""
    fn = site["fn"]
    shape = fn.batch_shape + fn.event_shape
    try:
        value: Tensor = fn.sample() if _is_discrete(fn) else init_to_median(site)
    except NotImplementedError:  # an improper prior has no draws
        transform = _to_reals(site)
        value = transform(torch.zeros(transform.inverse_shape(shape)))
    return value.expand(shape)


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False


def _to_reals(site: Site) -> Any:
    """The bijection from the reals to a site's support."""
    fn = site["fn"]
    try:
        transform = biject_to(fn.support)
        if not _is_discrete(fn) and type(transform).log_abs_det_jacobian is not _NO_JACOBIAN:
            return transform
    except (NotImplementedError, AttributeError):
        pass
    raise ArgumentError(
        f"ASVI has no posterior for the latent site {site['name']!r}: its family, {type(fn).__name__}, is none of"
        f" {', '.join(sorted(family.__name__ for family in _FAMILIES))} or Uniform, and its support is discrete or has"
        " no bijection from the reals. Write it with one of these, or hide it with poutine.block and add a guide."
    )


_NO_JACOBIAN = torch.distributions.Transform.log_abs_det_jacobian
