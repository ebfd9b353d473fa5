"""Bayesian linear regression with unknown noise, the model whose posterior is known in closed form."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError, require_count
from pyrovae.registry import MODELS

__all__ = ["BayesianLinearRegression", "NormalGamma"]


class NormalGamma(NamedTuple):
    r"""The law ``N(w | loc, (τ precision)⁻¹) Gamma(τ | concentration, rate)`` of d weights and the noise precision.

    Args:
        loc: A `d` tensor, the mean of the weights.
        precision: A `d x d` tensor, the precision of the weights in units of τ.
        concentration: of the Gamma of τ, a scalar tensor.
        rate: of the Gamma of τ, a scalar tensor.
    """

    loc: Tensor
    precision: Tensor
    concentration: Tensor
    rate: Tensor


@MODELS.register
class BayesianLinearRegression(PyroModule):
    r"""Linear regression with a Gaussian prior on the weights and a Gamma prior on the noise precision.

    .. math:: \tau \sim \mathrm{Gamma}(a_0, b_0), \qquad w \mid \tau \sim \mathcal{N}(0, (\tau \lambda_0)^{-1} I),
        \qquad y_n \mid w, \tau \sim \mathcal{N}(w^\top x_n, \tau^{-1})

    The prior is conjugate, so that :meth:`posterior` and :meth:`log_evidence` are exact.

    Args:
        features: number d of weights, the intercept included where there is one.
        intercept: whether the last weight multiplies a constant 1, which the model appends to the inputs (these
            then have ``features − 1`` columns).
        prior_precision: λ₀, the prior precision of each weight in units of the noise precision.
        noise_concentration: a₀ of the prior of the noise precision.
        noise_rate: b₀ of the same, in squared units of y.

    Raises:
        ArgumentError: an argument is out of range.

    References:
        Bishop 2006, Pattern Recognition and Machine Learning, section 3.3 and exercise 3.12,
        https://www.microsoft.com/en-us/research/publication/pattern-recognition-machine-learning/.

    Example:
        >>> model = BayesianLinearRegression(features=2, intercept=True)
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> model(x).shape   # generated
        torch.Size([3])
        >>> model.posterior(x, torch.tensor([1.0, 3.0, 5.0])).loc.shape
        torch.Size([2])
    """

    default_guide: ClassVar[str] = "FullRank"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {}}

    def __init__(
        self,
        features: int,
        intercept: bool = False,
        prior_precision: float = 1.0,
        noise_concentration: float = 1.0,
        noise_rate: float = 1.0,
    ) -> None:
        super().__init__()
        require_count("features", features, 1 + intercept)
        self.features = features
        self.intercept = intercept
        for name, value in (
            ("prior_precision", prior_precision),
            ("noise_concentration", noise_concentration),
            ("noise_rate", noise_rate),
        ):
            if not 0 < value < math.inf:
                raise ArgumentError(f"{name} is {value!r}; it must be a positive number")
            self.register_buffer(name, torch.tensor(float(value)), persistent=False)

    def design(self, x: Tensor) -> Tensor:
        """The inputs `n x columns` as the design matrix `n x features`, the constant appended.

        Raises:
            DataError: the inputs have another number of columns.
        """
        columns = self.features - self.intercept
        if x.dim() != 2 or x.shape[1] != columns:
            raise DataError(f"x has shape {tuple(x.shape)}; this model takes inputs of shape (n, {columns})")
        return torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if self.intercept else x

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Conditions on ``y``, or generates it when it is ``None``; returns it.

        Args:
            x: A `n x columns` tensor of inputs.
            y: A `n` tensor of outputs, or ``None``.
        """
        X = self.design(x)
        tau = pyro.sample("noise_precision", dist.Gamma(self.noise_concentration, self.noise_rate))
        scale = (tau * self.prior_precision).rsqrt().unsqueeze(-1)
        w = pyro.sample("weights", dist.Normal(X.new_zeros(self.features), scale).to_event(1))
        with pyro.plate("data", len(X), device=X.device):
            return pyro.sample("y", dist.Normal((X * w).sum(-1), tau.rsqrt()), obs=y)

    def start_values(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """Values of the latents from which a guide starts: the exact posterior's means."""
        if y is None:
            return {}
        exact = self.posterior(x, y)
        return {"noise_precision": exact.concentration / exact.rate, "weights": exact.loc}

    def posterior(self, x: Tensor, y: Tensor) -> NormalGamma:
        """The exact posterior given `n x columns` inputs and `n` outputs."""
        X = self.design(x)
        precision = X.mT @ X + self.prior_precision * torch.eye(self.features).to(X)
        loc = torch.linalg.solve(precision, X.mT @ y)
        residual = (y - X @ loc).square().sum() + self.prior_precision * loc.square().sum()
        return NormalGamma(loc, precision, self.noise_concentration + len(y) / 2, self.noise_rate + residual / 2)

    def log_evidence(self, x: Tensor, y: Tensor) -> Tensor:
        """``log p(y | x)`` in nats, exactly, for all data points together."""
        after = self.posterior(x, y)
        return (
            0.5 * (self.features * self.prior_precision.log() - torch.logdet(after.precision))
            + self.noise_concentration * self.noise_rate.log()
            - after.concentration * after.rate.log()
            + torch.lgamma(after.concentration)
            - torch.lgamma(self.noise_concentration)
            - 0.5 * len(y) * math.log(2 * math.pi)
        )
