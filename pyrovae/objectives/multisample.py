"""Bounds that are a function of K log-weights, and the gradient estimators that they share."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyrovae.errors import ArgumentError, ModelGuideError, unknown_name
from pyrovae.objectives.base import Estimate, Objective
from pyrovae.objectives.scoring import check_scoring
from pyrovae.structure import Program, Structure
from pyrovae.weights import LogWeights, Through

__all__ = ["MultiSample", "log_mean_exp"]

_ROUTES: dict[str, Through] = {
    "pathwise": "both",
    "dreg": "path",
    "stl": "path",
    "score": "parameters",
    "vimco": "parameters",
}


def log_mean_exp(log_w: Tensor) -> Tensor:
    """``log (1/K) Σ w_k`` along dimension 0."""
    return log_w.logsumexp(0) - math.log(len(log_w))


class MultiSample(Objective):
    """Base of the bounds on ``log p(x)`` that K particles give for each independent element.

    A subclass writes :meth:`bound`, and for ``"dreg"`` :meth:`sensitivities`. With ``c_k = ∂B/∂log w_k`` the estimators
    of the guide's gradient are

    - ``"pathwise"``: ``Σ c_k ∇ log w_k``, through the samples and through ``log q``;
    - ``"dreg"``: ``Σ (c_k − ∂c_k/∂log w_k) ∂log w_k/∂z_k ∇z_k`` (doubly reparameterized: the score that is left in the
      pathwise gradient is itself reparameterized; unbiased, and its signal does not drown as K grows);
    - ``"score"``: ``B Σ ∇ log q(z_k)`` (REINFORCE, for discrete guides too);
    - ``"vimco"``: ``Σ (B − B_{−k}) ∇ log q(z_k)``, where B_{−k} has log w_k replaced by the mean of the others.

    Args:
        particles: number K of particles.
        gradient: name of the estimator, or ``"auto"``: ``"dreg"`` where every site of the guide can be reparameterized
            (``"pathwise"`` where a flow of the guide has no inverse or a sequential one), else ``"vimco"`` (``"score"``
            where that is not defined).

    Example:
        >>> class Median(MultiSample):   # a bound of one's own: the median of the log-weights
        ...     gradients = ("pathwise",)
        ...     def bound(self, log_w):
        ...         return log_w.median(0).values
        >>> from pyrovae.models import VAE
        >>> from pyrovae.guides import AmortizedNormal
        >>> model = VAE(data_shape=(4,), latent_dim=2, hidden=(8,))
        >>> Median(5, "pathwise").estimate(model, AmortizedNormal(model), torch.ones(3, 4)).loss.shape
        torch.Size([])
    """

    gradients: ClassVar[tuple[str, ...]] = ()

    def __init__(self, particles: int, gradient: str) -> None:
        super().__init__(particles)
        if gradient not in (*self.gradients, "auto"):
            raise unknown_name(f"gradient of {type(self).__name__}", gradient, (*self.gradients, "auto"))
        if gradient == "vimco" and particles < 2:
            raise ArgumentError("gradient='vimco' compares a particle with the others; it needs particles=2 or more")
        self.gradient = gradient

    @abstractmethod
    def bound(self, log_w: Tensor) -> Tensor:
        """The bound of each element, `*independent plates` in nats, from log-weights `particles x …`."""

    def sensitivities(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """``c_k`` and ``c_k − ∂c_k/∂log w_k``, both like ``log_w``."""
        raise ArgumentError(f"gradient='dreg' is not defined for {type(self).__name__}")

    def choose(self, structure: Structure) -> str:
        """Doubly reparameterized where that is defined and quick, else pathwise, else VIMCO or the score function."""
        wanted = ["vimco", "score"] if self.particles > 1 else ["score"]
        if all(structure.reparameterized.values()):
            wanted = [*(["dreg"] if structure.quick else []), "pathwise", *wanted]
        return next(name for name in wanted if name in self.gradients)

    def accept(self, structure: Structure) -> None:
        """Refuses subsampled data inside shared latents, and a guide that the gradient is not defined for, or slow."""
        name = type(self).__name__
        if structure.subsampled:
            plates = ", ".join(map(repr, structure.subsampled))
            raise ModelGuideError(
                f"the plate {plates} is subsampled, and some latents are outside it: the weight of a particle is then a"
                " product over all data, of which a minibatch gives an unbiased logarithm but no unbiased value, so"
                f" that {name} of it is no bound. Use all data at once (no subsampling), or ELBO, which stays unbiased."
            )
        stuck = [site for site, pathwise in structure.reparameterized.items() if not pathwise]
        if stuck and _ROUTES[str(self.estimator)] != "parameters":
            others = [g for g in self.gradients if _ROUTES[g] == "parameters"]
            advice = f"gradient={others[-1]!r}" if others else "ELBO(gradient='score')"
            raise ArgumentError(
                f"gradient={self.estimator!r} needs a guide that can be reparameterized, and these sites cannot:"
                f" {', '.join(map(repr, stuck))}. Use {advice}."
            )
        asked = f"gradient={self.estimator!r} of {name}"
        instead = "" if "pathwise" in self.gradients else "IWAE with "
        check_scoring(structure, asked, _ROUTES[str(self.estimator)], f"{instead}gradient='pathwise'")

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Draws the particles once and returns the loss, the bound and its parts; see :class:`Objective`.

        The parts are those of the ELBO at the same particles: the expected log-likelihood and the KL of each site.
        """
        self.structure(model, guide, *args, **kwargs)
        weights = self.weights(model, guide, args, kwargs, _ROUTES[str(self.estimator)])
        log_w = weights.log_w
        bound = self.bound(log_w)
        objective = bound
        if self.estimator == "dreg":
            c, doubly = self.sensitivities(log_w.detach())
            weights.path.factor = torch.where(c == 0.0, 0.0, doubly / c)
        elif self.estimator in ("score", "vimco"):
            # log q inside the bound is part of its value, but its own gradient has to stay: E Σ c_k ∇ log w_k.
            signal = bound.detach() - (self.left_out(log_w.detach()) if self.estimator == "vimco" else 0.0)
            term = (signal * weights.log_q).sum(0)
            objective = bound + term - term.detach()
        return Estimate(
            loss=-(weights.scale * objective).sum(),
            bound=(weights.scale * bound).sum().detach(),
            **elbo_parts(weights),
        )

    def left_out(self, log_w: Tensor) -> Tensor:
        """The bound without particle k, whose log-weight is replaced by the mean of the others, for each k.

        References:
            Mnih & Rezende 2016, equation 10, https://arxiv.org/abs/1602.06725.
        """
        particles = len(log_w)
        others = (log_w.sum(0) - log_w) / (particles - 1)
        replaced = log_w.unsqueeze(1).expand(particles, *log_w.shape).clone()  # which is replaced, in dimension 1
        index = torch.arange(particles, device=log_w.device)
        replaced[index, index] = others
        return self.bound(replaced)


def elbo_parts(weights: LogWeights) -> dict[str, Any]:
    """The expected log-likelihood and each site's KL, summed over the data, as fields of an :class:`Estimate`."""

    def total(per_particle: Tensor) -> Tensor:
        return (weights.scale * per_particle.mean(0)).sum().detach()

    return {
        "log_likelihood": total(weights.reconstruction),
        "kl": {name: total(value) for name, value in weights.kl().items()},
    }
