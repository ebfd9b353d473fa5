"""How good is a fit: log-likelihoods, importance diagnostics, gaps, calibration, guides compared, use of latents."""

from __future__ import annotations

from pyrovae.evaluation.calibration import SBC, posterior_samples, sbc
from pyrovae.evaluation.compare import GuideComparison, GuideRow, compare_guides
from pyrovae.evaluation.features import FeatureAccuracies, FeatureAccuracy, classify_features
from pyrovae.evaluation.gaps import Gaps, gaps, local_parameters
from pyrovae.evaluation.importance import PSIS, pareto_smooth, psis
from pyrovae.evaluation.latents import ActiveUnits, active_units, kl_per_dimension
from pyrovae.evaluation.layers import LayerKL, kl_per_layer
from pyrovae.evaluation.likelihood import LogLikelihood, effective_sample_size, log_likelihood
from pyrovae.evaluation.prediction import Prediction, predict
from pyrovae.evaluation.summary import Marginal, PosteriorSummary, posterior_summary

__all__ = [
    "PSIS",
    "SBC",
    "ActiveUnits",
    "FeatureAccuracies",
    "FeatureAccuracy",
    "Gaps",
    "GuideComparison",
    "GuideRow",
    "LayerKL",
    "LogLikelihood",
    "Marginal",
    "PosteriorSummary",
    "Prediction",
    "active_units",
    "classify_features",
    "compare_guides",
    "effective_sample_size",
    "gaps",
    "kl_per_dimension",
    "kl_per_layer",
    "local_parameters",
    "log_likelihood",
    "pareto_smooth",
    "posterior_samples",
    "posterior_summary",
    "predict",
    "psis",
    "sbc",
]
