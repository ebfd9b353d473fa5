"""Generative models as Pyro modules, imported as ``pyrovae.models``."""

from __future__ import annotations

from pyrovae.models.linear_regression import BayesianLinearRegression
from pyrovae.models.mixture import GaussianMixture
from pyrovae.models.sigmoid_belief_net import SigmoidBeliefNet
from pyrovae.models.spherical_vae import SphericalVAE
from pyrovae.models.vae import VAE

__all__ = ["VAE", "BayesianLinearRegression", "GaussianMixture", "SigmoidBeliefNet", "SphericalVAE"]
