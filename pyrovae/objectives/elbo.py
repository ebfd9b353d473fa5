"""The evidence lower bound, with reweighted KL terms and its gradient estimators."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from pyrovae.errors import ArgumentError, unknown_name
from pyrovae.noise import Kind
from pyrovae.objectives.base import Estimate, Objective
from pyrovae.objectives.schedules import LinearWarmup
from pyrovae.objectives.scoring import check_scoring
from pyrovae.registry import OBJECTIVES
from pyrovae.structure import Program, Structure
from pyrovae.weights import LogWeights, Through

__all__ = ["ELBO"]

Gradient = Literal["auto", "pathwise", "stl", "score", "local", "flipout"]
KL = Literal["sampled", "analytic"]
Coefficient = float | LinearWarmup

_ROUTES: dict[str, Through] = {"pathwise": "both", "stl": "path", "score": "parameters"}
_ROUTES |= {"local": "both", "flipout": "both"}
_NOISE: dict[str, Kind] = {"local": "local", "flipout": "flipout"}


@OBJECTIVES.register
class ELBO(Objective):
    r"""Evidence lower bound, the mean of K log-weights.

    .. math::
        \mathcal{L} = \mathbb{E}_{q(z \mid x)} \log \frac{p(x, z)}{q(z \mid x)}
        = \mathbb{E}_q \log p(x \mid z) - \mathrm{KL}(q(z \mid x) \,\|\, p(z))

    With ``beta`` and ``free_bits`` each latent site's KL counts as β max(λ, KL), where the KL is first averaged over
    the minibatch and the particles, as in Kingma et al. 2016. The reported bound is the plain one in any case.

    Args:
        particles: number K of particles.
        gradient: ``"pathwise"`` (reparameterization); ``"stl"`` (sticking the landing: the guide's parameters are
            held fixed inside ``log q``, so that the variance vanishes where the guide equals the posterior);
            ``"score"`` (REINFORCE, for any guide, discrete too, with a leave-one-out baseline when K > 1);
            ``"local"`` and ``"flipout"`` (pathwise, for the weights of a Bayesian network under a
            :class:`~pyrovae.guides.MeanField` guide: the noise of each data point is its own, see
            :mod:`pyrovae.noise`; with ``kl="analytic"``); ``"auto"``:
            sticking the landing where every site of the guide can be reparameterized (pathwise with a closed-form KL,
            or where a flow of the guide has no inverse or a sequential one), else the score function.
        kl: ``"sampled"`` (``log q − log p`` at the particles) or ``"analytic"`` (the closed form, at each site
            where one is registered and unbiased; the others stay sampled).
        beta: coefficient of the KL: a number, a schedule, or a dictionary of these by site (others get 1).
        free_bits: floor λ of each site's KL in nats per data point: a number, or a dictionary by site (others 0).

    Raises:
        ArgumentError: an argument is out of range, or ``gradient`` and ``kl`` do not go together; and, at the first
            evaluation, a guide that cannot be reparameterized under ``"pathwise"`` or ``"stl"``, or whose flow has no
            inverse (under ``"stl"`` and ``"score"``) or a sequential one (under ``"stl"``).

    References:
        Jordan et al. 1999, https://doi.org/10.1023/A:1007665907178; Kingma & Welling 2014,
        https://arxiv.org/abs/1312.6114; Roeder et al. 2017 (STL), https://arxiv.org/abs/1703.09194; Higgins et al.
        2017 (β), https://openreview.net/forum?id=Sy2fzU9gl; Kingma et al. 2016 (free bits),
        https://arxiv.org/abs/1606.04934; Kingma, Salimans & Welling 2015 (local), https://arxiv.org/abs/1506.02557; Wen
        et al. 2018 (flipout), https://arxiv.org/abs/1803.04386.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))   # the exact posterior
        >>> x = torch.tensor([0.0, 2.0])
        >>> estimate = ELBO(gradient="stl").estimate(model, guide, x)
        >>> torch.allclose(estimate.bound, dist.Normal(0.0, 2.0**0.5).log_prob(x).sum())
        True
    """

    def __init__(
        self,
        particles: int = 1,
        gradient: Gradient = "pathwise",
        kl: KL = "sampled",
        beta: Coefficient | Mapping[str, Coefficient] = 1.0,
        free_bits: float | Mapping[str, float] = 0.0,
    ) -> None:
        super().__init__(particles)
        if gradient not in get_args(Gradient):
            raise unknown_name("gradient", gradient, get_args(Gradient))
        if kl not in get_args(KL):
            raise unknown_name("kl", kl, get_args(KL))
        if gradient == "stl" and kl == "analytic":
            raise ArgumentError(
                "gradient='stl' is defined for kl='sampled' only (a closed-form KL has no sampled log q to hold"
                " fixed). Use gradient='pathwise' with kl='analytic', or kl='sampled'."
            )
        if gradient in _NOISE and kl == "sampled":
            raise ArgumentError(
                f"gradient={gradient!r} draws the outputs of layers apart from the weights, so that the KL of the"
                " weights is to be the closed form: give kl='analytic' as well"
            )
        self.gradient = gradient
        self.analytic = kl
        self.beta = _per_site("beta", beta, default=1.0)
        self.free_bits = _per_site("free_bits", free_bits, default=0.0)

    def choose(self, structure: Structure) -> str:
        """Sticking the landing where it is defined and log q is quick, else pathwise, else the score function."""
        if not all(structure.reparameterized.values()):
            return "score"
        return "stl" if self.analytic == "sampled" and structure.quick else "pathwise"

    def accept(self, structure: Structure) -> None:
        """Refuses a pathwise gradient through a site that has none, and log q at a given value where it is slow."""
        stuck = [name for name, pathwise in structure.reparameterized.items() if not pathwise]
        if stuck and self.estimator != "score":
            raise ArgumentError(
                f"gradient={self.estimator!r} needs a guide that can be reparameterized, and these sites cannot:"
                f" {', '.join(map(repr, stuck))}. Use ELBO(gradient='score', particles=8) or another number of"
                " particles above 1, or sum discrete sites out with pyrovae.EnumeratedELBO."
            )
        route = _ROUTES[str(self.estimator)]
        check_scoring(structure, f"gradient={self.estimator!r}", route, "gradient='pathwise'")

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Draws the particles once and returns the loss, the bound and its parts; see :class:`Objective`."""
        self.structure(model, guide, *args, **kwargs)
        estimator = str(self.estimator)
        noise = _NOISE.get(estimator)
        weights = self.weights(model, guide, args, kwargs, _ROUTES[estimator], self.analytic, noise)

        def total(per_particle: Tensor) -> Tensor:
            """Mean over the particles, sum over the data, scaled up from subsampled plates."""
            return (weights.scale * per_particle.mean(0)).sum()

        log_q = weights.log_q
        if self.estimator == "score":  # E ∇ log q = 0, so log q inside the log-weight only adds noise
            held = {name: value.detach() for name, value in weights.log_guide.items()}
            weights = dataclasses.replace(weights, log_guide=held)
        kl = weights.kl()
        integrand, floor = self._reweighted(weights, kl)
        loss = -total(integrand)
        if self.estimator == "score":
            loss = loss - _score_term(total, integrand.detach(), log_q)
        return Estimate(
            loss=loss if floor is None else loss + total(floor),
            bound=total(weights.log_w).detach(),
            log_likelihood=total(weights.reconstruction).detach(),
            kl={name: total(value).detach() for name, value in kl.items()},
        )

    def _reweighted(self, weights: LogWeights, kl: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The log-weights with every KL times its coefficient, and the constant that the floor adds to the loss."""
        plain = all(value == 1.0 for value in self.beta.values()) and not any(self.free_bits.values())
        if plain:
            return weights.log_w, None
        for argument, given in (("beta", self.beta), ("free_bits", self.free_bits)):
            for name in given:
                if name and name not in kl:
                    raise unknown_name(f"site in {argument}", name, kl)
        integrand = weights.reconstruction
        floor = integrand.new_zeros(()).expand_as(integrand)
        for name, value in kl.items():
            beta = self.beta.get(name, self.beta[""])
            coefficient = beta(self.step) if callable(beta) else beta
            level = self.free_bits.get(name, self.free_bits[""])
            if level:  # d max(λ, KL) is dKL above the floor and nothing below it
                above = (value.detach().mean() > level).to(value.dtype)
                floor = floor + coefficient * level * (1.0 - above)
                coefficient = coefficient * above
            integrand = integrand - coefficient * value
        return integrand, floor


def _score_term(total: Any, signal: Tensor, log_q: Tensor) -> Tensor:
    """``(f − baseline) ∇ log q`` as a term of value zero; the baseline is the mean of the other particles."""
    if len(signal) > 1:
        signal = signal - (signal.sum(0) - signal) / (len(signal) - 1)
    term = total(signal * log_q)
    return term - term.detach()


def _per_site(argument: str, given: Any, default: float) -> dict[str, Any]:
    """Coefficients by site name; the entry ``""`` is that of every site not named."""
    by_site = {"": default, **given} if isinstance(given, Mapping) else {"": given}
    for name, value in by_site.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value < float("inf")
        schedule = argument == "beta" and callable(value)
        if not (number or schedule):
            where = f" at site {name!r}" if name else ""
            allowed = "a finite number, at least 0" + (", or a schedule" if argument == "beta" else " (nats)")
            raise ArgumentError(f"{argument}{where} is {value!r}; it must be {allowed}")
    return by_site
