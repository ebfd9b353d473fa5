"""How good is a fit: log-likelihoods, importance diagnostics, use of the latent space."""

from __future__ import annotations

from pyrovae.evaluation.latents import ActiveUnits, active_units, kl_per_dimension
from pyrovae.evaluation.likelihood import LogLikelihood, effective_sample_size, log_likelihood

__all__ = [
    "ActiveUnits",
    "LogLikelihood",
    "active_units",
    "effective_sample_size",
    "kl_per_dimension",
    "log_likelihood",
]
