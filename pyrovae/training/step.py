"""One gradient step, eager: objective, gradients, guard, update."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.elbo import ELBO as PyroELBO
from torch import Tensor

from pyrovae.errors import NonFiniteError
from pyrovae.objectives import Objective
from pyrovae.structure import Program
from pyrovae.training.data import Batches

__all__ = ["EagerStep", "Measured"]

Measured = dict[str, Tensor]  # detached scalars of one step, in nats per data point


@dataclass
class EagerStep:
    """Computes the loss of a minibatch per data point, its gradient, and updates the parameters.

    A loss or gradient that is not finite leaves the parameters as they are, the last good ones. On the CPU the error
    is raised at once; on an accelerator a fused optimizer skips this update and all that follow, and
    :meth:`skipped`, asked where the host waits for the device anyway, tells.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        objective: one of ours, or any Pyro loss.
        parameters: every learnable leaf tensor by name.
        optimizer: over these parameters.
        schedule: learning-rate schedule, stepped after each update.
        data_size: full size of the data plate where it is not the minibatch's length, else ``None``.
        clip_norm: largest norm of the gradient of the loss per data point, or ``None``.
        autocast: whether the objective runs in bfloat16 where torch deems that safe.
    """

    model: Program
    guide: Program
    objective: PyroELBO
    parameters: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    data_size: int | None
    clip_norm: float | None
    autocast: bool

    def __post_init__(self) -> None:
        self.device = next(iter(self.parameters.values())).device
        self.deferred = self.device.type != "cpu" and bool(self.optimizer.defaults.get("fused"))
        self.bad = torch.zeros((), dtype=torch.bool, device=self.device)
        self.updates = torch.zeros((), dtype=torch.int64, device=self.device)
        self.foreach: bool | None = None  # torch's choice; a graph fuses the tensors of a plain loop
        self.calls = 0
        self.names: tuple[str, ...] = ()
        self.sums = torch.zeros(0, dtype=torch.float64, device=self.device)
        self.mark()

    def __call__(self, batch: tuple[Tensor, ...]) -> None:
        """One update; the bound and its parts before it are added to the sums."""
        self.update(batch)
        self.calls += 1
        self.schedule.step()

    def many(self, batches: Batches, epoch: int, done: int, limit: int) -> int:
        """Takes the next updates of an epoch in one call, where that can be done.

        Args:
            batches: the data.
            epoch: number of the epoch.
            done: minibatches of it that were taken.
            limit: most updates.

        Returns:
            The number of updates; 0 where minibatches are to be given one by one.
        """
        return 0

    def mark(self) -> None:
        """Takes note of the schedule here, where all updates were good."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._marked = (self.calls, copy.deepcopy(self.schedule.state_dict()), rates)

    def rewind(self, skipped: int) -> None:
        """Takes the schedule back to where the first of the updates that were skipped began."""
        calls, schedule, rates = self._marked
        self.schedule.load_state_dict(schedule)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for _ in range(self.calls - skipped - calls):
            self.schedule.step()
        self.calls -= skipped

    def update(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        """What a step does to tensors: gradient, guard, update, sums. Returns the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        measured = self.backward(batch, self.data_size or len(batch[0]))
        if isinstance(self.objective, Objective):
            self.objective.advance()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=self.foreach)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip_norm, norm, foreach=self.foreach)
        self.apply(~torch.isfinite(measured["loss"] + norm), batch, measured["loss"])
        self._add(measured, len(batch[0]))
        return gradients

    def apply(self, bad: Tensor, batch: tuple[Tensor, ...], loss: Tensor) -> None:
        """The optimizer's update, unless the loss or the gradient is bad."""
        if self.deferred:
            self.bad |= bad
            self.optimizer.found_inf = self.bad.to(torch.float32)  # type: ignore[attr-defined]
        elif bool(bad):
            raise NonFiniteError(self._diagnosis(batch, loss))
        self.optimizer.step()

    def _add(self, measured: Measured, points: int) -> None:
        """Adds what was measured, times the data points, to the sums."""
        values = torch.stack([value.double() for value in measured.values()])
        self.sums += torch.where(self.bad, 0.0, points * values)
        self.updates += ~self.bad

    def skipped(self) -> int:
        """Updates that were left out since one of them was bad; the host waits for the device."""
        return self.calls - int(self.updates)

    def begin_epoch(self) -> None:
        """Takes note that a callback may have changed model, guide or objective."""

    def compiled_parts(self) -> dict[str, Any]:
        """What runs compiled, for a checkpoint."""
        return {}

    def compile_parts(self, parts: dict[str, Any]) -> None:
        """Has compiled what was when :meth:`compiled_parts` was asked, so that a fit continues alike."""

    def error_of(self, batch: tuple[Tensor, ...]) -> NonFiniteError:
        """The error of the first update that was skipped on the device; ``batch`` was its minibatch."""
        return NonFiniteError(self._diagnosis(batch, self.backward(batch, len(batch[0]))["loss"]))

    def backward(self, batch: tuple[Tensor, ...], points: int) -> Measured:
        """Adds the gradient of the loss per data point; returns loss, bound and parts."""
        measured = self._backward(batch, points)
        if not self.names:
            self.names = tuple(measured)
            self.sums = torch.zeros(len(measured), dtype=torch.float64, device=self.device)
        return measured

    def _backward(self, batch: tuple[Tensor, ...], points: int) -> Measured:
        if isinstance(self.objective, Objective):
            with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=self.autocast):
                estimate = self.objective.estimate(self.model, self.guide, *batch)
            loss = estimate.loss / points
            loss.backward()
            parts = {"bound": estimate.bound, **{f"kl/{name}": value for name, value in estimate.kl.items()}}
            if estimate.log_likelihood is not None:  # sites that are summed out leave no parts
                parts["log_likelihood"] = estimate.log_likelihood
            return {"loss": loss.detach(), **{name: value / points for name, value in parts.items()}}
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=self.autocast):
            total = self.objective.loss_and_grads(self.model, self.guide, *batch)
        loss = torch.as_tensor(total, dtype=torch.float64).detach() / points
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(points)
        return {"loss": loss, "bound": -loss}

    @torch.no_grad()
    def evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The bound per data point on a minibatch, a detached scalar in nats."""
        points = self.data_size or len(batch[0])
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=self.autocast):
            if isinstance(self.objective, Objective):
                return self.objective.estimate(self.model, self.guide, *batch).bound / points
            return -torch.as_tensor(self.objective.loss(self.model, self.guide, *batch)) / points

    def _diagnosis(self, batch: tuple[Tensor, ...], loss: Tensor) -> str:
        """Which parameter's gradient, and which site's log-density, is not finite."""
        value = float(loss)
        said = [f"the loss is {value:g}" if value - value != 0 else "the loss is finite but its gradient is not"]
        bad = [n for n, p in self.parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
        if bad:
            others = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            said.append(f"not finite: the gradient of {', '.join(bad[:3])}{others}")
        site = first_bad_site(self.model, self.guide, batch)
        if site:
            said.append(f"at a new draw the log-density of site {site!r} is not finite")
        return "; ".join(said)


@torch.no_grad()
def first_bad_site(model: Program, guide: Program, batch: tuple[Tensor, ...]) -> str | None:
    """Name of the first site, guide before model, whose log-density at a new draw is not finite."""
    with pyro.validation_enabled(False), poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*batch)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch)
    for trace in (guide_trace, model_trace):
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            log_prob: Any = site["fn"].log_prob(site["value"])
            if isinstance(log_prob, Tensor) and not bool(log_prob.isfinite().all()):
                return name
    return None
