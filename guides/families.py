"""Posterior families of amortized guides: from an encoder's outputs to the distribution of a latent vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, require_count, unknown_name

__all__ = [
    "FAMILIES",
    "BernoulliVector",
    "Categories",
    "DiagonalNormal",
    "FactorNormal",
    "Family",
    "FlowDistribution",
    "FlowNormal",
    "FullRankNormal",
    "make_family",
]

_LOG_SCALE_LIMIT = 10.0  # exp(±10): far outside any useful posterior, near enough to keep a first step finite
_FACTOR_LIMIT = 30.0  # of a factor over its residual scale: a correlation of 0.999, and a matrix that stays regular
_MOMENT_DRAWS = 1000


class Family(nn.Module):
    """From ``outputs`` real numbers a data point, all of them allowed, to a distribution over a vector.

    A family has an ``outputs`` count and a ``forward`` from `*batch x outputs` to a distribution of batch shape
    `*batch`. The encoder's last layer makes the numbers; a family holds parameters only where it has networks of its
    own.

    Args:
        dim: number of dimensions of the vector.
        outputs: number of real numbers that describe one distribution.
    """

    discrete: ClassVar[bool] = False

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        require_count("dim", dim)
        self.dim, self.outputs = dim, outputs


class DiagonalNormal(Family):
    r"""Independent Gaussians.

    .. math:: q(z) = \mathcal{N}(\mu, \mathrm{diag}\,\sigma^2)

    Args:
        dim: number of dimensions.

    Example:
        >>> family = DiagonalNormal(3)
        >>> family.outputs, family(torch.zeros(5, 6)).event_shape
        (6, torch.Size([3]))
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 2 * dim)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        """q(z) for `*batch x outputs` numbers: batch shape `*batch`, event shape (dim,)."""
        loc, log_scale = raw.chunk(2, dim=-1)
        return dist.Normal(loc, _scale(log_scale)).to_event(1)


class FullRankNormal(Family):
    r"""A Gaussian with any covariance.

    .. math:: q(z) = \mathcal{N}(\mu, L L^\top), \qquad L = \mathrm{diag}(\sigma)\,(I + N)

    with N strictly lower triangular, so that σ sets the units and N the correlations.

    Args:
        dim: number of dimensions d; the family has d + d(d+1)/2 outputs.

    Example:
        >>> FullRankNormal(3)(torch.zeros(5, 9)).covariance_matrix.shape
        torch.Size([5, 3, 3])
    """

    places: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 2 * dim + dim * (dim - 1) // 2)
        rows, columns = torch.tril_indices(dim, dim, offset=-1)
        self.register_buffer("places", rows * dim + columns, persistent=False)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        """q(z) for `*batch x outputs` numbers: batch shape `*batch`, event shape (dim,)."""
        loc, log_scale, below = raw.split([self.dim, self.dim, self.outputs - 2 * self.dim], dim=-1)
        flat = raw.new_zeros(*raw.shape[:-1], self.dim**2)
        lower = flat.index_copy(-1, self.places, _factor(below, self.dim)).unflatten(-1, (self.dim, self.dim))
        unit = lower + torch.eye(self.dim, dtype=raw.dtype, device=raw.device)
        return dist.MultivariateNormal(loc, scale_tril=_scale(log_scale).unsqueeze(-1) * unit)


class FactorNormal(Family):
    r"""A Gaussian whose covariance is a few factors and a diagonal.

    .. math:: q(z) = \mathcal{N}(\mu, B B^\top + \mathrm{diag}\,\sigma^2), \qquad B = \mathrm{diag}(\sigma)\,F

    Density and samples take O(dim · rank²) time (Woodbury).

    Args:
        dim: number of dimensions.
        rank: number of factors, the columns of B.

    References:
        Ong et al. 2018, https://arxiv.org/abs/1701.03208.

    Example:
        >>> FactorNormal(4, rank=2)(torch.zeros(5, 16)).covariance_matrix.shape
        torch.Size([5, 4, 4])
    """

    def __init__(self, dim: int, rank: int = 2) -> None:
        require_count("rank", rank)
        super().__init__(dim, (2 + rank) * dim)
        self.rank = rank

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        """q(z) for `*batch x outputs` numbers: batch shape `*batch`, event shape (dim,)."""
        loc, log_scale, factors = raw.split([self.dim, self.dim, self.dim * self.rank], dim=-1)
        scale = _scale(log_scale)
        columns = _factor(factors, self.rank).unflatten(-1, (self.dim, self.rank))
        return dist.LowRankMultivariateNormal(loc, scale.unsqueeze(-1) * columns, scale.square())


