"""One gradient step, compiled: the eager step's own code as one graph for each shape of minibatch."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae.errors import ArgumentError, CompilationError
from pyrovae.modes import modules_of
from pyrovae.objectives import Objective
from pyrovae.structure import Program
from pyrovae.training.graph import Compiled, Function, compile_function
from pyrovae.training.step import EagerStep

__all__ = ["CompiledStep", "Graphs", "Learning", "buffers_of", "check_compile", "numbers_of", "objective_state"]

logger = logging.getLogger(__name__)

Key = tuple[tuple[torch.Size, torch.dtype], ...]  # of each tensor of a minibatch

# "auto" compiles a shape when the steps that remain with it take longer than this eagerly. Compiling takes some 10 s,
# and a compiled step at most two thirds of the time.
_WORTH_SECONDS = 45.0
_WARM_STEPS = 5
_VALIDATION_SECONDS = 10.0  # spent on eager validation until "auto" compiles it
_MOST_GRAPHS = 8  # of one function, for as many shapes and Python numbers; beyond, something changes all the time
_PLAIN = int | float | str | bool


class Learning:
    """Makes torch optimizers traceable: learning rates and step counts as tensors.

    Args:
        optimizers: already stepped once, so that their state exists.

    Raises:
        CompilationError: an optimizer keeps Python numbers in its state.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        self._groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self._seen = [float(group["lr"]) for group in self._groups]
        self._rates = [
            torch.tensor(rate, dtype=group["params"][0].dtype, device=group["params"][0].device)
            for rate, group in zip(self._seen, self._groups, strict=True)
        ]
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                numbers = [key for key, value in state.items() if isinstance(value, int | float)]
                if numbers:
                    raise CompilationError(
                        f"{type(optimizer).__name__} keeps {', '.join(numbers)} as a Python number; use an optimizer of"
                        " torch.optim (or of pyro.optim that wraps one)"
                    )
                if "step" in state:
                    state["step"] = state["step"].to(parameter.device)

    def tensors(self) -> list[Tensor]:
        """Everything that a step reads or updates."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        return [*self._rates, *(value for state in states for value in state.values() if isinstance(value, Tensor))]

    def follow(self) -> None:
        """Takes over learning rates that changed since the last step."""
        for index, group in enumerate(self._groups):
            if group["lr"] != self._seen[index]:
                self._seen[index] = group["lr"]
                self._rates[index].fill_(group["lr"])

    @contextlib.contextmanager
    def traceable(self) -> Iterator[None]:
        """Within the block an optimizer's step reads nothing on the host."""
        plain = {"foreach": True, "fused": False, "capturable": True}  # the variant whose rate may be a tensor
        before = [{key: group[key] for key in ("lr", *plain) if key in group} for group in self._groups]
        flag = torch.compiler._is_compiling_flag
        try:
            for group, rate in zip(self._groups, self._rates, strict=True):
                group.update({"lr": rate} | {key: value for key, value in plain.items() if key in group})
            torch.compiler._is_compiling_flag = True
            yield
        finally:
            torch.compiler._is_compiling_flag = flag
            for group, values in zip(self._groups, before, strict=True):
                group.update(values)


def check_compile(compile: Any) -> None:
    """Raises an error unless the argument is one of those that a fit or an evaluation takes."""
    if not (compile is True or compile is False or compile == "auto"):
        raise ArgumentError(f"compile is {compile!r}; it must be 'auto', True or False")


def numbers_of(*programs: Any) -> tuple[Any, ...]:
    """The Python numbers, words and switches that programs hold directly, which tracing would freeze.

    Args:
        *programs: models, guides and objectives: attributes of objects, what functions close over and global names
            that they use.
    """
    found: list[Any] = []
    for program in programs:
        held = list(getattr(program, "__dict__", {}).values())
        if inspect.isfunction(program):
            held += [cell.cell_contents for cell in program.__closure__ or ()]
            held += [program.__globals__.get(name) for name in program.__code__.co_names]
        found += [value for value in held if isinstance(value, _PLAIN)]
    return tuple(found)


def buffers_of(*programs: Program) -> list[Tensor]:
    """The buffers of model and guide."""
    return [buffer for program in programs for module in modules_of(program) for buffer in module.buffers()]


def objective_state(objective: Any) -> list[Tensor]:
    """The tensors that an objective keeps from step to step."""
    return [objective.step] if isinstance(objective, Objective) else []


