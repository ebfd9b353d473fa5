"""The linear-Gaussian state-space model, all of it in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.distributions import transform_to

from pyrovae.errors import ArgumentError, require_count, unknown_name
from pyrovae.models.markov import StateSpaceModel, require_series
from pyrovae.registry import MODELS

__all__ = ["Gaussians", "LinearGaussianStateSpace"]

_TRIL = transform_to(constraints.lower_cholesky)  # from the matrices that are learned to Cholesky factors


class Gaussians(NamedTuple):
    """Gaussian laws of the state at each time.

    Args:
        mean: `n x T x d`.
        covariance: `T x d x d`, the same for all series.
    """

    mean: Tensor
    covariance: Tensor


class _Filtered(NamedTuple):
    """What the filter has found at each of T times; a mean is `n x d x (1 + c)`, affine in c unknown initial states."""

    means: list[Tensor]
    covariances: list[Tensor]
    predicted_means: list[Tensor]
    predicted_covariances: list[Tensor]
    quadratics: list[Tensor]  # of all innovations so far, n x (1 + c) x (1 + c)
    log_determinant: Tensor  # of the covariances of all innovations


@MODELS.register
class LinearGaussianStateSpace(StateSpaceModel):
    r"""Linear state-space model with Gaussian noise: exact filter, smoother, likelihood and forecasts.

    .. math:: z_1 \sim \mathcal{N}(m, P), \qquad z_{t+1} = F z_t + \eta_t, \quad \eta_t \sim \mathcal{N}(0, Q), \qquad
        x_t = H z_t + \varepsilon_t, \quad \varepsilon_t \sim \mathcal{N}(0, R)

    One data point is a series, `T x p`; all series have the same length, which may change from call to call. With
    ``diffuse=True`` the initial state has the flat prior of density 1 in place of N(m, P), and the likelihood is
    ``∫ p(x | z_1) dz_1``, the limit of ``p(x) (2π κ)^(d/2)`` for P = κ I (the diffuse log-likelihood of Durbin &
    Koopman, which leaves out the 2π here, is smaller by d/2 log 2π); such a model conditions on series but cannot
    generate them, so that a guide needs a start: ``init_loc_fn=init_to_value(values={"z": model.smooth(x).mean})``
    (Pyro's). The site of the states is ``"z"``, `n x T x d`.

    Args:
        transition: F, `d x d` numbers.
        observation: H, `p x d` numbers.
        state_covariance: Q, `d x d` numbers, positive definite.
        observation_covariance: R, `p x p` numbers, positive definite.
        initial_mean: m, `d` numbers; ``None`` for zeros.
        initial_covariance: P, `d x d` numbers; ``None`` for the identity.
        diffuse: whether nothing is known of the initial state.
        learn: names of the arguments that are parameters, of ``"transition"``, ``"observation"``,
            ``"state_covariance"`` and ``"observation_covariance"``; what is given is then where they start.
        steps: length of the series that are generated.

    Raises:
        ArgumentError: an argument is unknown, or a matrix has another shape or is not positive definite.

    References:
        Durbin & Koopman 2012, Time Series Analysis by State Space Methods, sections 4 and 7,
        https://doi.org/10.1093/acprof:oso/9780199641178.001.0001; de Jong 1991 (the diffuse filter),
        https://doi.org/10.1214/aos/1176348139.

    Example:
        >>> model = LinearGaussianStateSpace.local_level(state_variance=0.1, observation_variance=1.0)
        >>> x = model(size=3)
        >>> x.shape, model.log_evidence(x).shape, model.smooth(x).mean.shape
        (torch.Size([3, 100, 1]), torch.Size([3]), torch.Size([3, 100, 1]))
        >>> model.forecast(model.last_state(x, draws=10), steps=5).shape
        torch.Size([10, 3, 5, 1])
    """

    default_guide: ClassVar[str] = "SparsePrecision"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {}}

    transition: Tensor
    observation: Tensor
    state_raw_tril: Tensor
    observation_raw_tril: Tensor

    def __init__(
        self,
        transition: Sequence[Sequence[float]],
        observation: Sequence[Sequence[float]],
        state_covariance: Sequence[Sequence[float]],
        observation_covariance: Sequence[Sequence[float]],
        initial_mean: Sequence[float] | None = None,
        initial_covariance: Sequence[Sequence[float]] | None = None,
        diffuse: bool = False,
        learn: Sequence[str] = ("state_covariance", "observation_covariance"),
        steps: int = 100,
    ) -> None:
        super().__init__(len(transition), len(observation), steps)
        self.diffuse = diffuse
        d, p = self.latent_dim, self.features
        self.learn = tuple(learn)
        matrices = {
            "transition": _matrix("transition", transition, (d, d)),
            "observation": _matrix("observation", observation, (p, d)),
            "state_covariance": _TRIL.inv(_factor("state_covariance", state_covariance, d)),
            "observation_covariance": _TRIL.inv(_factor("observation_covariance", observation_covariance, p)),
        }
        for name in learn:
            if name not in matrices:
                raise unknown_name("argument in learn:", name, matrices)
        for name, value in matrices.items():
            attribute = name.replace("covariance", "raw_tril")
            if name in learn:
                setattr(self, attribute, nn.Parameter(value))
            else:
                self.register_buffer(attribute, value, persistent=False)
        mean = torch.zeros(d) if initial_mean is None else _matrix("initial_mean", initial_mean, (d,))
        identity = torch.eye(d).tolist()
        factor = _factor("initial_covariance", identity if initial_covariance is None else initial_covariance, d)
        self.register_buffer("initial_mean", mean, persistent=False)
        self.register_buffer("initial_tril", factor, persistent=False)

    @classmethod
    def local_level(
        cls, state_variance: float = 1.0, observation_variance: float = 1.0, **arguments: Any
    ) -> LinearGaussianStateSpace:
        """A random walk observed with noise: F = H = 1, Q = ``state_variance``, R = ``observation_variance``.

        Args:
            state_variance: of a step of the level, in squared units of x.
            observation_variance: of the noise.
            **arguments: the others of the class.
        """
        return cls([[1.0]], [[1.0]], [[state_variance]], [[observation_variance]], **arguments)

    @property
    def state_tril(self) -> Tensor:
        """The Cholesky factor of Q, `d x d`."""
        tril: Tensor = _TRIL(self.state_raw_tril)
        return tril

    @property
    def observation_tril(self) -> Tensor:
        """The Cholesky factor of R, `p x p`."""
        tril: Tensor = _TRIL(self.observation_raw_tril)
        return tril

    def learned(self) -> dict[str, Tensor]:
        """The arguments that are parameters, by name; covariances, not their factors."""
        values = {
            "transition": self.transition,
            "observation": self.observation,
            "state_covariance": self.state_tril @ self.state_tril.mT,
            "observation_covariance": self.observation_tril @ self.observation_tril.mT,
        }
        return {name: values[name].detach() for name in self.learn}

    def initial(self) -> TorchDistribution:
        """p(z_1): batch shape (), event shape (d,)."""
        if self.diffuse:
            return dist.ImproperUniform(constraints.real_vector, torch.Size(), self.initial_mean.shape)
        return dist.MultivariateNormal(self.initial_mean, scale_tril=self.initial_tril)

    def transition_law(self, z: Tensor, inputs: Tensor | None) -> TorchDistribution:
        """p(z_t | z_{t−1}) for states `*batch x s x d`: batch shape `*batch x s`, event shape (d,)."""
        return dist.MultivariateNormal(z @ self.transition.mT, scale_tril=self.state_tril)

    def observe(self, z: Tensor) -> TorchDistribution:
        """p(x | z) for states `*batch x T x d`: batch shape `*batch`, event shape (T, p)."""
        return dist.MultivariateNormal(z @ self.observation.mT, scale_tril=self.observation_tril).to_event(1)

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Conditions on ``x``, or generates ``size`` series when it is ``None``; returns the series.

        Args:
            x: A `n x T x p` tensor, or ``None``.
            size: number of series to generate.

        Raises:
            DataError: ``x`` is not a batch of series of p variables.
            ArgumentError: series are to be generated by a diffuse model.
        """
        if x is None and self.diffuse:
            raise ArgumentError("diffuse=True has no initial state to generate from; give initial_covariance instead")
        return super().forward(x, size=size)

    def marginal(self, steps: int) -> dist.GaussianHMM:
        """p(x_{1:T}), the states integrated out by a parallel scan: batch shape (), event shape (T, p).

        Raises:
            ArgumentError: the model is diffuse, so that it has no such law.
        """
        if self.diffuse:
            raise ArgumentError("diffuse=True has no law of the series; log_evidence gives the diffuse likelihood")
        d = self.latent_dim
        # Pyro's model makes a step before the first observation: the first one forgets all and draws z_1.
        F = torch.cat([self.transition.new_zeros(1, d, d), self.transition.expand(steps - 1, d, d)])
        mean = torch.cat([self.initial_mean.unsqueeze(0), self.initial_mean.new_zeros(steps - 1, d)])
        tril = torch.cat([self.initial_tril.unsqueeze(0), self.state_tril.expand(steps - 1, d, d)])
        start = dist.MultivariateNormal(torch.zeros_like(self.initial_mean), torch.eye(d).to(self.initial_mean))
        noise = dist.MultivariateNormal(self.initial_mean.new_zeros(self.features), scale_tril=self.observation_tril)
        step = dist.MultivariateNormal(mean, scale_tril=tril)
        return dist.GaussianHMM(start, F.mT, step, self.observation.mT, noise, duration=steps)

    def log_evidence(self, x: Tensor) -> Tensor:
        """``log p(x)`` in nats of each series, `n`, exactly (the diffuse likelihood where the model is diffuse)."""
        require_series(x, self.features)
        if not self.diffuse:
            found: Tensor = self.marginal(x.shape[1]).log_prob(x)
            return found
        run = self._filter(x)
        residual, precision, _ = _solved(run.quadratics[-1])
        constant = (x[0].numel() - self.latent_dim) * math.log(2 * math.pi)
        return -0.5 * (constant + run.log_determinant + torch.logdet(precision) + residual)

    def filter(self, x: Tensor) -> Gaussians:
        """p(z_t | x_{1:t}); not a number while a diffuse initial state is not yet determined by the data."""
        run = self._filter(x)
        laws = [_resolved(*parts) for parts in zip(run.means, run.covariances, run.quadratics, strict=True)]
        return Gaussians(torch.stack([law[0] for law in laws], 1), torch.stack([law[1] for law in laws]))

    def smooth(self, x: Tensor) -> Gaussians:
        """p(z_t | x_{1:T}), by the recursion of Rauch, Tung & Striebel."""
        run = self._filter(x)
        means, covariances = [run.means[-1]], [run.covariances[-1]]
        for t in range(x.shape[1] - 2, -1, -1):
            after = run.predicted_covariances[t + 1]
            gain = torch.linalg.solve(after, self.transition @ run.covariances[t]).mT
            means.append(run.means[t] + gain @ (means[-1] - run.predicted_means[t + 1]))
            covariances.append(run.covariances[t] + gain @ (covariances[-1] - after) @ gain.mT)
        last = run.quadratics[-1]
        laws = [
            _resolved(mean, covariance, last) for mean, covariance in zip(means[::-1], covariances[::-1], strict=True)
        ]
        return Gaussians(torch.stack([law[0] for law in laws], 1), torch.stack([law[1] for law in laws]))

    @torch.no_grad()
    def last_state(self, x: Tensor, draws: int = 1000) -> dict[str, Tensor]:
        """Exact draws of the last state given each series, as :meth:`forecast` takes them: `draws x n x 1 x d`."""
        now = self.filter(x)
        last = dist.MultivariateNormal(now.mean[:, -1], covariance_matrix=now.covariance[-1])
        return {"z": last.sample((require_count("draws", draws),)).unsqueeze(-2)}

    def maximize_likelihood(self, x: Tensor, iterations: int = 500) -> Tensor:
        """Sets the parameters to those of maximum likelihood, in float64, by L-BFGS; returns ``log p(x)``, summed.

        The model is left in float64. Parameters that start within a few orders of magnitude of the estimate suffice.

        Args:
            x: A `n x T x p` tensor.
            iterations: at most.
        """
        self.double()
        x = x.double()
        search = torch.optim.LBFGS(
            list(self.parameters()),
            max_iter=iterations,
            tolerance_grad=1e-9,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            search.zero_grad()
            value = -self.log_evidence(x).sum()
            value.backward()
            return value

        search.step(loss)
        with torch.no_grad():
            return self.log_evidence(x).sum()

    def _filter(self, x: Tensor) -> _Filtered:
        """Kalman's filter, the state affine in an unknown initial state where that is diffuse (de Jong 1991)."""
        require_series(x, self.features)
        d, unknown = self.latent_dim, self.latent_dim * self.diffuse
        F, H = self.transition, self.observation
        Q, R = self.state_tril @ self.state_tril.mT, self.observation_tril @ self.observation_tril.mT
        eye = torch.eye(d).to(F)
        mean, covariance = self.initial_mean.unsqueeze(-1), self.initial_tril @ self.initial_tril.mT
        if self.diffuse:
            mean, covariance = torch.cat([torch.zeros_like(mean), eye], dim=1), torch.zeros_like(eye)
        mean = mean.expand(len(x), d, 1 + unknown)
        run = _Filtered([], [], [], [], [], x.new_zeros(()))
        quadratic, log_determinant = x.new_zeros(()), x.new_zeros(())
        for value in x.unbind(1):
            run.predicted_means.append(mean)
            run.predicted_covariances.append(covariance)
            innovation = nn.functional.pad(value.unsqueeze(-1), (0, unknown)) - H @ mean
            spread = torch.linalg.cholesky(H @ covariance @ H.mT + R)
            white = torch.linalg.solve_triangular(spread, innovation, upper=False)
            gain = torch.linalg.solve_triangular(spread, H @ covariance, upper=False).mT
            mean, covariance = mean + gain @ white, covariance - gain @ gain.mT
            run.means.append(mean)
            run.covariances.append(covariance)
            quadratic = quadratic + white.mT @ white
            run.quadratics.append(quadratic)
            log_determinant = log_determinant + 2 * spread.diagonal().log().sum()
            mean, covariance = F @ mean, F @ covariance @ F.mT + Q
        return run._replace(log_determinant=log_determinant)


def _solved(quadratic: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares for the unknown initial state: the residual sum `n`, its precision and the state, `n x c`."""
    precision, linear = quadratic[..., 1:, 1:], quadratic[..., 1:, :1]
    state = -torch.linalg.solve_ex(precision, linear)[0]
    residual = quadratic[..., 0, 0] + (linear * state).sum((-1, -2))
    return residual, precision, state.squeeze(-1)


def _resolved(mean: Tensor, covariance: Tensor, quadratic: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `n x d` and covariance `d x d` of the state, the unknown initial state estimated from the data."""
    loadings = mean[..., 1:]
    if not loadings.shape[-1]:
        return mean.squeeze(-1), covariance
    _, precision, state = _solved(quadratic)
    if torch.linalg.matrix_rank(precision[0], hermitian=True) < len(precision[0]):
        return torch.full_like(mean[..., 0], math.nan), torch.full_like(covariance, math.nan)
    spread = loadings[0] @ torch.linalg.solve(precision[0], loadings[0].mT)
    return mean[..., 0] + (loadings @ state.unsqueeze(-1)).squeeze(-1), covariance + spread


def _matrix(argument: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    matrix = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if matrix.shape != shape or not bool(matrix.isfinite().all()):
        raise ArgumentError(f"{argument} has shape {tuple(matrix.shape)}; it must hold {shape} finite numbers")
    return matrix.clone()


def _factor(argument: str, value: Any, size: int) -> Tensor:
    """The Cholesky factor of a covariance matrix."""
    matrix = _matrix(argument, value, (size, size))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed) or not torch.equal(matrix, matrix.mT):
        raise ArgumentError(f"{argument} is {value!r}; it must be a symmetric positive definite matrix")
    return factor
