"""The Bayesian Gaussian mixture, its assignments summed out or explicit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyrovae.errors import ArgumentError, unknown_name
from pyrovae.models.likelihoods import require_batch
from pyrovae.registry import MODELS

__all__ = ["GaussianMixture"]

Covariance = Literal["full", "diagonal", "tied"]
Assignments = Literal["summed", "explicit"]


@MODELS.register
class GaussianMixture(PyroModule):
    r"""Mixture of C Gaussians in d dimensions with conjugate priors on weights, means and precisions.

    .. math:: \pi \sim \mathrm{Dir}(\alpha_0), \quad \Lambda_c \sim \mathcal{W}(\nu_0, (\nu_0 \Sigma_0)^{-1}), \quad
        \mu_c \mid \Lambda_c \sim \mathcal{N}(m_0, (\beta_0 \Lambda_c)^{-1}), \quad
        x_n \sim \sum_c \pi_c \, \mathcal{N}(\mu_c, \Lambda_c^{-1})

    A ``"tied"`` mixture has one Λ for all components; in a ``"diagonal"`` one each element of Λ_c's diagonal is
    Gamma(ν₀/2, ν₀ Σ₀ⱼⱼ/2). The prior keeps components apart from collapse: Λ has the mean Σ₀⁻¹ and the weight of
    ν₀ observations, so that no component shrinks onto a point; a Dirichlet concentration above 1 draws the weights
    together, one below 1 empties components that the data do not need.

    The assignments are summed out, so every site is continuous and any objective and guide of continuous latents
    fits. ``assignments="explicit"`` makes them a site ``"assignment"`` of each data point, which
    ``pyrovae.EnumeratedELBO`` sums out to the same number; the guide leaves them to it, as a guide of
    ``poutine.block(model, hide=["assignment"])`` does. Maximum likelihood and MAP estimates are those of
    ``expectation_maximization``.

    The Wishart is drawn by Bartlett's decomposition: with the Cholesky factor S of its scale, Λ = S A Aᵀ Sᵀ, where
    the squared diagonal of the lower triangular A is chi-squared (site ``"precision_diagonal"``) and what is below it
    standard normal (``"precision_lower"``, column by column).

    Args:
        components: number C of components.
        features: dimension d of the data.
        covariance: ``"full"``, ``"diagonal"`` or ``"tied"``.
        concentration: α₀ of each component.
        mean: m₀, a number or d numbers.
        mean_precision: β₀, the weight of m₀ in observations.
        degrees_of_freedom: ν₀, above d − 1 (for ``"diagonal"`` above 0); ``None`` for d + 2.
        scale: Σ₀: a number σ² for σ² I, or a `d x d` matrix (of which ``"diagonal"`` uses the diagonal), in squared
            units of the data.
        assignments: ``"summed"`` out in the density of x, or ``"explicit"``, a Categorical site in the data plate.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    References:
        Bishop 2006, Pattern Recognition and Machine Learning, section 10.2,
        https://www.microsoft.com/en-us/research/publication/pattern-recognition-machine-learning/; Bartlett 1933,
        https://doi.org/10.1017/S0370164600014474.

    Example:
        >>> model = GaussianMixture(components=3, features=2)
        >>> model(size=5).shape
        torch.Size([5, 2])
        >>> model.joint(torch.ones(3) / 3, torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2)).event_shape
        torch.Size([2])
    """

    default_guide: ClassVar[str] = "MeanField"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {}}

    def __init__(
        self,
        components: int,
        features: int,
        covariance: Covariance = "full",
        concentration: float = 1.0,
        mean: float | Sequence[float] = 0.0,
        mean_precision: float = 0.1,
        degrees_of_freedom: float | None = None,
        scale: float | Sequence[Sequence[float]] = 1.0,
        assignments: Assignments = "summed",
    ) -> None:
        super().__init__()
        for name, size in (("components", components), ("features", features)):
            if not isinstance(size, int) or size < 1:
                raise ArgumentError(f"{name} is {size!r}; it must be a whole number, at least 1")
        if covariance not in get_args(Covariance):
            raise unknown_name("covariance", covariance, get_args(Covariance))
        if assignments not in get_args(Assignments):
            raise unknown_name("assignments", assignments, get_args(Assignments))
        degrees = features + 2.0 if degrees_of_freedom is None else degrees_of_freedom
        least = 0 if covariance == "diagonal" else features - 1
        for name, value, above in (
            ("concentration", concentration, 0),
            ("mean_precision", mean_precision, 0),
            ("degrees_of_freedom", degrees, least),
        ):
            if not above < value < math.inf:
                raise ArgumentError(f"{name} is {value!r}; it must be a number above {above}")
        self.components, self.features, self.covariance = components, features, covariance
        self.assignments = assignments
        self.data_shape = (features,)
        self.mean_precision, self.degrees_of_freedom = float(mean_precision), float(degrees)
        self.register_buffer("concentration", torch.full((components,), float(concentration)), persistent=False)
        self.register_buffer("mean", _vector(mean, features), persistent=False)
        self.register_buffer("scale", _matrix(scale, features), persistent=False)
        wishart = torch.linalg.inv(degrees * self.scale)
        self.register_buffer("wishart_tril", torch.linalg.cholesky(wishart), persistent=False)
        pairs = [(i, j) for j in range(features) for i in range(j + 1, features)]
        place = torch.zeros(len(pairs), features, features)
        for index, (i, j) in enumerate(pairs):
            place[index, i, j] = 1.0
        self.register_buffer("_place", place.flatten(1), persistent=False)

    def wishart(self, diagonal: Tensor, lower: Tensor | None) -> Tensor:
        """Λ, `… x d x d`, from A's squared diagonal `… x d` and what is below it `… x d(d−1)/2` (``None``: nothing)."""
        factor = torch.diag_embed(diagonal.sqrt())
        if lower is not None:
            factor = factor + (lower @ self._place).reshape(factor.shape)
        tril = self.wishart_tril @ factor
        return tril @ tril.mT

    def joint(self, weights: Tensor, means: Tensor, precisions: Tensor) -> dist.MixtureSameFamily:
        """p(x | π, μ, Λ) of one data point.

        Args:
            weights: A `… x C` tensor.
            means: A `… x C x d` tensor.
            precisions: `… x C x d x d` (``"tied"``: `… x 1 x d x d`); for ``"diagonal"``, `… x C x d`.
        """
        return dist.MixtureSameFamily(dist.Categorical(weights), self.parts(means, precisions))

    def parts(self, means: Tensor, precisions: Tensor) -> dist.TorchDistribution:
        """p(x | c, μ, Λ) of every component, batch shape `… x C`, event shape (d,); arguments as for ``joint``."""
        if self.covariance == "diagonal":
            return dist.Normal(means, precisions.rsqrt()).to_event(1)
        return dist.MultivariateNormal(means, precision_matrix=precisions)

    def part(self, assignment: Tensor, means: Tensor, precisions: Tensor) -> dist.TorchDistribution:
        """p(x | c, μ, Λ) for whole numbers c, which broadcast against the batch shape `…` of the other two."""
        parts = self.parts(means, precisions)
        if self.covariance == "diagonal":
            loc, scale = parts.base_dist.loc, parts.base_dist.scale
            return dist.Normal(Vindex(loc)[..., assignment, :], Vindex(scale)[..., assignment, :]).to_event(1)
        tril = Vindex(parts.scale_tril)[..., assignment, :, :]
        return dist.MultivariateNormal(Vindex(parts.loc)[..., assignment, :], scale_tril=tril)

    def precisions(self) -> Tensor:
        """Samples Λ: `… x C x d x d` (``"tied"``: `… x 1 x d x d`), or `… x C x d` for ``"diagonal"``."""
        count = 1 if self.covariance == "tied" else self.components
        d, half = self.features, self.degrees_of_freedom / 2
        if self.covariance == "diagonal":
            shape = self.scale.new_full((count, d), half)
            return pyro.sample("precision", dist.Gamma(shape, half * self.scale.diagonal()).to_event(2))
        shape = (half - torch.arange(d, device=self.scale.device) / 2).to(self.scale).expand(count, d)
        diagonal = pyro.sample("precision_diagonal", dist.Gamma(shape, torch.full_like(shape, 0.5)).to_event(2))
        zeros = self.scale.new_zeros(count, d * (d - 1) // 2)
        lower = pyro.sample("precision_lower", dist.Normal(zeros, 1.0).to_event(2)) if d > 1 else None
        return self.wishart(diagonal, lower)

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Conditions on ``x``, or generates ``size`` data points when it is ``None``; returns the data.

        Args:
            x: A `n x d` tensor, or ``None``.
            size: number of data points to generate.

        Raises:
            DataError: ``x`` is not a batch of data points of this model's dimension.
        """
        if x is not None:
            require_batch(x, self.data_shape)
        weights = pyro.sample("weights", dist.Dirichlet(self.concentration))
        precisions = self.precisions()
        means = pyro.sample("means", self.mean_given(precisions))
        with pyro.plate("data", size if x is None else len(x), device=self.mean.device):
            if self.assignments == "summed":
                return pyro.sample("x", self.joint(weights, means, precisions), obs=x)
            assignment = pyro.sample("assignment", dist.Categorical(weights), infer={"enumerate": "parallel"})
            return pyro.sample("x", self.part(assignment, means, precisions), obs=x)

    @torch.no_grad()
    def start_values(self, x: Tensor | None = None) -> dict[str, Tensor]:
        """Values of the latents from which a guide starts: the mode that expectation-maximization finds from k-means.

        From the prior's median all components are alike, and gradients from there leave all but one without data.

        Args:
            x: A `n x d` tensor; without data, or where the prior has no mode, there are no such values.
        """
        from pyrovae.models.expectation_maximization import expectation_maximization

        if x is None or len(x) < self.components:
            return {}
        try:
            found = expectation_maximization(self, x, restarts=3, iterations=100)
        except ArgumentError:
            return {}
        values = {"weights": found.weights.to(self.mean), "means": found.means.to(self.mean)}
        covariances = found.covariances.to(self.mean)
        if self.covariance == "diagonal":
            return values | {"precision": 1 / covariances}
        factor = torch.linalg.solve_triangular(
            self.wishart_tril, torch.linalg.cholesky(torch.linalg.inv(covariances)), upper=False
        )
        values["precision_diagonal"] = factor.diagonal(dim1=-2, dim2=-1).square()
        return values | {"precision_lower": factor.flatten(-2) @ self._place.mT}

    def mean_given(self, precisions: Tensor) -> dist.TorchDistribution:
        """p(μ | Λ), event shape (C, d)."""
        loc = self.mean.expand(self.components, self.features)
        if self.covariance == "diagonal":
            return dist.Normal(loc, (self.mean_precision * precisions).rsqrt()).to_event(2)
        return dist.MultivariateNormal(loc, precision_matrix=self.mean_precision * precisions).to_event(1)


def _vector(mean: float | Sequence[float], features: int) -> Tensor:
    vector = torch.as_tensor(mean, dtype=torch.get_default_dtype())
    if vector.shape not in ((), (features,)) or not vector.isfinite().all():
        raise ArgumentError(f"mean is {mean!r}; it must be a number, or {features} numbers, one for each feature")
    return vector.expand(features).clone()


def _matrix(scale: float | Sequence[Sequence[float]], features: int) -> Tensor:
    matrix = torch.as_tensor(scale, dtype=torch.get_default_dtype())
    if matrix.dim() == 0:
        matrix = matrix * torch.eye(features)
    valid = matrix.shape == (features, features) and bool(torch.equal(matrix, matrix.mT))
    if not valid or torch.linalg.cholesky_ex(matrix).info != 0:
        raise ArgumentError(
            f"scale is {scale!r}; it must be a positive number, or a symmetric positive definite matrix of"
            f" {features} x {features} numbers"
        )
    return matrix
