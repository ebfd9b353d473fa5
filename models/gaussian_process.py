"""Gaussian process regression, whose evidence is exact and fits its own hyperparameters."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.gp import kernels
from pyro.contrib.gp.util import conditional
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from scipy import optimize, stats
from torch import Tensor
from torch.func import functional_call

from pyrovae.errors import ArgumentError, DataError, NonFiniteError, require_count, require_positive, unknown_name
from pyrovae.registry import MODELS

__all__ = ["EvidenceMaximum", "GaussianProcess", "maximize_evidence"]

_LOG_RANGE = math.log(1e5)  # either side of the model's own values, within which the evidence is maximised
_LOG_SPREAD = 3.0  # standard deviation of the logarithms of other starts
_KERNELS = {"rbf": kernels.RBF, "matern-3/2": kernels.Matern32, "matern-5/2": kernels.Matern52}


@MODELS.register
class GaussianProcess(PyroModule):
    r"""Regression on a function that is a Gaussian process, with the function integrated out.

    .. math:: f \sim \mathcal{GP}(0, k), \qquad y \mid x \sim \mathcal{N}(0, K + \sigma^2 I), \qquad
        K_{nm} = s \exp\Big(-\frac{1}{2} \sum_i \frac{(x_{ni} - x_{mi})^2}{\ell_i^2}\Big)

    The kernels are Pyro's. Length-scales ℓ, variance s and noise variance σ² are parameters, and the model has no
    latents: its bound under any guide of nothing is the log evidence itself, and a fit of all data in one batch is
    maximum likelihood of type II; :func:`maximize_evidence` does it by a quasi-Newton method from several starts.
    Time is O(n³), memory O(n²).

    Args:
        features: number of columns of the inputs.
        kernel: ``"rbf"`` (as in the formula), ``"matern-3/2"`` or ``"matern-5/2"``.
        ard: whether each column of the inputs has a length-scale of its own.
        lengthscale: ℓ to start from, in units of x.
        variance: s to start from, in squared units of y.
        noise: σ² to start from, in squared units of y.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    References:
        Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, sections 2.2 and 5.4,
        https://gaussianprocess.org/gpml/.

    Example:
        >>> model = GaussianProcess(features=1)
        >>> x = torch.linspace(0, 5, 20)[:, None]
        >>> y = model(x)   # generated
        >>> y.shape, model.log_evidence(x, y).shape
        (torch.Size([20]), torch.Size([]))
        >>> model.predict(torch.tensor([[2.5], [100.0]]), x, y).stddev.shape
        torch.Size([2])
    """

    default_guide: ClassVar[str] = "PointEstimate"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {}}

    def __init__(
        self,
        features: int = 1,
        kernel: str = "rbf",
        ard: bool = False,
        lengthscale: float = 1.0,
        variance: float = 1.0,
        noise: float = 0.1,
    ) -> None:
        super().__init__()
        self.features = require_count("features", features)
        if kernel not in _KERNELS:
            raise unknown_name("kernel", kernel, _KERNELS)
        for name, value in (("lengthscale", lengthscale), ("variance", variance), ("noise", noise)):
            require_positive(name, value)
        scales = torch.full((features,) if ard else (), float(lengthscale))
        self.kernel = _KERNELS[kernel](features, torch.tensor(float(variance)), scales)
        self.noise = PyroParam(torch.tensor(float(noise)), constraints.positive)

    def marginal(self, x: Tensor) -> dist.MultivariateNormal:
        """p(y | x) of `n x features` inputs, f integrated out: event shape (n,)."""
        self._require(x)
        # kernel(x) would read parameters from Pyro's global store, where two processes have the same names
        covariance = self.kernel.forward(x) + self.noise * torch.eye(len(x), dtype=x.dtype, device=x.device)
        return dist.MultivariateNormal(x.new_zeros(len(x)), scale_tril=torch.linalg.cholesky(covariance))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Conditions on ``y``, or generates it when it is ``None``; returns it.

        Args:
            x: A `n x features` tensor of inputs.
            y: A `n` tensor of outputs, or ``None``.

        Raises:
            DataError: the data are of another shape.
        """
        self._require(x, y)
        return pyro.sample("y", self.marginal(x), obs=y)

    def log_evidence(self, x: Tensor, y: Tensor) -> Tensor:
        """``log p(y | x)`` in nats, exactly, all data points together."""
        self._require(x, y)
        return self.marginal(x).log_prob(y)

    def predict(self, new: Tensor, x: Tensor, y: Tensor, *, noise: bool = False) -> dist.Normal:
        """p(f(x*) | x, y) of each new input; its ``mean`` and ``icdf`` are the curve and its bands.

        Args:
            new: A `m x features` tensor x*.
            x: A `n x features` tensor of inputs.
            y: A `n` tensor of outputs.
            noise: whether to predict an observation y* in place of the function f(x*).

        Returns:
            Normals of batch shape (m,); they are correlated, which this leaves out.
        """
        self._require(new)
        self._require(x, y)
        loc, variance = conditional(new, x, self.kernel.forward, y, None, self.marginal(x).scale_tril)
        variance = variance.clamp(min=torch.finfo(variance.dtype).tiny)  # rounding, at the data without noise
        return dist.Normal(loc, (variance + self.noise if noise else variance).sqrt())

    def _require(self, x: Tensor, y: Tensor | None = None) -> None:
        if x.dim() != 2 or x.shape[1] != self.features:
            raise DataError(f"x has shape {tuple(x.shape)}; this model takes inputs of shape (n, {self.features})")
        if y is not None and y.shape != x.shape[:1]:
            raise DataError(f"y has shape {tuple(y.shape)}; it must be ({len(x)},), one number for each row of x")


