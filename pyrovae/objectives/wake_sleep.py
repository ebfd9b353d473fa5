"""The forward KL and its kin: sleep, wake-sleep and reweighted wake-sleep."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.objectives.base import Estimate, Objective
from pyrovae.objectives.multisample import MultiSample, elbo_parts, log_mean_exp
from pyrovae.objectives.scoring import check_scoring
from pyrovae.registry import OBJECTIVES
from pyrovae.structure import Program, Structure, sample_sites

__all__ = ["ForwardKL", "ReweightedWakeSleep", "WakeSleep", "simulated"]


def simulated(model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``−log q(z | x)`` summed over a minibatch of pairs that the model simulates, z ~ p(z) and x ~ p(x | z).

    Each argument that the model observes, as it is, at some site is replaced by what the model draws there.

    Raises:
        ModelGuideError: no argument is observed as it is, so the guide cannot be given the simulated data.
    """
    with torch.no_grad():
        dream = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    # What Pyro's uncondition took out of each observed site, by the identity of the argument that it was.
    seen = {id(site["infer"]["obs"]): site["value"] for site in dream.nodes.values() if _was_observed(site)}
    if not any(id(arg) in seen for arg in args):
        raise ModelGuideError(
            "the model observes none of its positional arguments as it is (obs=x), so a simulated x cannot be handed to"
            " the guide; pass the data as an argument and observe just that tensor"
        )
    drawn = [seen.get(id(arg), arg) for arg in args]
    latents = poutine.trace(poutine.replay(guide, trace=dream)).get_trace(*drawn, **kwargs)
    sites = sample_sites(latents)
    unknown = [name for name, site in sites.items() if name not in dream.nodes and not site["is_observed"]]
    if unknown:
        raise ModelGuideError(
            f"the guide samples {', '.join(map(repr, unknown))}, which the model does not, so that a simulated latent"
            " has no density under it; use a guide without auxiliary sites"
        )
    total = torch.zeros((), device=_device(drawn))
    for site in sites.values():
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        total = total - pyro.distributions.util.scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
    return total


def _was_observed(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and bool(site["infer"].get("was_observed"))


def _device(values: list[Any]) -> torch.device:
    return next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))


@OBJECTIVES.register
class ForwardKL(Objective):
    r"""Inclusive KL on simulated data: the sleep phase. It trains the guide alone.

    .. math:: \mathbb{E}_{p(x)} \mathrm{KL}(p(z \mid x) \,\|\, q(z \mid x))
        = -\mathbb{E}_{p(x, z)} \log q(z \mid x) + \text{const}

    The model simulates a minibatch of the data's size, so the guide must be amortized: a function of its arguments. The
    reported bound is the ELBO of the data.

    Args:
        particles: number K of particles of the reported bound.

    Raises:
        ArgumentError: at the first evaluation, a guide whose flow has no inverse, so that it cannot score a latent that
            the model simulated (one with a sequential inverse gets a warning).
        ModelGuideError: at an evaluation, a model whose observations are not its arguments, or a guide with auxiliary
            sites.

    References:
        Hinton et al. 1995, https://doi.org/10.1126/science.7761831; Bornschein & Bengio 2015,
        https://arxiv.org/abs/1406.2751.

    Example:
        >>> from pyrovae.models import VAE
        >>> from pyrovae.guides import AmortizedNormal
        >>> model = VAE(data_shape=(4,), latent_dim=2, hidden=(8,))
        >>> ForwardKL().estimate(model, AmortizedNormal(model), torch.ones(3, 4)).loss.shape
        torch.Size([])
    """

    def __init__(self, particles: int = 1) -> None:
        super().__init__(particles)

    def accept(self, structure: Structure) -> None:
        """Refuses a guide that cannot score a simulated latent, and warns of one that does it slowly."""
        check_scoring(structure, type(self).__name__, "parameters", "ELBO(gradient='pathwise')")

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """The sleep loss, and the ELBO of the data for reporting; see :class:`Objective`."""
        with torch.no_grad():
            weights = self.weights(model, guide, args, kwargs, "parameters")
        bound = (weights.scale * weights.log_w.mean(0)).sum()
        return Estimate(loss=simulated(model, guide, args, kwargs), bound=bound, **elbo_parts(weights))


