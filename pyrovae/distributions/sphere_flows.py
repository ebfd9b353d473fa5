"""Normalizing flows on the unit sphere: through a chart to R^d, a flow there, and back."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Transform

from pyrovae.distributions.von_mises_fisher import SphericalUniform
from pyrovae.errors import ArgumentError

__all__ = ["SphericalFlow", "Stereographic"]


class Stereographic(Transform):
    r"""Stereographic projection of the unit sphere of R^{d+1}, without its last pole e_{d+1}, to R^d.

    .. math::
        y_i = \frac{x_i}{1 - x_{d+1}}, \qquad
        x = \frac{(2 y, \lVert y \rVert^2 - 1)}{\lVert y \rVert^2 + 1}, \qquad
        \log \sqrt{\det J^\top J} = d \log \frac{\lVert y \rVert^2 + 1}{2}

    The log-determinant is that of the map from the sphere's tangent space to R^d, so that densities on the sphere are
    with respect to the surface measure. It equals the exponential map at −e_{d+1} composed with the stretch from
    radius r of R^d to the angle 2 arctan r, which covers the sphere once.

    Args:
        cache_size: 1 to remember the last pair of values, as for any transform of torch.

    References:
        Gemici, Rezende & Mohamed 2016, "Normalizing flows on Riemannian manifolds",
        https://arxiv.org/abs/1611.02304.

    Example:
        >>> chart = Stereographic()
        >>> chart(torch.tensor([1.0, 0.0, 0.0]))
        tensor([1., 0.])
        >>> chart.inv(torch.tensor([0.0, 0.0]))
        tensor([ 0.,  0., -1.])
    """

    domain = constraints.sphere
    codomain = constraints.real_vector
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stereographic)

    __hash__ = Transform.__hash__

    def with_cache(self, cache_size: int = 1) -> Stereographic:
        """The same chart with another cache size."""
        return self if self._cache_size == cache_size else Stereographic(cache_size=cache_size)

    def _call(self, x: Tensor) -> Tensor:
        rest, height = x[..., :-1], x[..., -1:]
        square = rest.square().sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        # 1 − height, without cancellation near the pole, where square = (1 − height)(1 + height)
        return rest / torch.where(height > 0, square / (1.0 + height.clamp(min=0.0)), 1.0 - height)

    def _inverse(self, y: Tensor) -> Tensor:
        share = 2.0 / (1.0 + y.square().sum(-1, keepdim=True))
        return torch.cat([share * y, 1.0 - share], dim=-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log of the change of volume from the sphere at ``x`` to R^d at ``y``: `*batch`."""
        return y.shape[-1] * (torch.log1p(y.square().sum(-1)) - math.log(2.0))

    def forward_shape(self, shape: tuple[int, ...]) -> torch.Size:
        """From `*batch x (d+1)` to `*batch x d`."""
        return torch.Size((*shape[:-1], shape[-1] - 1))

    def inverse_shape(self, shape: tuple[int, ...]) -> torch.Size:
        """From `*batch x d` to `*batch x (d+1)`."""
        return torch.Size((*shape[:-1], shape[-1] + 1))


class SphericalFlow(nn.Module):
    r"""A normalizing flow on the unit sphere of R^{d+1}: chart, Euclidean flow T, inverse chart.

    .. math::
        x = \sigma^{-1}(T(\sigma(x_0))), \quad x_0 \sim q_0, \qquad
        \log q(x) = \log q_0(x_0) - \log \lvert \det J_T(y_0) \rvert
        + d \log \frac{\lVert y \rVert^2 + 1}{\lVert y_0 \rVert^2 + 1}

    with y₀ = σ(x₀), y = T(y₀) and σ the :class:`Stereographic` projection. Called with a context or nothing, it
    returns a distribution for a ``pyro.sample`` statement; densities are with respect to the surface measure, in
    nats. The pole e_{d+1} is the infinity of R^d: the density is continuous there if T is the identity far out, as a
    spline's is, and may have a peak or a hole there otherwise. T runs forward to draw, and is inverted to score
    values that it did not draw itself; give ``flow.inv`` of a lazy transform that is quicker the other way.

    Args:
        flow: a module that, called with a context (``None`` for none), gives a torch ``Transform`` on R^d, as those of
            zuko are; or such a transform itself.
        dim: dimension d + 1 ≥ 2 of the ambient space.
        base: distribution on the sphere that q_0 is; ``None`` for the uniform one (with the data type and the device
            of the flow's parameters).

    Raises:
        ArgumentError: an argument is of another kind, or the base is on another sphere.

    References:
        Gemici, Rezende & Mohamed 2016, "Normalizing flows on Riemannian manifolds",
        https://arxiv.org/abs/1611.02304.

    Example:
        >>> flow = SphericalFlow(dist.transforms.spline_coupling(2), dim=3)
        >>> x = flow().rsample((5,))
        >>> x.shape, flow().log_prob(x).shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        flow: Callable[[Tensor | None], Transform] | Transform,
        dim: int,
        base: dist.TorchDistribution | None = None,
    ) -> None:
        super().__init__()
        if not callable(flow):
            raise ArgumentError(
                f"flow is {flow!r}; it must be a module that gives a torch Transform on R^{{dim - 1}}, or a Transform"
            )
        uniform = SphericalUniform(dim)  # it checks dim
        if base is not None and (base.support is not uniform.support or base.event_shape != uniform.event_shape):
            raise ArgumentError(
                f"base is {type(base).__name__} with support {base.support} and event shape {tuple(base.event_shape)};"
                f" it must be a distribution on the sphere with event shape ({dim},), as SphericalUniform({dim}) and"
                " VonMisesFisher are"
            )
        self.dim = dim
        self.flow = flow
        self._base = base

    def base(self) -> dist.TorchDistribution:
        """The distribution q_0 that the flow starts from."""
        if self._base is not None:
            return self._base
        like = next(self.parameters(), torch.empty(0))
        return SphericalUniform(self.dim, dtype=like.dtype, device=like.device)

    def forward(self, context: Tensor | None = None) -> dist.TransformedDistribution:
        """The distribution on the sphere given a context: event shape (dim,), batch shape that of the transform.

        Args:
            context: A `*batch x features` tensor for a conditional flow, or ``None``.
        """
        transform = self.flow if isinstance(self.flow, Transform) else self.flow(context)
        if not isinstance(transform, Transform):
            raise ArgumentError(f"the flow gave {type(transform).__name__}; it must give a torch Transform on R^d")
        base = self.base()
        if context is not None:
            base = base.expand(torch.broadcast_shapes(base.batch_shape, context.shape[:-1]))
        chart = Stereographic(cache_size=1)
        return dist.TransformedDistribution(base, [chart, transform, Stereographic(cache_size=1).inv])
