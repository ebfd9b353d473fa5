"""Coefficients that follow the step counter of an objective, as tensors."""

from __future__ import annotations

from torch import Tensor

from pyrovae.errors import ArgumentError, require_count
from pyrovae.registry import SCHEDULES

__all__ = ["LinearWarmup"]


@SCHEDULES.register
class LinearWarmup:
    r"""Linear warm-up: from ``start`` to ``end`` over the first ``steps`` gradient steps, then constant.

    .. math:: \beta_t = \text{start} + (\text{end} - \text{start}) \min(1, t / \text{steps})

    Args:
        steps: number of gradient steps until ``end`` is reached, at least 1.
        start: coefficient at step 0, at least 0.
        end: coefficient from step ``steps`` on, at least 0.

    Raises:
        ArgumentError: ``steps`` is not a whole number above 0, or a coefficient is negative.

    References:
        Bowman et al. 2016, "Generating sentences from a continuous space", https://arxiv.org/abs/1511.06349.

    Example:
        >>> import torch
        >>> warmup = LinearWarmup(steps=4)
        >>> [float(warmup(torch.tensor(step))) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """

    def __init__(self, steps: int, start: float = 0.0, end: float = 1.0) -> None:
        require_count("steps", steps, 1, " gradient step")
        for name, value in (("start", start), ("end", end)):
            if not 0.0 <= value < float("inf"):
                raise ArgumentError(f"{name} is {value!r}; a coefficient must be finite and at least 0")
        self.steps = steps
        self.start = start
        self.end = end

    def __call__(self, step: Tensor) -> Tensor:
        """The coefficient at ``step``, a scalar tensor on its device."""
        return self.start + (self.end - self.start) * (step / self.steps).clamp(max=1.0)