@OBJECTIVES.register
class WakeSleep(ForwardKL):
    r"""The wake-sleep algorithm: the model by the ELBO, the guide by simulated data.

    .. math:: \nabla_\theta: -\mathbb{E}_{q(z \mid x)} \log p(x, z), \qquad
        \nabla_\phi: -\mathbb{E}_{p(x, z)} \log q(z \mid x)

    The loss is the sum of both, its value that of the negative ELBO of the data plus the sleep loss.

    Args:
        particles: number K of particles of the wake phase.

    Raises:
        ArgumentError: as for :class:`ForwardKL`.
        ModelGuideError: as for :class:`ForwardKL`.

    References:
        Hinton et al. 1995, https://doi.org/10.1126/science.7761831.

    Example:
        >>> from pyrovae.models import VAE
        >>> from pyrovae.guides import AmortizedNormal
        >>> model = VAE(data_shape=(4,), latent_dim=2, hidden=(8,))
        >>> WakeSleep().estimate(model, AmortizedNormal(model), torch.ones(3, 4)).loss.shape
        torch.Size([])
    """

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """The wake and the sleep loss together; see :class:`Objective`."""
        weights = self.weights(model, guide, args, kwargs, "parameters")

        def total(per_particle: Tensor) -> Tensor:
            return (weights.scale * per_particle.mean(0)).sum()

        # log q with its gradient stopped: the samples are held, so only θ is left.
        wake = -total(weights.log_w + weights.log_q - weights.log_q.detach())
        return Estimate(
            loss=wake + simulated(model, guide, args, kwargs),
            bound=total(weights.log_w).detach(),
            **elbo_parts(weights),
        )


@OBJECTIVES.register
class ReweightedWakeSleep(MultiSample):
    r"""Reweighted wake-sleep, with weights for each data point.

    .. math:: \nabla_\theta: \sum_k \tilde w_k \nabla_\theta \log p(x, z_k), \qquad
        \nabla_\phi: \lambda \sum_k \tilde w_k \nabla_\phi \log q(z_k \mid x)
        + (1 - \lambda) \, \mathbb{E}_{p(x', z)} \nabla_\phi \log q(z \mid x')

    with w̃ the weights normalised over the particles of a data point, and λ = ``wake``. The model climbs the IWAE bound,
    which is the value that is reported; the guide descends the inclusive KL, so that it covers the posterior. No
    reparameterization is needed.

    Args:
        particles: number K of particles, at least 2.
        wake: share λ of the wake phase in the guide's gradient, from 0 (sleep alone) to 1.
        gradient: of the wake phase: ``"score"``, ``"dreg"`` for guides that can be reparameterized, or ``"auto"``.

    Raises:
        ArgumentError: an argument is out of range.
        ModelGuideError: at the first evaluation, a subsampled plate inside shared latents.

    References:
        Bornschein & Bengio 2015, https://arxiv.org/abs/1406.2751; Le et al. 2019, https://arxiv.org/abs/1805.10469;
        Tucker et al. 2019 (DReG), https://arxiv.org/abs/1810.04152.

    Example:
        >>> from pyrovae.models import VAE
        >>> from pyrovae.guides import AmortizedNormal
        >>> model = VAE(data_shape=(4,), latent_dim=2, hidden=(8,))
        >>> estimate = ReweightedWakeSleep(5).estimate(model, AmortizedNormal(model), torch.ones(3, 4))
        >>> bool(estimate.bound < 0)
        True
    """

    gradients: ClassVar[tuple[str, ...]] = ("dreg", "score")

    def __init__(self, particles: int, wake: float = 1.0, gradient: str = "score") -> None:
        super().__init__(particles, gradient)
        if particles < 2:
            raise ArgumentError("particles is 1, whose normalised weight is always 1; it must be at least 2")
        if isinstance(wake, bool) or not isinstance(wake, int | float) or not 0.0 <= wake <= 1.0:
            raise ArgumentError(f"wake is {wake!r}; it must be a number from 0 (sleep alone) to 1 (wake alone)")
        self.wake = float(wake)

    def bound(self, log_w: Tensor) -> Tensor:
        """The IWAE bound."""
        return log_mean_exp(log_w)

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Both phases; see :class:`Objective`."""
        self.structure(model, guide, *args, **kwargs)
        weights = self.weights(model, guide, args, kwargs, "path" if self.estimator == "dreg" else "parameters")
        log_w = weights.log_w
        share = log_w.detach().softmax(0)
        if self.estimator == "dreg":  # φ moves by the path alone: E w̃ ∇ log q = E w̃ (1 − w̃) ∂log w/∂z ∇z
            weights.path.factor = self.wake * (1.0 - share)
            climb = (share * log_w).sum(0)
        else:  # θ by log p, φ by log q at held samples
            log_p = log_w + weights.log_q
            climb = (share * (log_p + self.wake * weights.log_q)).sum(0)
        bound = self.bound(log_w.detach())
        loss = -(weights.scale * (bound + climb - climb.detach())).sum()
        if self.wake < 1.0:
            sleep = (1.0 - self.wake) * simulated(model, guide, args, kwargs)
            loss = loss + sleep - sleep.detach()
        return Estimate(loss=loss, bound=(weights.scale * bound).sum(), **elbo_parts(weights))
