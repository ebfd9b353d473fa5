"""Likelihoods of a response y given the outputs of a network, in the units of y."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.errors import ArgumentError, require_positive
from pyrovae.registry import named

__all__ = ["RESPONSES", "Response", "response"]

_FLOOR = 1e-4  # of a standard deviation that a network gives, in standard deviations of y


class Response(PyroModule):
    """A family of distributions of y, a number for each data point, that the outputs of a network parametrize.

    Args:
        members: of networks that are trained together, each with parameters of its own; ``None`` for one network.
    """

    outputs: int | None = 1
    """Numbers that the network gives for each data point; ``None`` for any number above 1, the classes."""
    real: bool = True
    """Whether y are real numbers, which are standardised inside."""
    floating: bool = True
    """Whether y are floating-point numbers."""

    def __init__(self, members: int | None = None) -> None:
        super().__init__()
        self.shape = () if members is None else (members, 1)

    def forward(self, out: Tensor, loc: Tensor, scale: Tensor) -> TorchDistribution:
        """The distribution of y.

        Args:
            out: what the network gives, `… x n`, or `… x n x outputs` where these are several.
            loc: mean of y over the training data, to which ``out`` is added in units of ``scale``.
            scale: standard deviation of y over the training data.
        """
        raise NotImplementedError


class _Scaled(Response):
    """A response with one scale for all data points: learned, or given.

    Args:
        scale: in units of y, held fixed; ``None`` learns it, from ``start`` on.
        start: where the learned scale starts, in standard deviations of y.
        members: see :class:`Response`.
    """

    def __init__(self, scale: float | None = None, start: float = 0.5, members: int | None = None) -> None:
        super().__init__(members)
        self.known = scale is not None
        if scale is not None:
            value = torch.full(
                self.shape, require_positive("scale of the likelihood", scale, ", in units of y, or None")
            )
            self.register_buffer("scale", value, persistent=False)
        else:
            first = torch.full(self.shape, require_positive("start of the likelihood's scale", start))
            self.scale = PyroParam(first, constraints.softplus_positive)

    def noise(self, scale: Tensor) -> Tensor:
        """The scale in units of y, from the standard deviation of y."""
        return self.scale if self.known else self.scale * scale


class _Normal(_Scaled):
    """``N(f, σ²)``, one σ for all data points."""

    def forward(self, out: Tensor, loc: Tensor, scale: Tensor) -> TorchDistribution:
        return dist.Normal(loc + scale * out, self.noise(scale))


class _StudentT(_Scaled):
    """Student's t around f with one scale; its degrees of freedom are learned, above 2 so that it has a variance.

    Args:
        df: degrees of freedom, held fixed; ``None`` learns them, from 5 on.
        **options: those of the scale.
    """

    def __init__(self, df: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        if df is not None and not df > 2:
            raise ArgumentError(f"df is {df!r}; it must be above 2, so that the response has a variance, or None")
        if df is not None:
            self.register_buffer("df", torch.full(self.shape, float(df)), persistent=False)
        else:
            self.df = PyroParam(torch.full(self.shape, 5.0), constraints.greater_than(2.0))

    def forward(self, out: Tensor, loc: Tensor, scale: Tensor) -> TorchDistribution:
        return dist.StudentT(self.df, loc + scale * out, self.noise(scale))


class _HeteroscedasticNormal(Response):
    """``N(f, g²)``: the network gives mean and standard deviation, the latter through a softplus."""

    outputs = 2

    def forward(self, out: Tensor, loc: Tensor, scale: Tensor) -> TorchDistribution:
        mean, raw = out.unbind(-1)
        return dist.Normal(loc + scale * mean, scale * (softplus(raw) + _FLOOR))


class _Bernoulli(Response):
    """y in {0, 1}, with logit f."""

    real = False

    def forward(self, out: Tensor, loc: Tensor, scale: Tensor) -> TorchDistribution:
        return dist.Bernoulli(logits=out)


class _Categorical(Response):
    """y in {0, …, C − 1}, whole numbers, with the C outputs as logits."""

    outputs = None
    real = False
    floating = False

    def forward(self, out: Tensor, loc: Tensor, scale: Tensor) -> TorchDistribution:
        return dist.Categorical(logits=out)


class _Poisson(Response):
    """y in {0, 1, …} with rate exp(f)."""

    real = False

    def forward(self, out: Tensor, loc: Tensor, scale: Tensor) -> TorchDistribution:
        return dist.Poisson(out.exp())


RESPONSES: dict[str, type[Response]] = {
    "normal": _Normal,
    "heteroscedastic": _HeteroscedasticNormal,
    "student-t": _StudentT,
    "bernoulli": _Bernoulli,
    "categorical": _Categorical,
    "poisson": _Poisson,
}


def response(given: str | Mapping[str, Any], members: int | None = None) -> Response:
    """A likelihood from what a user gives.

    Args:
        given: a name in ``RESPONSES``, or a dictionary of a ``"name"`` and options (``scale``, ``start``, ``df``).
        members: of networks that are trained together; ``None`` for one network.

    Raises:
        ArgumentError: an unknown name, an unknown option, or one out of range.

    Example:
        >>> response({"name": "normal", "scale": 0.1})(torch.zeros(3), torch.tensor(5.0), torch.tensor(2.0)).mean
        tensor([5., 5., 5.])
    """
    made: Response = named("likelihood", given, RESPONSES, members=members)
    return made
