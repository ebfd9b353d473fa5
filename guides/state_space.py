"""Amortized posterior of the states of a series: a Markov chain whose steps a recurrent network proposes."""

from __future__ import annotations

import functools
from typing import Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, require_count
from pyrovae.guides.amortized import held, replayed, require
from pyrovae.models.markov import MarkovChain, require_series
from pyrovae.models.networks import full_precision, mlp
from pyrovae.modes import device_of
from pyrovae.registry import GUIDES

__all__ = ["AmortizedMarkov"]

_LEAST_SCALE = 1e-4  # in units of the prior's


class SeriesModel(Protocol):
    """What the guide reads from a model, and runs of it."""

    latent_dim: int
    features: int

    def initial(self) -> dist.TorchDistribution:
        """p(z_1)."""

    def transition_law(self, z: Tensor, inputs: Tensor | None) -> dist.TorchDistribution:
        """p(z_t | z_{t−1}, u_t)."""

    def inputs(self, steps: int, after: int = 1) -> Tensor | None:
        """Known inputs."""


@GUIDES.register
class AmortizedMarkov(PyroModule):
    r"""Posterior of the states of a series with the factorization of the true one.

    .. math:: q(z_{1:T} \mid x) = \prod_{t=1}^T \mathcal{N}\bigl(z_t \mid m_t + s_t a_t, \; (s_t b_t)^2\bigr), \qquad
        (a_t, b_t) = f_\phi(m_t, x_t, g_t), \qquad g_t = \mathrm{GRU}_\phi(x_t, g_{t+1})

    Here m_t and s_t are mean and standard deviation of the model's own transition p(z_t | z_{t−1}), coordinate by
    coordinate, so that each step is the prior's, shifted and rescaled in its own units. A recurrent network runs
    backwards over the series: g_t sums up what the present and the future say. The past acts through z_{t−1} alone, as
    it does in the posterior of every state-space model. The model is run, not copied: its parameters get a gradient
    through the guide too.

    Args:
        model: a state-space model with Gaussian transitions, such as ``DeepKalmanFilter``; it is not a submodule of
            the guide.
        hidden: width of the recurrent network and of the hidden layer after it.
        activation: of the hidden layer.

    Raises:
        ArgumentError: the model is of another kind, or an argument is out of range.

    References:
        Krishnan, Shalit & Sontag 2017 (structured inference networks), https://arxiv.org/abs/1609.09869.

    Example:
        >>> from pyrovae.models.nonlinear_state_space import DeepKalmanFilter
        >>> guide = AmortizedMarkov(DeepKalmanFilter(features=3, latent_dim=2))
        >>> guide(torch.zeros(5, 20, 3)).shape
        torch.Size([5, 20, 2])
    """

    def __init__(self, model: SeriesModel, hidden: int = 32, activation: str = "elu") -> None:
        super().__init__()
        require(self, model, "latent_dim", "features", "initial", "transition_law", "inputs")
        if getattr(model, "diffuse", False):
            raise ArgumentError(
                "guide AmortizedMarkov starts from the model's p(z_1), and this model is diffuse. Give it an"
                " initial_covariance in place of diffuse=True."
            )
        self._model = (model,)  # in a tuple, so that the model is not a submodule
        self.features, self.hidden = model.features, require_count("hidden", hidden)
        d = model.latent_dim
        self.encoder = nn.GRU(self.features, hidden, batch_first=True)
        self.direct = nn.Linear(d + self.features + hidden, 2 * d)
        self.network = mlp(d + self.features + hidden, (hidden,), 2 * d, activation)

    def encode(self, x: Tensor) -> MarkovChain:
        """q(z | x) for series `n x T x p`: batch shape (n,), event shape (T, d).

        Raises:
            DataError: ``x`` is not a batch of series of p variables.
        """
        require_series(x, self.features)
        (model,) = self._model
        backwards, _ = self.encoder(x.flip(1))
        summary = torch.cat([x, full_precision(backwards).flip(1)], dim=-1)
        known = model.inputs(x.shape[1] - 1)
        covariates = 0 if known is None else known.shape[-1]
        inputs = summary[:, 1:]
        if known is not None:
            inputs = torch.cat([known.to(x).expand(len(x), -1, -1), inputs], dim=-1)
        holding = functools.partial(held, model, when=replayed())

        def step(z: Tensor, now: Tensor | None) -> dist.TorchDistribution:
            assert now is not None
            with holding():
                prior = model.transition_law(z, now[..., :covariates] if covariates else None)
            return self._corrected(prior, now[..., covariates:])

        with holding():
            first = model.initial()
        return MarkovChain(self._corrected(first, summary[:, 0]), step, x.shape[1], inputs)

    def _corrected(self, prior: dist.TorchDistribution, summary: Tensor) -> dist.TorchDistribution:
        """The prior's step, shifted and rescaled by what the data say."""
        batch = torch.broadcast_shapes(prior.mean.shape[:-1], summary.shape[:-1])
        mean, deviation = (part.expand(*batch, -1) for part in (prior.mean, prior.variance.sqrt()))
        joined = torch.cat([mean, summary.expand(*batch, -1)], dim=-1)
        shift, raw_scale = full_precision(self.direct(joined) + self.network(joined)).chunk(2, dim=-1)
        scale = nn.functional.softplus(raw_scale) + _LEAST_SCALE
        return dist.Normal(mean + deviation * shift, deviation * scale).to_event(1)

    def forward(self, x: Tensor) -> Tensor:
        """Samples z for a batch `n x T x p`; returns `n x T x d` (particles to the left)."""
        with pyro.plate("data", len(x), device=device_of(self)):
            return pyro.sample("z", self.encode(x))
