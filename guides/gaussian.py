"""Gaussian posteriors over all latents of a model: mean-field, full-rank, factor covariance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
from pyro import poutine
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_feasible,
    init_to_median,
)
from pyro.infer.autoguide.guides import AutoGuide
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to

from pyrovae.errors import ArgumentError, ModelGuideError, require_count, require_positive
from pyrovae.registry import GUIDES

__all__ = ["FactorCovariance", "FullRank", "MeanField"]


for _map_to in (biject_to, transform_to):  # torch has the constraint of a mixture, and no map to it
    _map_to.register(
        constraints.MixtureSameFamilyConstraint, lambda given, map_to=_map_to: map_to(given.base_constraint)
    )


Program = Callable[..., Any]
Init = Callable[[dict[str, Any]], Tensor]


class FirstCall(AutoGuide):
    """What our guides add to Pyro's at their first call: latents that are checked, and a state loaded before it."""

    _joint = True  # one distribution over all latents together, so that they cannot come in minibatches
    _loaded: dict[str, Tensor] | None = None
    _starts: dict[str, Tensor] | None = None  # values of latents from which the model wants a guide to start
    prototype_trace: Any

    def __init__(
        self, model: Program, *, init_loc_fn: Init | None = None, default: Init = init_to_median, **kwargs: Any
    ) -> None:
        if not callable(model):
            raise ArgumentError(f"model is {model!r}; it must be a Pyro model: a function or module with pyro.sample")

        def checked_init(site: dict[str, Any]) -> Tensor:
            self._check_latent(site)
            starts = self._starts if init_loc_fn is None and self._starts else {}
            value = starts[site["name"]] if site["name"] in starts else (init_loc_fn or default)(site)
            return value.clone()  # the parameter must not be the caller's own tensor

        super().__init__(model, init_loc_fn=checked_init, **kwargs)
        self._given = (model,)  # Pyro keeps it wrapped in the handler that sets starting values

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the model out; Pyro's method also takes it from the guide that is copied."""
        return {**self.__dict__, "_model": None, "_given": None, "master": None}

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        start_values = getattr(self._given[0], "start_values", None)
        self._starts = None if start_values is None or self._loaded else start_values(*args, **kwargs)
        try:
            super()._setup_prototype(*args, **kwargs)
            self._make_parameters(*args, **kwargs)
            if self._loaded:
                self._load()
        except BaseException:
            self.prototype_trace = None  # else the next call would take a half-made guide for a whole one
            raise
        self._loaded = None

    def _make_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Makes those parameters and buffers that Pyro's guide does not, once the latents are known."""

    def _load(self) -> None:
        """Takes over the state that waited for the parameters."""
        assert self._loaded is not None
        try:
            self.load_state_dict(self._loaded)
        except RuntimeError as error:
            raise ModelGuideError(
                f"the loaded state of guide {type(self).__name__} does not fit this model ({error}). Load it with the"
                " model and data sizes that it was saved with."
            ) from error

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Before the first call there are no parameters yet: the state waits for them."""
        if self.prototype_trace is not None:
            return super()._load_from_state_dict(state_dict, prefix, *rest)
        own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        self._loaded = {name: value.detach().clone() for name, value in own.items()}
        return None

    def _check_latent(self, site: dict[str, Any]) -> None:
        """Raises an error unless a latent site is continuous and where this guide can follow."""
        try:
            biject_to(site["fn"].support)
        except NotImplementedError:
            raise ModelGuideError(
                f"latent site {site['name']!r} ({type(site['fn']).__name__}) is discrete or has no map to the real"
                f" line, and {type(self).__name__} needs continuous latents. Hide it from the guide"
                f" (poutine.block(model, hide=[{site['name']!r}])) and sum it out with pyrovae.EnumeratedELBO."
            ) from None
        for frame in site["cond_indep_stack"]:
            self._check_plate(site["name"], frame)

    def _check_plate(self, site_name: str, frame: Any) -> None:
        name = type(self).__name__
        if not frame.vectorized:
            raise ModelGuideError(
                f"latent site {site_name!r} lies in the sequential plate {frame.name!r}; {name} needs vectorized"
                " plates: with pyro.plate(…) in place of for … in pyro.plate(…)."
            )
        if self._joint and frame.full_size not in (None, frame.size):
            raise ModelGuideError(
                f"latent site {site_name!r} lies in plate {frame.name!r}, of which the model takes {frame.size} of"
                f" {frame.full_size} elements; {name} is one distribution over all latents together and cannot follow"
                " a minibatch of them. Use MeanField(model, create_plates=…), an amortized guide, or the whole plate."
            )


def log_joint(guide: AutoContinuous, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    r"""Log-density of data and unconstrained latents, ``log p(x, f(u)) + log |det ∂f/∂u|``, a scalar in nats.

    Args:
        guide: the guide, after its first call, that says how the latents lie in ``u``.
        latent: `(latent_dim,)`, the point u.
        *args: passed to the model.
        **kwargs: passed to the model.
    """
    values, log_volume = {}, latent.new_zeros(())
    for site, unconstrained in guide._unpack_latent(latent):
        transform = biject_to(site["fn"].support)
        values[site["name"]] = transform(unconstrained)
        log_volume = log_volume + transform.log_abs_det_jacobian(unconstrained, values[site["name"]]).sum()
    conditioned = pyro.condition(guide._given[0], data=values)
    with poutine.block():
        trace = poutine.trace(conditioned).get_trace(*args, **kwargs)
    return trace.log_prob_sum() + log_volume


@GUIDES.register
class MeanField(FirstCall, AutoNormal):
    r"""Gaussian with independent coordinates, site by site, in unconstrained space.

    .. math:: z = f(u), \qquad u = \mu + \sigma \odot \varepsilon, \qquad \varepsilon \sim \mathcal{N}(0, I)

    f is the map from the reals onto the support of each site (the identity on real support). On real support the KL
    to a prior that has a closed form is used under ``pyrovae.ELBO(kl="analytic")``. Local latents may come in
    minibatches: the parameters then have the full size of the plate, and ``create_plates`` says which rows are in use.

    Args:
        model: Pyro model with continuous latents.
        init_scale: initial σ.
        init_loc_fn: initial value of a site, one of Pyro's ``init_to_…``; ``None`` for the model's
            ``start_values``, or else ``init_to_feasible``.
        create_plates: function of the model's arguments that returns the subsampled plate or plates.

    Raises:
        ArgumentError: an argument is out of range.
        ModelGuideError: at the first call, a latent site that is discrete or in a sequential plate.

    References:
        Kucukelbir et al. 2017 (ADVI), https://jmlr.org/papers/v18/16-107.html.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("mean", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        ...     pyro.sample("scale", dist.LogNormal(torch.zeros(()), 1.0))
        >>> guide = MeanField(model)
        >>> {name: tuple(value.shape) for name, value in guide().items()}
        {'mean': (3,), 'scale': ()}
    """

    _joint = False

    def __init__(
        self,
        model: Program,
        init_scale: float = 0.1,
        *,
        init_loc_fn: Init | None = None,
        create_plates: Program | None = None,
    ) -> None:
        init_scale = require_positive("init_scale", init_scale)
        start = {"init_loc_fn": init_loc_fn, "default": init_to_feasible}
        super().__init__(model, init_scale=init_scale, create_plates=create_plates, **start)


@GUIDES.register
class FullRank(FirstCall, AutoMultivariateNormal):
    r"""Gaussian with a full covariance over all latents together, in unconstrained space.

    .. math:: u = \mu + L \varepsilon, \qquad L = \mathrm{diag}(s)\, U, \quad s > 0,
        \quad U \text{ unit lower triangular}

    Memory and time are O(d²) for d latent dimensions.

    Args:
        model: Pyro model with continuous latents.
        init_scale: initial s; U starts at the identity.
        init_loc_fn: initial value of a site, one of Pyro's ``init_to_…``; ``None`` for the model's
            ``start_values``, or else ``init_to_median``.

    Raises:
        ArgumentError: an argument is out of range.
        ModelGuideError: at the first call, a latent site that is discrete, in a sequential or in a subsampled plate.
        RuntimeError: at the first call, a model without latents.

    References:
        Kucukelbir et al. 2017 (ADVI), https://jmlr.org/papers/v18/16-107.html; Titsias & Lázaro-Gredilla 2014,
        https://proceedings.mlr.press/v32/titsias14.html.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> guide = FullRank(lambda: pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
        >>> guide()["z"].shape
        torch.Size([3])
        >>> guide.get_posterior().covariance_matrix.shape
        torch.Size([3, 3])
    """

    def __init__(self, model: Program, init_scale: float = 0.1, *, init_loc_fn: Init | None = None) -> None:
        init_scale = require_positive("init_scale", init_scale)
        super().__init__(model, init_loc_fn=init_loc_fn, init_scale=init_scale)


@GUIDES.register
class FactorCovariance(FirstCall, AutoLowRankMultivariateNormal):
    r"""Gaussian with a factor covariance over all latents together (VAFC), in unconstrained space.

    .. math:: u = \mu + B \varepsilon_1 + d \odot \varepsilon_2, \qquad \Sigma = B B^\top + \mathrm{diag}(d^2)

    The parameters are d > 0 and F, with B = diag(d) F. The log-density takes the Woodbury identity, so memory is O(d r)
    and time O(d r²) for d latent dimensions and rank r.

    Args:
        model: Pyro model with continuous latents.
        rank: number r of factors, columns of B.
        init_scale: approximate initial standard deviation of each coordinate; F starts at random.
        init_loc_fn: initial value of a site, one of Pyro's ``init_to_…``; ``None`` for the model's
            ``start_values``, or else ``init_to_median``.

    Raises:
        ArgumentError: an argument is out of range.
        ModelGuideError: at the first call, a latent site that is discrete, in a sequential or in a subsampled plate.
        RuntimeError: at the first call, a model without latents.

    References:
        Ong, Nott & Smith 2018, https://arxiv.org/abs/1701.03208.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> guide = FactorCovariance(lambda: pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1)), rank=2)
        >>> guide()["z"].shape
        torch.Size([5])
        >>> guide.get_posterior().cov_factor.shape
        torch.Size([5, 2])
    """

    def __init__(self, model: Program, rank: int, init_scale: float = 0.1, *, init_loc_fn: Init | None = None) -> None:
        require_count("rank", rank)
        init_scale = require_positive("init_scale", init_scale)
        super().__init__(model, init_loc_fn=init_loc_fn, init_scale=init_scale, rank=rank)
