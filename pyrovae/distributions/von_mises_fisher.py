"""The uniform and the von Mises–Fisher distribution on the unit sphere, in any number of dimensions."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.kl import register_kl
from torch.nn.functional import normalize

from pyrovae.errors import ArgumentError, require_count

__all__ = ["SphericalUniform", "VonMisesFisher"]


def _log_area(n: int) -> float:
    """Log of the surface measure of the unit sphere in R^n."""
    return math.log(2.0) + n / 2 * math.log(math.pi) - math.lgamma(n / 2)


def _check_dim(name: str, n: object) -> None:
    require_count(name, n, 2, ", the number of dimensions of the space R^n that the sphere lies in")


class SphericalUniform(TorchDistribution):
    r"""Uniform distribution on the unit sphere of R^n.

    .. math:: p(x) = \frac{\Gamma(n/2)}{2 \pi^{n/2}}, \qquad \lVert x \rVert = 1

    Densities are with respect to the surface measure, in nats.

    Args:
        dim: number n of dimensions of the ambient space, at least 2.
        batch_shape: shape of a batch of independent copies.
        dtype: of the samples; ``None`` for torch's default.
        device: of the samples; ``None`` for torch's default.
        validate_args: whether to check values.

    Raises:
        ArgumentError: ``dim`` is out of range.

    Example:
        >>> p = SphericalUniform(3)
        >>> p.sample((5,)).shape
        torch.Size([5, 3])
        >>> bool(torch.isclose(p.log_prob(torch.tensor([0.0, 0.0, 1.0])).exp(), torch.tensor(0.25 / math.pi)))
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.sphere
    has_rsample = True

    def __init__(
        self,
        dim: int,
        batch_shape: Any = torch.Size(),  # noqa: B008
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        _check_dim("dim", dim)
        self._like = torch.zeros((), dtype=dtype, device=device)
        super().__init__(torch.Size(batch_shape), torch.Size([dim]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SphericalUniform:
        """A distribution of the given batch shape."""
        new = self._get_checked_instance(SphericalUniform, _instance)
        new._like = self._like
        super(SphericalUniform, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Expectation in R^n, zero: `*batch x n`."""
        return self._like.expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, 1/n: `*batch x n`."""
        return self.mean + 1.0 / self.event_shape[0]

    def entropy(self) -> Tensor:
        """Log of the sphere's area, `*batch`, in nats."""
        return self._like.expand(self.batch_shape) + _log_area(self.event_shape[0])

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Directions of standard Gaussian vectors, `*sample_shape x *batch x n`."""
        shape = self._extended_shape(sample_shape)
        return normalize(torch.randn(shape, dtype=self._like.dtype, device=self._like.device), dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at unit vectors ``value``, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.new_full(shape, -_log_area(self.event_shape[0]))


class VonMisesFisher(TorchDistribution):
    r"""Von Mises–Fisher distribution on the unit sphere of R^n: concentrated about a direction, and alike around it.

    .. math::
        p(x) = \frac{e^{\kappa \mu^\top x}}{|S^{n-1}| \, M_n(\kappa)}, \qquad
        M_n(\kappa) = \Gamma(\tfrac n2) \left(\tfrac 2\kappa\right)^{n/2-1} I_{n/2-1}(\kappa)

    Densities are with respect to the surface measure, in nats. Samples have pathwise gradients: the angle to ``loc``
    is drawn by inverting its distribution function (to 1e-10 in probability for n up to 1000, κ up to 1e6) and
    differentiated implicitly in κ; a change of ``loc`` turns the sample by the smallest rotation that does it. The
    log-normaliser has a relative error below 1e-12. Both are computed in double precision whatever the data type,
    by a fixed sequence of operations, so that steps with them can be compiled.

    Args:
        loc: A `*batch x n` tensor of unit vectors μ, n at least 2.
        concentration: A `*batch` tensor κ ≥ 0 (broadcast against ``loc``); 0 is the uniform distribution.
        validate_args: whether to check arguments and values.

    Raises:
        ArgumentError: a shape does not fit, or, where arguments are checked, a value is not allowed.

    References:
        Mardia & Jupp 2000, "Directional statistics", sections 9.3 and 10.3, https://doi.org/10.1002/9780470316979;
        Figurnov et al. 2018 (implicit reparameterization), https://arxiv.org/abs/1805.08498.

    Example:
        >>> q = VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(10.0))
        >>> q.rsample((5,)).shape
        torch.Size([5, 3])
        >>> kl = torch.distributions.kl_divergence(q, SphericalUniform(3))
        >>> bool(torch.isclose(kl, torch.tensor(20.0).log() - 1.0))   # κ coth κ − 1 + log(κ / sinh κ)
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "loc": constraints.sphere,
        "concentration": constraints.nonnegative,
    }
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor, validate_args: bool | None = None) -> None:
        if loc.dim() < 1:
            raise ArgumentError("loc is a scalar; it must be a `*batch x n` tensor of unit vectors")
        n = loc.shape[-1]
        _check_dim("the last dimension of loc", n)
        try:
            batch = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        except RuntimeError:
            raise ArgumentError(
                f"concentration has shape {tuple(concentration.shape)}, which does not broadcast against the batch"
                f" shape {tuple(loc.shape[:-1])} of loc; it must have one number for each unit vector"
            ) from None
        log_m, cosine = _log_normaliser(concentration.double(), n)
        self.loc = loc.expand(*batch, n)
        self.concentration, self._log_m, self._cosine = (
            tensor.expand(batch) for tensor in (concentration, log_m, cosine)
        )
        try:
            super().__init__(batch, torch.Size([n]), validate_args=validate_args)
        except ValueError as error:
            raise ArgumentError(
                f"{error}. Each loc must have norm 1 (torch.nn.functional.normalize gives it) and each concentration"
                " must be at least 0."
            ) from None

    def expand(self, batch_shape: Any, _instance: Any = None) -> VonMisesFisher:
        """A distribution of the given batch shape with the same parameters."""
        new = self._get_checked_instance(VonMisesFisher, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch_shape + self.event_shape)
        for name in ("concentration", "_log_m", "_cosine"):
            setattr(new, name, getattr(self, name).expand(batch_shape))
        super(VonMisesFisher, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean_cosine(self) -> Tensor:
        r"""Expected cosine to ``loc``, :math:`A_n(\kappa) = I_{n/2}(\kappa) / I_{n/2-1}(\kappa)`: `*batch`."""
        return self._cosine.to(self.loc.dtype)

    @property
    def mean(self) -> Tensor:
        """Expectation in R^n, shorter than 1: `*batch x n`."""
        return self.mean_cosine.unsqueeze(-1) * self.loc

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate: `*batch x n`."""
        n, kappa, along = self.event_shape[0], self.concentration.double(), self._cosine
        across = torch.where(kappa > 0, along / kappa.clamp(min=1e-300), 1.0 / n)  # E (v·x)² for unit v ⊥ loc
        spread = 1.0 - n * across - along.square()
        return (across.unsqueeze(-1) + spread.unsqueeze(-1) * self.loc.double().square()).to(self.loc.dtype)

    def entropy(self) -> Tensor:
        """Differential entropy with respect to the surface measure, `*batch`, in nats."""
        return _log_area(self.event_shape[0]) - _kl_to_uniform(self)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at unit vectors ``value``, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        distance = (value - self.loc).square().sum(-1)  # 2 (1 − cos θ): accurate near loc, where the cosine is not
        log_m = self._log_m.to(self.loc.dtype)
        return -self.concentration * distance / 2 - log_m - _log_area(self.event_shape[0])

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Unit vectors with pathwise gradients, `*sample_shape x *batch x n`."""
        shape, n = self._extended_shape(sample_shape), self.event_shape[0]
        loc = self.loc.detach()
        u = torch.rand(shape[:-1], dtype=torch.float64, device=loc.device)
        y = _colatitude(u, self.concentration.double(), self._log_m, n).unsqueeze(-1)
        across = torch.randn(shape, dtype=loc.dtype, device=loc.device)
        for _ in range(2):  # what rounding leaves along loc after the first time goes the second time
            across = normalize(across - (across * loc).sum(-1, keepdim=True) * loc, dim=-1)
        x = -y.tanh().to(loc.dtype) * loc + (1.0 / y.cosh()).to(loc.dtype) * across
        # The smallest rotation from loc to self.loc, to first order: of value zero, it carries the gradient of loc.
        held = x.detach()
        return x + self.loc * (loc * held).sum(-1, keepdim=True) - loc * (self.loc * held).sum(-1, keepdim=True)


@register_kl(VonMisesFisher, SphericalUniform)
def _kl_von_mises_fisher_uniform(q: VonMisesFisher, p: SphericalUniform) -> Tensor:
    if q.event_shape != p.event_shape:
        raise ArgumentError(
            f"KL between spheres of R^{q.event_shape[0]} and R^{p.event_shape[0]}; both must have the same dimension"
        )
    return _kl_to_uniform(q).expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape))


