"""The linear mixed model: fixed effects, and random effects of one or several grouping factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from scipy.optimize import minimize
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError, require_count, require_positive, unknown_name
from pyrovae.registry import MODELS

__all__ = ["LinearMixedModel", "MixedModelFit"]

Covariance = Literal["full", "diagonal"]
Parametrization = Literal["centred", "non-centred"]

_DENSE = 10**7  # numbers of a design for which estimates are start values


class MixedModelFit(NamedTuple):
    """Estimates of a linear mixed model by maximum likelihood (ML) or restricted maximum likelihood (REML).

    Args:
        beta: A `p` tensor, the fixed effects.
        beta_covariance: A `p x p` tensor, their covariance given the estimated variances.
        sigma: scalar tensor, the standard deviation of the residuals.
        covariance: of the random effects, `q x q`, by grouping factor.
        effects: their best linear unbiased predictions, `levels x q`, by grouping factor.
        criterion: scalar tensor: the deviance, −2 log-likelihood in nats (ML), or the REML criterion.
    """

    beta: Tensor
    beta_covariance: Tensor
    sigma: Tensor
    covariance: dict[str, Tensor]
    effects: dict[str, Tensor]
    criterion: Tensor


@MODELS.register
class LinearMixedModel(PyroModule):
    r"""Linear regression whose coefficients vary between the levels of grouping factors.

    .. math:: y_n = x_n^\top \beta + \sum_g z_{gn}^\top b_{g, \mathrm{index}_g(n)} + \varepsilon_n, \qquad
        b_{gj} \sim \mathcal{N}(0, L_g L_g^\top), \qquad \varepsilon_n \sim \mathcal{N}(0, \sigma^2)

    The grouping factors may be crossed, or nested (number the levels of the inner one throughout). One row of data
    is one observation, and every argument of the model has one row an observation: the design X of the fixed
    effects, the designs of all factors side by side in Z, and the levels of all factors side by side in ``index``
    (:meth:`stack` makes the two from one matrix and one vector a factor). So ``(X, Z, index, y)`` is what
    ``pyrovae.fit`` takes, with ``batch_size=len(y)``: the effects belong to all rows, and a part of the rows alone
    would weigh too little against their prior.

    :meth:`estimate` is ML or REML. For a full Bayesian analysis the model has the priors

    .. math:: \beta \sim \mathcal{N}(0, s_\beta^2 I), \quad \sigma \sim \mathrm{HalfNormal}(s_\sigma), \quad
        L_g = \mathrm{diag}(\tau_g)\, C_g, \quad \tau_g \sim \mathrm{HalfNormal}(s_g), \quad
        C_g \sim \mathrm{LKJCholesky}(\eta)

    They are weakly informative when the scales are of the order of the largest plausible values, in units of y. The
    sites are ``"beta"``, ``"sigma"`` and, for a factor ``subject``, ``"subject_sd"``, ``"subject_correlation"`` (the
    Cholesky factor C; only where the covariance is full and q > 1) and ``"subject_effects"``.

    Args:
        fixed: number p of fixed effects.
        groups: by grouping factor, the number of its levels and the number q of effects of each.
        covariance: of the effects of a level: ``"full"`` or ``"diagonal"``.
        fixed_scale: s_β, one number or p numbers.
        effect_scales: s_g, by grouping factor, one number or q numbers; a factor that is left out has 1.
        residual_scale: s_σ.
        concentration: η; 1 is uniform over correlations, above it smaller ones are more probable.
        parametrization: ``"centred"``: the effects are sampled as they are; ``"non-centred"``: in units of L_g, so
            that the site holds u with b = L_g u. Centred suits many observations a level, non-centred few.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    References:
        Bates, Mächler, Bolker & Walker 2015 (lme4), https://doi.org/10.18637/jss.v067.i01; Lewandowski, Kurowicka &
        Joe 2009 (LKJ), https://doi.org/10.1016/j.jmva.2009.04.008; Gelman 2006 (priors of standard deviations),
        https://doi.org/10.1214/06-BA117A.

    Example:
        >>> model = LinearMixedModel(fixed=2, groups={"subject": (3, 2)})
        >>> days = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(3)
        >>> X = torch.stack([torch.ones(12), days], dim=1)
        >>> Z, index = model.stack({"subject": X}, {"subject": torch.arange(3).repeat_interleave(4)})
        >>> y = model(X, Z, index)   # generated
        >>> fit = model.estimate(X, Z, index, y)
        >>> fit.beta.shape, fit.effects["subject"].shape
        (torch.Size([2]), torch.Size([3, 2]))
    """

    default_guide: ClassVar[str] = "FullRank"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {}}

    def __init__(
        self,
        fixed: int,
        groups: Mapping[str, Sequence[int]],
        covariance: Covariance = "full",
        fixed_scale: float | Sequence[float] = 10.0,
        effect_scales: Mapping[str, float | Sequence[float]] | None = None,
        residual_scale: float = 1.0,
        concentration: float = 2.0,
        parametrization: Parametrization = "centred",
    ) -> None:
        super().__init__()
        self.fixed = require_count("fixed", fixed)
        self.groups = _checked_groups(groups)
        if covariance not in get_args(Covariance):
            raise unknown_name("covariance", covariance, get_args(Covariance))
        if parametrization not in get_args(Parametrization):
            raise unknown_name("parametrization", parametrization, get_args(Parametrization))
        self.covariance, self.parametrization = covariance, parametrization
        scales = dict(effect_scales or {})
        for name in scales:
            if name not in self.groups:
                raise unknown_name("grouping factor in effect_scales:", name, self.groups)
        self.columns = sum(q for _, q in self.groups.values())
        self.register_buffer("fixed_scale", _positive("fixed_scale", fixed_scale, fixed), persistent=False)
        for name, (_, q) in self.groups.items():
            scale = _positive(f"effect_scales[{name!r}]", scales.get(name, 1.0), q)
            self.register_buffer(f"{name}_scale", scale, persistent=False)
        for argument, value in (("residual_scale", residual_scale), ("concentration", concentration)):
            self.register_buffer(argument, torch.tensor(require_positive(argument, value)), persistent=False)

    def stack(self, designs: Mapping[str, Tensor], levels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The arguments Z and ``index`` of the model.

        Args:
            designs: by grouping factor, the `n x q` design of its effects.
            levels: by grouping factor, the level of each observation, `n` whole numbers from 0.

        Returns:
            Z, `n x Σq`, and index, `n x factors`.

        Raises:
            ArgumentError: a grouping factor is missing, or not one of this model.
        """
        for argument, given in (("designs", designs), ("levels", levels)):
            if given.keys() != self.groups.keys():
                raise ArgumentError(f"{argument} has {sorted(given)}; this model's factors are {sorted(self.groups)}")
        Z = torch.cat([designs[name] for name in self.groups], dim=1)
        return Z, torch.stack([levels[name] for name in self.groups], dim=1)

    def forward(self, X: Tensor, Z: Tensor, index: Tensor, y: Tensor | None = None) -> Tensor:
        """Conditions on ``y``, or generates it when it is ``None``; returns it.

        Args:
            X: A `n x p` tensor, the design of the fixed effects (the intercept is a column of ones).
            Z: A `n x Σq` tensor, the designs of the grouping factors' effects side by side.
            index: A `n x factors` tensor of whole numbers, the level of each observation.
            y: A `n` tensor, or ``None``.

        Raises:
            DataError: a tensor has another shape than these.
        """
        self._check(X, Z, index)
        beta = pyro.sample("beta", dist.Normal(torch.zeros_like(self.fixed_scale), self.fixed_scale).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(self.residual_scale))
        mean = (X * beta).sum(-1)
        for place, (name, part) in enumerate(self._parts(Z)):
            effects = self._effects(name)
            mean = mean + (part * effects[..., index[:, place], :]).sum(-1)
        with pyro.plate("data", len(X), device=X.device):
            return pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    def _effects(self, name: str) -> Tensor:
        """Samples the effects of a grouping factor, `… x levels x q`, and what their covariance depends on."""
        levels, q = self.groups[name]
        sd = pyro.sample(f"{name}_sd", dist.HalfNormal(getattr(self, f"{name}_scale")).to_event(1))
        tril = torch.diag_embed(sd)
        if self.covariance == "full" and q > 1:
            prior = dist.LKJCholesky(q, self.concentration)
            tril = sd.unsqueeze(-1) * pyro.sample(f"{name}_correlation", prior)
        zeros = sd.new_zeros(q)
        with pyro.plate(name, levels, device=sd.device):
            if self.parametrization == "centred":
                return pyro.sample(f"{name}_effects", dist.MultivariateNormal(zeros, scale_tril=tril))
            unit = pyro.sample(f"{name}_effects", dist.Normal(zeros, 1.0).to_event(1))
            return (tril @ unit.unsqueeze(-1)).squeeze(-1)

    def start_values(self, X: Tensor, Z: Tensor, index: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """Values of the latents from which a guide starts: the REML estimates, as :meth:`forward` takes the data.

        A standard deviation that is estimated at zero starts at a hundredth of the residuals'. Without data, and where
        there is no estimate (a dense design of more than 10⁷ numbers), there are no such values.
        """
        levels = sum(count * q for count, q in self.groups.values())
        if y is None or len(X) * levels > _DENSE:
            return {}
        try:
            found = self.estimate(X, Z, index, y)
        except DataError:
            return {}
        values = {"beta": found.beta, "sigma": found.sigma}
        for name, (_, q) in self.groups.items():
            floor = (found.sigma / 100).square() * torch.eye(q).to(found.sigma)
            tril = torch.linalg.cholesky(found.covariance[name] + floor)
            sd = tril.square().sum(-1).sqrt()
            values[f"{name}_sd"] = sd
            if self.covariance == "full" and q > 1:
                values[f"{name}_correlation"] = tril / sd.unsqueeze(-1)
            effects = found.effects[name]
            if self.parametrization == "non-centred":
                effects = torch.linalg.solve_triangular(tril, effects.mT, upper=False).mT
            values[f"{name}_effects"] = effects
        return {name: value.detach().to(X) for name, value in values.items()}

    def exact_marginal(
        self, X: Tensor, Z: Tensor, index: Tensor, beta: Tensor, sigma: Tensor, tril: Mapping[str, Tensor]
    ) -> dist.LowRankMultivariateNormal:
        r"""p(y | β, σ, L), the random effects integrated out, exactly (its density takes the Woodbury identity).

        .. math:: y \sim \mathcal{N}(X \beta, \; V \, \mathrm{blockdiag}(L_g L_g^\top) \, V^\top + \sigma^2 I)

        Args:
            X: as in :meth:`forward`.
            Z: likewise.
            index: likewise.
            beta: `*batch x p`.
            sigma: `*batch`.
            tril: L, `*batch x q x q`, by grouping factor.

        Returns:
            A distribution of batch shape `*batch` and event shape (n,).
        """
        self._check(X, Z, index)
        V = self._random_design(Z, index)
        factor = V @ self._block_diagonal(tril)
        return dist.LowRankMultivariateNormal(
            beta @ X.mT, factor, sigma.square().unsqueeze(-1).expand(*sigma.shape, len(X))
        )

    def exact_effects(
        self, X: Tensor, Z: Tensor, index: Tensor, y: Tensor, beta: Tensor, sigma: Tensor, tril: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """E(b | y, β, σ, L) by grouping factor, `*batch x levels x q`; the arguments as in :meth:`exact_marginal`."""
        self._check(X, Z, index)
        weighted = self._random_design(Z, index) @ self._block_diagonal(tril)
        precision = weighted.mT @ weighted + sigma.square()[..., None, None] * torch.eye(weighted.shape[-1]).to(X)
        right = weighted.mT @ (y - beta @ X.mT).unsqueeze(-1)
        unit = torch.linalg.solve(precision, right).squeeze(-1)
        return self._split((self._block_diagonal(tril) @ unit.unsqueeze(-1)).squeeze(-1))

    def estimate(
        self, X: Tensor, Z: Tensor, index: Tensor, y: Tensor, restricted: bool = True, tolerance: float = 1e-10
    ) -> MixedModelFit:
        r"""Maximum likelihood, or restricted maximum likelihood (REML), in float64; the priors play no part.

        β and σ² are profiled out, and the deviance is a function of the relative factors Λ = L/σ alone:

        .. math:: d(\Lambda) = \log |R|^2 + n \Bigl(1 + \log \frac{2 \pi \rho^2}{n}\Bigr), \qquad
            R R^\top = \Lambda^\top V^\top V \Lambda + I, \qquad
            \rho^2 = \min_{\beta, u} \lVert y - X \beta - V \Lambda u \rVert^2 + \lVert u \rVert^2

        REML has n − p in place of n, and adds the log-determinant of the precision of β in units of 1/σ².

        Args:
            X: as in :meth:`forward`.
            Z: likewise.
            index: likewise.
            y: A `n` tensor.
            restricted: REML where true, else ML.
            tolerance: of L-BFGS-B, on the gradient of the deviance.

        Raises:
            DataError: a tensor has another shape, or X has linearly dependent columns.

        References:
            Bates et al. 2015, section 3.4, https://doi.org/10.18637/jss.v067.i01.
        """
        self._check(X, Z, index)
        X, Z, y = X.double(), Z.double(), y.double()
        if y.shape != X.shape[:1] or torch.linalg.matrix_rank(X) < self.fixed or len(X) <= self.fixed:
            raise DataError(
                f"y has shape {tuple(y.shape)} and X {tuple(X.shape)}; y needs one number a row, and X more rows than"
                " columns, which must be linearly independent (drop the column that others add up to)"
            )
        problem = _Profile(X, y, self._random_design(Z, index), restricted)

        def deviance(theta: np.ndarray) -> tuple[float, np.ndarray]:
            point = torch.from_numpy(theta.copy()).requires_grad_()
            with torch.enable_grad():
                value = problem(self._block_diagonal(self._factors(point))).criterion
            (gradient,) = torch.autograd.grad(value, point)
            return value.item(), gradient.numpy()

        start, lower = self._start()
        bounds = [(0.0 if diagonal else None, None) for diagonal in lower]
        options = {"maxiter": 1000, "ftol": 1e-15, "gtol": tolerance}
        found = minimize(deviance, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        relative = self._factors(torch.from_numpy(found.x))
        best = problem(self._block_diagonal(relative))
        covariance = {name: best.sigma**2 * tril @ tril.mT for name, tril in relative.items()}
        return MixedModelFit(
            best.beta, best.beta_covariance, best.sigma, covariance, self._split(best.effects), best.criterion
        )

    def _check(self, X: Tensor, Z: Tensor, index: Tensor) -> None:
        for name, given, columns in (("X", X, self.fixed), ("Z", Z, self.columns), ("index", index, len(self.groups))):
            if given.shape != (len(X), columns):
                raise DataError(
                    f"{name} has shape {tuple(given.shape)}; this model takes ({len(X)}, {columns}): one row an"
                    " observation. stack() makes Z and index from one matrix and one vector a grouping factor"
                )
        if index.is_floating_point():
            raise DataError(f"index is {index.dtype}; it holds levels, whole numbers from 0: convert it, index.long()")

    def _parts(self, Z: Tensor) -> list[tuple[str, Tensor]]:
        """The design of each grouping factor."""
        return list(zip(self.groups, Z.split([q for _, q in self.groups.values()], dim=1), strict=True))

    def _random_design(self, Z: Tensor, index: Tensor) -> Tensor:
        """V, `n x Σ(levels q)`: a row's design in the columns of its level."""
        blocks = []
        for place, (name, part) in enumerate(self._parts(Z)):
            chosen = torch.nn.functional.one_hot(index[:, place], self.groups[name][0]).to(Z)
            blocks.append((chosen.unsqueeze(-1) * part.unsqueeze(-2)).flatten(1))
        return torch.cat(blocks, dim=1)

    def _block_diagonal(self, tril: Mapping[str, Tensor]) -> Tensor:
        """The factor of all effects together, `*batch x Σ(levels q) x Σ(levels q)`."""
        size = sum(levels * q for levels, q in self.groups.values())
        batch = next(iter(tril.values())).shape[:-2]
        whole = next(iter(tril.values())).new_zeros(*batch, size, size)
        start = 0
        for name, (levels, q) in self.groups.items():
            rows = start + torch.arange(levels * q).reshape(levels, q, 1)
            whole[..., rows, rows.mT] = tril[name].unsqueeze(-3)
            start += levels * q
        return whole

    def _split(self, effects: Tensor) -> dict[str, Tensor]:
        """All effects `*batch x Σ(levels q)` by grouping factor, `*batch x levels x q`."""
        sizes = [levels * q for levels, q in self.groups.values()]
        parts = effects.split(sizes, dim=-1)
        shapes = self.groups.items()
        return {name: part.unflatten(-1, (levels, q)) for part, (name, (levels, q)) in zip(parts, shapes, strict=True)}

    def _indices(self, q: int) -> Tensor:
        """Rows and columns of the free elements of a factor, `2 x elements`."""
        return torch.tril_indices(q, q) if self.covariance == "full" else torch.arange(q).expand(2, q)

    def _factors(self, theta: Tensor) -> dict[str, Tensor]:
        """The relative factor of each grouping factor, from all free elements in one vector."""
        found, start = {}, 0
        for name, (_, q) in self.groups.items():
            rows, cols = self._indices(q)
            found[name] = theta.new_zeros(q, q).index_put((rows, cols), theta[start : start + len(rows)])
            start += len(rows)
        return found

    def _start(self) -> tuple[np.ndarray, list[bool]]:
        """The identity as the starting point of the search, and which elements are on the diagonal."""
        diagonal = [bool(row == col) for _, q in self.groups.values() for row, col in self._indices(q).T]
        return np.array(diagonal, dtype=float), diagonal


class _Solution(NamedTuple):
    """What the profiled deviance is made of at one Λ; ``effects`` are b = Λ u."""

    criterion: Tensor
    beta: Tensor
    beta_covariance: Tensor
    sigma: Tensor
    effects: Tensor


class _Profile:
    """The profiled deviance, by penalized least squares (Bates et al. 2015, equations 18 to 42)."""

    def __init__(self, X: Tensor, y: Tensor, V: Tensor, restricted: bool) -> None:
        self.X, self.y, self.V = X, y, V
        self.degrees = len(y) - restricted * X.shape[1]
        self.restricted = restricted
        self.VV, self.VX, self.Vy = V.mT @ V, V.mT @ X, V.mT @ y.unsqueeze(-1)

    def __call__(self, relative: Tensor) -> _Solution:
        """At the factor Λ of all effects."""
        R = torch.linalg.cholesky(relative.mT @ self.VV @ relative + torch.eye(len(relative)).to(relative))
        RX = torch.linalg.solve_triangular(R, relative.mT @ self.VX, upper=False)
        Ry = torch.linalg.solve_triangular(R, relative.mT @ self.Vy, upper=False)
        precision = self.X.mT @ self.X - RX.mT @ RX
        beta = torch.linalg.solve(precision, self.X.mT @ self.y.unsqueeze(-1) - RX.mT @ Ry)
        u = torch.linalg.solve_triangular(R.mT, Ry - RX @ beta, upper=True)
        effects = relative @ u
        residual = self.y.unsqueeze(-1) - self.X @ beta - self.V @ effects
        variance = (residual.square().sum() + u.square().sum()) / self.degrees
        criterion = 2 * R.diagonal().log().sum() + self.degrees * (1 + (2 * math.pi * variance).log())
        if self.restricted:
            criterion = criterion + torch.logdet(precision)
        covariance = variance * torch.linalg.inv(precision)
        return _Solution(criterion, beta.squeeze(-1), covariance, variance.sqrt(), effects.squeeze(-1))


def _checked_groups(groups: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    if not isinstance(groups, Mapping) or not groups:
        raise ArgumentError(f"groups is {groups!r}; it must be a dict such as {{'subject': (levels, effects)}}")
    found = {}
    for name, sizes in groups.items():
        if not (isinstance(name, str) and name.isidentifier() and name != "data"):
            raise ArgumentError(f"groups names {name!r}; a grouping factor's name must be an identifier, not 'data'")
        if not isinstance(sizes, Sequence) or len(sizes) != 2:
            raise ArgumentError(f"groups[{name!r}] is {sizes!r}; it must be (levels, effects of each level)")
        levels, q = (require_count(f"groups[{name!r}]", size) for size in sizes)
        found[name] = (levels, q)
    return found


def _positive(argument: str, value: float | Sequence[float], size: int) -> Tensor:
    """One positive number, or ``size`` of them, as a vector."""
    vector = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if vector.shape not in ((), (size,)) or not bool(((vector > 0) & vector.isfinite()).all()):
        raise ArgumentError(f"{argument} is {value!r}; it must be a finite number above 0, or {size} of them")
    return vector.expand(size).clone()
