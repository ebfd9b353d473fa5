"""What every objective is: a bound and a gradient estimator over the log-weights of a model and a guide."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pyro.infer.elbo import ELBO as PyroELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor

from pyrovae.errors import require_count
from pyrovae.noise import Kind
from pyrovae.structure import Program, Structure, check
from pyrovae.weights import LogWeights, Through, log_weights

__all__ = ["Estimate", "Objective"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """One evaluation of an objective: scalars in nats, summed over the data and scaled up from subsampled plates.

    Args:
        loss: the value is the negative objective, the gradient is the estimator's.
        bound: the plain bound on ``log p(x)``, without any reweighting of the KL (detached).
        log_likelihood: the expected log-likelihood ``E log p(x | z)`` (detached); ``None`` where it is not apart from
            the KL, because sites are summed out.
        kl: the KL of each latent site (detached); empty where there is no ``log_likelihood``.
    """

    loss: Tensor
    bound: Tensor
    log_likelihood: Tensor | None = None
    kl: dict[str, Tensor] = field(default_factory=dict)


class Objective(PyroELBO):
    """Base of all objectives; an objective subclasses it and writes :meth:`estimate`.

    It is a Pyro loss: ``pyro.infer.SVI(model, guide, optimizer, loss=objective)`` works unchanged, and
    ``objective(model, guide)`` is an ``nn.Module`` whose ``forward(*args)`` is the scalar loss. Values are computed
    without host synchronisation; a coefficient that changes during a fit is a tensor that follows ``step``.

    Args:
        particles: number K of particles, drawn in one vectorized pass.
    """

    step: Tensor
    gradient: str | None = None
    """The gradient estimator as it was asked for; ``"auto"`` for the best one that is defined for the guide."""
    estimator: str | None = None
    """The estimator in use: ``gradient``, or what ``"auto"`` chose when it saw model and guide."""

    def __init__(self, particles: int = 1) -> None:
        require_count("particles", particles)
        super().__init__(num_particles=particles, vectorize_particles=True)
        self.particles = particles
        self.step = torch.zeros((), dtype=torch.int64)
        self._checked: tuple[Program, Program, Structure] | None = None

    @abstractmethod
    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Draws the particles once and returns the loss, the bound and its parts.

        Args:
            model: Pyro model, called with ``*args, **kwargs``.
            guide: Pyro guide, called with the same.
            *args: passed to both.
            **kwargs: passed to both.
        """

    def structure(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Structure:
        """The checked structure of model and guide; they are run and checked the first time they are seen."""
        if self._checked is None or self._checked[0] is not model or self._checked[1] is not guide:
            structure = check(model, guide, *args, **kwargs)
            self.estimator = self.choose(structure) if self.gradient == "auto" else self.gradient
            if self.gradient == "auto":
                logger.info("%s: gradient='auto' is %r for this guide", type(self).__name__, self.estimator)
            self.accept(structure)
            self._checked = (model, guide, structure)
        return self._checked[2]

    def weights(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        through: Through,
        kl: Literal["sampled", "analytic"] = "sampled",
        noise: Kind | None = None,
    ) -> LogWeights:
        """The log-weights of K particles; see :func:`pyrovae.log_weights`. Call :meth:`structure` first."""
        nesting = self.structure(model, guide, *args, **kwargs).max_plate_nesting
        options: dict[str, Any] = {"through": through, "kl": kl, "noise": noise, "max_plate_nesting": nesting}
        return log_weights(model, guide, *args, particles=self.particles, **options, **kwargs)

    def choose(self, structure: Structure) -> str | None:
        """The estimator that ``gradient="auto"`` stands for, with a model and guide of that structure."""
        return self.gradient

    def accept(self, structure: Structure) -> None:
        """Raises an error when this objective is not defined for a model and guide of that structure."""

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The scalar loss: its value is the negative objective in nats, its gradient the estimator's."""
        return self.estimate(model, guide, *args, **kwargs).loss

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss without a gradient, a scalar tensor in nats (``pyro.infer.SVI.evaluate_loss`` calls it)."""
        with torch.no_grad():
            return self.estimate(model, guide, *args, **kwargs).loss

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Adds the gradient of the loss to every parameter, advances the schedules, and returns the loss."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward(retain_graph=self.retain_graph)
        self.advance()
        return loss.detach()

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        """Abstract in Pyro's base: one importance trace without the particle plate; the estimators do not use it."""
        return get_importance_trace("flat", float("inf"), model, guide, args, kwargs)

    def advance(self) -> None:
        """Counts one gradient step; schedules follow it."""
        self.step += 1

    def to(self, device: torch.device | str) -> Objective:
        """Moves the step counter, and so every scheduled coefficient, to a device."""
        self.step = self.step.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved to continue a fit exactly."""
        return {"step": self.step.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.step.copy_(state["step"])
