"""pyrovae, eager and compiled: the step that :func:`pyrovae.fit` runs."""

from __future__ import annotations

import time

import pyro
import torch
from torch import Tensor

import pyrovae
from benchmarks.speed_peers.programs import our_objective, programs
from benchmarks.speed_peers.pyro_svi import PyroSVI
from benchmarks.speed_peers.torch_data import batches, synchronize
from benchmarks.speed_peers.workloads import Workload
from pyrovae.structure import Program
from pyrovae.training.compiled import CompiledStep
from pyrovae.training.data import Resident
from pyrovae.training.optimizers import make_optimizer, make_schedule
from pyrovae.training.programs import local_params, named_parameters
from pyrovae.training.step import EagerStep

__all__ = ["FullBatch", "Ours", "compiled", "make_step"]


def compiled(workload: Workload, device: torch.device) -> FullBatch | Ours:
    """What a user of compiled steps would take."""
    return FullBatch(workload, device) if workload.minibatches == 1 else Ours(workload, device, compile=True)


class FullBatch(PyroSVI):
    """``pyrovae.SVI``, where every step is on the same data.

    Args:
        workload: what to fit.
        device: where.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__(workload, device, False, pyrovae.SVI, our_objective(workload).to(device))

    def take(self, steps: int) -> None:
        self.svi.steps(steps, *self.batches[0])


class Ours:
    """The step of :func:`pyrovae.fit`.

    Args:
        workload: what to fit.
        device: where.
        compile: whether the step is the compiled one.
    """

    def __init__(self, workload: Workload, device: torch.device, compile: bool) -> None:
        torch.manual_seed(0)
        self.workload, self.device = workload, device
        minibatches = batches(workload, device)
        tensors = tuple(torch.cat(parts) for parts in zip(*minibatches, strict=True))
        self.data = Resident(tensors, None, len(minibatches[0][0]), device, seed=None)
        self.programs = programs(workload, device)
        self.step = make_step(workload, *self.programs, minibatches[0], compile)
        self.place = 0  # of the next minibatch

    def run(self, steps: int) -> float:
        """Seconds that a number of steps takes."""
        with local_params(*self.programs), pyro.validation_enabled(False):
            synchronize(self.device)
            start = time.perf_counter()
            self._take(steps)
            synchronize(self.device)
            return time.perf_counter() - start

    def _take(self, steps: int) -> None:
        """The steps, in the calls that :func:`pyrovae.fit` would make."""
        while steps:
            taken = self.step.many(self.data, 0, self.place, steps)
            if not taken:
                self.step(next(self.data.epoch(0, self.place)))
            self.place = (self.place + (taken or 1)) % self.data.steps
            steps -= taken or 1

    def tune(self) -> None:
        """Nothing to choose."""

    def loss(self) -> float:
        """The negative bound in nats per data point."""
        count = self.workload.evaluations
        with local_params(*self.programs), pyro.validation_enabled(False):
            minibatches = list(self.data.epoch(0))
            values = [self.step.evaluate(minibatches[i % len(minibatches)]) for i in range(count)]
        return -float(torch.stack(values).mean())


def make_step(
    workload: Workload, model: Program, guide: Program, batch: tuple[Tensor, ...], compile: bool
) -> EagerStep:
    """The step of a fit, built as :func:`pyrovae.fit` builds it."""
    objective = our_objective(workload).to(batch[0].device)
    with local_params(model, guide):
        objective.structure(model, guide, *batch)
        parameters = named_parameters(model, guide, *batch)
        optimizer = make_optimizer("adam", list(parameters.values()), workload.lr)
        parts = {
            "model": model,
            "guide": guide,
            "objective": objective,
            "parameters": parameters,
            "optimizer": optimizer,
            "schedule": make_schedule("constant", optimizer, 1),
            "data_size": None,
            "clip_norm": None,
            "autocast": False,
        }
        return CompiledStep(**parts, mode=True) if compile else EagerStep(**parts)