def _kl_to_uniform(q: VonMisesFisher) -> Tensor:
    """κ A(κ) − log M(κ)."""
    return (q.concentration.double() * (q._cosine - 1.0) - q._log_m).to(q.loc.dtype)


# ---------------------------------------------------------------------------------------------------------
# The normaliser

_ORDER, _TERMS = 16, 10  # relative error below 1e-12 in log M − κ, measured for n from 2 to 1000, κ from 1e-3 to 1e5
_LARGE = 20.0  # κ over n from which dA / dκ is a series in n / κ; its relative error is below 1e-6 for n to 1000


def _log_normaliser(kappa: Tensor, n: int) -> tuple[Tensor, Tensor]:
    r"""``log M(κ) − κ`` and the mean cosine ``A(κ) = d log M / dκ``, of the shape of ``kappa``, differentiable once.

    :math:`M = {}_0F_1(\tfrac n2; \tfrac{\kappa^2}{4})`. At a high order it has an asymptotic expansion that holds for
    all κ; from there Gauss's continued fraction leads down to order n/2, all its terms being positive:

    .. math:: \frac{{}_0F_1(b+1; z)}{{}_0F_1(b; z)} = r_b = \frac{1}{1 + \frac{z}{b (b+1)} r_{b+1}}
    """
    with torch.no_grad():
        steps = max(0, math.ceil(_ORDER - (n / 2 - 1)))
        top = n / 2 - 1 + steps
        log_m = _expansion(kappa, top)
        ratio = (_expansion(kappa, top + 1) - log_m).exp()
        for step in reversed(range(steps)):
            b = n / 2 + step
            ratio = 1.0 / (1.0 + kappa.square() / (4.0 * b * (b + 1.0)) * ratio)
            log_m = log_m - ratio.log()
        cosine = kappa / n * ratio
        slope = 1.0 - cosine.square() - (n - 1) / n * ratio  # dA / dκ = 1 − A² − (n − 1) A / κ
        slope = torch.where(kappa > _LARGE * n, _slope_far_out(kappa.clamp(min=_LARGE * n), n), slope)
    moved = kappa - kappa.detach()  # zero, with the gradients in closed form: shorter to trace than the recursion
    return log_m + (cosine - 1.0) * moved, cosine + slope * moved


