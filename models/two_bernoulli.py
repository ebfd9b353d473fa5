"""Two coins that share one Gaussian latent: the smallest model whose likelihood is an integral."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, require_count
from pyrovae.models.likelihoods import require_batch
from pyrovae.registry import MODELS

__all__ = ["TwoBernoulli"]


@MODELS.register
class TwoBernoulli(PyroModule):
    r"""Two binary variables that are independent given a standard normal latent, and dependent without it.

    .. math:: z \sim \mathcal{N}(0, 1), \qquad x_i \mid z \sim \mathrm{Bern}(\sigma(a_i + b_i z)), \quad i = 1, 2

    The integral over z is one-dimensional, so that :meth:`log_likelihood` and :meth:`joint` are exact up to the error
    of a Gauss-Hermite rule. Any objective and guide of a VAE fits, and can be held against it. A table of four
    frequencies has three degrees of freedom and the model four parameters: the data fix the table and not (a, b), of
    which (a, −b) is the same model too.

    Args:
        a: the two logits at z = 0 to start from.
        b: the two slopes to start from. At zero slopes the gradient of both is zero, and with equal ones it may stay
            equal; so start them elsewhere.
        nodes: number of nodes of the Gauss-Hermite rule. The default gives eight digits for slopes up to 3; steeper
            ones need more.

    Raises:
        ArgumentError: an argument is out of range.

    References:
        Bock & Lieberman 1970 (its maximum likelihood, by this quadrature), https://doi.org/10.1007/BF02291262.

    Example:
        >>> model = TwoBernoulli(a=(0.0, 0.0), b=(2.0, 2.0))
        >>> model(size=5).shape
        torch.Size([5, 2])
        >>> table = model.joint()
        >>> bool(table.sum().isclose(torch.tensor(1.0)))
        True
        >>> bool(model.covariance() > 0)
        True
    """

    data_shape = (2,)
    latent_dim = 1
    hidden = (16,)  # the model has no network; this is what amortized guides take for theirs
    activation = "tanh"
    network = "mlp"
    default_guide: ClassVar[str] = "AmortizedNormal"
    default_objective: ClassVar[dict[str, Any]] = {"name": "IWAE", "arguments": {"particles": 50}}

    def __init__(self, a: Sequence[float] = (0.0, 0.0), b: Sequence[float] = (1.0, 0.5), nodes: int = 128) -> None:
        super().__init__()
        for name, pair in (("a", a), ("b", b)):
            if len(pair) != 2 or not np.isfinite(pair).all():
                raise ArgumentError(f"{name} is {pair!r}; it must hold two finite numbers, one for each variable")
        self.a = nn.Parameter(torch.tensor(tuple(a), dtype=torch.get_default_dtype()))
        self.b = nn.Parameter(torch.tensor(tuple(b), dtype=torch.get_default_dtype()))
        self._rule = np.polynomial.hermite_e.hermegauss(require_count("nodes", nodes))

    def prior(self) -> dist.TorchDistribution:
        """p(z): batch shape (), event shape (1,)."""
        return dist.Normal(torch.zeros_like(self.a[:1]), torch.ones_like(self.a[:1])).to_event(1)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for `*batch x 1` latents: batch shape `*batch`, event shape (2,)."""
        return dist.Bernoulli(logits=self.a + self.b * z).to_event(1)

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Conditions on ``x``, or generates ``size`` data points when it is ``None``; returns the data.

        Args:
            x: A `n x 2` tensor of zeros and ones, or ``None``.
            size: number of data points to generate.

        Raises:
            DataError: ``x`` is not a batch of pairs.
        """
        if x is not None:
            require_batch(x, self.data_shape)
        with pyro.plate("data", size if x is None else len(x), device=self.a.device):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z), obs=x)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """``log p(x)`` of each of `n x 2` data points in nats, `n`, by Gauss-Hermite quadrature; differentiable."""
        require_batch(x, self.data_shape)
        z, weight = (self.a.new_tensor(part) for part in self._rule)
        log_weight = weight.log() - weight.sum().log()
        return (self.decode(z[:, None]).log_prob(x.to(self.a)[:, None]) + log_weight).logsumexp(-1)

    def joint(self) -> Tensor:
        """The table p(x₁ = i, x₂ = j), `2 x 2`."""
        values = torch.cartesian_prod(*[torch.arange(2.0, dtype=self.a.dtype, device=self.a.device)] * 2)
        return self.log_likelihood(values).exp().reshape(2, 2)

    def covariance(self) -> Tensor:
        """Cov(x₁, x₂), between −1/4 and 1/4; 0 where either slope is 0."""
        p = self.joint()
        return p[1, 1] * p[0, 0] - p[1, 0] * p[0, 1]

    def log_odds_ratio(self) -> Tensor:
        """The logarithm of p₁₁ p₀₀ / (p₁₀ p₀₁), any real number; 0 where either slope is 0."""
        log_p = self.joint().log()
        return log_p[1, 1] + log_p[0, 0] - log_p[1, 0] - log_p[0, 1]
