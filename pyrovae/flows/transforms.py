"""Transforms that know the log-determinant of what they just did, alone and chained."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints

_validating = Distribution._validate_args
import zuko.transforms  # noqa: E402, F401  (gives every Transform `call_and_ladj`)

Distribution.set_default_validate_args(_validating)  # zuko turns it off for all of torch when it is imported

__all__ = ["Chain", "FlowTransform"]


class FlowTransform(Transform):
    r"""A map of real vectors that is computed together with its log-determinant.

    .. math:: y = f(x), \qquad \log \left| \det \frac{\partial f(x)}{\partial x} \right|

    A subclass defines :meth:`push` and, where there is one, its inverse :meth:`pull`. Input, output and
    log-determinant of the last call are remembered, so that a distribution scores its own draw without an inverse
    and without a second pass. Batch dimensions broadcast on the left: `*particles x *batch x features`.

    Example:
        >>> class Doubled(FlowTransform):
        ...     def push(self, x):
        ...         return 2 * x, torch.full(x.shape[:-1], 2.0).log() * x.shape[-1]
        >>> x = torch.ones(3)
        >>> y = Doubled()(x)
        >>> y
        tensor([2., 2., 2.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self) -> None:
        super().__init__(cache_size=1)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x)``, `*batch x features`, and the log-determinant of f at x, `*batch`."""
        raise NotImplementedError

    def pull(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The x with ``f(x) = y``, `*batch x features`, and the log-determinant of f (not of its inverse) at x."""
        raise NotImplementedError(
            f"{type(self).__name__} has no inverse in closed form: it knows the density of its own last draw alone"
        )

    def _call(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, ladj = self.push(x)
        self._last = x, y, ladj
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            x, ladj = self.pull(y)
        self._last = x, y, ladj
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The log-determinant of f at x, `*batch`; ``y`` is used only to recognise the last call."""
        if self._last is not None and self._last[0] is x and self._last[1] is y:
            return self._last[2]
        return self.push(x)[1]


class Chain(FlowTransform):
    r"""Transforms one after another.

    .. math:: f = f_K \circ \dots \circ f_1, \qquad
        \log |\det \partial f| = \sum_k \log |\det \partial f_k|

    Args:
        *parts: the transforms of real vectors, the first to be applied first.

    Example:
        >>> from torch.distributions import AffineTransform
        >>> double = AffineTransform(torch.zeros(3), 2.0 * torch.ones(3), event_dim=1)
        >>> chain = Chain(double, double)
        >>> x = torch.ones(5, 3)
        >>> y = chain(x)
        >>> torch.allclose(y, 4 * x), chain.log_abs_det_jacobian(x, y).shape
        (True, torch.Size([5]))
    """

    def __init__(self, *parts: Transform) -> None:
        super().__init__()
        self.parts = parts

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All parts in turn, and the sum of their log-determinants."""
        total = x.new_zeros(())
        for part in self.parts:
            x, ladj = part.call_and_ladj(x)  # type: ignore[attr-defined]
            total = total + ladj
        return x, total

    def pull(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of all parts, the last part first."""
        total = y.new_zeros(())
        for part in reversed(self.parts):
            y, ladj = part.inv.call_and_ladj(y)  # type: ignore[attr-defined]
            total = total - ladj
        return y, total
