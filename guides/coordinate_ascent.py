"""Mean-field posteriors by coordinate ascent, in closed form, for conjugate-exponential models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from sklearn.cluster import KMeans
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError, require_count
from pyrovae.models.likelihoods import require_batch
from pyrovae.models.linear_regression import BayesianLinearRegression
from pyrovae.models.mixture import GaussianMixture

__all__ = ["GaussianMixturePosterior", "LinearRegressionPosterior", "NormalWishart", "coordinate_ascent"]


def coordinate_ascent(
    model: BayesianLinearRegression | GaussianMixture,
    *data: Tensor,
    sweeps: int = 1000,
    tolerance: float = 1e-8,
    seed: int = 0,
) -> LinearRegressionPosterior | GaussianMixturePosterior:
    r"""Fits a factorized posterior to a conjugate-exponential model, one exact update of each factor a sweep (CAVI).

    .. math:: q_j(z_j) \propto \exp \mathbb{E}_{q_{-j}} \log p(x, z)

    The ELBO rises with every update, so that no step size is needed; for a mixture it rises to a local optimum that
    depends on the start. The sweeps compute in float64; the posterior is of the model's data type.

    Args:
        model: a :class:`~pyrovae.models.BayesianLinearRegression`, for the factors q(w) q(τ), or a
            :class:`~pyrovae.models.GaussianMixture`, for q(π) q(μ, Λ) Π q(assignment).
        *data: what the model conditions on: inputs `n x columns` and outputs `n`, or a `n x d` tensor.
        sweeps: the largest number of sweeps.
        tolerance: the sweeps end when one raises the ELBO by less than this, in nats per data point.
        seed: of the k-means clustering that a mixture starts from.

    Returns:
        The fitted posterior, a Pyro guide of the model, with the ELBO after each sweep in ``bounds``.

    Raises:
        ArgumentError: the model is of another kind, or an argument is out of range.
        DataError: the data are not finite or do not fit the model.

    References:
        Bishop 2006, Pattern Recognition and Machine Learning, chapter 10,
        https://www.microsoft.com/en-us/research/publication/pattern-recognition-machine-learning/; Blei et al. 2017,
        https://arxiv.org/abs/1601.00670.

    Example:
        >>> model = GaussianMixture(components=2, features=1)
        >>> x = torch.tensor([[-5.0], [-5.2], [-4.8], [5.0], [5.1], [4.9]])
        >>> q = coordinate_ascent(model, x)
        >>> q.responsibilities(x).round().sum(0)
        tensor([3., 3.])
        >>> bool((q.bounds.diff() > -1e-9).all())
        True
    """
    if type(model) not in _METHODS:
        known = ", ".join(sorted(kind.__name__ for kind in _METHODS))
        raise ArgumentError(
            f"coordinate_ascent knows the exact updates of {known}, not of {type(model).__name__}."
            " Fit another model with pyrovae.fit and a guide such as guides.ASVI."
        )
    require_count("sweeps", sweeps)
    if not tolerance >= 0:
        raise ArgumentError(f"tolerance is {tolerance!r}; it must be a number of nats per data point, at least 0")
    updates, posterior = _METHODS[type(model)]
    _require_data(model, data)
    bounds: list[float] = []
    with torch.no_grad():
        sequence = updates(model, seed, *(tensor.double() for tensor in data))
        while len(bounds) < sweeps and _risen(bounds) >= tolerance * len(data[0]):
            factors, bound = next(sequence)
            bounds.append(float(bound))
    fitted = posterior(model, factors).to(next(model.buffers()).dtype)
    fitted.bounds = torch.tensor(bounds, dtype=torch.float64)
    fitted.converged = _risen(bounds) < tolerance * len(data[0])
    return fitted


def _risen(bounds: list[float]) -> float:
    return bounds[-1] - bounds[-2] if len(bounds) > 1 else math.inf


def _require_data(model: Any, data: tuple[Tensor, ...]) -> None:
    wanted = 2 if isinstance(model, BayesianLinearRegression) else 1
    if len(data) != wanted:
        raise DataError(f"{len(data)} tensors of data were given; {type(model).__name__} conditions on {wanted}")
    if wanted == 2:
        model.design(data[0])
        if data[1].shape != data[0].shape[:1]:
            raise DataError(f"y has shape {tuple(data[1].shape)}; it must be ({len(data[0])},), one number for each x")
    else:
        require_batch(data[0], model.data_shape)
    if not all(tensor.isfinite().all() for tensor in data):
        raise DataError("the data are not finite everywhere. Drop or impute what is missing.")


class _Posterior(PyroModule):
    """A fitted posterior: a guide without learnable parameters, whose factors are buffers."""

    bounds: Tensor
    """ELBO in nats, all data points together, after each sweep."""
    converged: bool
    """Whether the last sweep raised the ELBO by less than the tolerance."""


# Linear regression ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _NormalTimesGamma:
    loc: Tensor
    covariance: Tensor
    concentration: Tensor
    rate: Tensor


def _linear_regression_sweeps(
    model: BayesianLinearRegression, seed: int, x: Tensor, y: Tensor
) -> Iterator[tuple[_NormalTimesGamma, Tensor]]:
    """Updates of q(w) = N(m, S), then of q(τ) = Gamma(a, b), and the ELBO (Bishop 2006, section 10.3)."""
    lam, a0, b0 = (getattr(model, name).double() for name in ("prior_precision", "noise_concentration", "noise_rate"))
    X = model.design(x)
    n, d = X.shape
    precision = X.mT @ X + lam * torch.eye(d).to(X)  # of w, in units of τ
    loc = torch.linalg.solve(precision, X.mT @ y)
    squares = (y - X @ loc).square().sum() + lam * loc.square().sum()
    concentration = a0 + (n + d) / 2
    tau = a0 / b0
    while True:
        covariance = torch.linalg.inv(tau * precision)
        expected = squares + (precision * covariance).sum()  # E of |y − Xw|² + λ₀|w|²
        rate = b0 + expected / 2
        tau = concentration / rate
        q, p = dist.Gamma(concentration, rate), dist.Gamma(a0, b0)
        log_tau = torch.digamma(concentration) - rate.log()
        log_joint = (n + d) / 2 * (log_tau - math.log(2 * math.pi)) + d / 2 * lam.log() - tau * expected / 2
        entropy = d / 2 * (1 + math.log(2 * math.pi)) + torch.logdet(covariance) / 2
        bound = log_joint + entropy - torch.distributions.kl_divergence(q, p)
        yield _NormalTimesGamma(loc, covariance, concentration, rate), bound


class LinearRegressionPosterior(_Posterior):
    r"""The factorized posterior of a :class:`~pyrovae.models.BayesianLinearRegression`, as a Pyro guide.

    .. math:: q(w, \tau) = \mathcal{N}(w \mid m, S) \, \mathrm{Gamma}(\tau \mid a, b)

    It is what :func:`coordinate_ascent` returns. As a guide it takes the model's arguments and ignores them.

    Args:
        model: the model of which it is the posterior; not kept.
        factors: m (``loc``), S (``covariance``), a (``concentration``) and b (``rate``).
    """

    loc: Tensor
    covariance: Tensor
    concentration: Tensor
    rate: Tensor

    def __init__(self, model: BayesianLinearRegression, factors: _NormalTimesGamma) -> None:
        super().__init__()
        for name in ("loc", "covariance", "concentration", "rate"):
            self.register_buffer(name, getattr(factors, name))

    def weights(self) -> dist.TorchDistribution:
        """q(w): event shape (features,)."""
        return dist.MultivariateNormal(self.loc, self.covariance)

    def noise_precision(self) -> dist.TorchDistribution:
        """q(τ), in inverse squared units of y."""
        return dist.Gamma(self.concentration, self.rate)

    def forward(self, x: Tensor | None = None, y: Tensor | None = None) -> None:
        """The guide's sample statements."""
        pyro.sample("noise_precision", self.noise_precision())
        pyro.sample("weights", self.weights())