def _slope_far_out(kappa: Tensor, n: int) -> Tensor:
    """``dA / dκ`` at κ far above n, where its terms nearly cancel: by the solution A = Σ c_j κ^-j of that equation."""
    c = [1.0]
    for j in range(1, _TERMS):
        products = sum(c[i] * c[j - i] for i in range(1, j))
        c.append(((j - n) * c[j - 1] - products) / 2)
    inverse, series = 1.0 / kappa, torch.zeros_like(kappa)
    for j in reversed(range(1, _TERMS)):
        series = (series - j * c[j]) * inverse
    return series * inverse


def _expansion(kappa: Tensor, order: float) -> Tensor:
    """Debye's expansion of ``log M(κ) − κ`` at a high order of the Bessel function, uniform in κ.

    DLMF 10.41.3, https://dlmf.nist.gov/10.41, divided by its value at κ = 0 and free of differences of large numbers.
    """
    z = kappa / order
    s = (1.0 + z.square()).sqrt()
    coefficients = [0.0] * (3 * _TERMS + 1)
    for k, row in enumerate(_DEBYE):
        for j, coefficient in enumerate(row):
            coefficients[k + 2 * j] += coefficient / order**k
    p, series = 1.0 / s, torch.zeros_like(kappa)
    for coefficient in reversed(coefficients):
        series = series * p + coefficient
    exponent = -kappa * (1.0 + 1.0 / (s + z)) / (1.0 + s) - order * torch.log1p(z.square() / (2.0 * (1.0 + s)))
    return exponent - s.log() / 2 + (series / sum(coefficients)).log()


