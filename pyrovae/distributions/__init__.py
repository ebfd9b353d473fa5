"""Distributions that torch, Pyro and zuko lack."""

from __future__ import annotations

from pyrovae.distributions.categorical256 import Categorical256
from pyrovae.distributions.logistic import DiscretizedLogistic, DiscretizedLogisticMixture
from pyrovae.distributions.sphere_flows import SphericalFlow, Stereographic
from pyrovae.distributions.von_mises_fisher import SphericalUniform, VonMisesFisher

__all__ = [
    "Categorical256",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "SphericalFlow",
    "SphericalUniform",
    "Stereographic",
    "VonMisesFisher",
]
