"""One gradient step, compiled: the eager step's own code as one graph for each shape of minibatch."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyrovae.errors import ArgumentError, CompilationError
from pyrovae.objectives import Objective
from pyrovae.training.data import Batches, Key, Resident, key_of
from pyrovae.training.graph import Compiled, Function, compile_function
from pyrovae.training.optimizers import Constant
from pyrovae.training.programs import buffers_of
from pyrovae.training.step import EagerStep

__all__ = ["CompiledStep", "Graphs", "Learning", "check_compile", "numbers_of", "objective_state"]

logger = logging.getLogger(__name__)

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
        self._seen = _rates(self._groups)
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

    def ahead(self, schedule: LRScheduler, steps: int) -> list[list[float]]:
        """The rates of the next steps, through which it takes the schedule: one for each, or one for all."""
        rows = [_rates(self._groups)]
        if isinstance(schedule, Constant):
            schedule.step(steps=steps)
        else:
            for _ in range(steps):
                schedule.step()
                rows.append(_rates(self._groups))
            rows.pop()
        self._seen = rows[-1]
        return rows

    def take(self, rates: Tensor) -> None:
        """Takes over the rates of one step; may be traced."""
        for rate, value in zip(self._rates, rates, strict=True):
            rate.copy_(value)

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


def _rates(groups: Iterable[dict[str, Any]]) -> list[float]:
    """The learning rate of each group of an optimizer."""
    return [float(group["lr"]) for group in groups]


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
        """The graph of a key, if it has been compiled."""
        return self._graphs.get(key)

    def get(
        self,
        key: Any,
        function: Function,
        args: Sequence[Tensor],
        state: Callable[[], Sequence[Tensor]],
        repeats: bool = False,
        shapes: Sequence[torch.Size] | None = None,
    ) -> Compiled | None:
        """The graph of a key, compiled when it is first asked for; ``None``, after a warning, where that cannot be.

        Args:
            key: under which the graph will be found.
            function: from tensors to results and gradients.
            args: tensors of the shapes that it is compiled for.
            state: gives the tensors that the function updates.
            repeats: whether the graph will be repeated on these arguments.
            shapes: for the log, where they are not those of the arguments.

        Raises:
            CompilationError: the compiled function gives other numbers than the eager one.
        """
        if key in self._graphs or self.failed:
            return self._graphs.get(key)
        start = time.perf_counter()
        try:
            if len(self._graphs) == _MOST_GRAPHS:
                raise CompilationError(
                    f"it came in more than {_MOST_GRAPHS} variants. Hold Python numbers that change in tensors, and"
                    " give arguments of a few shapes"
                )
            graph = compile_function(function, args, state(), repeats)
        except CompilationError as error:
            if error.wrong:
                raise
            self.failed = True
            warnings.warn(f"{self.what} runs eagerly, it cannot be compiled: {error}", stacklevel=4)
            return None
        said = ", ".join(str(tuple(shape)) for shape in shapes or [arg.shape for arg in args])
        logger.info("compiled %s for shapes %s in %.1f s", self.what, said, time.perf_counter() - start)
        self._graphs[key] = graph
        return graph


class _Feed:
    """The whole minibatches of an epoch for a graph that gathers them itself: their rows, learning rates, and the next.

    Args:
        batches: the data.
        rates: the learning rates, to begin with.
    """

    def __init__(self, batches: Resident, rates: list[float]) -> None:
        device = batches.tensors[0].device
        self.batches = batches
        self.rows = torch.zeros(batches.whole, batches.batch_size, dtype=torch.int64, device=device)
        self.rates = torch.tensor([rates] * batches.whole, dtype=torch.float64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.tensors = (self.rows, self.rates, *batches.tensors)
        self._epoch = -1
        self._constant: list[float] | None = rates  # of all places

    def go_to(self, epoch: int, place: int) -> None:
        """The next minibatch is that of an epoch and a place in it."""
        if epoch != self._epoch:
            self.rows.copy_(self.batches.order(epoch)[: self.rows.numel()].view_as(self.rows))
            self._epoch = epoch
        self.place.fill_(place)

    def set_rates(self, rates: list[list[float]], place: int) -> None:
        """The learning rates of a place and those after it; one row is that of all."""
        if len(rates) > 1:
            self.rates[place : place + len(rates)] = torch.tensor(rates, dtype=self.rates.dtype)
            self._constant = None
        elif rates[0] != self._constant:
            self.rates.copy_(torch.tensor(rates[0], dtype=self.rates.dtype))
            self._constant = rates[0]

    def next(self, rows: Tensor, rates: Tensor, *tensors: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The learning rates and the minibatch at this place; may be traced."""
        batch = self.batches.gather(rows.index_select(0, self.place).squeeze(0), tensors)
        taken = rates.index_select(0, self.place).squeeze(0)
        self.place += 1
        return taken, batch


