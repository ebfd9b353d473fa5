"""Variational posteriors as Pyro guides, imported as ``pyrovae.guides``.

For latents shared by all data: ``MeanField``, ``FullRank``, ``FactorCovariance``, ``SparsePrecision``, ``Flow``,
``ASVI``, ``PointEstimate`` and ``Laplace``, each ``Guide(model)`` for any Pyro model. For latents of each data point:
the ``Amortized…`` guides of the packaged models, ``BottomUp`` and ``Ladder`` of several layers, and ``amortize`` for
a model and an encoder of one's own; ``refine`` and ``Refined`` improve on the encoder's proposal. For the weights of a
``BNN``: all of the first kind, and ``network_laplace``.
"""

from __future__ import annotations

from pyrovae.guides.amortized import (
    AmortizedBernoulli,
    AmortizedFactorCovariance,
    AmortizedFlow,
    AmortizedFullRank,
    AmortizedNormal,
)
from pyrovae.guides.conditional import AmortizedConditional
from pyrovae.guides.coordinate_ascent import (
    GaussianMixturePosterior,
    LinearRegressionPosterior,
    coordinate_ascent,
)
from pyrovae.guides.draw import AmortizedDRAW
from pyrovae.guides.flows import Flow
from pyrovae.guides.gaussian import FactorCovariance, FullRank, MeanField
from pyrovae.guides.hierarchical import BottomUp, Ladder
from pyrovae.guides.network_laplace import NetworkGaussian, linearize, network_laplace
from pyrovae.guides.own_model import AmortizedModel, amortize
from pyrovae.guides.point import GaussianAtMode, Laplace, PointEstimate, WithoutPrior
from pyrovae.guides.refinement import Refined, Refinement, refine
from pyrovae.guides.semi_supervised import AmortizedSemiSupervised
from pyrovae.guides.sparse import SparsePrecision
from pyrovae.guides.spherical import AmortizedVonMisesFisher
from pyrovae.guides.state_space import AmortizedMarkov
from pyrovae.guides.structured import ASVI
from pyrovae.models.autoencoder import DeterministicEncoder

__all__ = [
    "ASVI",
    "AmortizedBernoulli",
    "AmortizedConditional",
    "AmortizedDRAW",
    "AmortizedFactorCovariance",
    "AmortizedFlow",
    "AmortizedFullRank",
    "AmortizedMarkov",
    "AmortizedModel",
    "AmortizedNormal",
    "AmortizedSemiSupervised",
    "AmortizedVonMisesFisher",
    "BottomUp",
    "DeterministicEncoder",
    "FactorCovariance",
    "Flow",
    "FullRank",
    "GaussianAtMode",
    "GaussianMixturePosterior",
    "Ladder",
    "Laplace",
    "LinearRegressionPosterior",
    "MeanField",
    "NetworkGaussian",
    "PointEstimate",
    "Refined",
    "Refinement",
    "SparsePrecision",
    "WithoutPrior",
    "amortize",
    "coordinate_ascent",
    "linearize",
    "network_laplace",
    "refine",
]
