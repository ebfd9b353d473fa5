"""Generative models as Pyro modules, imported as ``pyrovae.models``."""

from __future__ import annotations

from pyrovae.models.sigmoid_belief_net import SigmoidBeliefNet
from pyrovae.models.vae import VAE

__all__ = ["VAE", "SigmoidBeliefNet"]
