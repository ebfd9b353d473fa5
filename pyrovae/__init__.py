"""pyrovae: deep latent-variable models and Bayesian neural networks on Pyro.

Write a model and a guide, choose an objective, fit, and know how good the fit is::

    run = pyrovae.fit(model, guide, data, objective=pyrovae.ELBO(), epochs=100)
    pyrovae.evaluation.log_likelihood(model, guide, test, particles=5000)
"""

from __future__ import annotations

from importlib.metadata import version

from pyrovae import datasets, distributions, evaluation, flows, guides, latent, models, plots, tabular
from pyrovae.evaluation.prediction import Prediction, predict
from pyrovae.mcmc import Draws, nuts
from pyrovae.objectives import (
    ELBO,
    IWAE,
    JVI,
    TVO,
    EnumeratedELBO,
    ForwardKL,
    FunctionSpaceELBO,
    LinearWarmup,
    Objective,
    Renyi,
    ReweightedWakeSleep,
    SemiSupervisedELBO,
    WakeSleep,
)
from pyrovae.training import SVI, Run, fit, load
from pyrovae.weights import LogWeights, log_weights

__version__ = version("pyrovae")

__all__ = [
    "ELBO",
    "IWAE",
    "JVI",
    "SVI",
    "TVO",
    "Draws",
    "EnumeratedELBO",
    "ForwardKL",
    "FunctionSpaceELBO",
    "LinearWarmup",
    "LogWeights",
    "Objective",
    "Prediction",
    "Renyi",
    "ReweightedWakeSleep",
    "Run",
    "SemiSupervisedELBO",
    "WakeSleep",
    "datasets",
    "distributions",
    "evaluation",
    "fit",
    "flows",
    "guides",
    "latent",
    "load",
    "log_weights",
    "models",
    "nuts",
    "plots",
    "predict",
    "tabular",
]