# Gaussian mixture -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormalWishart:
    r"""Factors q(π) q(μ, Λ) of a mixture of C Gaussians in d dimensions; the prior is one of them too.

    .. math:: \mathrm{Dir}(\pi \mid \alpha) \prod_c \mathcal{N}(\mu_c \mid m_c, (\beta_c \Lambda_c)^{-1})
        \, \mathcal{W}(\Lambda_c \mid \nu_c, V_c^{-1})

    Args:
        concentration: α, a `C` tensor.
        loc: m, a `C x d` tensor.
        mean_precision: β, a `C` tensor.
        degrees_of_freedom: ν, a `C` tensor (``"tied"``: `1`).
        scatter: V, the inverse scale of the Wishart: `C x d x d` (``"tied"``: `1 x d x d`). For ``"diagonal"`` a
            `C x d` tensor, and Λ's diagonal is Gamma(ν/2, V/2).
    """

    concentration: Tensor
    loc: Tensor
    mean_precision: Tensor
    degrees_of_freedom: Tensor
    scatter: Tensor

    @classmethod
    def prior(cls, model: GaussianMixture) -> NormalWishart:
        """The prior of a mixture, in float64."""
        count = 1 if model.covariance == "tied" else model.components
        scatter = model.degrees_of_freedom * model.scale.double()
        scatter = scatter.diagonal() if model.covariance == "diagonal" else scatter
        ones = scatter.new_ones(model.components)
        return cls(
            concentration=model.concentration.double(),
            loc=model.mean.double().expand(model.components, -1),
            mean_precision=model.mean_precision * ones,
            degrees_of_freedom=model.degrees_of_freedom * ones[:count],
            scatter=scatter.expand(count, *scatter.shape),
        )

    def given(self, x: Tensor, responsibilities: Tensor) -> NormalWishart:
        """The update, from this prior, by `n x d` data with `n x C` responsibilities (Bishop 2006, 10.58-10.63)."""
        counts = responsibilities.sum(0)
        mean_precision = self.mean_precision + counts
        loc = (self.mean_precision[:, None] * self.loc + responsibilities.mT @ x) / mean_precision[:, None]
        deviation = x[:, None] - loc  # from the updated mean: data and prior then add up without a cross term
        shift = self.loc - loc
        if self.diagonal:
            scatter = torch.einsum("nc,ncd,ncd->cd", responsibilities, deviation, deviation)
            scatter = scatter + self.mean_precision[:, None] * shift.square()
        else:
            scatter = torch.einsum("nc,ncd,nce->cde", responsibilities, deviation, deviation)
            scatter = scatter + torch.einsum("c,cd,ce->cde", self.mean_precision, shift, shift)
        if len(self.degrees_of_freedom) < len(counts):  # one Λ for all components
            counts, scatter = counts.sum(0, keepdim=True), scatter.sum(0, keepdim=True)
        return NormalWishart(
            concentration=self.concentration + responsibilities.sum(0),
            loc=loc,
            mean_precision=mean_precision,
            degrees_of_freedom=self.degrees_of_freedom + counts,
            scatter=self.scatter + scatter,
        )

    @property
    def diagonal(self) -> bool:
        return self.scatter.dim() == 2

    def expected_log_joint(self, x: Tensor) -> Tensor:
        """E log p(x, c | π, μ, Λ) of `n x d` data and each component, `n x C` (Bishop 2006, 10.46)."""
        d = self.loc.shape[1]
        log_weight = torch.digamma(self.concentration) - torch.digamma(self.concentration.sum())
        distance = d / self.mean_precision + self.degrees_of_freedom * self._squared(x[:, None] - self.loc)
        return log_weight + (self._expected_log_det() - d * math.log(2 * math.pi) - distance) / 2

    def _squared(self, deviation: Tensor) -> Tensor:
        """vᵀ V⁻¹ v of `… x C x d` deviations, `… x C`."""
        if self.diagonal:
            return (deviation.square() / self.scatter).sum(-1)
        tril = torch.linalg.cholesky(self.scatter)
        return torch.linalg.solve_triangular(tril, deviation.unsqueeze(-1), upper=False).square().sum((-2, -1))

    def _expected_log_det(self) -> Tensor:
        """E log |Λ| of each component."""
        d, half = self.loc.shape[1], self.degrees_of_freedom[:, None] / 2
        if self.diagonal:
            return (torch.digamma(half) - (self.scatter / 2).log()).sum(-1)
        steps = torch.arange(d).to(half) / 2
        return torch.digamma(half - steps).sum(-1) + d * math.log(2.0) - torch.logdet(self.scatter)

    def kl(self, prior: NormalWishart) -> Tensor:
        """KL of these factors from the prior's, in nats."""
        d = self.loc.shape[1]
        weights = torch.distributions.kl_divergence(
            dist.Dirichlet(self.concentration), dist.Dirichlet(prior.concentration)
        )
        ratio = prior.mean_precision / self.mean_precision
        shift = self.degrees_of_freedom * self._squared(self.loc - prior.loc)
        means = (d * (ratio - 1 - ratio.log()) + prior.mean_precision * shift) / 2
        return weights + means.sum() + self._kl_precision(prior).sum()

    def _kl_precision(self, prior: NormalWishart) -> Tensor:
        nu, nu0 = self.degrees_of_freedom, prior.degrees_of_freedom
        if self.diagonal:
            q, p = (dist.Gamma(f.degrees_of_freedom[:, None] / 2, f.scatter / 2) for f in (self, prior))
            return torch.distributions.kl_divergence(q, p).sum(-1)
        d = self.loc.shape[1]
        trace = torch.linalg.solve(self.scatter, prior.scatter).diagonal(dim1=-2, dim2=-1).sum(-1)
        normalizer = (nu * torch.logdet(self.scatter) - nu0 * torch.logdet(prior.scatter)) / 2
        normalizer = normalizer - (nu - nu0) * d / 2 * math.log(2.0) - torch.mvlgamma(nu / 2, d)
        normalizer = normalizer + torch.mvlgamma(nu0 / 2, d)
        return normalizer + (nu - nu0) / 2 * self._expected_log_det() + nu * (trace - d) / 2