def _debye_polynomials(terms: int) -> list[list[float]]:
    """U_0, …, U_terms of DLMF 10.41.9; entry j of row k is the coefficient of p^(k + 2j)."""
    rows = [[1.0]]
    for k in range(terms):
        row = [0.0] * (k + 2)
        for j, c in enumerate(rows[-1]):
            d = k + 2 * j
            row[j] += c * (d / 2 + 1 / (8 * (d + 1)))
            row[j + 1] -= c * (d / 2 + 5 / (8 * (d + 3)))
        rows.append(row)
    return rows


_DEBYE = _debye_polynomials(_TERMS)

# ---------------------------------------------------------------------------------------------------------
# The angle to the mean direction

_NODES = 40
_NEWTON_STEPS = 5
_REACH = 10.0  # standard deviations of the angle, beyond which it has a mass below 1e-12
_LEAST = 1e-12  # a tail that u may lie in


def _colatitude(u: Tensor, kappa: Tensor, log_m: Tensor, n: int) -> Tensor:
    """``y = log tan(θ/2)`` where the distribution function of the angle θ to the mean direction equals ``u``.

    Newton's method on the log-probability of the tail that ``u`` lies in, as a function of y: both tails are nearly
    exponential in y, so that this is nearly linear. The last step is differentiable in κ: the gradient of a Newton
    step at the solution is that of the implicit function.

    Args:
        u: A `*sample x *batch` tensor of uniform numbers in [0, 1), float64.
        kappa: A `*batch` tensor, float64.
        log_m: ``log M(κ) − κ``, likewise.
        n: dimension of the ambient space.
    """
    nodes, weights = _fejer(_NODES, kappa.device)

    def log_density(theta: Tensor, kappa: Tensor, log_m: Tensor) -> Tensor:
        log_beta = math.lgamma(0.5) + math.lgamma((n - 1) / 2) - math.lgamma(n / 2)
        power = (n - 2) * theta.sin().log() if n > 2 else 0.0
        return power - 2.0 * kappa * (theta / 2).sin().square() - log_m - log_beta

    def mass(start: Tensor, end: Tensor) -> Tensor:
        half = ((end - start) / 2).unsqueeze(-1)
        theta = start.unsqueeze(-1) + half * (1.0 + nodes)
        density = log_density(theta, kappa.unsqueeze(-1), log_m.unsqueeze(-1)).exp()
        return (half * weights * density).sum(-1)

    def newton(y: Tensor) -> Tensor:
        theta = 2.0 * y.exp().atan()
        tail = side * mass(theta, end)
        slope = (log_density(theta, kappa, log_m).exp() * theta.sin() / tail).detach()
        return y + side * (tail / p).log() / slope

    with torch.no_grad():
        # y has its mode where κ sin²θ = (n − 1) cosθ, and the precision R sin²θ there.
        m = n - 1
        precision = (m * m + 4.0 * kappa.square()).sqrt()
        sine, cosine = (2 * m / (m + precision)).sqrt(), 2.0 * kappa / (m + precision)
        mode, width = torch.atan2(sine, cosine), precision.rsqrt()
        low = (mode - _REACH * width).clamp(min=0.0)
        high = (mode + math.sqrt(2.0) * _REACH * width).clamp(max=math.pi)
        below = mass(low, mode)
        u = u.clamp(_LEAST, 1.0 - _LEAST)
        side = torch.where(u > below, 1.0, -1.0).to(u.dtype)  # of the mode that θ lies on
        p = torch.where(u > below, 1.0 - u, u)
        end = torch.where(u > below, high, low)
        # Gaussian in y or, where that is nearer to the mode on the far side, in θ.
        z = -torch.special.ndtri((p / torch.where(u > below, 1.0 - below, below) / 2).clamp(max=0.5))
        y = (sine / (1.0 + cosine)).log() + side * z * width / sine
        far = torch.minimum(mode + math.sqrt(2.0) * z * width, high * (1.0 - 1e-9))
        y = torch.where(u > below, torch.minimum(y, (far / 2).tan().log()), y)
        for _ in range(_NEWTON_STEPS - 1):
            y = newton(y)
    return newton(y)


def _fejer(points: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Fejér's first quadrature rule on [-1, 1], in float64, made on the device."""
    angles = math.pi / points * (torch.arange(points, dtype=torch.float64, device=device) + 0.5)
    j = torch.arange(1, points // 2 + 1, dtype=torch.float64, device=device)
    sums = ((2.0 * angles.unsqueeze(-1) * j).cos() / (4.0 * j.square() - 1.0)).sum(-1)
    return angles.cos(), 2.0 / points * (1.0 - 2.0 * sums)
