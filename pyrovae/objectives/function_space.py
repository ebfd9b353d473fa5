"""Variational inference in function space: a prior of functions in place of a prior of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, ModelGuideError, require_count, require_positive
from pyrovae.objectives.base import Estimate, Objective
from pyrovae.objectives.elbo import Coefficient
from pyrovae.objectives.function_priors import GaussianProcessPrior, Kernel, require_network
from pyrovae.objectives.spectral_stein import require_eigenfunctions, spectral_stein
from pyrovae.registry import OBJECTIVES
from pyrovae.structure import Program, Structure

__all__ = ["FunctionSpaceELBO"]

Sampler = Callable[[Tensor, int], Tensor]
Measure = Callable[[Tensor], Tensor]
Box = Sequence[float | Sequence[float]]


@OBJECTIVES.register
class FunctionSpaceELBO(Objective):
    r"""Functional variational Bayes of a network: the KL is that of the functions, at a set of measurement points.

    .. math::
        \mathbb{E}_q \log p(\mathcal{D} \mid f) - \beta \, \mathrm{KL}(q(f^X) \,\|\, p(f^X)), \qquad
        \nabla_\phi \mathrm{KL} = \mathbb{E}_q \big[ \nabla_\phi f^X
        \big( \nabla_f \log q(f^X) - \nabla_f \log p(f^X) \big) \big]

    The measurement points X are the minibatch's inputs and ``points`` more, drawn uniformly from a box around them.
    The score of q comes from its particles by :func:`spectral_stein`, that of a Gaussian-process prior is a closed
    form, that of an implicit prior comes from as many draws of it by the same estimator. Both laws get the noise
    N(0, γ²) on every value, so that the KL is finite where the values of a network's functions lie on fewer dimensions
    than there are points. The model is a :class:`~pyrovae.models.BNN`, the guide any whose weights can be
    reparameterized; the model's own prior of weights plays no part. The prior is one of the network's outputs as
    functions of its inputs, both standardised (``model.standardize``); several outputs are independent under it.

    **What the figures are.** ``kl["f"]`` is the KL of two Gaussians that have the mean and covariance of q's particles
    (noise added) and of the prior (its draws, where it is implicit). Neither q nor an implicit prior need be Gaussian;
    and the covariance of fewer particles than measurement points is singular, so that γ² stands in for what they miss
    and the value is too high. The gradient is *not* that of this value. ``bound`` is ``log_likelihood − kl["f"]``, to
    be compared within a fit: it is **no bound on the evidence**, since with minibatches X lacks most of the data, and
    the KL at some points is below that of whole functions (which is infinite for most networks and processes).

    **Bias.** The spectral estimator finds too small a score where the particles are few for the directions in which
    functions vary, so that q spreads too little there, away from the data first. Many steps are needed, too: that a
    network follows the prior where no data are is learned from the points alone.

    **Scaling.** The likelihood of a minibatch of B of N data points counts N/B times, the KL once at each step, on the
    points of that step: the paper's λ = 1/N, with which full batches and minibatches have one objective but for the
    points. The authors' programs take λ = 1/B; that is ``beta=N / B``.

    Args:
        prior: kernels of a Gaussian process as for :class:`~pyrovae.objectives.GaussianProcessPrior`, such as ``"rbf"``
            or what :func:`~pyrovae.objectives.fit_prior` gives; ``"weights"`` for the model's own prior of weights,
            pushed through the network; or a function of inputs (`n x features`, standardised) and a number S that
            returns `S x n` draws, or `S x n x outputs` where these are several.
        particles: number of functions drawn from q, at least 2.
        points: number of random measurement points; or a function of the minibatch's inputs that returns all
            measurement points, those of the minibatch included if wanted, in the same units.
        box: lowest and highest inputs of the random points, in units of x, as in ``[-3.0, 3.0]`` or
            ``[[0.0, -1.0], [1.0, 1.0]]``; ``None`` for the range of the minibatch, widened by ``margin``.
        margin: share of that range that is added at both ends.
        beta: coefficient of the KL: a number, or a schedule.
        noise: γ, standard deviation of the noise on function values, in standard deviations of y.
        eigenfunctions: of the spectral estimator: their number, or the share of the eigenvalues that they reach.
        ridge: of the spectral estimator.

    Raises:
        ArgumentError: an argument is out of range; and, at the first evaluation, a guide that cannot be
            reparameterized, or a box or length-scales that do not fit x.
        ModelGuideError: at an evaluation, the model is no ``BNN``, or the points or the draws have another shape.

    References:
        Sun et al. 2019, https://arxiv.org/abs/1903.05779; Burt et al. 2020 (on the infinite KL),
        https://arxiv.org/abs/2011.09421.

    Example:
        >>> from pyrovae.guides import MeanField
        >>> from pyrovae.models import BNN
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> model = BNN([1, 20, 1])
        >>> objective = FunctionSpaceELBO({"name": "rbf", "lengthscale": 0.5}, particles=20)
        >>> estimate = objective.estimate(model, MeanField(model), x, torch.sin(3 * x[:, 0]))
        >>> list(estimate.kl), torch.allclose(estimate.bound, estimate.log_likelihood - estimate.kl["f"])
        (['f'], True)
    """

    def __init__(
        self,
        prior: Kernel | Sequence[Kernel] | Sampler = "rbf",
        particles: int = 100,
        points: int | Measure = 20,
        box: Box | None = None,
        margin: float = 0.5,
        beta: Coefficient = 1.0,
        noise: float = 0.01,
        eigenfunctions: int | float = 0.99,
        ridge: float = 0.0,
    ) -> None:
        require_count("particles", particles, 2, ", since the score of q comes from their spread")
        super().__init__(particles)
        self.points = points if callable(points) else require_count("points", points, 0)
        self.margin = _not_negative("margin", margin)
        self.beta = beta if callable(beta) else _not_negative("beta", beta)
        self.noise = require_positive("noise", noise)
        self.ridge = _not_negative("ridge", ridge)
        require_eigenfunctions(eigenfunctions)
        self.eigenfunctions = eigenfunctions
        self.prior: GaussianProcessPrior | Sampler | str
        self.prior = prior if callable(prior) or prior == "weights" else GaussianProcessPrior(prior)
        self.box = None if box is None else _box(box)

    def to(self, device: torch.device | str) -> Objective:
        """Moves the step counter, the box and the prior to a device."""
        self.box = None if self.box is None else self.box.to(device)
        if isinstance(self.prior, nn.Module):
            self.prior.to(device)
        return super().to(device)

    def accept(self, structure: Structure) -> None:
        """Refuses a guide without a pathwise gradient."""
        stuck = [name for name, pathwise in structure.reparameterized.items() if not pathwise]
        if stuck:
            raise ArgumentError(
                f"FunctionSpaceELBO needs a guide that can be reparameterized, and site {stuck[0]!r} cannot; use"
                " MeanField(model) or another Gaussian guide"
            )

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Draws the particles and the points once; see :class:`~pyrovae.objectives.base.Objective`."""
        network = require_network(model, args)
        self.structure(model, guide, *args, **kwargs)
        with _Noted("weights") as drawn:
            weights = self.weights(model, guide, args, kwargs, "both")
        points = self.measurement_points(args[0])
        f = _flat(network, network.outputs(drawn.value, points)).to(points.dtype)
        draws = (
            None
            if isinstance(self.prior, GaussianProcessPrior)
            else self._draws(network, guide, points, f, args, kwargs)
        )
        with torch.autocast(points.device.type, enabled=False):
            kl, surrogate = self._kl(network, points, f, draws)
        log_likelihood = (weights.scale * weights.reconstruction.mean(0)).sum()
        beta = self.beta(self.step) if callable(self.beta) else self.beta
        return Estimate(
            loss=beta * (kl + surrogate - surrogate.detach()) - log_likelihood,
            bound=log_likelihood.detach() - kl,
            log_likelihood=log_likelihood.detach(),
            kl={"f": kl},
        )

    def _kl(self, network: Any, points: Tensor, f: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        """The KL of Gaussians with the moments of q and the prior, and a scalar whose gradient is that of the KL."""
        noisy = f + self.noise * torch.randn_like(f)
        at = noisy.detach()
        if draws is None:
            prior = self._process(network, points, f.shape[-1])
            score_p = -torch.cholesky_solve(at.mT.double(), prior.scale_tril).mT.to(f.dtype)
        else:
            prior, score_p = self._gaussian(draws), self._score(draws + self.noise * torch.randn_like(draws), at)
        value = torch.distributions.kl_divergence(self._gaussian(f.detach()), prior).sum().to(f.dtype)
        return value, (noisy * (self._score(at) - score_p)).sum(-1).mean(-1).sum()

    @torch.no_grad()
    def measurement_points(self, x: Tensor) -> Tensor:
        """The points X at which the KL is taken, in units of x, for a minibatch of inputs `n x *event`."""
        if callable(self.points):
            given = self.points(x)
            if given.shape[1:] != x.shape[1:] or not len(given):
                raise ModelGuideError(
                    f"points returns a tensor of shape {tuple(given.shape)}; for these x it must be (m,"
                    f" {', '.join(map(str, x.shape[1:]))}), one row for each measurement point"
                )
            return given
        if self.box is None:
            low, high = x.amin(0), x.amax(0)
            low, high = low - self.margin * (high - low), high + self.margin * (high - low)
        else:
            low, high = self._bounds(x)
        uniform = torch.rand(self.points, *x.shape[1:], dtype=x.dtype, device=x.device)
        return torch.cat([x, low + (high - low) * uniform])

    def _bounds(self, x: Tensor) -> Tensor:
        assert self.box is not None
        if self.box.shape[1:] not in (torch.Size(), x.shape[1:]):
            raise ArgumentError(
                f"box has ends of shape {tuple(self.box.shape[1:])}; for these x they must be numbers, or of shape"
                f" {tuple(x.shape[1:])}"
            )
        return self.box.to(x)

    @torch.no_grad()
    def _process(self, network: Any, points: Tensor, size: int) -> dist.MultivariateNormal:
        """The law of the noisy values at the points under a Gaussian process."""
        assert isinstance(self.prior, GaussianProcessPrior)
        covariance = self.prior(_inputs(network, points).double())
        outputs = torch.eye(size // covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        covariance = torch.kron(outputs, covariance)
        return self._normal(torch.zeros_like(covariance[..., 0]), covariance)

    @torch.no_grad()
    def _draws(
        self, network: Any, guide: Program, points: Tensor, f: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Values at the points of as many functions of an implicit prior as there are particles, like f."""
        if callable(self.prior):
            draws = self.prior(_inputs(network, points), self.particles)
            wanted = (self.particles, *f.shape[:-2], len(points)) if network.own_data else (self.particles, len(points))
            wanted = wanted if network.response.outputs == 1 else (*wanted, f.shape[-1] // len(points))
            if draws.shape != wanted:
                raise ModelGuideError(f"prior returns draws of shape {tuple(draws.shape)}; it must be {wanted}")
        else:
            nesting = self.structure(network, guide, *args, **kwargs).max_plate_nesting
            with poutine.block(), _Noted("weights") as drawn, pyro.plate("draws", self.particles, dim=-nesting - 1):
                network(*args, **kwargs)
            draws = network.outputs(drawn.value, points)
        return _flat(network, draws).expand_as(f)

    def _score(self, samples: Tensor, at: Tensor | None = None) -> Tensor:
        return spectral_stein(samples, at, eigenfunctions=self.eigenfunctions, ridge=self.ridge)

    def _gaussian(self, draws: Tensor) -> dist.MultivariateNormal:
        """The Gaussian with the mean and covariance of draws `… x S x d`, noise added."""
        draws = draws.double()
        mean = draws.mean(-2, keepdim=True)
        return self._normal(mean.squeeze(-2), (draws - mean).mT @ (draws - mean) / (draws.shape[-2] - 1))

    def _normal(self, mean: Tensor, covariance: Tensor) -> dist.MultivariateNormal:
        eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        factor = torch.linalg.cholesky_ex(covariance + self.noise**2 * eye).L  # not finite where it fails
        return dist.MultivariateNormal(mean, scale_tril=factor, validate_args=False)


class _Noted(Messenger):
    """Takes note of the value of a sample site."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.value: Tensor

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == self.name:
            self.value = msg["value"]


def _inputs(network: Any, points: Tensor) -> Tensor:
    """Standardised inputs of a prior, `n x features` (`members x n x features` with data of their own)."""
    standard = (points - network.x_loc) / network.x_scale
    return standard.movedim(1, 0).flatten(2) if network.own_data else standard.flatten(1)


def _flat(network: Any, out: Tensor) -> Tensor:
    """Function values `K x *members x n (x outputs)` as `*members x K x (outputs · n)`."""
    joined = out if network.response.outputs == 1 else out.mT.flatten(-2)
    return joined.movedim(0, -2)


def _box(given: Box) -> Tensor:
    try:
        box = torch.tensor(given, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"box is {given!r}; it must be [low, high], each one number or one for each column"
        ) from error
    if box.dim() == 0 or len(box) != 2 or not bool((box[0] < box[1]).all() and box.isfinite().all()):
        raise ArgumentError(f"box is {given!r}; it must be [low, high], with low below high everywhere")
    return box


def _not_negative(argument: str, value: Any) -> float:
    return 0.0 if value == 0 and not isinstance(value, bool) else require_positive(argument, value, ", or 0")