class Graphs:
    """Compiled graphs of one step, by what they were compiled for; none any more once one could not be compiled.

    Args:
        what: the step, as a reader would say it, for the warning.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.failed = False
        self._graphs: dict[Any, Compiled] = {}

    def __getitem__(self, key: Any) -> Compiled | None:
        return self._graphs.get(key)

    def add(
        self, key: Any, function: Function, args: Sequence[Tensor], state: Callable[[], Sequence[Tensor]]
    ) -> Compiled | None:
        """Compiles a function; ``None``, after a warning, where that cannot be done.

        Args:
            key: under which the graph will be found.
            function: from tensors to results and gradients.
            args: tensors of the shapes that it is compiled for.
            state: gives the tensors that the function updates.

        Raises:
            CompilationError: the compiled function gives other numbers than the eager one.
        """
        start = time.perf_counter()
        try:
            if len(self._graphs) == _MOST_GRAPHS:
                raise CompilationError(
                    f"it came in more than {_MOST_GRAPHS} variants. Hold Python numbers that change in tensors, and"
                    " give arguments of a few shapes"
                )
            graph = compile_function(function, args, state())
        except CompilationError as error:
            if error.wrong:
                raise
            self.failed = True
            warnings.warn(f"{self.what} runs eagerly, it cannot be compiled: {error}", stacklevel=4)
            return None
        shapes = ", ".join(str(tuple(arg.shape)) for arg in args)
        logger.info("compiled %s for shapes %s in %.1f s", self.what, shapes, time.perf_counter() - start)
        self._graphs[key] = graph
        return graph


@dataclass
class CompiledStep(EagerStep):
    """An :class:`EagerStep` that compiles itself, once for each shape of minibatch.

    The first step is eager, so that the optimizer's state exists. A step that cannot be compiled says why, once, and
    stays eager. An update with a loss or gradient that is not finite is skipped, and so are all after it, until
    :meth:`raise_if_bad` is called.

    Args:
        mode: ``True``, or ``"auto"`` to compile a shape only when the steps that remain pay for it.
        steps: number of steps to come, from which ``"auto"`` decides.
    """

    mode: Literal["auto", True] = True
    steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.graphs = Graphs("the step of this fit")
        self.validation = Graphs("the validation of this fit")
        self.validates_compiled = False
        self._validation_seconds, self._validation_size = 0.0, 0
        self.chosen: list[Key] = []  # shapes that are compiled, now or as soon as they come
        self._learning: Learning | None = None
        self._tracing = False
        self._times: dict[Key, list[float]] = {}
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Looks for Python numbers that a callback changed: a graph holds those it was compiled with."""
        self._numbers = numbers_of(self.model, self.guide, self.objective)

    def __call__(self, batch: tuple[Tensor, ...]) -> None:
        """One update, eager or compiled."""
        key = tuple([(part.shape, part.dtype) for part in batch])
        graph = self.graphs[key, self._numbers] or self._compiled(key, batch)
        if graph is None:
            start = time.perf_counter()
            super().__call__(batch)
            self._times.setdefault(key, []).append(time.perf_counter() - start)
            return
        assert self._learning is not None
        self._learning.follow()
        graph(*batch)
        self.calls += 1
        self.schedule.step()

    @torch.no_grad()
    def evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The bound per data point on a minibatch; compiled for the shape that comes first, where that pays."""
        key = (tuple([part.shape for part in batch]), self._numbers)
        graph = self.validation[key]
        if graph is None and self._validation_is_worth(batch):
            graph = self.validation.add(key, lambda *parts: ([EagerStep.evaluate(self, parts)], []), batch, lambda: ())
        if graph is not None:
            return graph(*batch)[0][0].clone()
        start = time.perf_counter()
        bound = super().evaluate(batch)
        self._validation_seconds += time.perf_counter() - start
        return bound

    def _validation_is_worth(self, batch: tuple[Tensor, ...]) -> bool:
        """Whether validation is to be compiled now: once it has cost as much time as compiling will."""
        if self.validation.failed or not self.calls:  # the first one is validated
            return False
        if not self.validates_compiled:
            self.validates_compiled = self.mode is True or (
                bool(self.chosen) and self._validation_seconds > _VALIDATION_SECONDS
            )
        self._validation_size = max(self._validation_size, len(batch[0]))
        return self.validates_compiled and len(batch[0]) == self._validation_size

    def compiled_parts(self) -> dict[str, Any]:
        shapes = [[[list(shape), str(dtype).removeprefix("torch.")] for shape, dtype in key] for key in self.chosen]
        return {"step": shapes, "validation": self.validates_compiled}

    def compile_parts(self, parts: dict[str, Any]) -> None:
        named = [[(torch.Size(shape), getattr(torch, name)) for shape, name in key] for key in parts.get("step", [])]
        self.chosen = [tuple(key) for key in named]
        self.validates_compiled = parts.get("validation", False)

    def apply(self, bad: Tensor, batch: tuple[Tensor, ...], loss: Tensor) -> None:
        """The optimizer's update; in a graph, everything it changed is put back where an update was bad."""
        if not self._tracing:
            return super().apply(bad, batch, loss)
        assert self._learning is not None
        self.bad |= bad
        changed = [*self.parameters.values(), *self._learning.tensors()]
        before = [tensor.detach().clone() for tensor in changed]
        with self._learning.traceable():
            self.optimizer.step()
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(torch.where(self.bad, value, tensor))
        return None

    def _compiled(self, key: Key, batch: tuple[Tensor, ...]) -> Compiled | None:
        """The graph for a shape, if it is to have one now."""
        wanted = key in self.chosen or self.mode is True or self._worth(key)
        if self.graphs.failed or not self.optimizer.state or not wanted:
            return None
        if key not in self.chosen:
            self.chosen.append(key)
        graph = self.graphs.add((key, self._numbers), self._function, batch, self._state)
        self.optimizer.zero_grad(set_to_none=True)
        return graph

    def _function(self, *batch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The step as it is traced."""
        self._tracing, self.foreach = True, False
        try:
            gradients = self.update(batch)
            return [self.sums], gradients
        finally:
            self._tracing, self.foreach = False, None

    def _state(self) -> list[Tensor]:
        """Every tensor that a step updates."""
        self._learning = self._learning or Learning([self.optimizer])
        return [
            *self.parameters.values(),
            *self._learning.tensors(),
            *buffers_of(self.model, self.guide),
            *objective_state(self.objective),
            self.bad,
            self.updates,
            self.sums,
        ]

    def _worth(self, key: Key) -> bool:
        """Whether the steps that remain with this shape would take long enough eagerly."""
        times = self._times.get(key, [])
        if len(times) != _WARM_STEPS:  # it decides once
            return False
        share = len(times) / max(1, sum(len(each) for each in self._times.values()))
        seconds = sorted(times)[len(times) // 2] * share * (self.steps - self.calls)
        return seconds > _WORTH_SECONDS
