"""Generative models as Pyro modules, imported as ``pyrovae.models``.

Deep latent-variable models: ``VAE`` (and ``SphericalVAE``, ``ConditionalVAE``, ``SemiSupervisedVAE``),
``HierarchicalVAE``, ``DRAW``, ``SigmoidBeliefNet``, and ``Autoencoder`` as their baseline. Statistical classics, each
with an exact answer beside it: ``TwoBernoulli``, ``GaussianMixture``, ``BayesianLinearRegression``,
``LinearMixedModel``, ``EightSchools``, ``HierarchicalNormal``, ``GaussianProcess``, ``LinearGaussianStateSpace``,
``StochasticVolatility``, ``GrowthModel`` and ``DeepKalmanFilter``. Bayesian neural networks: ``BNN``.
"""

from __future__ import annotations

from pyrovae.models.autoencoder import Autoencoder
from pyrovae.models.bnn import BNN
from pyrovae.models.conditional_vae import ConditionalVAE
from pyrovae.models.draw import DRAW
from pyrovae.models.eight_schools import EightSchools
from pyrovae.models.expectation_maximization import MixtureEstimate, expectation_maximization
from pyrovae.models.gaussian_process import EvidenceMaximum, GaussianProcess, maximize_evidence
from pyrovae.models.hierarchical_vae import HierarchicalVAE
from pyrovae.models.how_bayesian import HierarchicalNormal, treat
from pyrovae.models.linear_regression import BayesianLinearRegression
from pyrovae.models.markov import MarkovChain, StateSpaceModel
from pyrovae.models.mixed import LinearMixedModel, MixedModelFit
from pyrovae.models.mixture import GaussianMixture
from pyrovae.models.nonlinear_state_space import DeepKalmanFilter, GrowthModel
from pyrovae.models.semi_supervised_vae import SemiSupervisedVAE
from pyrovae.models.sigmoid_belief_net import SigmoidBeliefNet
from pyrovae.models.spherical_vae import SphericalVAE
from pyrovae.models.state_space import LinearGaussianStateSpace
from pyrovae.models.stochastic_volatility import StochasticVolatility
from pyrovae.models.two_bernoulli import TwoBernoulli
from pyrovae.models.vae import VAE

__all__ = [
    "BNN",
    "DRAW",
    "VAE",
    "Autoencoder",
    "BayesianLinearRegression",
    "ConditionalVAE",
    "DeepKalmanFilter",
    "EightSchools",
    "EvidenceMaximum",
    "GaussianMixture",
    "GaussianProcess",
    "GrowthModel",
    "HierarchicalNormal",
    "HierarchicalVAE",
    "LinearGaussianStateSpace",
    "LinearMixedModel",
    "MarkovChain",
    "MixedModelFit",
    "MixtureEstimate",
    "SemiSupervisedVAE",
    "SigmoidBeliefNet",
    "SphericalVAE",
    "StateSpaceModel",
    "StochasticVolatility",
    "TwoBernoulli",
    "expectation_maximization",
    "maximize_evidence",
    "treat",
]
