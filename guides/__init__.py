"""Variational posteriors as Pyro guides, imported as ``pyrovae.guides``."""

from __future__ import annotations

from pyrovae.guides.amortized import AmortizedBernoulli, AmortizedNormal

__all__ = ["AmortizedBernoulli", "AmortizedNormal"]
