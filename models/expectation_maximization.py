"""Maximum likelihood and MAP estimates of a Gaussian mixture by expectation-maximization."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Literal, get_args

import pyro.distributions as dist
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError, NonFiniteError, require_count, unknown_name
from pyrovae.guides.coordinate_ascent import NormalWishart
from pyrovae.models.likelihoods import require_batch
from pyrovae.models.mixture import GaussianMixture

__all__ = ["MixtureEstimate", "expectation_maximization"]

Kind = Literal["ml", "map"]

_SINGULAR = 1e-9  # smallest eigenvalue of a covariance, in units of the data's variances, below which it has collapsed


@dataclass(frozen=True)
class MixtureEstimate:
    """Point estimates of a mixture of C Gaussians in d dimensions; what :func:`expectation_maximization` returns.

    Args:
        weights: A `C` tensor.
        means: A `C x d` tensor.
        covariances: `C x d x d`; `1 x d x d` for ``"tied"``, `C x d` (the variances) for ``"diagonal"``.
        responsibilities: of each component for each data point, `n x C`.
        log_likelihood: of all data points together in nats, after each iteration; for ``"ml"`` it never falls.
        log_prior: log-density of the parameters (π, μ, Λ) after each iteration, zeros for ``"ml"``; its sum with
            ``log_likelihood`` never falls.
        converged: whether the last iteration rose by less than the tolerance.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    responsibilities: Tensor
    log_likelihood: Tensor
    log_prior: Tensor
    converged: bool

    @property
    def precisions(self) -> Tensor:
        """Inverse covariances, in the same form, which is that of ``GaussianMixture.joint``."""
        return 1 / self.covariances if self.covariances.dim() == 2 else torch.linalg.inv(self.covariances)

    @property
    def parts(self) -> dist.TorchDistribution:
        """The Gaussians: batch shape (C,), event shape (d,)."""
        covariances = torch.diag_embed(self.covariances) if self.covariances.dim() == 2 else self.covariances
        return dist.MultivariateNormal(self.means, covariances)

    @property
    def density(self) -> dist.TorchDistribution:
        """p(x): batch shape (), event shape (d,)."""
        return dist.MixtureSameFamily(dist.Categorical(self.weights), self.parts)

    def aligned_to(self, other: MixtureEstimate) -> MixtureEstimate:
        r"""The same estimate, its components in the order in which they are nearest those of another.

        .. math:: \min_\sigma \sum_c \mathrm{KL}\big(\mathcal{N}_c^{\mathrm{other}} \,\|\, \mathcal{N}_{\sigma(c)}\big)

        over all permutations σ, by the Hungarian method.

        Args:
            other: an estimate with as many components of as many dimensions.

        Raises:
            ArgumentError: the other has another number of components or dimensions.
        """
        if other.means.shape != self.means.shape:
            raise ArgumentError(
                f"other has means of shape {tuple(other.means.shape)}; to be aligned it must have the shape of this"
                f" estimate's, {tuple(self.means.shape)}"
            )
        theirs = dist.MultivariateNormal(other.means[:, None], scale_tril=other.parts.scale_tril[:, None])
        cost = torch.distributions.kl_divergence(theirs, self.parts)
        order = torch.as_tensor(linear_sum_assignment(cost.cpu())[1]).to(self.means.device)
        return replace(
            self,
            weights=self.weights[order],
            means=self.means[order],
            covariances=self.covariances if len(self.covariances) == 1 else self.covariances[order],
            responsibilities=self.responsibilities[:, order],
        )


