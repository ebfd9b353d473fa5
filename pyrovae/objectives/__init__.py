"""Objectives: log-weights → bound and gradient, one family a file.

An objective is a Pyro loss. Its value is the negative bound in nats (summed over the data), its gradient is that of
the chosen estimator.
"""

from __future__ import annotations

from pyrovae.objectives.base import Estimate, Objective
from pyrovae.objectives.elbo import ELBO
from pyrovae.objectives.schedules import LinearWarmup

__all__ = ["ELBO", "Estimate", "LinearWarmup", "Objective"]
