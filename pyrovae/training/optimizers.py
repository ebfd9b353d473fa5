"""Optimizers and learning-rate schedules by name or factory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from pyrovae.errors import ArgumentError, require_positive, unknown_name

__all__ = ["OPTIMIZERS", "SCHEDULES", "Constant", "OptimizerSpec", "ScheduleSpec", "make_optimizer", "make_schedule"]

OptimizerSpec = str | type | Callable[[list[Tensor]], torch.optim.Optimizer]
ScheduleSpec = str | Callable[[torch.optim.Optimizer], LRScheduler]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
_FUSED = ("adam", "adamw", "sgd")

# Factor of the learning rate against the finished share of all gradient steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))),
    "linear": lambda done: max(0.0, 1.0 - done),
}


class Constant(LRScheduler):
    """Leaves the rate alone, at a tenth of the time of a rule that gives 1."""

    def get_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None, steps: int = 1) -> None:
        self.last_epoch += steps
        if self.last_epoch == 0:  # the step of its construction
            self._last_lr = self.get_lr()


def make_optimizer(spec: OptimizerSpec, parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    """One optimizer for all parameters.

    Args:
        spec: a name of ``OPTIMIZERS`` (fused where torch has a fused kernel), a ``torch.optim`` class, or a function
            from the list of parameters to an optimizer (``lr`` is then its own affair).
        parameters: unconstrained leaf tensors.
        lr: learning rate, above 0.

    Raises:
        ArgumentError: unknown name, a rate out of range, or a factory that returns something else.

    Example:
        >>> make_optimizer("adamw", [torch.zeros(2, requires_grad=True)], lr=0.01).defaults["lr"]
        0.01
    """
    require_positive("lr", lr)
    if isinstance(spec, str):
        if spec not in OPTIMIZERS:
            raise unknown_name("optimizer", spec, OPTIMIZERS)
        fused: dict[str, Any] = {"fused": True} if spec in _FUSED else {}
        return OPTIMIZERS[spec](parameters, lr=lr, **fused)  # type: ignore[call-arg]
    if isinstance(spec, type) and issubclass(spec, torch.optim.Optimizer):
        return spec(parameters, lr=lr)  # type: ignore[call-arg]
    factory: Any = spec
    made = factory(parameters) if callable(factory) else factory
    if not isinstance(made, torch.optim.Optimizer):
        raise ArgumentError(
            f"optimizer gave a {type(made).__name__}; it must be a name ({', '.join(OPTIMIZERS)}), a torch.optim class,"
            " or a function from a list of parameters to a torch.optim.Optimizer"
        )
    return made


def make_schedule(spec: ScheduleSpec, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """A learning-rate schedule that is stepped once a gradient step.

    Args:
        spec: ``"constant"``, ``"cosine"`` or ``"linear"`` (both to 0 at the last step), or a function from the
            optimizer to a ``torch.optim.lr_scheduler`` object.
        optimizer: whose learning rate it sets.
        steps: gradient steps of the whole fit.

    Raises:
        ArgumentError: unknown name, or a factory that returns something else.

    Example:
        >>> optimizer = make_optimizer("sgd", [torch.zeros(2, requires_grad=True)], lr=1.0)
        >>> make_schedule("linear", optimizer, steps=4).get_last_lr()
        [1.0]
    """
    if isinstance(spec, str):
        if spec not in SCHEDULES:
            raise unknown_name("schedule", spec, SCHEDULES)
        if spec == "constant":
            return Constant(optimizer)
        factor = SCHEDULES[spec]
        return LambdaLR(optimizer, lambda step: factor(step / steps))
    made: Any = spec(optimizer) if callable(spec) else spec
    if not isinstance(made, LRScheduler):
        raise ArgumentError(
            f"schedule gave a {type(made).__name__}; it must be a name ({', '.join(SCHEDULES)}) or a function from an"
            " optimizer to a torch.optim.lr_scheduler object, stepped once a gradient step"
        )
    return made
