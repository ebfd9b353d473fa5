"""Distributions that torch, Pyro and zuko lack."""

from __future__ import annotations

from pyrovae.distributions.categorical256 import Categorical256
from pyrovae.distributions.sphere_flows import SphericalFlow, Stereographic
from pyrovae.distributions.von_mises_fisher import SphericalUniform, VonMisesFisher

__all__ = ["Categorical256", "SphericalFlow", "SphericalUniform", "Stereographic", "VonMisesFisher"]