class FlowNormal(Family):
    r"""A diagonal Gaussian carried through a flow that the data point steers.

    .. math:: z = f(z_0 \mid c), \quad z_0 \sim \mathcal{N}(\mu, \mathrm{diag}\,\sigma^2), \qquad
        \log q(z) = \log \mathcal{N}(z_0) - \log \left|\det \partial f / \partial z_0\right|

    The encoder gives μ, log σ and, through tanh, the context c of the flow.

    Args:
        dim: number of dimensions.
        flow: name of a flow of ``pyrovae.flows`` (``"planar"``, ``"iaf"``, ``"spline"``, …), or a module from a
            `*batch x context` tensor to a transform of vectors (any ``zuko.lazy.LazyTransform``). Its forward
            direction is from the base to the latent.
        depth: number of layers of a flow given by name.
        context: number of context features c.
        options: arguments of the class of a flow given by name, such as ``{"hidden": (320,)}``.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    References:
        Rezende & Mohamed 2015, https://arxiv.org/abs/1505.05770; Kingma et al. 2016,
        https://arxiv.org/abs/1606.04934.

    Example:
        >>> class Shift(nn.Module):
        ...     def forward(self, c):
        ...         return dist.transforms.AffineTransform(c, 2.0, event_dim=1)
        >>> FlowNormal(3, Shift(), context=3)(torch.zeros(5, 9)).rsample().shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        dim: int,
        flow: str | nn.Module = "iaf",
        depth: int = 4,
        context: int = 64,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        require_count("depth", depth)
        require_count("context", context)
        super().__init__(dim, 2 * dim + context)
        self.context = context
        if isinstance(flow, str):
            from pyrovae import flows  # it loads zuko, which only this family needs

            flow = flows.stack(flow, dim, depth, context=context, **(options or {}))
        elif not isinstance(flow, nn.Module):
            raise ArgumentError(
                f"flow is {flow!r}; it must be the name of a flow, or a module from a context to a transform"
                " (a zuko.lazy.LazyTransform)"
            )
        self.flow = flow

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        """q(z) for `*batch x outputs` numbers: batch shape `*batch`, event shape (dim,)."""
        loc, log_scale, context = raw.split([self.dim, self.dim, self.context], dim=-1)
        base = dist.Normal(loc, _scale(log_scale)).to_event(1)
        return FlowDistribution(self.flow(context.tanh()), base)


class FlowDistribution(dist.TorchDistribution):
    """A base distribution over vectors, carried through a transform.

    The density of its last draw is known from drawing it, so that a flow without an inverse can be a posterior; at any
    other value the density takes the inverse. ``mean`` and ``variance`` have no closed form: they are estimated from
    1000 new draws, which is meant for pictures and for counting active units.

    Args:
        transform: from the base to the value.
        base: of event shape (dim,).

    Example:
        >>> base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        >>> q = FlowDistribution(dist.transforms.AffineTransform(1.0, 2.0, event_dim=1), base)
        >>> bool(torch.isclose(q.log_prob(torch.ones(3)), base.log_prob(torch.zeros(3)) - 3 * math.log(2.0)))
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, transform: Any, base: dist.TorchDistribution) -> None:
        self.transform, self.base_dist = transform, base
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """The same transform of the expanded base."""
        return FlowDistribution(self.transform, self.base_dist.expand(torch.Size(batch_shape)))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws of shape `*sample_shape x *batch x dim`, with a pathwise gradient."""
        noise = self.base_dist.rsample(torch.Size(sample_shape))
        value = self.transform(noise)
        self._drawn = (value, self._log_prob(noise, value))
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of `… x dim` values, in nats."""
        if self._drawn is not None and value is self._drawn[0]:
            return self._drawn[1]
        return self._log_prob(self.transform.inv(value), value)

    def _log_prob(self, noise: Tensor, value: Tensor) -> Tensor:
        return self.base_dist.log_prob(noise) - self.transform.log_abs_det_jacobian(noise, value)

    @property
    def mean(self) -> Tensor:
        """Mean of 1000 draws, `*batch x dim`."""
        return self.sample(torch.Size((_MOMENT_DRAWS,))).mean(0)

    @property
    def variance(self) -> Tensor:
        """Variance of 1000 draws, `*batch x dim`."""
        return self.sample(torch.Size((_MOMENT_DRAWS,))).var(0)