@dataclass(frozen=True)
class EvidenceMaximum:
    """What :func:`maximize_evidence` found, besides the parameters, which the model holds.

    Args:
        log_evidence: at the maximum, in nats, all data points together.
        estimate: of ``"lengthscale"``, ``"variance"`` and ``"noise"``, in their own units.
        log_error: standard error of the logarithm of each, from the curvature of the log evidence (NaN where it has
            no maximum, as along a parameter that stays at the edge of its range).
    """

    log_evidence: float
    estimate: dict[str, Tensor]
    log_error: dict[str, Tensor]

    def interval(self, name: str, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """The ends of the asymptotic confidence interval of a hyperparameter, in its own units.

        Args:
            name: ``"lengthscale"``, ``"variance"`` or ``"noise"``.
            level: probability with which such intervals cover the truth, for many data.

        Raises:
            ArgumentError: the name is unknown, or the level is not between 0 and 1.
        """
        if name not in self.estimate:
            raise unknown_name("hyperparameter", name, self.estimate)
        if not 0 < level < 1:
            raise ArgumentError(f"level is {level!r}; it must be between 0 and 1")
        factor = (float(stats.norm.ppf(0.5 + level / 2)) * self.log_error[name]).exp()
        return self.estimate[name] / factor, self.estimate[name] * factor


def maximize_evidence(
    model: GaussianProcess, x: Tensor, y: Tensor, *, restarts: int = 3, iterations: int = 500, seed: int = 0
) -> EvidenceMaximum:
    r"""Sets the hyperparameters of a Gaussian process where the evidence is highest (ML-II), in place.

    .. math:: \max_{\ell, s, \sigma^2} \log \mathcal{N}(y \mid 0, K + \sigma^2 I)

    L-BFGS over their logarithms, in float64; the evidence has several local maxima, so it starts at the model's own
    values and then elsewhere. Each stays within a factor of 10⁵ of the model's own values.

    Args:
        model: the process; it takes the best values found.
        x: A `n x features` tensor of inputs.
        y: A `n` tensor of outputs.
        restarts: number of starts; all but the first are the first times log-normal factors.
        iterations: the largest number of iterations from each start.
        seed: of the other starts.

    Raises:
        ArgumentError: an argument is out of range.
        DataError: the data are of another shape, or not finite.
        NonFiniteError: the covariance is singular wherever the method starts.

    References:
        MacKay 1992, https://doi.org/10.1162/neco.1992.4.3.415; Rasmussen & Williams 2006, section 5.4.1,
        https://gaussianprocess.org/gpml/.

    Example:
        >>> model = GaussianProcess()
        >>> x = torch.linspace(0, 10, 30)[:, None]
        >>> found = maximize_evidence(model, x, (2 * x[:, 0]).sin() + 0.1 * (37 * x[:, 0]).cos())
        >>> low, high = found.interval("lengthscale")
        >>> bool(low < model.kernel.lengthscale < high)
        True
    """
    require_count("restarts", restarts)
    require_count("iterations", iterations)
    model._require(x, y)
    if not (x.isfinite().all() and y.isfinite().all()):
        raise DataError("the data are not finite everywhere. Drop or impute what is missing.")
    evidence = _LogEvidence(copy.deepcopy(model).double(), x.double(), y.double())
    own = torch.nn.utils.parameters_to_vector(evidence.parameters()).detach()

    def value_and_gradient(logs: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.as_tensor(logs).to(own).requires_grad_()
        try:
            value = -evidence.at(point)
        except torch.linalg.LinAlgError:  # the covariance is singular to working precision
            return math.inf, np.zeros_like(logs)
        (gradient,) = torch.autograd.grad(value, point)
        return float(value.detach()), gradient.cpu().numpy()

    generator = np.random.default_rng(seed)
    centre = own.cpu().numpy()
    starts = [centre, *generator.normal(centre, _LOG_SPREAD, (restarts - 1, len(centre)))]
    bounds = np.stack([centre - _LOG_RANGE, centre + _LOG_RANGE], -1)
    options = {"maxiter": iterations, "ftol": 1e-14, "gtol": 1e-7}
    ends = [
        optimize.minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        for start in starts
    ]
    end = min(ends, key=lambda end: end.fun)
    if not math.isfinite(end.fun):
        raise NonFiniteError(
            f"the covariance of y is singular at each of {restarts} starts. Build the model with a larger noise, or"
            " a shorter lengthscale."
        )
    best = torch.as_tensor(end.x).to(own)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), evidence.unpacked(best).values(), strict=True):
            parameter.copy_(value)
    hessian = torch.autograd.functional.hessian(lambda point: -evidence.at(point), best)
    errors = evidence.unpacked(_standard_errors(hessian))
    estimate = {_own_name(name): value.exp() for name, value in evidence.unpacked(best).items()}
    return EvidenceMaximum(float(evidence.at(best)), estimate, {_own_name(name): v for name, v in errors.items()})


class _LogEvidence(torch.nn.Module):
    """The log evidence as a function of the logarithms of all hyperparameters, which are what the process learns."""

    def __init__(self, process: GaussianProcess, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.process, self.x, self.y = process, x, y

    def forward(self) -> Tensor:
        return self.process.log_evidence(self.x, self.y)

    def unpacked(self, vector: Tensor) -> dict[str, Tensor]:
        """The entries of a vector, for each parameter those that are its own."""
        shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
        parts = vector.split([shape.numel() for shape in shapes.values()])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def at(self, vector: Tensor) -> Tensor:
        """The log evidence at these values."""
        return functional_call(self, self.unpacked(vector), ())


def _own_name(parameter: str) -> str:
    return parameter.rpartition(".")[2].removesuffix("_unconstrained")


def _standard_errors(hessian: Tensor) -> Tensor:
    """Square roots of the diagonal of the inverse; NaN where the matrix is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return torch.full_like(hessian[0], math.nan)
    return torch.cholesky_inverse(factor).diagonal().sqrt()
