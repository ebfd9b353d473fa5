"""Figures: each function takes an optional matplotlib Axes and returns the one it has drawn in.

The packaged models and guides can be drawn, and so can any that offer what a figure needs: a model has ``data_shape``,
``latent_dim``, ``prior()`` and ``decode(z)``, a guide has ``encode(x)``; the last three return distributions.
"""

from __future__ import annotations

from pyrovae.plots.canvas import canvas_animation, canvas_steps
from pyrovae.plots.curves import bound_parts, learning_curves
from pyrovae.plots.forecast import forecast_bands
from pyrovae.plots.images import image_grid
from pyrovae.plots.latent import class_grid, interpolation, manifold, reconstructions, samples
from pyrovae.plots.latent_tools import (
    analogies,
    attribute_slider,
    attribute_strip,
    interpolation_strips,
    neighbours,
)
from pyrovae.plots.posterior import contour_panels, ecdf_difference, posterior_contours, rank_histogram
from pyrovae.plots.predictive import pit_histogram, predictive_band, reliability_diagram, risk_coverage_curve
from pyrovae.plots.report import report
from pyrovae.plots.scatter import latent_scatter

__all__ = [
    "analogies",
    "attribute_slider",
    "attribute_strip",
    "bound_parts",
    "canvas_animation",
    "canvas_steps",
    "class_grid",
    "contour_panels",
    "ecdf_difference",
    "forecast_bands",
    "image_grid",
    "interpolation",
    "interpolation_strips",
    "latent_scatter",
    "learning_curves",
    "manifold",
    "neighbours",
    "pit_histogram",
    "posterior_contours",
    "predictive_band",
    "rank_histogram",
    "reconstructions",
    "reliability_diagram",
    "report",
    "risk_coverage_curve",
    "samples",
]