def _mixture_sweeps(model: GaussianMixture, seed: int, x: Tensor) -> Iterator[tuple[NormalWishart, Tensor]]:
    """Updates of q(π) q(μ, Λ), then of the responsibilities, and the ELBO (Bishop 2006, section 10.2)."""
    if len(x) < model.components:
        raise DataError(f"there are {len(x)} data points for {model.components} components; give at least as many")
    prior = NormalWishart.prior(model)
    found = KMeans(model.components, n_init=1, random_state=seed).fit_predict(x.cpu().numpy())
    labels = torch.as_tensor(found, dtype=torch.long, device=x.device)
    responsibilities = torch.nn.functional.one_hot(labels, model.components).to(x)
    while True:
        factors = prior.given(x, responsibilities)
        log_joint = factors.expected_log_joint(x)
        responsibilities = log_joint.softmax(-1)
        yield factors, log_joint.logsumexp(-1).sum() - factors.kl(prior)


class GaussianMixturePosterior(_Posterior):
    r"""The factorized posterior of a :class:`~pyrovae.models.GaussianMixture`, as a Pyro guide.

    It is what :func:`coordinate_ascent` returns: q(π) q(μ, Λ), with :meth:`responsibilities` for the assignments. As a
    guide it takes the model's arguments and ignores them. The model sums the assignments out, so its ELBO under this
    guide is at least the last of ``bounds``, which pays for a factorized q(assignment) too.

    With S and S_c the Cholesky factors of the prior's and the posterior's scale of the Wishart, the model's lower
    triangular A is M B, where M = S⁻¹ S_c and B is Bartlett's factor of the posterior: the squared diagonal of A is
    Gamma, and a column of A below its diagonal is Gaussian given the diagonal.

    Args:
        model: the model of which it is the posterior; it is not a submodule of the guide.
        factors: q(π) q(μ, Λ).
    """

    concentration: Tensor
    loc: Tensor
    mean_precision: Tensor
    degrees_of_freedom: Tensor
    scatter: Tensor

    def __init__(self, model: GaussianMixture, factors: NormalWishart) -> None:
        super().__init__()
        self._model = (model,)
        for name in _FIELDS:
            self.register_buffer(name, getattr(factors, name).contiguous())

    @property
    def factors(self) -> NormalWishart:
        """q(π) q(μ, Λ)."""
        return NormalWishart(*(getattr(self, name) for name in _FIELDS))

    def responsibilities(self, x: Tensor) -> Tensor:
        """q(assignment) of `n x d` data, `n x C`."""
        return self.factors.expected_log_joint(x.to(self.loc)).softmax(-1)

    def forward(self, x: Tensor | None = None) -> None:
        """The guide's sample statements."""
        pyro.sample("weights", dist.Dirichlet(self.concentration))
        precisions = self._precisions()
        if self.factors.diagonal:
            means = dist.Normal(self.loc, (self.mean_precision[:, None] * precisions).rsqrt()).to_event(2)
        else:
            scaled = self.mean_precision[:, None, None] * precisions
            means = dist.MultivariateNormal(self.loc, precision_matrix=scaled).to_event(1)
        pyro.sample("means", means)

    def _precisions(self) -> Tensor:
        """Samples Λ in the model's coordinates."""
        half = self.degrees_of_freedom[:, None] / 2
        if self.factors.diagonal:
            return pyro.sample("precision", dist.Gamma(half.expand_as(self.scatter), self.scatter / 2).to_event(2))
        model = self._model[0]
        d = model.features
        tril = torch.linalg.cholesky(torch.linalg.inv(self.scatter))
        change = torch.linalg.solve_triangular(model.wishart_tril.to(tril), tril, upper=False)  # M
        on_diagonal = change.diagonal(dim1=-2, dim2=-1)
        shape = half - torch.arange(d).to(half) / 2
        diagonal = pyro.sample("precision_diagonal", dist.Gamma(shape, 0.5 / on_diagonal.square()).to_event(2))
        if d == 1:
            return model.wishart(diagonal, None)
        slope, chol = [], change.new_zeros(len(change), d * (d - 1) // 2, d * (d - 1) // 2)
        start = 0
        for column in range(d - 1):  # A below the diagonal of a column, given the diagonal: M_ij A_jj / M_jj + M B
            stop = start + d - 1 - column
            slope.append(change[:, column + 1 :, column] / on_diagonal[:, column, None])
            chol[:, start:stop, start:stop] = change[:, column + 1 :, column + 1 :]
            start = stop
        columns = torch.arange(d - 1).repeat_interleave(torch.arange(d - 1, 0, -1)).to(change.device)
        mean = torch.cat(slope, -1) * diagonal.sqrt()[..., columns]
        lower = pyro.sample("precision_lower", dist.MultivariateNormal(mean, scale_tril=chol).to_event(1))
        return model.wishart(diagonal, lower)


_FIELDS = ("concentration", "loc", "mean_precision", "degrees_of_freedom", "scatter")

_METHODS: dict[type, tuple[Callable[..., Iterator[tuple[Any, Tensor]]], type]] = {
    BayesianLinearRegression: (_linear_regression_sweeps, LinearRegressionPosterior),
    GaussianMixture: (_mixture_sweeps, GaussianMixturePosterior),
}
