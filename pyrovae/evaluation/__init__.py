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
from pyrovae.evaluation.predictive import (
    ClassificationScores,
    RegressionScores,
    Reliability,
    classification_scores,
    regression_scores,
)
from pyrovae.evaluation.summary import Marginal, PosteriorSummary, posterior_summary
from pyrovae.evaluation.uncertainty import (
    OutOfDistribution,
    RiskCoverage,
    function_r_hat,
    out_of_distribution,
    risk_coverage,
)

__all__ = [
    "PSIS",
    "SBC",
    "ActiveUnits",
    "ClassificationScores",
    "FeatureAccuracies",
    "FeatureAccuracy",
    "Gaps",
    "GuideComparison",
    "GuideRow",
    "LayerKL",
    "LogLikelihood",
    "Marginal",
    "OutOfDistribution",
    "PosteriorSummary",
    "Prediction",
    "RegressionScores",
    "Reliability",
    "RiskCoverage",
    "active_units",
    "classification_scores",
    "classify_features",
    "compare_guides",
    "effective_sample_size",
    "function_r_hat",
    "gaps",
    "kl_per_dimension",
    "kl_per_layer",
    "local_parameters",
    "log_likelihood",
    "out_of_distribution",
    "pareto_smooth",
    "posterior_samples",
    "posterior_summary",
    "predict",
    "psis",
    "regression_scores",
    "risk_coverage",
    "sbc",
]
