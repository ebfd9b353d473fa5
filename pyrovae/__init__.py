"""pyrovae: deep latent-variable models and Bayesian neural networks on Pyro.

Write a model and a guide, choose an objective, fit, and know how good the fit is::

    run = pyrovae.fit(model, guide, data, objective=pyrovae.ELBO(), epochs=100)
    pyrovae.evaluation.log_likelihood(model, guide, test, particles=5000)
"""

from __future__ import annotations

from importlib.metadata import version

from pyrovae import datasets, evaluation, guides, models, plots
from pyrovae.objectives import ELBO, LinearWarmup, Objective
from pyrovae.training import Run, fit, load
from pyrovae.weights import LogWeights, log_weights

__version__ = version("pyrovae")

__all__ = [
    "ELBO",
    "LinearWarmup",
    "LogWeights",
    "Objective",
    "Run",
    "datasets",
    "evaluation",
    "fit",
    "guides",
    "load",
    "log_weights",
    "models",
    "plots",
]
