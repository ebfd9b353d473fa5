"""A normalizing flow as the posterior of all continuous latents of any model."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoContinuous
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import AffineTransform, Transform

from pyrovae.errors import require_count, require_positive
from pyrovae.flows import Chain, stack
from pyrovae.flows.stacks import family
from pyrovae.guides.gaussian import FirstCall, Init, Program
from pyrovae.registry import GUIDES

__all__ = ["Flow"]


@GUIDES.register
class Flow(FirstCall, AutoContinuous):
    r"""Normalizing-flow posterior of all continuous latents of a model, joint and unconstrained.

    .. math:: u = \mu + \sigma \odot f_K \circ \dots \circ f_1(\epsilon), \quad \epsilon \sim \mathcal{N}(0, I),
        \qquad z = T(u)

    with T Pyro's map onto the support of each latent. The flow works at unit scale whatever the units of the latents;
    it starts near the identity, so that a fit starts at a diagonal Gaussian. The Householder flow, a rotation, is
    put after the scales: :math:`u = \mu + f(\sigma \odot \epsilon)`, a Gaussian with correlations. Parameters do not
    depend on the data; local latents of a minibatch need an amortized guide.

    A flow that starts much narrower than the posterior can stay there under sticking the landing, which ``"auto"``
    takes for most flows: its gradient vanishes where guide and posterior agree up to a factor. A larger
    ``init_scale``, or ``gradient="pathwise"``, avoids that (notebook 04 shows both).

    Args:
        model: any Pyro model, of which all latents are continuous and of fixed size.
        flow: ``"planar"``, ``"radial"``, ``"householder"``, ``"sylvester"``, ``"iaf"``, ``"maf"``, ``"coupling"`` or
            ``"spline"``; see :mod:`pyrovae.flows` for what each can do.
        depth: number K of layers.
        affine: whether μ and σ are learnt; otherwise they stay 0 and 1.
        init_scale: where σ starts, in units of the unconstrained latents.
        init_loc_fn: initial value of a site, one of Pyro's ``init_to_…``; ``None`` for the model's
            ``start_values``, or else ``init_to_median``.
        **options: arguments of the flow's class, such as ``hidden``.

    Raises:
        ArgumentError: unknown flow or option, or an argument out of range; ``gradient="stl"`` and ``"dreg"`` with a
            flow whose given values cannot be scored, or only slowly (use ``"pathwise"`` or ``"auto"``).
        ModelGuideError: a state was loaded that belongs to a model with another number of latents.

    References:
        Rezende & Mohamed 2015, https://arxiv.org/abs/1505.05770; Kingma et al. 2016,
        https://arxiv.org/abs/1606.04934; Kucukelbir et al. 2017, https://arxiv.org/abs/1603.00788.

    Example:
        >>> import pyro, pyrovae
        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(torch.ones(())))
        ...     pyro.sample("x", dist.Normal(torch.zeros(()), scale), obs=torch.tensor(2.0))
        >>> guide = Flow(model, "planar", depth=4)
        >>> bool(guide()["scale"] > 0)
        True
        >>> loss = pyrovae.ELBO(particles=8).differentiable_loss(model, guide)
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        model: Program,
        flow: str = "iaf",
        depth: int = 2,
        affine: bool = True,
        init_scale: float = 0.1,
        init_loc_fn: Init | None = None,
        **options: Any,
    ) -> None:
        family(flow, options)
        require_count("depth", depth)
        require_positive("init_scale", init_scale)
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._name, self._depth, self._options = flow, depth, options
        self._affine, self._init_scale = affine, init_scale
        self.flow: nn.Module | None = None

    def _make_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Makes the parameters, for as many latents as the model has, on their device and of their type."""
        loc = self._init_loc()
        flow = stack(self._name, loc.numel(), self._depth, **self._options)
        if self._affine:
            self.loc = nn.Parameter(loc.clone())
            self.scale = PyroParam(torch.full_like(loc, self._init_scale), constraints.softplus_positive)
        else:
            self.register_buffer("loc", torch.zeros_like(loc))
            self.register_buffer("scale", torch.ones_like(loc))
        self.flow = flow.to(loc)

    def get_base_dist(self) -> dist.TorchDistribution:
        """The standard normal of as many dimensions as the model has unconstrained latents."""
        loc = self.loc
        return dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """From the base to the unconstrained latents; for the latest draw, no inverse is needed."""
        assert self.flow is not None
        flow = self.flow()
        if not self._affine:
            return Chain(flow)
        loc, scale = self.loc, self.scale
        if self._name == "householder":
            return Chain(
                AffineTransform(torch.zeros_like(loc), scale, event_dim=1),
                flow,
                AffineTransform(loc, torch.ones_like(scale), event_dim=1),
            )
        return Chain(flow, AffineTransform(loc, scale, event_dim=1))
