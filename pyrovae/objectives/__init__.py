"""Objectives: log-weights → bound and gradient, one family a file.

An objective is a Pyro loss. Its value is the negative bound in nats (summed over the data), its gradient is that of
the chosen estimator.
"""

from __future__ import annotations

from pyrovae.objectives.base import Estimate, Objective
from pyrovae.objectives.elbo import ELBO
from pyrovae.objectives.enumerated import EnumeratedELBO
from pyrovae.objectives.function_priors import GaussianProcessPrior, fit_prior
from pyrovae.objectives.function_space import FunctionSpaceELBO
from pyrovae.objectives.iwae import IWAE
from pyrovae.objectives.jvi import JVI
from pyrovae.objectives.multisample import MultiSample
from pyrovae.objectives.renyi import Renyi
from pyrovae.objectives.schedules import LinearWarmup
from pyrovae.objectives.semi_supervised import SemiSupervisedELBO
from pyrovae.objectives.spectral_stein import spectral_stein
from pyrovae.objectives.tvo import TVO
from pyrovae.objectives.wake_sleep import ForwardKL, ReweightedWakeSleep, WakeSleep

__all__ = [
    "ELBO",
    "IWAE",
    "JVI",
    "TVO",
    "EnumeratedELBO",
    "Estimate",
    "ForwardKL",
    "FunctionSpaceELBO",
    "GaussianProcessPrior",
    "LinearWarmup",
    "MultiSample",
    "Objective",
    "Renyi",
    "ReweightedWakeSleep",
    "SemiSupervisedELBO",
    "WakeSleep",
    "fit_prior",
    "spectral_stein",
]
