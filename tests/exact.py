"""Models whose evidence is known in closed form, for tests of estimators."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints


class PPCA(PyroModule):
    """Probabilistic PCA: z ~ N(0, I), x | z ~ N(Wz + b, s² I); so x ~ N(b, WWᵀ + s² I).

    Tipping & Bishop 1999, https://doi.org/10.1111/1467-9868.00196.
    """

    def __init__(self, dim: int = 4, latent_dim: int = 2, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.data_shape, self.latent_dim = (dim,), latent_dim
        self.W = nn.Parameter(torch.randn(dim, latent_dim, generator=generator))
        self.b = nn.Parameter(torch.randn(dim, generator=generator))
        self.s = PyroParam(torch.tensor(0.7), constraints.positive)

    def prior(self) -> dist.TorchDistribution:
        return dist.Normal(torch.zeros(self.latent_dim).to(self.b), 1.0).to_event(1)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        return dist.Normal(z @ self.W.mT + self.b, self.s).to_event(1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.decode(z), obs=x)

    def evidence(self) -> dist.TorchDistribution:
        eye = torch.eye(self.data_shape[0]).to(self.b)
        return dist.MultivariateNormal(self.b, self.W @ self.W.mT + self.s**2 * eye)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        precision = torch.eye(self.latent_dim).to(x) + self.W.mT @ self.W / self.s**2
        mean = torch.linalg.solve(precision, self.W.mT @ (x - self.b).mT / self.s**2).mT
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def elbo(self, x: Tensor, q: dist.TorchDistribution) -> Tensor:
        """log p(x) − KL(q ‖ p(z | x)) for each data point, exactly; q is a diagonal Normal."""
        full = dist.MultivariateNormal(q.mean, torch.diag_embed(q.variance))
        return self.evidence().log_prob(x) - torch.distributions.kl_divergence(full, self.posterior(x))


class LinearGuide(PyroModule):
    """q(z | x) = N(A x + c, diag t²)."""

    def __init__(self, model: PPCA, seed: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(0.3 * torch.randn(model.latent_dim, *model.data_shape, generator=generator))
        self.c = nn.Parameter(0.1 * torch.randn(model.latent_dim, generator=generator))
        self.t = PyroParam(torch.full((model.latent_dim,), 0.6), constraints.positive)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Normal(x @ self.A.mT + self.c, self.t.expand(len(x), -1)).to_event(1)

    def forward(self, x: Tensor) -> None:
        self.sample(self.encode(x))

    def sample(self, q: dist.TorchDistribution) -> Tensor:
        with pyro.plate("data", q.batch_shape[-1]):
            return pyro.sample("z", q)


def standard_errors(draws: Tensor, exact: Tensor) -> Tensor:
    """Deviation of the mean of ``draws`` (along dimension 0) from ``exact``, in standard errors of that mean."""
    return (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
