"""Flows by name, stacked to any depth."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import zuko
from torch import Tensor
from torch.distributions import Transform

from pyrovae.errors import require_count, unknown_name
from pyrovae.flows.autoregressive import IAF, MAF, Coupling, NeuralSpline
from pyrovae.flows.householder import Householder
from pyrovae.flows.layers import Layer
from pyrovae.flows.planar import Planar, Radial
from pyrovae.flows.sylvester import Sylvester
from pyrovae.flows.transforms import Chain

__all__ = ["FLOWS", "Stack", "family", "stack"]

FLOWS: dict[str, type[Layer]] = {
    "coupling": Coupling,
    "householder": Householder,
    "iaf": IAF,
    "maf": MAF,
    "planar": Planar,
    "radial": Radial,
    "spline": NeuralSpline,
    "sylvester": Sylvester,
}
"""Every family of layers by name."""


class Stack(zuko.lazy.LazyComposedTransform):
    """Layers one after another, each given the same context; calling it returns a :class:`Chain`.

    Example:
        >>> import torch
        >>> layers = Stack(FLOWS["radial"](3), FLOWS["planar"](3))
        >>> layers()(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    def forward(self, c: Tensor | None = None) -> Transform:
        """The transform of `*batch x features` vectors, given a context `*batch x context`, or ``None``."""
        return Chain(*(layer(c) for layer in self.transforms))


def family(name: str, options: Iterable[str] = ()) -> type[Layer]:
    """The class of layers of a name, after checking that it has the options.

    Args:
        name: a key of ``FLOWS``.
        options: names of the arguments that are to be given to it, beside ``features`` and ``context``.

    Raises:
        ArgumentError: unknown name, or an option that this family does not have.

    Example:
        >>> family("planar").__name__
        'Planar'
    """
    if name not in FLOWS:
        raise unknown_name("flow", name, FLOWS)
    allowed = set(inspect.signature(FLOWS[name]).parameters) - {"features", "context", "reverse"}
    for option in options:
        if option not in allowed:
            raise unknown_name(f"option of flow {name!r}", option, allowed)
    return FLOWS[name]


def stack(name: str, features: int, depth: int, context: int = 0, **options: Any) -> Stack:
    r"""A flow of several layers of one family.

    .. math:: z = f_K \circ \dots \circ f_1 (z_0), \qquad
        \log q(z) = \log q_0(z_0) - \sum_k \log \left| \det \frac{\partial f_k}{\partial z_{k-1}} \right|

    The transform's forward direction is that of drawing. Layers that treat the features in an order (autoregressive,
    coupling, spline, triangular Sylvester) alternate between that order and its reverse. Every flow starts near the
    identity.

    Args:
        name: ``"planar"``, ``"radial"``, ``"householder"``, ``"sylvester"``, ``"iaf"``, ``"maf"``, ``"coupling"`` or
            ``"spline"``.
        features: size of the vectors.
        depth: number K of layers.
        context: size of the context vector that every layer depends on (an amortized flow); 0 for parameters that are
            learnt.
        **options: arguments of the family's class, such as ``hidden``.

    Returns:
        A module; called with a context `*batch x context`, or with none, it returns a torch ``Transform``.

    Raises:
        ArgumentError: unknown name or option, or an argument out of range.

    References:
        Rezende & Mohamed 2015, https://arxiv.org/abs/1505.05770.

    Example:
        >>> import pyro.distributions as dist, torch
        >>> flow = stack("sylvester", features=3, depth=2, context=5)
        >>> context = torch.randn(7, 5)                                        # from an encoder, say
        >>> base = dist.Normal(torch.zeros(7, 3), 1.0).to_event(1)
        >>> posterior = dist.TransformedDistribution(base, [flow(context)])
        >>> z = posterior.rsample()
        >>> z.shape, posterior.log_prob(z).shape
        (torch.Size([7, 3]), torch.Size([7]))
    """
    kind = family(name, options)
    require_count("depth", depth)
    orders = [{"reverse": bool(layer % 2)} if kind.reverses else {} for layer in range(depth)]
    return Stack(*(kind(features, context, **order, **options) for order in orders))
