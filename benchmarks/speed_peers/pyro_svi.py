"""Pyro's own SVI, as its tutorials use it."""

from __future__ import annotations

import time
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import Adam

from benchmarks.speed_peers.programs import programs, pyro_loss
from benchmarks.speed_peers.torch_data import batches, synchronize
from benchmarks.speed_peers.workloads import Workload

__all__ = ["PyroSVI"]


class PyroSVI:
    """``pyro.infer.SVI`` with ``Trace_ELBO`` or ``RenyiELBO``.

    Args:
        workload: what to fit.
        device: where.
        validate: whether Pyro validates models and distributions, as it does by default.
        svi: the class, for one with Pyro's signature.
        loss: ``None`` for Pyro's.
    """

    def __init__(
        self, workload: Workload, device: torch.device, validate: bool, svi: type[SVI] = SVI, loss: Any = None
    ) -> None:
        torch.manual_seed(0)
        self.workload, self.device, self.validate = workload, device, validate
        self.store: dict[str, Any] = {"params": {}, "constraints": {}}  # Pyro's global one serves one fit at a time
        self.batches = batches(workload, device)
        model, guide = programs(workload, device)
        self.svi = svi(model, guide, Adam({"lr": workload.lr}), loss=loss or pyro_loss(workload))

    def run(self, steps: int) -> float:
        """Seconds that a number of steps takes."""
        with pyro.get_param_store().scope(self.store), pyro.validation_enabled(self.validate):
            synchronize(self.device)
            start = time.perf_counter()
            self.take(steps)
            synchronize(self.device)
            return time.perf_counter() - start

    def take(self, steps: int) -> None:
        """A number of steps, over the minibatches in turn."""
        for step in range(steps):
            self.svi.step(*self.batches[step % len(self.batches)])

    def tune(self) -> None:
        """Nothing to choose."""

    def loss(self) -> float:
        """The negative bound in nats per data point."""
        with pyro.get_param_store().scope(self.store), pyro.validation_enabled(False):
            count = self.workload.evaluations
            values = [self.svi.evaluate_loss(*self.batches[i % len(self.batches)]) for i in range(count)]
        return sum(values) / count / self.workload.batch
