"""A flow as the learnable prior of a latent vector."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.errors import ArgumentError
from pyrovae.flows.stacks import FLOWS, family, stack

__all__ = ["FlowPrior"]


class FlowPrior(nn.Module):
    r"""A learnable density of a vector: a standard normal through a flow that scores any point quickly.

    .. math:: p(z) = \mathcal{N}(f^{-1}(z); 0, I) \left| \det \frac{\partial f^{-1}(z)}{\partial z} \right|

    The posterior draws the z that the prior scores, so the flow must have a quick inverse: ``"maf"`` (whose own draws
    are then sequential), ``"coupling"``, ``"spline"`` or ``"radial"``.

    Args:
        features: size of the vector.
        flow: name of the family.
        depth: number of layers.
        **options: arguments of the family's class, such as ``hidden``.

    Raises:
        ArgumentError: the flow has no quick inverse, or leaves a standard normal as it is; an unknown name or option.

    References:
        Chen et al. 2017 (Variational Lossy Autoencoder), https://arxiv.org/abs/1611.02731.

    Example:
        >>> prior = FlowPrior(2, flow="coupling", depth=4)
        >>> p = prior()
        >>> p.batch_shape, p.event_shape, p.log_prob(torch.randn(5, 7, 2)).shape
        (torch.Size([]), torch.Size([2]), torch.Size([5, 7]))
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, features: int, flow: str = "coupling", depth: int = 4, **options: Any) -> None:
        super().__init__()
        family(flow, options)
        fit = sorted(name for name, kind in FLOWS.items() if kind.scores == "quick" and name != "householder")
        if flow not in fit:
            slow = "its inverse takes one pass a feature" if FLOWS[flow].scores == "sequential" else "it has no inverse"
            why = "it leaves a standard normal as it is" if flow == "householder" else slow
            raise ArgumentError(f"flow is {flow!r}, which cannot be a prior: {why}. Use one of {', '.join(fit)}.")
        self.flow = stack(flow, features, depth, **options)
        self.register_buffer("loc", torch.zeros(features), persistent=False)
        self.register_buffer("scale", torch.ones(features), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        """p(z): batch shape (), event shape (features,)."""
        return dist.TransformedDistribution(dist.Normal(self.loc, self.scale).to_event(1), [self.flow()])
