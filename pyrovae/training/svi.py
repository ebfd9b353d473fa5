"""``pyrovae.SVI``: Pyro's SVI with a compiled step."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.elbo import ELBO as PyroELBO
from pyro.infer.util import torch_item
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.util import warn_if_nan
from torch import Tensor
from torch.utils import _pytree as pytree

from pyrovae.errors import ArgumentError, CompilationError
from pyrovae.progress import Pace
from pyrovae.structure import Program
from pyrovae.training.compiled import Graphs, Learning, numbers_of, objective_state
from pyrovae.training.data import key_of
from pyrovae.training.graph import Compiled, Function
from pyrovae.training.programs import buffers_of

__all__ = ["SVI"]

_LONGEST_CALL = 1000  # steps


class SVI(pyro.infer.SVI):
    r"""``pyro.infer.SVI`` with a compiled step: a Pyro notebook changes its import and nothing else.

    The first step is Pyro's own, eager and validated. The second traces loss, gradients and the optimizer's updates to
    one graph for each shape of arguments, compiles it and compares it with the eager step at the same random numbers;
    that takes some seconds. Every later step runs the graph. It draws the same random numbers as Pyro's step and gives
    the same losses up to rounding.

    :meth:`steps` takes many steps on the same arguments in one call, without Python between them.

    Model and guide must have a static structure: tensors may change from step to step, Python numbers and branches
    that depend on values may not. A number among the arguments, or one that model, guide or loss hold directly, gets a
    graph for each value, up to eight; the step is traced again at the 10th, 100th, … call, and a number that changed
    elsewhere is then an error. Where a step is not static, or an operator has no compiled form, a warning says why and
    the steps stay eager. (Tracing runs model and guide some more times, which one that counts its calls will notice.)

    Args:
        model: Pyro model.
        guide: Pyro guide.
        optim: a ``pyro.optim`` optimizer around one of ``torch.optim``; learning rates may change from step to step.
        loss: an objective of pyrovae or a loss of ``pyro.infer``, or a function of model, guide and arguments.
        loss_and_grads: as for ``pyro.infer.SVI``.
        compile: ``False`` for Pyro's own step.
        **kwargs: as for ``pyro.infer.SVI``.

    Raises:
        ArgumentError: ``compile`` is neither ``True`` nor ``False``.
        CompilationError: at the second step, compiled results that differ from the eager ones; later, a Python number
            that changed after it was compiled.

    References:
        Bingham et al. 2019 (Pyro), https://jmlr.org/papers/v20/18-403.html; Ansel et al. 2024 (Inductor),
        https://doi.org/10.1145/3620665.3640366.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=pyro.infer.Trace_ELBO(), compile=False)
        >>> svi.step(torch.ones(5)) > 0
        True
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: PyroOptim,
        loss: PyroELBO | Callable[..., Any],
        loss_and_grads: Callable[..., Any] | None = None,
        *,
        compile: bool = True,
        **kwargs: Any,
    ) -> None:
        if not isinstance(compile, bool):
            raise ArgumentError(f"compile is {compile!r}; it must be True or False")
        super().__init__(model, guide, optim, loss, loss_and_grads, **kwargs)
        self.compile = compile
        self._objective = loss
        self._graphs = Graphs("this SVI")
        self._records: dict[Any, _Record] = {}
        self._learning: Learning | None = None
        self._parameters: dict[str, Tensor] = {}
        self._stored: dict[str, Tensor] = {}
        self._losses = 1  # that a step gives
        self._pace = Pace()

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One gradient step.

        Args:
            *args: passed to model and guide.
            **kwargs: passed to both.

        Returns:
            The loss before the step, a float (what the loss gives, where that is a tuple).
        """
        if not self.compile:
            return self._eager(*args, **kwargs)
        if self._learning is None or not self._current():
            return self._first(args, kwargs)
        call = _Call(args, kwargs)
        graph = self._graphs.get((call.key, self._numbers()), self._function(call), call.tensors, self._state)
        if graph is None:
            return self._eager(*args, **kwargs)
        self._learning.follow()
        losses, _ = graph(*call.tensors)
        loss = tuple(map(torch_item, losses))
        for value in loss:
            warn_if_nan(value, "loss")
        return loss[0] if len(loss) == 1 else loss

    def steps(self, number: int, *args: Any, **kwargs: Any) -> Tensor:
        """Many gradient steps on the same arguments: those of :meth:`step`, but for a call of it each time.

        For full-batch data, and for models that draw their minibatches themselves (``subsample_size`` of a plate).

        Args:
            number: of steps.
            *args: passed to model and guide.
            **kwargs: passed to both.

        Returns:
            The loss before each step, a tensor of length ``number`` (with a row for each, where the loss is a tuple).

        Raises:
            ArgumentError: ``number`` is below 1.

        Example:
            >>> import pyro.distributions as dist
            >>> def model(x):
            ...     mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
            >>> guide = pyro.infer.autoguide.AutoNormal(model)
            >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO(), compile=False)
            >>> losses = svi.steps(100, torch.ones(5))
            >>> losses.shape, bool(losses[-1] < losses[0])
            (torch.Size([100]), True)
        """
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ArgumentError(f"number is {number!r}; it must be a whole number of steps, at least 1")
        call, found, taken = _Call(args, kwargs), list[Tensor](), 0
        while taken < number:
            record = self._record(call)
            if record is None:
                steps = 1
                found.append(torch.as_tensor(self.step(*args, **kwargs), dtype=torch.float64).unsqueeze(0))
            else:
                assert self._learning is not None
                self._learning.follow()
                steps = min(number - taken, self._pace.steps, _LONGEST_CALL)
                start = time.perf_counter()
                found.append(record.take(call.tensors, steps))
                self._pace.took(steps, time.perf_counter() - start)
            taken += steps
        losses = torch.cat([part.cpu() for part in found])
        warn_if_nan(losses, "loss")
        return losses

    def _record(self, call: _Call) -> _Record | None:
        """The graph that writes down its losses, for such arguments; ``None`` where the next step is an eager one."""
        if not self.compile or self._graphs.failed or self._learning is None or not self._current():
            return None
        key = ("steps", call.key, self._numbers())
        if key not in self._records:
            made = _Record(call.tensors, self._losses, next(iter(self._parameters.values())).device)
            function = made.around(self._function(call))
            graph = self._graphs.get(key, function, made.args, lambda: [*self._state(), made.losses, made.place], True)
            if graph is None:
                return None
            made.graph = graph
            self._records[key] = made
        return self._records[key]

    def _eager(self, *args: Any, **kwargs: Any) -> Any:
        """Pyro's step."""
        with _Leaves():
            return super().step(*args, **kwargs)

    def _numbers(self) -> tuple[Any, ...]:
        return numbers_of(self.model, self.guide, self._objective)

    def _first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pyro's step, which makes the parameters and the optimizers' state."""
        self._graphs, self._records = Graphs("this SVI"), {}
        with poutine.trace(param_only=True) as seen:
            loss = self._eager(*args, **kwargs)
        self._losses = len(loss) if isinstance(loss, tuple) else 1
        self._parameters = {name: site["value"].unconstrained() for name, site in seen.trace.nodes.items()}
        store = pyro.get_param_store()._params
        self._stored = {name: leaf for name, leaf in self._parameters.items() if store.get(name) is leaf}
        owned = [self.optim.optim_objs[leaf] for leaf in self._parameters.values() if leaf in self.optim.optim_objs]
        try:
            self._learning = Learning(getattr(each, "optimizer", each) for each in owned)  # a scheduler's optimizer
        except CompilationError as error:
            self.compile = False
            warnings.warn(f"this SVI runs eagerly, it cannot be compiled: {error}", stacklevel=3)
        return loss

    def _current(self) -> bool:
        """Whether the parameter store still holds the tensors of the graphs (``clear_param_store`` makes new ones)."""
        store = pyro.get_param_store()._params
        return all(store.get(name) is leaf for name, leaf in self._stored.items())

    def _function(self, call: _Call) -> Function:
        """The step as it is traced: a function of the tensors among the arguments."""

        def function(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            assert self._learning is not None
            args, kwargs = call.filled(tensors)
            parameters = list(self._parameters.values())
            _drop_gradients(parameters)
            try:
                loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
                moved = [p for p in parameters if p.grad is not None]
                gradients = [p.grad for p in moved if p.grad is not None]
                with self._learning.traceable():
                    self.optim(moved)
            finally:
                _drop_gradients(parameters)
            losses = loss if isinstance(loss, tuple) else (loss,)
            return [torch.as_tensor(value).detach() for value in losses], gradients

        return function

    def _state(self) -> list[Tensor]:
        """Every tensor that a step updates."""
        assert self._learning is not None
        return [
            *self._parameters.values(),
            *self._learning.tensors(),
            *buffers_of(self.model, self.guide),
            *objective_state(self._objective),
        ]


class _Leaves(Messenger):
    """Gives parameters that live in modules the attribute by which Pyro's SVI finds the leaf to optimize.

    Under ``module_local_params`` Pyro 1.9 sets it on a ``PyroParam`` and forgets it on an ``nn.Parameter``.
    """

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        if not hasattr(value, "unconstrained"):
            value.unconstrained = weakref.ref(value)


class _Call:
    """Arguments of a step: the tensors among them, and what else a graph depends on."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        static = tuple((index, repr(leaf)) for index, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
        plain = not static and len(leaves) == len(args)
        self.key = (len(leaves) if plain else str(self._spec), static, key_of(self.tensors))

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """Arguments and keyword arguments with other tensors."""
        leaves = list(self._fixed)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self._spec)


class _Record:
    """Arguments that stay in their place, and the losses of the steps on them.

    Args:
        tensors: among the arguments of the step.
        losses: number of losses that a step gives.
        device: where the graph runs.
    """

    graph: Compiled

    def __init__(self, tensors: Sequence[Tensor], losses: int, device: torch.device) -> None:
        self.args = [tensor.detach().clone() for tensor in tensors]
        self.losses = torch.zeros(_LONGEST_CALL, losses, dtype=torch.float64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)

    def around(self, function: Function) -> Function:
        """The function, which then writes its losses down in the next row."""

        def recorded(*tensors: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            losses, gradients = function(*tensors)
            row = torch.stack([loss.to(self.losses) for loss in losses])
            self.losses.index_copy_(0, self.place, row.unsqueeze(0))
            self.place += 1
            return losses, gradients

        return recorded

    def take(self, tensors: Sequence[Tensor], steps: int) -> Tensor:
        """Losses of some steps on these tensors."""
        for place, tensor in zip(self.args, tensors, strict=True):
            place.copy_(tensor)
        self.place.zero_()
        self.graph.repeat(steps)
        losses = self.losses[:steps].clone()
        return losses.squeeze(1) if losses.shape[1] == 1 else losses


def _drop_gradients(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