class BernoulliVector(Family):
    """Independent binary units, from their logits.

    Args:
        dim: number of units.

    Example:
        >>> BernoulliVector(3)(torch.zeros(5, 3)).mean[0]
        tensor([0.5000, 0.5000, 0.5000])
    """

    discrete: ClassVar[bool] = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        """q(z) for `*batch x dim` logits: batch shape `*batch`, event shape (dim,)."""
        return dist.Bernoulli(logits=raw).to_event(1)


class Categories(Family):
    """One of several categories, from logits.

    Args:
        dim: number of categories.
        one_hot: whether a value is a vector with a single 1, or the index of the category.

    Example:
        >>> Categories(3)(torch.zeros(5, 3)).event_shape, Categories(3, one_hot=False)(torch.zeros(5, 3)).event_shape
        (torch.Size([3]), torch.Size([]))
    """

    discrete: ClassVar[bool] = True

    def __init__(self, dim: int, one_hot: bool = True) -> None:
        super().__init__(dim, dim)
        self.one_hot = one_hot

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        """q(z) for `*batch x dim` logits: batch shape `*batch`, event shape (dim,) or ()."""
        return (dist.OneHotCategorical if self.one_hot else dist.Categorical)(logits=raw)


FAMILIES: dict[str, type[Family]] = {
    "normal": DiagonalNormal,
    "full-rank": FullRankNormal,
    "factor-covariance": FactorNormal,
    "flow": FlowNormal,
    "bernoulli": BernoulliVector,
    "categorical": Categories,
}


def make_family(family: str | Callable[..., Family], dim: int, **options: Any) -> Family:
    """A family over vectors of a size, by its name in ``FAMILIES`` or from what makes one.

    Args:
        family: ``"normal"``, ``"full-rank"``, ``"factor-covariance"`` (option ``rank``), ``"flow"`` (options ``flow``,
            ``depth``, ``context``), ``"bernoulli"``, ``"categorical"``; or a function of ``dim`` and the options.
        dim: number of dimensions, or of categories.
        **options: of the family.

    Raises:
        ArgumentError: the name is unknown, or an option is not one of that family.

    Example:
        >>> make_family("factor-covariance", 5, rank=3).outputs
        25
    """
    if isinstance(family, str) and family not in FAMILIES:
        raise unknown_name("family", family, FAMILIES)
    build = FAMILIES[family] if isinstance(family, str) else family
    try:
        made = build(dim, **options)
    except TypeError as error:
        raise ArgumentError(f"family {family!r} does not take {options!r}: {error}") from error
    if not isinstance(made, Family):
        raise ArgumentError(
            f"family made a {type(made).__name__}; it must be a name ({', '.join(sorted(FAMILIES))}) or a function from"
            " a dimension to a pyrovae.guides.families.Family"
        )
    return made


def _scale(log_scale: Tensor) -> Tensor:
    return log_scale.clamp(-_LOG_SCALE_LIMIT, _LOG_SCALE_LIMIT).exp()


def _factor(raw: Tensor, terms: int) -> Tensor:
    """Entries of a factor, in units of the residual scale, such that ``terms`` of them add up to a variance of O(1)."""
    return (raw / math.sqrt(terms)).clamp(-_FACTOR_LIMIT, _FACTOR_LIMIT)