def expectation_maximization(
    model: GaussianMixture,
    x: Tensor,
    *,
    estimate: Kind = "map",
    start: Tensor | None = None,
    restarts: int = 10,
    iterations: int = 1000,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> MixtureEstimate:
    r"""Estimates the parameters of a Gaussian mixture: responsibilities and the parameters' mode, in turn.

    .. math:: \max_{\pi, \mu, \Lambda} \sum_n \log \sum_c \pi_c \, \mathcal{N}(x_n \mid \mu_c, \Lambda_c^{-1})
        \;\big[ + \log p(\pi, \mu, \Lambda) \big]

    ``"map"`` adds the model's conjugate prior, and finds the mode of the posterior in (π, μ, Λ). Without it,
    ``"ml"``, the likelihood has no maximum: a component that shrinks onto one point makes it infinite. A restart in
    which that happens is left out, and a warning says so. Every restart ends in a local optimum; the best is returned.
    The iterations compute in float64.

    Args:
        model: the mixture, of which ``"ml"`` reads the form alone.
        x: A `n x d` tensor.
        estimate: ``"map"`` or ``"ml"``.
        start: responsibilities to start from, `n x C`; ``None`` for a k-means clustering in each restart.
        restarts: number of k-means clusterings, each from other initial centres.
        iterations: the largest number of iterations.
        tolerance: the iterations end when one rises by less than this, in nats per data point.
        seed: of the initial centres of k-means.

    Returns:
        The estimate with the highest objective.

    Raises:
        ArgumentError: an argument is unknown or out of range, or the prior has no mode.
        DataError: the data are not finite, too few, or not of the model's dimension.
        NonFiniteError: a component collapsed in every restart.

    Warns:
        UserWarning: a component collapsed in some of the restarts.

    References:
        Dempster et al. 1977, https://doi.org/10.1111/j.2517-6161.1977.tb01600.x; Fraley & Raftery 2007 (the prior
        against collapse), https://doi.org/10.1007/s00357-007-0004-5.

    Example:
        >>> model = GaussianMixture(components=2, features=1)
        >>> x = torch.tensor([[-5.0], [-5.2], [-4.8], [5.0], [5.1], [4.9], [4.7], [5.3]])
        >>> found = expectation_maximization(model, x, estimate="ml", restarts=2)
        >>> sorted(round(float(weight), 4) for weight in found.weights)
        [0.375, 0.625]
        >>> bool((found.log_likelihood.diff() > -1e-9).all())
        True
    """
    if estimate not in get_args(Kind):
        raise unknown_name("estimate", estimate, get_args(Kind))
    require_count("iterations", iterations)
    if not tolerance >= 0:
        raise ArgumentError(f"tolerance is {tolerance!r}; it must be a number of nats per data point, at least 0")
    _require_data(model, x)
    prior = _proper_prior(model) if estimate == "map" else _flat_prior(model)
    starts = [_require_start(model, x, start)] if start is not None else _clusterings(model, x, restarts, seed)
    found: list[MixtureEstimate] = []
    with torch.no_grad():
        for responsibilities in starts:
            try:
                found.append(_ascend(prior, x.double(), responsibilities, iterations, tolerance, estimate))
            except _Collapse as collapse:
                said = str(collapse)
    if not found:
        raise NonFiniteError(f"{said} in every start. {_ADVICE}")
    if len(found) < len(starts):
        warnings.warn(f"{said} in {len(starts) - len(found)} of {len(starts)} restarts. {_ADVICE}", stacklevel=2)
    return max(found, key=lambda each: float(each.log_likelihood[-1] + each.log_prior[-1]))


_ADVICE = (
    "The likelihood is infinite there, which is no maximum. Use estimate='map', whose prior keeps the covariances from"
    " zero, or fewer components, or covariance='tied'."
)


class _Collapse(Exception):
    """A component has a singular covariance, or no data."""


def _proper_prior(model: GaussianMixture) -> NormalWishart:
    """The model's own prior, which must have a mode for components that hold no data."""
    least = float(_flat_prior(model).degrees_of_freedom[0])
    if model.degrees_of_freedom <= least or (model.concentration < 1).any():
        raise ArgumentError(
            f"the model has degrees_of_freedom={model.degrees_of_freedom} and concentration="
            f"{float(model.concentration[0])}, and such a prior has no mode; estimate='map' needs more than {least:g}"
            " degrees of freedom and a concentration of at least 1. Raise them, or integrate the parameters with"
            " guides.coordinate_ascent."
        )
    return NormalWishart.prior(model)


def _flat_prior(model: GaussianMixture) -> NormalWishart:
    """The improper prior under which the mode of the posterior is the maximum of the likelihood."""
    prior = NormalWishart.prior(model)
    degrees = 1 if prior.diagonal else model.features
    shared = model.components / len(prior.degrees_of_freedom) - 1  # each mean brings |Λ|^½, also where Λ is shared
    return NormalWishart(
        concentration=torch.ones_like(prior.concentration),
        loc=torch.zeros_like(prior.loc),
        mean_precision=torch.zeros_like(prior.mean_precision),
        degrees_of_freedom=torch.full_like(prior.degrees_of_freedom, degrees - shared),
        scatter=torch.zeros_like(prior.scatter),
    )


def _ascend(
    prior: NormalWishart, x: Tensor, responsibilities: Tensor, iterations: int, tolerance: float, estimate: Kind
) -> MixtureEstimate:
    """Expectation-maximization from the given responsibilities."""
    traces: list[tuple[float, float]] = []
    empty, rise = responsibilities.new_empty(0), math.inf
    while len(traces) < iterations and rise >= tolerance * len(x):
        now = MixtureEstimate(*_mode(prior, x, responsibilities), responsibilities, empty, empty, False)
        if estimate == "ml":
            _require_regular(now, x, responsibilities)
        log_joint = now.weights.log() + now.parts.log_prob(x[:, None])
        responsibilities = log_joint.softmax(-1)
        log_prior = _log_prior(prior, now) if estimate == "map" else 0.0
        traces.append((float(log_joint.logsumexp(-1).sum()), float(log_prior)))
        rise = sum(traces[-1]) - sum(traces[-2]) if len(traces) > 1 else math.inf
    log_likelihood, log_priors = torch.tensor(traces, dtype=torch.float64).unbind(-1)
    return replace(
        now,
        responsibilities=responsibilities,
        log_likelihood=log_likelihood,
        log_prior=log_priors,
        converged=rise < tolerance * len(x),
    )


def _mode(prior: NormalWishart, x: Tensor, responsibilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and covariances at the mode of p(π, μ, Λ | x, responsibilities), a conjugate posterior."""
    after = prior.given(x, responsibilities)
    components, d = after.loc.shape
    shared = components / len(after.degrees_of_freedom) - 1
    counts = after.degrees_of_freedom - (1 if after.diagonal else d) + shared
    covariances = after.scatter / counts.reshape(-1, *[1] * (after.scatter.dim() - 1))
    excess = after.concentration - 1
    return excess / excess.sum(), after.loc, covariances


def _log_prior(prior: NormalWishart, now: MixtureEstimate) -> Tensor:
    """log p(π, μ, Λ)."""
    log_p = dist.Dirichlet(prior.concentration).log_prob(now.weights)
    nu, precisions = prior.degrees_of_freedom, now.precisions
    if prior.diagonal:
        scale = (prior.mean_precision[:, None] * precisions).rsqrt()
        log_p = log_p + dist.Gamma(nu[:, None] / 2, prior.scatter / 2).log_prob(precisions).sum()
        return log_p + dist.Normal(prior.loc, scale).log_prob(now.means).sum()
    wishart = torch.distributions.Wishart(nu, precision_matrix=prior.scatter)
    log_p = log_p + wishart.log_prob((precisions + precisions.mT) / 2).sum()
    of_means = dist.MultivariateNormal(prior.loc, now.covariances / prior.mean_precision[:, None, None])
    return log_p + of_means.log_prob(now.means).sum()


def _require_regular(now: MixtureEstimate, x: Tensor, responsibilities: Tensor) -> None:
    """Raises :class:`_Collapse` where a covariance is singular, measured in the standard deviations of the data."""
    scale = x.std(0, correction=0)
    if now.covariances.dim() == 2:
        smallest = (now.covariances / scale.square()).amin(-1)
    else:
        smallest = torch.linalg.eigvalsh((now.covariances / scale / scale[:, None]).nan_to_num(0.0, 0.0, 0.0)).amin(-1)
    worst = int(smallest.nan_to_num(0.0).argmin())
    if not smallest[worst] > _SINGULAR:
        of = "the common covariance" if len(smallest) < len(now.means) else f"the covariance of component {worst}"
        counts = responsibilities.sum(0)
        raise _Collapse(
            f"{of} became singular (the components hold {[round(float(n), 1) for n in counts]} data points)"
        )


def _clusterings(model: GaussianMixture, x: Tensor, restarts: int, seed: int) -> list[Tensor]:
    """Responsibilities 0 and 1 of k-means clusterings."""
    require_count("restarts", restarts)
    return [_clustering(model.components, x, seed + restart) for restart in range(restarts)]


def _clustering(components: int, x: Tensor, seed: int) -> Tensor:
    found = KMeans(components, n_init=1, random_state=seed).fit_predict(x.cpu().double().numpy())
    labels = torch.as_tensor(found, dtype=torch.long, device=x.device)
    return torch.nn.functional.one_hot(labels, components).double()


def _require_start(model: GaussianMixture, x: Tensor, start: Tensor) -> Tensor:
    shape = (len(x), model.components)
    valid = tuple(start.shape) == shape and bool((start >= 0).all())
    if not valid or not torch.allclose(start.double().sum(-1), start.new_ones(len(x)).double(), atol=1e-4):
        raise ArgumentError(
            f"start has shape {tuple(start.shape)}; it must hold responsibilities of shape {shape}, not negative, each"
            " row of which sums to 1"
        )
    return start.to(x.device).double()


def _require_data(model: GaussianMixture, x: Tensor) -> None:
    if not isinstance(model, GaussianMixture):
        raise ArgumentError(f"model is a {type(model).__name__}; it must be a GaussianMixture")
    require_batch(x, model.data_shape)
    if not x.isfinite().all():
        raise DataError("the data are not finite everywhere. Drop or impute what is missing.")
    if len(x) < model.components:
        raise DataError(f"there are {len(x)} data points for {model.components} components; give at least as many")
