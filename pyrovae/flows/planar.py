"""Planar and radial flows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrovae.flows.layers import SMALL, Parametrized
from pyrovae.flows.transforms import FlowTransform

__all__ = ["Planar", "Radial"]

_UNIT = math.log(math.e - 1.0)  # softplus(_UNIT) = 1


class _PlanarTransform(FlowTransform):
    def __init__(self, u: Tensor, w: Tensor, b: Tensor) -> None:
        super().__init__()
        wu = (w * u).sum(-1, keepdim=True)
        self.room = F.softplus(wu + _UNIT)  # 1 + wᵀû
        self.u = u + (self.room - 1.0 - wu) * w / w.square().sum(-1, keepdim=True).clamp(min=1e-12)
        self.w, self.b = w, b

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = ((self.w * x).sum(-1, keepdim=True) + self.b).tanh()
        determinant = h.square() + (1.0 - h.square()) * self.room  # 1 + (1 − h²) wᵀû
        return x + self.u * h, determinant.log().squeeze(-1)


class Planar(Parametrized):
    r"""Planar flow: moves points along one direction, by how far they lie along another.

    .. math:: f(x) = x + \hat u \tanh(w^\top x + b), \qquad
        \log|\det| = \log\left|1 + (1 - \tanh^2(w^\top x + b))\, w^\top \hat u\right|

    where :math:`\hat u = u + (m(w^\top u) - w^\top u)\, w / \|w\|^2` with
    :math:`m(a) = -1 + \mathrm{softplus}(a + \log(e - 1))`, so that :math:`w^\top \hat u > -1` and f is invertible (the
    shift makes :math:`m(0) = 0`, and u = 0 the identity). Drawing takes one pass. There is no inverse in closed
    form: only its own draws can be scored, which is all that a pathwise gradient needs.

    Args:
        features: size of the vectors.
        context: size of the context from which a network computes u, w and b; 0 to learn them.
        hidden: widths of that network; empty for a linear map.

    References:
        Rezende & Mohamed 2015, https://arxiv.org/abs/1505.05770.

    Example:
        >>> layer = Planar(3, context=5)
        >>> transform = layer(torch.randn(7, 5))
        >>> x = torch.randn(2, 7, 3)
        >>> y = transform(x)
        >>> y.shape, transform.log_abs_det_jacobian(x, y).shape
        (torch.Size([2, 7, 3]), torch.Size([2, 7]))
    """

    scores = "own draws"
    kind = _PlanarTransform

    def __init__(self, features: int, context: int = 0, hidden: Sequence[int] = ()) -> None:
        w = torch.randn(features) / features**0.5
        super().__init__(features, context, hidden, u=SMALL * torch.randn(features), w=w, b=torch.zeros(1))


class _RadialTransform(FlowTransform):
    def __init__(self, centre: Tensor, reach: Tensor, strength: Tensor) -> None:
        super().__init__()
        self.centre = centre
        self.alpha = F.softplus(reach + _UNIT)
        self.sum = F.softplus(reach + strength + _UNIT)  # α + β

    def _ladj(self, r: Tensor, features: int) -> Tensor:
        across = ((self.sum + r) / (self.alpha + r)).log()
        along = (r.square() + 2.0 * self.alpha * r + self.alpha * self.sum).log() - 2.0 * (self.alpha + r).log()
        return ((features - 1) * across + along).squeeze(-1)

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        offset = x - self.centre
        r = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
        return self.centre + offset * (self.sum + r) / (self.alpha + r), self._ladj(r, x.shape[-1])

    def pull(self, y: Tensor) -> tuple[Tensor, Tensor]:
        offset = y - self.centre
        distance = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
        # r (r + α + β) / (r + α) = distance, a quadratic equation, by the root that does not cancel
        gap = distance - self.sum
        root = (gap.square() + 4.0 * self.alpha * distance).sqrt() + gap.abs()
        r = torch.where(gap > 0, root / 2.0, 2.0 * self.alpha * distance / root)
        return self.centre + offset * (self.alpha + r) / (self.sum + r), self._ladj(r, y.shape[-1])


class Radial(Parametrized):
    r"""Radial flow: moves points towards a centre or away from it, the more the nearer they are.

    .. math:: f(x) = x + \frac{\beta}{\alpha + r}(x - c), \quad r = \|x - c\|, \qquad
        \det = \left(\frac{\alpha + \beta + r}{\alpha + r}\right)^{D-1}
        \frac{r^2 + 2 \alpha r + \alpha (\alpha + \beta)}{(\alpha + r)^2}

    with α > 0 and β > −α, so that f is invertible; β = 0 is the identity. Both directions are quick: the inverse
    solves a quadratic equation.

    Args:
        features: size D of the vectors.
        context: size of the context from which a network computes c, α and β; 0 to learn them.
        hidden: widths of that network; empty for a linear map.

    References:
        Rezende & Mohamed 2015, https://arxiv.org/abs/1505.05770.

    Example:
        >>> transform = Radial(3)()
        >>> x = torch.randn(7, 3)
        >>> torch.allclose(transform.inv(transform(x).clone()), x, atol=1e-5)
        True
    """

    scores = "quick"
    kind = _RadialTransform

    def __init__(self, features: int, context: int = 0, hidden: Sequence[int] = ()) -> None:
        small = SMALL * torch.randn(features + 1)
        parameters = {"centre": small[:-1], "reach": torch.zeros(1), "strength": small[-1:]}
        super().__init__(features, context, hidden, **parameters)
