"""A function of tensors, traced through Pyro's handlers to one ATen graph and compiled by Inductor.

Plain ``torch.compile`` reads Python bytecode and breaks at Pyro's handlers. Here the function is run, and what it does
to tensors is recorded (``make_fx``): forward pass, gradients and the optimizer's update become one graph, in which the
handlers have left no trace.
"""

from __future__ import annotations

import contextlib
import linecache
import logging
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pyro
import torch
from pyro.infer.util import torch_item
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pyrovae.errors import CompilationError
from pyrovae.training.native import native
from pyrovae.training.passes import drop_known_comparisons, use_library

__all__ = ["Compiled", "Function", "compile_function"]

logger = logging.getLogger(__name__)

Function = Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]]
"""From arguments to results and gradients; it may update tensors in place."""

_OPTIONS: dict[str, Any] = {
    "fallback_random": True,  # torch's own random kernels, in the order of the eager run, so that both agree
    "size_asserts": False,  # shapes are those that the graph was compiled for
    "alignment_asserts": False,
    "cpp.min_chunk_size": 4096,  # numbers for which a thread is started; for fewer that costs more than it saves
    "cpp.vec_isa_ok": True,  # does not compile a trial for each instruction set that the processor has
    "cpp_wrapper_build_separate": True,  # compiles kernels apart from what calls them, which is much quicker
    "cpp_cache_precompile_headers": False,  # precompiling takes longer than a graph
}
_CHECKED_CALLS = frozenset(10**power for power in range(1, 10))


