"""pyrovae, eager and compiled: the step that :func:`pyrovae.fit` runs."""

from __future__ import annotations

import time

import pyro
import torch
from torch import Tensor

from benchmarks.speed_peers.programs import our_objective, programs
from benchmarks.speed_peers.torch_data import batches, synchronize
from benchmarks.speed_peers.workloads import Workload
from pyrovae.structure import Program
from pyrovae.training.compiled import CompiledStep
from pyrovae.training.optimizers import make_optimizer, make_schedule
from pyrovae.training.programs import local_params, named_parameters
from pyrovae.training.step import EagerStep

__all__ = ["Ours", "make_step"]


class Ours:
    """pyrovae's step.

    Args:
        workload: what to fit.
        device: where.
        compile: whether the step is the compiled one.
    """

    def __init__(self, workload: Workload, device: torch.device, compile: bool) -> None:
        torch.manual_seed(0)
        self.workload, self.device = workload, device
        self.batches = batches(workload, device)
        self.programs = programs(workload, device)
        self.step = make_step(workload, *self.programs, self.batches[0], compile)

    def run(self, steps: int) -> float:
        """Seconds that a number of steps takes."""
        with local_params(*self.programs), pyro.validation_enabled(False):
            synchronize(self.device)
            start = time.perf_counter()
            take(self.step, self.batches, steps)
            synchronize(self.device)
            return time.perf_counter() - start

    def tune(self) -> None:
        """Nothing to choose."""

    def loss(self) -> float:
        """The negative bound in nats per data point."""
        count = self.workload.evaluations
        with local_params(*self.programs), pyro.validation_enabled(False):
            values = [self.step.evaluate(self.batches[i % len(self.batches)]) for i in range(count)]
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


def take(step: EagerStep, minibatches: list[tuple[Tensor, ...]], steps: int) -> None:
    """A number of steps, over the minibatches in turn."""
    for index in range(steps):
        step(minibatches[index % len(minibatches)])
