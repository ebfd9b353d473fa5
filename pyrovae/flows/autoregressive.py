"""Autoregressive flows, affine and spline, and their two-block case, coupling; the networks are zuko's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform

from pyrovae.errors import require_count, require_positive
from pyrovae.flows.layers import SMALL, Layer
from pyrovae.flows.transforms import Chain

__all__ = ["IAF", "MAF", "Coupling", "NeuralSpline"]


class _AtContext(Chain):
    """One transform of zuko's, which wants vectors with all the batch dimensions of the context."""

    def __init__(self, part: Transform, c: Tensor | None) -> None:
        super().__init__(part)
        self.batch = torch.Size() if c is None else c.shape[:-1]

    def _expanded(self, x: Tensor) -> Tensor:
        return x.expand(*torch.broadcast_shapes(x.shape[:-1], self.batch), x.shape[-1])

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().push(self._expanded(x))

    def pull(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return super().pull(self._expanded(y))


class _Autoregressive(Layer):
    """A monotonic map of each feature, whose parameters a masked network computes from the features before it.

    Args:
        features: size of the vectors.
        context: size of the context, one more input of the network.
        hidden: widths of the network.
        reverse: whether the last feature comes first.
        blocks: number of groups of features that are transformed together; ``None`` for one group a feature.
        univariate: the monotonic map.
        shapes: the shapes of its parameters.
    """

    reverses = True

    def __init__(
        self,
        features: int,
        context: int,
        hidden: Sequence[int],
        reverse: bool,
        blocks: int | None = None,
        univariate: Callable[..., Transform] = MonotonicAffineTransform,
        shapes: Sequence[tuple[int, ...]] = ((), ()),
    ) -> None:
        super().__init__(features, context)
        order = torch.arange(features)
        network: dict[str, Any] = {
            "hidden_features": [require_count("hidden", width) for width in hidden],
            "activation": nn.ELU,
        }
        self.net = MaskedAutoregressiveTransform(
            features,
            context,
            passes=blocks,
            order=order.flip(0) if reverse else order,
            univariate=univariate,
            shapes=shapes,
            **network,
        )
        with torch.no_grad():  # parameters of zero are the identity
            if hasattr(self.net, "hyper"):
                self.net.hyper[-1].weight.mul_(SMALL)
                self.net.hyper[-1].bias.zero_()
            else:  # a single feature without context
                for value in self.net.phi:
                    value.mul_(SMALL)

    def transform(self, c: Tensor | None) -> Transform:
        """The transform at a context."""
        return _AtContext(self.net(c), c)


class IAF(_Autoregressive):
    r"""Inverse autoregressive flow: draws in one pass.

    .. math:: y_i = \exp(a_i)\, x_i + b_i, \quad (a_i, b_i) = g_i(x_{<i}, c), \qquad \log|\det| = \sum_i a_i

    with a softly bounded to (−6.9, 6.9), and g one masked network. Drawing, and scoring a draw, takes one pass of the
    network; scoring a given vector takes as many as there are features.

    Args:
        features: size of the vectors.
        context: size of the context, which is one more input of the network; 0 for none.
        hidden: widths of the network's hidden layers.
        reverse: whether the last feature comes first; a stack alternates.

    References:
        Kingma et al. 2016, https://arxiv.org/abs/1606.04934.

    Example:
        >>> transform = IAF(3, context=5)(torch.randn(7, 5))
        >>> x = torch.randn(2, 7, 3)
        >>> y = transform(x)
        >>> y.shape, transform.log_abs_det_jacobian(x, y).shape
        (torch.Size([2, 7, 3]), torch.Size([2, 7]))
    """

    scores = "sequential"

    def __init__(
        self, features: int, context: int = 0, hidden: Sequence[int] = (64, 64), reverse: bool = False
    ) -> None:
        super().__init__(features, context, hidden, reverse)


class MAF(_Autoregressive):
    r"""Masked autoregressive flow: scores in one pass.

    .. math:: y_i = (x_i - b_i) \exp(-a_i), \quad (a_i, b_i) = g_i(y_{<i}, c), \qquad \log|\det| = -\sum_i a_i

    The inverse of :class:`IAF`: scoring a given vector takes one pass of the network, drawing one takes as many as
    there are features. It is the kind for densities of data and for priors.

    Args:
        features: size of the vectors.
        context: size of the context, which is one more input of the network; 0 for none.
        hidden: widths of the network's hidden layers.
        reverse: whether the last feature comes first; a stack alternates.

    References:
        Papamakarios et al. 2017, https://arxiv.org/abs/1705.07057.

    Example:
        >>> transform = MAF(3)()
        >>> x = torch.randn(7, 3)
        >>> torch.allclose(transform.inv(transform(x).clone()), x, atol=1e-5)
        True
    """

    scores = "quick"

    def __init__(
        self, features: int, context: int = 0, hidden: Sequence[int] = (64, 64), reverse: bool = False
    ) -> None:
        super().__init__(features, context, hidden, reverse)

    def transform(self, c: Tensor | None) -> Transform:
        """The transform at a context."""
        return _AtContext(self.net(c).inv, c)


class Coupling(_Autoregressive):
    r"""Affine coupling: one half of the features sets the scale and shift of the other half.

    .. math:: y_A = \exp(a)\, x_A + b, \qquad y_B = \exp(a(x_A, c))\, x_B + b(x_A, c)

    where A is the first half of the features, with a scale and shift that depend on the context alone. Both directions
    are quick (one pass, and two).

    Args:
        features: size of the vectors.
        context: size of the context, which is one more input of the network; 0 for none.
        hidden: widths of the network's hidden layers.
        reverse: whether A is the last half; a stack alternates.

    References:
        Dinh et al. 2017 (RealNVP), https://arxiv.org/abs/1605.08803.

    Example:
        >>> transform = Coupling(4)()
        >>> x = torch.randn(7, 4)
        >>> torch.allclose(transform.inv(transform(x).clone()), x, atol=1e-5)
        True
    """

    scores = "quick"

    def __init__(
        self, features: int, context: int = 0, hidden: Sequence[int] = (64, 64), reverse: bool = False
    ) -> None:
        super().__init__(features, context, hidden, reverse, blocks=2)


class NeuralSpline(_Autoregressive):
    r"""Neural spline coupling: as :class:`Coupling`, with monotonic rational-quadratic splines for the affine maps.

    .. math:: y_i = s(x_i; \theta_i), \qquad \theta_A = \theta_A(c), \quad \theta_B = \theta_B(x_A, c)

    Each spline maps (−bound, bound) onto itself and is the identity outside. Both directions are quick.

    Args:
        features: size of the vectors.
        context: size of the context, which is one more input of the network; 0 for none.
        hidden: widths of the network's hidden layers.
        bins: number of bins of each spline.
        bound: half the width of the interval that is transformed, in units of the base.
        reverse: whether A is the last half; a stack alternates.

    References:
        Durkan et al. 2019, https://arxiv.org/abs/1906.04032.

    Example:
        >>> transform = NeuralSpline(4, bins=4)()
        >>> x = torch.randn(7, 4)
        >>> torch.allclose(transform.inv(transform(x).clone()), x, atol=1e-4)
        True
    """

    scores = "quick"

    def __init__(
        self,
        features: int,
        context: int = 0,
        hidden: Sequence[int] = (64, 64),
        bins: int = 8,
        bound: float = 5.0,
        reverse: bool = False,
    ) -> None:
        require_count("bins", bins, 2)
        require_positive("bound", bound, ", in units of the base")

        def spline(*parameters: Tensor) -> Transform:
            return MonotonicRQSTransform(*parameters, bound=bound)

        super().__init__(features, context, hidden, reverse, 2, spline, ((bins,), (bins,), (bins - 1,)))
