"""A normalizing flow as the posterior of all continuous latents of any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import AffineTransform, Transform

from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.flows import Chain, stack
from pyrovae.flows.layers import at_least
from pyrovae.flows.stacks import family

__all__ = ["Flow"]


class Flow(AutoContinuous):
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
        init_loc_fn: Pyro's initialization strategy, by which μ starts.
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
        model: Callable[..., Any],
        flow: str = "iaf",
        depth: int = 2,
        affine: bool = True,
        init_scale: float = 0.1,
        init_loc_fn: Callable[..., Any] = init_to_median,
        **options: Any,
    ) -> None:
        family(flow, options)
        at_least(1, "depth", depth)
        if not 0.0 < init_scale < float("inf"):
            raise ArgumentError(f"init_scale is {init_scale!r}; it must be a finite number above 0")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._name, self._depth, self._options = flow, depth, options
        self._affine, self._init_scale = affine, init_scale
        self.flow: nn.Module | None = None

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        if self.flow is None:
            self._build(self._init_loc())
        elif self.loc.numel() != self.latent_dim:
            raise ModelGuideError(
                f"the loaded state of guide {type(self).__name__} is of {self.loc.numel()} unconstrained latents, and"
                f" the model has {self.latent_dim}. Load it with the model and data sizes that it was saved with."
            )

    def _build(self, loc: Tensor) -> None:
        """Makes the parameters, for as many latents as ``loc`` has, on its device and of its type."""
        flow = stack(self._name, loc.numel(), self._depth, **self._options)
        if self._affine:
            self.loc = nn.Parameter(loc.clone())
            self.scale = PyroParam(torch.full_like(loc, self._init_scale), constraints.softplus_positive)
        else:
            self.register_buffer("loc", torch.zeros_like(loc))
            self.register_buffer("scale", torch.ones_like(loc))
        self.flow = flow.to(loc)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Makes the parameters when a state is loaded before the first call, which would have made them."""
        if self.flow is None and f"{prefix}loc" in state_dict:
            self._build(torch.zeros_like(state_dict[f"{prefix}loc"]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

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