class Compiled:
    """A compiled graph with the tensors that it reads and updates in place.

    Args:
        run: Inductor's callable, which gives results and gradients in one sequence.
        state: tensors that are the same at every call, sharing memory with what the function works on.
        results: number of results.
        check: traces the function anew and raises an error where it has changed.
    """

    def __init__(
        self, run: Callable[..., Any], state: Sequence[Tensor], results: int, check: Callable[[], None]
    ) -> None:
        self._run = run
        self._state = [tensor.detach() for tensor in state]
        self._results = results
        self._check = check
        self._calls = 0
        self._repeat: Callable[[int], None] | None = None

    @torch.no_grad()
    def __call__(self, *args: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Runs the graph on new arguments; updates the state in place; gives results and gradients.

        At the 10th, 100th, … call the function is traced again, for Python numbers that changed since.
        """
        self._count(1)
        given = self._run(*args, *self._state)
        return given[: self._results], given[self._results :]

    @torch.no_grad()
    def repeat(self, times: int) -> None:
        """Runs the graph a number of times on the arguments that it was compiled for, in one call.

        What it gives is dropped, so that the function must leave in its state what it is to say.
        """
        assert self._repeat is not None, "compile_function(..., repeats=True)"
        self._count(times)
        self._repeat(times)

    def _count(self, calls: int) -> None:
        before, self._calls = self._calls, self._calls + calls
        if any(before < number <= self._calls for number in _CHECKED_CALLS):
            self._check()

    @torch.no_grad()
    def capture(self, args: Sequence[Tensor], repeats: bool) -> None:
        """Records the kernels of one call in a CUDA graph, which later calls replay: the host launches once a call.

        Arguments are then copied into those of the recording, and results are valid until the next call.
        """
        static, state, run = list(args) if repeats else [arg.clone() for arg in args], self._state, self._run
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            given = run(*static, *state)

        def replay(*inputs: Tensor) -> Any:
            for place, value in zip(static, inputs, strict=False):  # the state follows, in its place already
                if place is not value:
                    place.copy_(value)
            recorded.replay()
            return given

        self._run = replay

    @torch.no_grad()
    def repeat_with(self, args: Sequence[Tensor], loop: Callable[[int], None] | None, keep: _Snapshot) -> None:
        """Lets the graph be repeated: by a loop in C++, once it is seen to do what a call does, else one in Python."""

        def calls(times: int) -> None:
            for _ in range(times):
                self._run(*args, *self._state)

        self._repeat = calls
        if loop is None:
            return
        states = []
        for run in (calls, loop):
            keep.restore()
            run(1)
            states.append([tensor.detach().clone() for tensor in keep.tensors])
        keep.restore()
        if all(torch.allclose(one, two, equal_nan=True) for one, two in zip(*states, strict=True)):
            self._repeat = loop
        else:  # pragma: no cover - Inductor leaves updates to its Python wrapper only where inputs share memory
            logger.info("steps are called from Python, one by one: the graph alone does not update its state")


def compile_function(
    function: Function, args: Sequence[Tensor], state: Sequence[Tensor], repeats: bool = False
) -> Compiled:
    """Traces a function and compiles it.

    The function is run four times: to trace it, to trace it again and see that nothing but tensors changes from call to
    call, to know what it should give, and compiled. State and random state are then as they were.

    Args:
        function: from tensors to results and gradients; it may update ``state`` in place.
        args: tensors of the shapes that it will be called with.
        state: every tensor that it updates. Other tensors that it reads become constants of the graph, by reference.
        repeats: whether the graph will be repeated on these very arguments.

    Returns:
        A :class:`Compiled`, called with new arguments.

    Raises:
        CompilationError: control flow that depends on data, a Python number that changes from call to call, an
            operator without a compiled form, no C++ compiler, or results that differ from the eager ones.

    Example:
        >>> total = torch.zeros(2)
        >>> add = compile_function(lambda x: ([total.add_(x).sum()], []), [torch.ones(2)], [total])
        >>> results, gradients = add(torch.ones(2))
        >>> results[0], total
        (tensor(2.), tensor([1., 1.]))
    """
    own = list({id(tensor): tensor for tensor in state}.values())
    device = [*args, *own][0].device
    keep = _Snapshot(own, device)
    try:
        graph, lifted, results = _trace(function, args, own)
        keep.restore()
        again, lifted_again, _ = _trace(function, args, own)
    except CompilationError:
        raise
    except Exception as error:  # anything may come out of a user's model
        raise CompilationError(f"it cannot be traced: {_first_line(error)}{_where(error)}") from error
    finally:
        keep.restore()
    signature, gradients = _Signature.of(graph, lifted), torch.is_grad_enabled()

    def check() -> None:
        with torch.set_grad_enabled(gradients):
            _check_again(function, args, own, signature)

    signature.require(_Signature.of(again, lifted_again))
    inputs = [*args, *own, *lifted]
    try:
        run, loop = _inductor(graph, inputs, device, repeats)
    except Exception as error:  # Inductor's failures have no common base
        raise CompilationError(f"Inductor cannot compile it: {_first_line(error)}") from error
    compiled = Compiled(run, [*own, *lifted], results, check)
    _compare(function, compiled, args, own, keep)
    if device.type == "cuda":
        compiled.capture(args, repeats)
        keep.restore()
    if repeats:
        compiled.repeat_with(args, loop, keep)
    return compiled


# ---------------------------------------------------------------------------------------------------------
# Tracing


def _trace(
    function: Function, args: Sequence[Tensor], state: Sequence[Tensor]
) -> tuple[GraphModule, list[Tensor], int]:
    """The graph of one run, whose inputs are args, state and the constants it met; these; how many results it has."""
    copies = [arg.detach().view_as(arg) for arg in args]  # an argument may also be a tensor that the model holds
    counts = []

    def flat(*_: Tensor) -> list[Tensor]:
        results, gradients = function(*copies)
        counts.append(len(results))
        return [*results, *gradients]

    with pyro.validation_enabled(False), _no_host_values(), _one_fake_mode(allow_fallback_kernels=True):
        graph = make_fx(flat)(*copies, *state)
    lifted: list[Tensor] = []
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and isinstance(getattr(graph, str(node.target), None), Tensor):
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"constant_{len(lifted)}")
            last.meta = dict(node.meta)
            lifted.append(getattr(graph, str(node.target)))
            node.replace_all_uses_with(last)
            graph.graph.erase_node(node)
    for node in reversed(list(graph.graph.nodes)):  # the optimizer's marks for the profiler
        if "profiler" in str(node.target):
            graph.graph.erase_node(node)
    graph.graph.set_codegen(torch.fx.graph.CodeGen())
    graph.recompile()
    return graph, lifted, counts[0]


def _check_again(function: Function, args: Sequence[Tensor], state: Sequence[Tensor], before: _Signature) -> None:
    """Raises an error when the function, run now, is no longer what was compiled."""
    keep = _Snapshot(state, [*args, *state][0].device)
    try:
        graph, lifted, _ = _trace(function, args, state)
    finally:
        keep.restore()
    try:
        before.require(_Signature.of(graph, lifted))
    except CompilationError as error:
        said = f"it changed after it was compiled, and the compiled one went on as it had been: {error}"
        raise CompilationError(said, wrong=True) from None


@contextlib.contextmanager
def _no_host_values() -> Iterator[None]:
    """Within the block, Pyro's losses leave on the device what they would otherwise read for their return value."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("pyro.") and module is not None]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("pyro.util.torch_isnan", return_value=False))
        for module in modules:
            if isinstance(module, ModuleType) and vars(module).get("torch_item") is torch_item:
                stack.enter_context(mock.patch.object(module, "torch_item", _detached))
        yield


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class _Signature:
    """What a trace recorded, to compare with another one."""

    calls: list[tuple[str, str]]
    constants: list[Tensor]

    @classmethod
    def of(cls, graph: GraphModule, constants: list[Tensor]) -> _Signature:
        nodes = graph.graph.nodes
        return cls([(f"{node.op} {node.target}", f"{node.args} {node.kwargs}") for node in nodes], constants)

    def require(self, other: _Signature) -> None:
        """Raises an error unless both runs left the same graph: tracing would freeze what changes between them."""
        for (ours, arguments), (theirs, changed) in zip(self.calls, other.calls, strict=False):
            if ours != theirs:
                raise CompilationError(f"two steps took different paths: one has {ours}, the other {theirs}")
            if arguments != changed:
                raise CompilationError(
                    f"a Python number changes from step to step: {ours} of {arguments} became {changed}. Hold it in a"
                    " tensor (a buffer) that is updated in place"
                )
        if len(self.calls) != len(other.calls):
            raise CompilationError("two steps took different paths (one is longer)")
        for one, two in zip(self.constants, other.constants, strict=True):
            if one is not two and not (one.shape == two.shape and torch.equal(one, two)):
                raise CompilationError(
                    "a tensor is made anew from Python numbers that change from step to step; hold it in a buffer that"
                    " is updated in place"
                )


# ---------------------------------------------------------------------------------------------------------
# Compiling


@torch.no_grad()
def _inductor(
    graph: GraphModule, inputs: list[Tensor], device: torch.device, repeats: bool
) -> tuple[Callable[..., Any], Callable[[int], None] | None]:
    """Inductor's callable, and what repeats its first call, where that is asked for and there is the library for it."""
    with _quiet():
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        known = config.get_config_copy()
        with config.patch({name: value for name, value in _OPTIONS.items() if name in known}):
            drop_known_comparisons(graph)
            library = native() if device.type == "cpu" else None
            if library is not None:
                use_library(graph, library)
            for node in graph.graph.nodes:
                node.meta.clear()  # fake tensors of the trace, which Inductor would take for its own
            recording = library.recording() if library is not None and repeats else contextlib.nullcontext()
            patches = library.options if library is not None else None
            # With it, Inductor's cache knows that all shapes of the graph are fixed.
            with recording as loop, _one_fake_mode(shape_env=ShapeEnv(), static_shapes=True):
                run: Any = compile_fx(
                    graph, [tensor.detach() for tensor in inputs], config_patches=patches, ignore_shape_env=True
                )
    return run, loop


@contextlib.contextmanager
def _one_fake_mode(**options: Any) -> Iterator[None]:
    """Within the block, torch describes values by tensors of one fake mode, and does not make one for each of them."""
    with tracing(TracingContext(FakeTensorMode(**options))):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what Inductor says of its own deprecated calls, of operators that are called by their names, and of a
    machine without a GPU."""
    chatty = [logging.getLogger(name) for name in ("torch.utils.cpp_extension", "torch._inductor.ir")]
    levels = [each.level for each in chatty]
    for each in chatty:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        for each, level in zip(chatty, levels, strict=True):
            each.setLevel(level)


# ---------------------------------------------------------------------------------------------------------
# Checking


class _Snapshot:
    """Values of some tensors and the random state, to go back to."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.tensors, self.device = tensors, device
        self.values = [tensor.detach().clone() for tensor in tensors]
        self.rng = torch.get_rng_state()
        self.cuda_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in zip(self.tensors, self.values, strict=True):
            tensor.copy_(value)
        torch.set_rng_state(self.rng)
        if self.cuda_rng is not None:
            torch.cuda.set_rng_state(self.cuda_rng, self.device)


@dataclass(frozen=True)
class _Outcome:
    """What one run gave, and the state after it."""

    results: list[Tensor]
    gradients: list[Tensor]
    state: list[Tensor]


def _compare(
    function: Function,
    compiled: Compiled,
    args: Sequence[Tensor],
    state: Sequence[Tensor],
    keep: _Snapshot,
    attempts: int = 3,
) -> None:
    """Eager and compiled runs give the same results, gradients and updates from the same state.

    A discrete draw may fall on the other side of its threshold by rounding alone, so a difference is looked at again at
    other random numbers; a real one stays.
    """
    said = ""
    for attempt in range(attempts):
        outcomes = []
        for run in (function, compiled):
            keep.restore()
            torch.manual_seed(torch.initial_seed() + attempt)
            with pyro.validation_enabled(False), _no_host_values():
                given = run(*args)
            outcomes.append(_Outcome(*([t.detach().double() for t in part] for part in (*given, state))))
        keep.restore()
        said = _difference(outcomes[0], outcomes[1], [value.double() for value in keep.values])
        if not said:
            return
    raise CompilationError(f"the compiled step differs from the eager one at the same draws: {said}", wrong=True)


def _difference(eager: _Outcome, compiled: _Outcome, before: list[Tensor]) -> str:
    """What differs by more than rounding, or nothing.

    An adaptive optimizer turns a gradient that is zero but for rounding into a full step of either sign, so gradients
    are compared by their norm over all parameters, and of the updates a fifth may differ.
    """
    for index, (one, two) in enumerate(zip(eager.results, compiled.results, strict=True)):
        if not torch.allclose(one, two, rtol=1e-3, atol=1e-4, equal_nan=True):
            return f"result {index} is {float(one.mean()):.8g} eagerly and {float(two.mean()):.8g} compiled"
    size = sum(float(one.square().sum()) for one in eager.gradients)
    pairs = zip(eager.gradients, compiled.gradients, strict=True)
    off = sum(float((one - two).square().sum()) for one, two in pairs)
    if off > 1e-4 * size + 1e-12:  # so a relative error above 1 %
        return f"the gradient is off by {(off / size) ** 0.5 if size else math.inf:.2g} of its norm"
    elements, differing = 0, 0
    for one, two, start in zip(eager.state, compiled.state, before, strict=True):
        tolerance = 0.02 * (one - start).abs() + 1e-6 * one.abs().max() if one.numel() else one
        elements += one.numel()
        differing += int(((one - two).abs() > tolerance).sum())
    if differing > 0.2 * elements:
        return f"{differing} of {elements} numbers of parameters and optimizer change otherwise"
    return ""


# ---------------------------------------------------------------------------------------------------------
# Saying what went wrong


def _first_line(error: BaseException) -> str:
    if "_local_scalar_dense" in str(error):
        return "a tensor's value is read in Python (a branch on it, .item(), float() or bool())"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _where(error: BaseException) -> str:
    """The innermost line of the user's code, else of Pyro's; neither torch's nor ours."""
    torch_code, pyro_code, ours = (Path(path).parent for path in (torch.__file__, pyro.__file__, Path(__file__).parent))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_absolute()]
    frames = [frame for frame in frames if not {torch_code, ours} & set(Path(frame.filename).parents)]
    users = [frame for frame in frames if pyro_code not in Path(frame.filename).parents]
    for frame in (users or frames)[-1:]:
        line = linecache.getline(frame.filename, frame.lineno or 0).strip()
        return f" (at {Path(frame.filename).name}:{frame.lineno}: {line})"
    return ""
