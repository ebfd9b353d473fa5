"""Priors of the weights of a network, as one distribution over the flat vector that holds them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, require_positive, unknown_name
from pyrovae.models.flat import Block
from pyrovae.registry import named

__all__ = ["PRIORS", "BlockPrior", "WeightPrior", "weight_prior"]

BlockPrior = Callable[[str, torch.Size], TorchDistribution]
Scale = float | str | Mapping[str, float | str]
Sharing = Literal["network", "layer"]


class WeightPrior(nn.Module):
    r"""A prior of a flat vector of weights, the scale of each given by the block of it that it lies in.

    Args:
        blocks: of the flat vector.
        scale: a number; ``"fan-in"`` for ``1/√fan_in`` (1 for a bias); or a dictionary from patterns of parameter names
            to one of these (where several fit, the last counts; where none does, 1); or a list of these, one for each
            of ``members``.
        latent: whether a factor on all these scales is latent too, with a half-normal prior of scale 1: ``"network"``
            for one, ``"layer"`` for one for each layer; ``None`` for none. It is the site ``"prior_scale"``, which
            :func:`pyrovae.models.treat` maximises (ML-II, MAP-II) or integrates.
        members: of networks that are trained together, each with its own; ``None`` for one network.

    Raises:
        ArgumentError: an argument is out of range.
    """

    scale: Tensor
    owner: Tensor

    def __init__(
        self,
        blocks: Sequence[Block],
        scale: Scale | Sequence[Scale] = 1.0,
        latent: Sharing | None = None,
        members: int | None = None,
    ) -> None:
        super().__init__()
        if latent is not None and latent not in get_args(Sharing):
            raise unknown_name("latent scale of a prior", latent, get_args(Sharing))
        self.latent = latent
        if isinstance(scale, list | tuple):
            if len(scale) != members:
                raise ArgumentError(
                    f"scale of a prior is a list of {len(scale)}; members is {members}, and each has one"
                )
            scales = torch.stack([_scales(blocks, one) for one in scale])[:, None]
        else:
            scales = _scales(blocks, scale)  # type: ignore[arg-type]
        self.register_buffer("scale", scales, persistent=False)
        layers = list(dict.fromkeys(block.layer for block in blocks))
        which = [0 if latent == "network" else layers.index(block.layer) for block in blocks]
        owner = torch.cat([torch.full((block.size,), index) for block, index in zip(blocks, which, strict=True)])
        self.register_buffer("owner", owner, persistent=False)
        self.groups = max(which) + 1
        self.layers = tuple(layers)

    def forward(self) -> TorchDistribution:
        """The prior of the vector, after the sample statements of what it depends on."""
        scale = self.scale
        if self.latent is not None:
            factor = pyro.sample("prior_scale", dist.HalfNormal(scale.new_ones(self.groups)).to_event(1))
            scale = scale * factor[..., self.owner]
        return self.law(scale).to_event(1)

    def law(self, scale: Tensor) -> TorchDistribution:
        """The element-wise prior, from `… x size` scales."""
        raise NotImplementedError


class _Normal(WeightPrior):
    """``N(0, s²)``."""

    def law(self, scale: Tensor) -> TorchDistribution:
        return dist.Normal(torch.zeros_like(scale), scale)


class _Laplace(WeightPrior):
    """Laplace with mean absolute value s."""

    def law(self, scale: Tensor) -> TorchDistribution:
        return dist.Laplace(torch.zeros_like(scale), scale)


class _ScaleMixture(WeightPrior):
    """``π N(0, s²) + (1 − π) N(0, (r s)²)``: Blundell et al. 2015, equation 7.

    Args:
        blocks: of the flat vector.
        share: π, of the first component.
        ratio: r, of the second component's standard deviation to the first's.
        **options: those of :class:`WeightPrior`.
    """

    shares: Tensor
    ratios: Tensor

    def __init__(
        self, blocks: Sequence[Block], share: float = 0.5, ratio: float = math.exp(-6), **options: Any
    ) -> None:
        super().__init__(blocks, **options)
        if not 0.0 < share < 1.0:
            raise ArgumentError(f"share of a scale mixture is {share!r}; it must lie between 0 and 1")
        self.register_buffer("shares", torch.tensor([share, 1.0 - share]), persistent=False)
        self.register_buffer("ratios", torch.tensor([1.0, require_positive("ratio", ratio)]), persistent=False)

    def law(self, scale: Tensor) -> TorchDistribution:
        scales = scale.unsqueeze(-1) * self.ratios
        parts = dist.Normal(torch.zeros_like(scales), scales)
        return dist.MixtureSameFamily(dist.Categorical(self.shares.expand(scales.shape)), parts)


class _Horseshoe(WeightPrior):
    """``N(0, (τ λ_i s_i)²)`` with half-Cauchy τ and λ_i: Carvalho, Polson & Scott 2010.

    Its sites ``"global_scale"`` (of one number) and ``"local_scale"`` (of one number for each weight) are latent.

    Args:
        blocks: of the flat vector.
        global_scale: scale of the half-Cauchy prior of τ.
        **options: those of :class:`WeightPrior`.
    """

    global_scale: Tensor

    def __init__(self, blocks: Sequence[Block], global_scale: float = 1.0, **options: Any) -> None:
        super().__init__(blocks, **options)
        given = torch.tensor([require_positive("global_scale", global_scale)])
        self.register_buffer("global_scale", given, persistent=False)

    def law(self, scale: Tensor) -> TorchDistribution:
        tau = pyro.sample("global_scale", dist.HalfCauchy(self.global_scale).to_event(1))
        local = pyro.sample("local_scale", dist.HalfCauchy(torch.ones_like(self.scale)).to_event(1))
        spread = scale * tau * local
        return dist.Normal(torch.zeros_like(spread), spread)


class _ByBlock(WeightPrior):
    """A prior for each parameter, that a function of its name and shape returns."""

    def __init__(self, blocks: Sequence[Block], function: BlockPrior) -> None:
        super().__init__(blocks)
        self.blocks = tuple(blocks)
        self.function = function

    def forward(self) -> TorchDistribution:
        return _Joined([self._of(block) for block in self.blocks])

    def _of(self, block: Block) -> TorchDistribution:
        given = self.function(block.name, block.shape)
        whole = torch.Size(given.batch_shape + given.event_shape) if hasattr(given, "event_shape") else None
        if whole != block.shape:
            raise ArgumentError(
                f"prior gives {given!r} for parameter {block.name!r}; it must return a distribution of shape"
                f" {tuple(block.shape)}, such as dist.Normal(0.0, 1.0).expand(shape)"
            )
        return given.to_event(len(given.batch_shape))


class _Joined(TorchDistribution):
    """Independent distributions, the values of which lie one after the other in a vector."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, parts: Sequence[TorchDistribution], batch: Sequence[int] = ()) -> None:
        self.parts = list(parts)
        self.sizes = [part.event_shape.numel() for part in parts]
        super().__init__(torch.Size(batch), torch.Size([sum(self.sizes)]), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return all(part.has_rsample for part in self.parts)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        places = zip(self.parts, self.sizes, strict=True)
        if all(part.support.base_constraint is constraints.real for part, _ in places):
            return constraints.real_vector
        each = [constraints.independent(part.support.base_constraint, 1) for part in self.parts]
        return constraints.cat(each, dim=-1, lengths=self.sizes)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _Joined:
        return _Joined([part.expand(torch.Size(batch_shape)) for part in self.parts], torch.Size(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        drawn = [(part.rsample if part.has_rsample else part.sample)(torch.Size(sample_shape)) for part in self.parts]
        return torch.cat([d.flatten(-len(p.event_shape)) for d, p in zip(drawn, self.parts, strict=True)], dim=-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        pieces = value.split(self.sizes, dim=-1)
        parts = zip(self.parts, pieces, strict=True)
        return sum(part.log_prob(piece.unflatten(-1, part.event_shape)) for part, piece in parts)


PRIORS: dict[str, type[WeightPrior]] = {
    "normal": _Normal,
    "laplace": _Laplace,
    "scale-mixture": _ScaleMixture,
    "horseshoe": _Horseshoe,
}


def weight_prior(
    given: str | Mapping[str, Any] | BlockPrior, blocks: Sequence[Block], members: int | None = None
) -> WeightPrior:
    """A prior of a flat vector from what a user gives.

    Args:
        given: a name in ``PRIORS``; a dictionary of a ``"name"`` and options; or a function of a parameter's name and
            shape that returns its distribution, of that shape.
        blocks: of the flat vector.
        members: of networks that are trained together; ``None`` for one network.

    Raises:
        ArgumentError: an unknown name, an unknown option, or one out of range.

    Example:
        >>> blocks = [Block("weight", torch.Size([2, 4]), 0, 4), Block("bias", torch.Size([2]), 8, 1)]
        >>> weight_prior({"name": "normal", "scale": "fan-in"}, blocks)().stddev[[0, 9]]
        tensor([0.5000, 1.0000])
    """
    if callable(given):
        return _ByBlock(blocks, given)
    prior: WeightPrior = named("prior", given, PRIORS, blocks, members=members)
    return prior


def _scales(blocks: Sequence[Block], scale: Scale) -> Tensor:
    return torch.cat([torch.full((block.size,), _scale_of(block, scale)) for block in blocks])


def _scale_of(block: Block, scale: Scale) -> float:
    if isinstance(scale, Mapping):
        fitting = [value for pattern, value in scale.items() if fnmatch.fnmatchcase(block.name, pattern)]
        return _scale_of(block, fitting[-1] if fitting else 1.0)
    if scale == "fan-in":
        return block.fan_in**-0.5
    return require_positive("scale of a prior", scale, ", 'fan-in', or a dictionary of these by parameter name")