@dataclass
class CompiledStep(EagerStep):
    """An :class:`EagerStep` that compiles itself, once for each shape of minibatch.

    The first step is eager, so that the optimizer's state exists. A step that cannot be compiled says why, once, and
    stays eager. An update with a loss or gradient that is not finite is skipped, and so are all after it; they change
    nothing, and :meth:`skipped` counts them.

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
        self._tracing = False
        self._times: dict[Key, list[float]] = {}
        self._feed: _Feed | None = None
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Looks for Python numbers that a callback changed: a graph holds those it was compiled with."""
        self._numbers = numbers_of(self.model, self.guide, self.objective)

    def __call__(self, batch: tuple[Tensor, ...]) -> None:
        """One update, eager or compiled."""
        key = key_of(batch)
        graph = self.graphs[key, self._numbers] or self._compiled(key, batch)
        if graph is None:
            start = time.perf_counter()
            super().__call__(batch)
            self._times.setdefault(key, []).append(time.perf_counter() - start)
            return
        self._learning.follow()
        graph(*batch)
        self.calls += 1
        self.schedule.step()

    def many(self, batches: Batches, epoch: int, done: int, limit: int) -> int:
        """Takes the next updates of an epoch, on minibatches that the graph gathers itself, in one call."""
        steps = min(limit, batches.whole - done) if isinstance(batches, Resident) else 0
        if steps < 1 or self.graphs.failed or not self._has_state():
            return 0
        assert isinstance(batches, Resident)
        key = batches.key
        if not self._is_wanted(key):
            return 0
        if self._feed is None or self._feed.batches is not batches:
            self._feed = _Feed(batches, _rates(self.optimizer.param_groups))
        feed = self._feed
        feed.go_to(epoch, done)
        shapes = [shape for shape, _ in key]
        graph = self.graphs.get((feed, self._numbers), self._next, feed.tensors, self._state, True, shapes)
        if graph is None:
            return 0
        feed.set_rates(self._learning.ahead(self.schedule, steps), done)
        graph.repeat(steps)
        self.calls += steps
        return steps

    @torch.no_grad()
    def evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The bound per data point on a minibatch; compiled for the shape that comes first, where that pays."""
        key = (tuple([part.shape for part in batch]), self._numbers)
        if self.validation[key] is not None or self._validation_is_worth(batch):
            graph = self.validation.get(key, lambda *parts: ([EagerStep.evaluate(self, parts)], []), batch, lambda: ())
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
        """The optimizer's update; in a graph, :meth:`_function` sees to the bad ones."""
        if not self._tracing:
            return super().apply(bad, batch, loss)
        self.bad |= bad
        with self._learning.traceable():
            self.optimizer.step()
        return None

    def _compiled(self, key: Key, batch: tuple[Tensor, ...]) -> Compiled | None:
        """The graph for a shape, if it is to have one now."""
        if self.graphs.failed or not self._has_state() or not self._is_wanted(key):
            return None
        return self.graphs.get((key, self._numbers), self._function, batch, self._state)

    @functools.cached_property
    def _learning(self) -> Learning:
        """The optimizer as a graph takes it; asked for when its state exists, and where an error lets a fit go on."""
        return Learning([self.optimizer])

    def _has_state(self) -> bool:
        """Whether the optimizer's state exists: after a step, or when a fit goes on that had compiled some."""
        return bool(self.calls or self.optimizer.state or self.chosen)

    def _is_wanted(self, key: Key) -> bool:
        """Whether a shape is to be compiled, now or before."""
        if key not in self.chosen and (self.mode is True or self._worth(key)):
            self.chosen.append(key)
        return key in self.chosen

    def _next(self, *tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The step on the next minibatch of the feed, as it is traced."""
        assert self._feed is not None
        rates, batch = self._feed.next(*tensors)
        self._learning.take(rates)
        return self._function(*batch)

    def _function(self, *batch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The step as it is traced; all that it changed is put back where an update was bad."""
        changing = self._changing()
        before = [tensor.detach().clone() for tensor in changing]
        self._tracing, self.foreach = True, False
        try:
            gradients = self.update(batch)
        finally:
            self._tracing, self.foreach = False, None
            self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for tensor, value in zip(changing, before, strict=True):
                tensor.copy_(torch.where(self.bad, value, tensor))
        return [self.sums], gradients

    def _changing(self) -> list[Tensor]:
        """What a good update changes."""
        buffers, kept = buffers_of(self.model, self.guide), objective_state(self.objective)
        return [*self.parameters.values(), *self._learning.tensors(), *buffers, *kept]

    def _state(self) -> list[Tensor]:
        """Every tensor that a step updates."""
        place = [self._feed.place] if self._feed is not None else []
        return [*self._changing(), self.bad, self.updates, self.sums, *place]

    def _worth(self, key: Key) -> bool:
        """Whether the steps that remain with this shape would take long enough eagerly."""
        times = self._times.get(key, [])
        if len(times) != _WARM_STEPS:  # it decides once
            return False
        share = len(times) / max(1, sum(len(each) for each in self._times.values()))
        seconds = sorted(times)[len(times) // 2] * share * (self.steps - self.calls)
        return seconds > _WORTH_SECONDS
