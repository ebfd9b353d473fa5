"""Distributions that torch, Pyro and zuko lack."""

from __future__ import annotations

from pyrovae.distributions.categorical256 import Categorical256

__all__ = ["Categorical256"]
