"""Priors of functions: Gaussian processes whose covariance is a sum of kernels, fixed or fitted beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, ModelGuideError, require_positive
from pyrovae.registry import named
from pyrovae.structure import Program

__all__ = ["KERNELS", "GaussianProcessPrior", "Kernel", "fit_prior", "require_network"]

Kernel = str | Mapping[str, Any]


class _Stationary(nn.Module):
    """A kernel of the distance between inputs, each divided by its length-scale.

    Args:
        variance: of the function's values.
        lengthscale: one number, or one for each column of the inputs.
    """

    lengthscale: Tensor

    def __init__(self, variance: float = 1.0, lengthscale: float | Sequence[float] = 1.0) -> None:
        super().__init__()
        self.variance = require_positive("variance of a kernel", variance)
        each = [lengthscale] if isinstance(lengthscale, int | float) else list(lengthscale)
        scales = [require_positive("lengthscale of a kernel", scale) for scale in each]
        self.register_buffer("lengthscale", torch.tensor(scales), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.scaled(x)
        return self.variance * self.of(torch.cdist(scaled, scaled, compute_mode="donot_use_mm_for_euclid_dist"))

    def scaled(self, x: Tensor) -> Tensor:
        """Columns divided by their length-scales."""
        if len(self.lengthscale) not in (1, x.shape[-1]):
            raise ArgumentError(
                f"lengthscale has {len(self.lengthscale)} numbers; these inputs have {x.shape[-1]} columns: give one"
                " for each, or one number"
            )
        return x / self.lengthscale

    def of(self, distance: Tensor) -> Tensor:
        """The correlation at a distance."""
        raise NotImplementedError


class _RBF(_Stationary):
    def of(self, distance: Tensor) -> Tensor:
        return (-0.5 * distance.square()).exp()


class _Matern32(_Stationary):
    def of(self, distance: Tensor) -> Tensor:
        scaled = math.sqrt(3.0) * distance
        return (1.0 + scaled) * (-scaled).exp()


class _Matern52(_Stationary):
    def of(self, distance: Tensor) -> Tensor:
        scaled = math.sqrt(5.0) * distance
        return (1.0 + scaled + scaled.square() / 3.0) * (-scaled).exp()


class _Periodic(_Stationary):
    """``s exp(−2 Σ_i sin²(π (x_i − x'_i) / p) / ℓ_i²)``, with the period p as ``period``."""

    def __init__(self, period: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.period = require_positive("period of a kernel", period)

    def forward(self, x: Tensor) -> Tensor:
        waves = (math.pi / self.period * (x.unsqueeze(-2) - x.unsqueeze(-3))).sin()
        return self.variance * (-2.0 * self.scaled(waves).square().sum(-1)).exp()


class _Linear(nn.Module):
    """``s (c + xᵀx')``, with c as ``offset``: a line whose value at 0 has variance s c."""

    def __init__(self, variance: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.variance = require_positive("variance of a kernel", variance)
        self.offset = 0.0 if offset == 0 else require_positive("offset of a kernel", offset, ", or 0")

    def forward(self, x: Tensor) -> Tensor:
        return self.variance * (self.offset + x @ x.mT)


KERNELS: dict[str, type[nn.Module]] = {
    "rbf": _RBF,
    "matern-3/2": _Matern32,
    "matern-5/2": _Matern52,
    "periodic": _Periodic,
    "linear": _Linear,
}


class GaussianProcessPrior(nn.Module):
    """A Gaussian process with mean 0, whose covariance is a sum of kernels.

    Args:
        kernels: a name in ``KERNELS``; a dictionary of a ``"name"`` and options (``variance``; ``lengthscale``, one
            number or a list of one for each column; ``period``; ``offset`` of a ``"linear"`` one); or a list of these,
            to be summed.

    Raises:
        ArgumentError: an unknown name or option, or one out of range.

    Example:
        >>> prior = GaussianProcessPrior([{"name": "rbf", "lengthscale": 0.5}, "linear"])
        >>> prior(torch.tensor([[0.0], [1.0]]))
        tensor([[1.0000, 0.1353],
                [0.1353, 2.0000]])
    """

    def __init__(self, kernels: Kernel | Sequence[Kernel]) -> None:
        super().__init__()
        each = [kernels] if isinstance(kernels, str | Mapping) else list(kernels)
        if not each:
            raise ArgumentError(f"prior is an empty list; there are these kernels: {', '.join(KERNELS)}")
        self.kernels = nn.ModuleList(named("kernel", given, KERNELS) for given in each)

    def forward(self, x: Tensor) -> Tensor:
        """The covariance of the values at inputs `… x n x features`, `… x n x n`."""
        return torch.stack([kernel(x) for kernel in self.kernels]).sum(0)


def fit_prior(model: Program, x: Tensor, y: Tensor, kernel: str = "rbf", ard: bool = False) -> dict[str, Any]:
    """The Gaussian-process prior whose evidence of the training data is highest, as the paper fits it beforehand.

    Its noise is not part of the prior: the network's likelihood has its own. Time is O(n³): give a part of many data.

    Args:
        model: a :class:`~pyrovae.models.BNN`, standardised to the data (``model.standardize(x, y)``).
        x: inputs, `n x features`.
        y: targets of a regression, `n`.
        kernel: ``"rbf"``, ``"matern-3/2"`` or ``"matern-5/2"``.
        ard: whether each column of x has a length-scale of its own.

    Returns:
        The argument ``prior`` of :class:`FunctionSpaceELBO`.

    Raises:
        ArgumentError: the kernel is unknown.
        DataError: the data are of another shape, or not finite.

    Example:
        >>> from pyrovae.models import BNN
        >>> x = torch.linspace(-2, 2, 30)[:, None]
        >>> model = BNN([1, 10, 1])
        >>> sorted(fit_prior(model, x, torch.sin(3 * x[:, 0])))
        ['lengthscale', 'name', 'variance']
    """
    from pyrovae.models.gaussian_process import GaussianProcess, maximize_evidence  # models import objectives

    network = require_network(model, (x,))
    process = GaussianProcess(x.shape[-1], kernel, ard)
    found = maximize_evidence(process, (x - network.x_loc) / network.x_scale, (y - network.y_loc) / network.y_scale)
    return {"name": kernel, **{name: found.estimate[name].tolist() for name in ("variance", "lengthscale")}}


def require_network(model: Any, args: tuple[Any, ...]) -> Any:
    """The model, checked."""
    from pyrovae.models.bnn import BNN  # models import objectives

    if not isinstance(model, BNN):
        raise ModelGuideError(f"FunctionSpaceELBO needs a BNN, whose functions have values; it was given {model!r}")
    if not args:
        raise ModelGuideError("FunctionSpaceELBO needs the inputs as the first argument: estimate(model, guide, x, y)")
    return model
