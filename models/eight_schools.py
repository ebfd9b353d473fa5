"""Eight schools: a hierarchical model of parallel experiments, centred and non-centred."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.errors import ArgumentError, require_count, require_positive, unknown_name
from pyrovae.models.likelihoods import require_batch
from pyrovae.registry import MODELS

__all__ = ["EightSchools", "Moments"]

Parametrization = Literal["centred", "non-centred"]


class Moments(NamedTuple):
    """Mean and standard deviation of a posterior, the same shape each."""

    mean: Tensor
    sd: Tensor


@MODELS.register
class EightSchools(PyroModule):
    r"""Effects of parallel experiments, estimated with known standard errors, drawn from one population.

    .. math:: \mu \sim \mathcal{N}(0, s_\mu^2), \quad \tau \sim \mathrm{HalfCauchy}(s_\tau), \quad
        \theta_j \mid \mu, \tau \sim \mathcal{N}(\mu, \tau^2), \quad
        x_j \mid \theta_j \sim \mathcal{N}(\theta_j, \sigma_j^2)

    One data point is a whole study: the estimates of all J schools, with a population of its own. So the eight
    schools are the data ``x`` of shape `1 x 8`. ``"non-centred"`` samples the standardised effects
    ``(θ − μ) / τ`` in the site ``"unit"`` in place of ``"theta"``, which takes away the funnel that τ near zero makes
    of the centred posterior. :meth:`log_evidence` and :meth:`posterior` are exact, by quadrature over τ; all else is
    Gaussian.

    Args:
        standard_errors: σ, of each school's estimate.
        parametrization: ``"centred"`` or ``"non-centred"``.
        mean_scale: s_μ.
        deviation_scale: s_τ.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    References:
        Rubin 1981, https://doi.org/10.3102/10769986006004377; Gelman et al. 2013, Bayesian Data Analysis, section
        5.5, http://www.stat.columbia.edu/~gelman/book/; Papaspiliopoulos, Roberts & Sköld 2007 (parametrizations),
        https://doi.org/10.1214/088342307000000014.

    Example:
        >>> model = EightSchools()
        >>> x = torch.tensor([[28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]])
        >>> model.log_evidence(x).round(decimals=3)   # in nats, one number a study
        tensor([-31.3110])
        >>> model(size=5).shape
        torch.Size([5, 8])
    """

    default_guide: ClassVar[str] = "MeanField"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {}}

    def __init__(
        self,
        standard_errors: Sequence[float] = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0),
        parametrization: Parametrization = "non-centred",
        mean_scale: float = 5.0,
        deviation_scale: float = 5.0,
    ) -> None:
        super().__init__()
        if parametrization not in get_args(Parametrization):
            raise unknown_name("parametrization", parametrization, get_args(Parametrization))
        if isinstance(standard_errors, str) or not isinstance(standard_errors, Sequence) or not standard_errors:
            raise ArgumentError(f"standard_errors is {standard_errors!r}; it must be a list of numbers above 0")
        errors = [require_positive(f"standard_errors[{j}]", error) for j, error in enumerate(standard_errors)]
        self.parametrization = parametrization
        self.data_shape = (len(errors),)
        self.register_buffer("standard_errors", torch.tensor(errors), persistent=False)
        for argument, value in (("mean_scale", mean_scale), ("deviation_scale", deviation_scale)):
            self.register_buffer(argument, torch.tensor(float(require_positive(argument, value))), persistent=False)

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Conditions on ``x``, or generates ``size`` studies when it is ``None``; returns the estimates.

        Args:
            x: A `n x J` tensor of estimates, or ``None``.
            size: number of studies to generate.

        Raises:
            DataError: ``x`` is not a batch of studies of this many schools.
        """
        if x is not None:
            require_batch(x, self.data_shape)
        with pyro.plate("data", size if x is None else len(x), device=self.standard_errors.device):
            mu = pyro.sample("mu", dist.Normal(torch.zeros_like(self.mean_scale), self.mean_scale)).unsqueeze(-1)
            tau = pyro.sample("tau", dist.HalfCauchy(self.deviation_scale)).unsqueeze(-1)
            if self.parametrization == "centred":
                theta = pyro.sample(
                    "theta", dist.Normal(mu, tau).expand([*mu.shape[:-1], *self.data_shape]).to_event(1)
                )
            else:
                zeros = torch.zeros_like(self.standard_errors)
                theta = mu + tau * pyro.sample("unit", dist.Normal(zeros, 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(theta, self.standard_errors).to_event(1), obs=x)

    def log_evidence(self, x: Tensor, nodes: int = 400) -> Tensor:
        r"""``log p(x)`` in nats of each study, `n`, exactly up to the error of the quadrature.

        .. math:: p(x) = \int_0^1 \mathcal{N}\bigl(x \mid 0, \;
            \mathrm{diag}(\sigma^2 + \tau(u)^2) + s_\mu^2 1 1^\top\bigr) \, du, \qquad \tau(u) = s_\tau \tan(\pi u / 2)

        Args:
            x: A `n x J` tensor of estimates.
            nodes: of the Gauss–Legendre rule.
        """
        log_joint, _ = self._given_deviation(x, nodes)
        return log_joint.logsumexp(0).to(x)

    def posterior(self, x: Tensor, nodes: int = 400) -> dict[str, Moments]:
        """Exact posterior means and standard deviations of ``"mu"`` and ``"tau"``, `n`, and ``"theta"``, `n x J`.

        Args:
            x: A `n x J` tensor of estimates.
            nodes: of the Gauss–Legendre rule.
        """
        log_joint, tau = self._given_deviation(x, nodes)
        weight = log_joint.softmax(0).unsqueeze(-1)  # of each τ, nodes x n x 1
        data, error, scale = x.double(), self.standard_errors.double(), self.mean_scale.double()
        variance = error.square() + tau.square().unsqueeze(-1)  # nodes x 1 x J
        mu_variance = 1.0 / (scale**-2 + (1.0 / variance).sum(-1, keepdim=True))
        mu = mu_variance * (data / variance).sum(-1, keepdim=True)
        shrink = error.square() / variance
        theta = (1 - shrink) * data + shrink * mu
        theta_variance = (1 - shrink) * error.square() + shrink.square() * mu_variance

        def moments(mean: Tensor, conditional_variance: Tensor) -> Moments:
            first = (weight * mean).sum(0)
            second = (weight * (conditional_variance + mean.square())).sum(0)
            return Moments(first.to(x), (second - first.square()).sqrt().to(x))

        found = {
            "mu": moments(mu, mu_variance),
            "tau": moments(tau.unsqueeze(-1), torch.zeros_like(mu)),
        }
        squeezed = {name: Moments(*(part.squeeze(-1) for part in pair)) for name, pair in found.items()}
        return {**squeezed, "theta": moments(theta, theta_variance)}

    def _given_deviation(self, x: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
        """``log p(x | τ)`` plus the log-weight of each node, `nodes x n`, and the nodes τ, `nodes x 1`; in float64."""
        require_batch(x, self.data_shape)
        points, weights = np.polynomial.legendre.leggauss(require_count("nodes", nodes))
        u, weight = torch.from_numpy(points).to(x.device) / 2 + 0.5, torch.from_numpy(weights).to(x.device) / 2
        tau = (self.deviation_scale.double() * (math.pi * u / 2).tan()).unsqueeze(-1)
        variance = self.standard_errors.double().square() + tau.square()
        common = self.mean_scale.double().expand(nodes, len(self.standard_errors), 1)
        marginal = dist.LowRankMultivariateNormal(torch.zeros_like(variance), common, variance)
        return marginal.log_prob(x.double().unsqueeze(1)).mT + weight.log().unsqueeze(-1), tau
