"""Semi-amortized inference: gradient steps on each data point's posterior, from the encoder's proposal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.errors import ArgumentError, ModelGuideError, require_count, require_positive
from pyrovae.evaluation.likelihood import asking, mean_error
from pyrovae.guides.amortized import replayed
from pyrovae.structure import Program, check
from pyrovae.weights import log_weights

__all__ = ["Refined", "Refinement", "refine"]

_CLIP = 5.0  # largest norm of a data point's gradient, as in Kim et al. 2018


class Refinable(Protocol):
    """An amortized guide that tells the numbers that describe a posterior from the posterior."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The guide as a program."""

    def propose(self, x: Tensor) -> Tensor:
        """`n x outputs` numbers, for n data points."""

    def posterior(self, raw: Tensor) -> Any:
        """The distribution that they describe."""

    def sample(self, q: Any) -> Any:
        """The guide's sample statements, given the posterior."""


@dataclass(frozen=True)
class Refinement:
    """Posteriors of n data points, refined from the encoder's proposals.

    Args:
        raw: the numbers that describe them, `n x outputs`.
        posterior: the distribution, of batch shape (n,); ``guide.sample`` takes it.
        before: ELBO of the encoder's proposal in nats, `n`.
        after: ELBO of the refined posterior in nats, `n`.
        standard_error: Monte Carlo standard error of ``after − before``, `n`.
    """

    raw: Tensor
    posterior: Any
    before: Tensor
    after: Tensor
    standard_error: Tensor

    def __repr__(self) -> str:
        gain = (self.after - self.before).mean()
        return (
            f"Refinement(ELBO {self.before.mean():.3f} -> {self.after.mean():.3f} nats per data point, gain"
            f" {gain:.3f} ± {mean_error(self.standard_error):.3f}, {len(self.after)} data points)"
        )


def refine(
    model: Program,
    guide: Refinable,
    x: Tensor,
    steps: int = 50,
    lr: float = 0.02,
    *,
    particles: int = 8,
    evaluation_particles: int = 100,
    seed: int = 0,
) -> Refinement:
    r"""Takes gradient steps on the variational parameters of every data point, the whole batch at once.

    .. math:: \lambda_0 = \mathrm{enc}_\phi(x), \qquad \lambda_{t+1} = \lambda_t
        + \eta \nabla_\lambda \mathbb{E}_{q(z; \lambda_t)} [\log p(x, z) - \log q(z; \lambda_t)]

    The gradient of a data point is scaled down to norm 5 where it is larger. A data point whose bound did not rise (on
    ``evaluation_particles`` draws) keeps its proposal; ``before`` and ``after`` are from other draws than those. The
    mean gain is a lower estimate of the guide's amortization gap.

    Args:
        model: Pyro model of ``x``, with one latent or more for each data point.
        guide: an amortized guide with ``propose`` and ``posterior``: those of :func:`pyrovae.guides.amortize`,
            ``AmortizedNormal`` and its siblings.
        x: A `n x …` tensor of data.
        steps: number of gradient steps.
        lr: step size η, in units of the encoder's outputs.
        particles: draws of a data point for each gradient; the data are repeated so many times.
        evaluation_particles: draws of a data point for ``before`` and ``after``.
        seed: of all draws; the caller's random state is left as it was.

    Returns:
        A :class:`Refinement`.

    Raises:
        ArgumentError: the guide has no ``propose`` and ``posterior``, or an argument is out of range.
        ModelGuideError: the model's bound does not come apart into data points.

    References:
        Hjelm et al. 2016, https://arxiv.org/abs/1511.06382; Kim et al. 2018, https://arxiv.org/abs/1802.02550;
        Cremer et al. 2018, https://arxiv.org/abs/1801.03558.

    Example:
        >>> from pyrovae.models import VAE
        >>> from pyrovae.guides import AmortizedNormal
        >>> model = VAE(data_shape=(4,), latent_dim=2, hidden=(8,))
        >>> x = torch.bernoulli(torch.full((5, 4), 0.4))
        >>> result = refine(model, AmortizedNormal(model), x, steps=5)
        >>> result.posterior.batch_shape, bool((result.after - result.before).mean() > 0)
        (torch.Size([5]), True)
    """
    _check_arguments(guide, steps, lr, particles)
    with asking(model, guide, seed=seed):
        nesting = _nesting(model, guide, x)
        proposed = guide.propose(x)
        refined = _climb(model, guide, x, proposed, steps, lr, particles, nesting, differentiate=False)

        def gain(count: int) -> tuple[Tensor, Tensor]:
            before, after = (_log_w(model, guide, x, raw, nesting, count) for raw in (proposed, refined))
            return before, after

        before, after = gain(evaluation_particles)
        rose = after.mean(0) > before.mean(0)
        raw = torch.where(rose.unsqueeze(-1), refined, proposed)
        before, after = gain(evaluation_particles)
        after = torch.where(rose, after, before)
        error = ((before.var(0) + after.var(0)) / len(after)).sqrt()
        error = torch.where(rose, error, torch.zeros_like(error))
        return Refinement(raw, guide.posterior(raw), before.mean(0), after.mean(0), error)


class Refined(PyroModule):
    r"""A guide whose every posterior is refined by a few gradient steps from another guide's proposal.

    It serves for evaluation (``log_likelihood`` with refined proposals is a tighter bound) and for training
    (semi-amortized VAE). With ``differentiate=True`` gradients go *through* the steps, to the encoder and, since the
    steps depend on them, to the model's parameters: the exact gradient of the bound after refinement, by second
    derivatives. With ``differentiate=False`` they *stop* at the steps, :math:`\lambda_T = \lambda_0 + \mathrm{const}`:
    the encoder gets the gradient at the refined posterior as if it were its proposal, at the cost of T first-order
    gradients.

    Objectives that train the guide by a loss of its own (wake-sleep) need ``differentiate=False``.

    Args:
        model: Pyro model of a batch of data. It is not part of the guide.
        guide: an amortized guide, as for :func:`refine`.
        steps: number T of gradient steps.
        lr: step size, in units of the encoder's outputs.
        particles: draws of a data point for each gradient; the data are repeated so many times.
        differentiate: whether gradients go through the steps.

    Raises:
        ArgumentError: the guide has no ``propose`` and ``posterior``, or an argument is out of range.
        ModelGuideError: at the first call, a model whose bound does not come apart into data points.

    References:
        Kim et al. 2018, https://arxiv.org/abs/1802.02550; Marino et al. 2018, https://arxiv.org/abs/1807.09356.

    Example:
        >>> from pyrovae.models import VAE
        >>> from pyrovae.guides import AmortizedNormal
        >>> model = VAE(data_shape=(4,), latent_dim=2, hidden=(8,))
        >>> guide = Refined(model, AmortizedNormal(model), steps=3)
        >>> guide(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        model: Program,
        guide: Refinable,
        steps: int = 5,
        lr: float = 0.05,
        *,
        particles: int = 4,
        differentiate: bool = True,
    ) -> None:
        super().__init__()
        _check_arguments(guide, steps, lr, particles)
        if not isinstance(guide, torch.nn.Module):
            raise ArgumentError(f"guide is a {type(guide).__name__}; it must be a torch.nn.Module")
        self._model = (model,)  # in a tuple, so that it is no submodule
        self.guide = guide
        self.steps, self.lr, self.particles, self.differentiate = steps, lr, particles, differentiate
        self._max_plate_nesting: int | None = None
        self._last: dict[str, Tensor] = {}

    def propose(self, x: Tensor) -> Tensor:
        """The refined numbers that describe the posteriors of n data points, `n x outputs`."""
        (model,) = self._model
        if replayed() and self._last.get("x") is x:
            return self._last["raw"]  # an objective scores the last draws, with all that q depends on held fixed
        if self._max_plate_nesting is None:
            self._max_plate_nesting = _nesting(model, self.guide, x)
        raw = self.guide.propose(x)
        through = self.differentiate and torch.is_grad_enabled()
        refined = _climb(
            model, self.guide, x, raw, self.steps, self.lr, self.particles, self._max_plate_nesting, through
        )
        self._last.update(x=x, raw=refined.detach())
        return refined if through else raw + (refined - raw).detach()

    def posterior(self, raw: Tensor) -> Any:
        """The distribution that the numbers describe."""
        return self.guide.posterior(raw)

    def encode(self, x: Tensor) -> Any:
        """The refined posterior of each data point."""
        return self.posterior(self.propose(x))

    def forward(self, x: Tensor) -> Any:
        """Samples the latents for a batch `n x …` of data."""
        return self.sample(self.encode(x))

    def sample(self, q: Any) -> Any:
        """The guide's sample statements, given the posterior of a batch of n data points."""
        return self.guide.sample(q)


def _climb(
    model: Program,
    guide: Refinable,
    x: Tensor,
    raw: Tensor,
    steps: int,
    lr: float,
    particles: int,
    nesting: int,
    differentiate: bool,
) -> Tensor:
    """The numbers after all steps; a function of ``raw`` and all parameters only where it is to be differentiated."""
    repeated = x.repeat(particles, *[1] * (x.dim() - 1))
    with torch.enable_grad():
        if not raw.requires_grad or not differentiate:
            raw = raw.detach().requires_grad_()
        for _ in range(steps):
            bound = _log_w(model, guide, repeated, raw.repeat(particles, 1), nesting).sum() / particles
            (gradient,) = torch.autograd.grad(bound, raw, create_graph=differentiate)
            norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
            raw = raw + lr * gradient * (_CLIP / norm.clamp(min=_CLIP))
    return raw


def _log_w(model: Program, guide: Refinable, x: Tensor, raw: Tensor, nesting: int, particles: int = 1) -> Tensor:
    """Log-weights of each data point, `particles x n`; what is drawn is seen by no handler around the guide."""
    with poutine.block():
        weights = log_weights(
            model,
            lambda _: guide.sample(guide.posterior(raw)),
            x,
            particles=particles,
            max_plate_nesting=nesting,
        )
    if tuple(size for _, size in weights.plates) != (len(x),):
        plates = ", ".join(f"{name!r} of size {size}" for name, size in weights.plates) or "none"
        raise ModelGuideError(
            f"refinement needs a bound of each of the {len(x)} data points, but the plates around every site of model"
            f" and guide are: {plates}. Every latent must lie in the plate of the data."
        )
    return weights.log_w


def _nesting(model: Program, guide: Refinable, x: Tensor) -> int:
    """The number of batch dimensions of model and guide, after checking that they fit."""
    with torch.no_grad(), poutine.block():
        q = guide.posterior(guide.propose(x))
        structure = check(model, lambda _: guide.sample(q), x)
    stuck = [name for name, pathwise in structure.reparameterized.items() if not pathwise]
    if stuck:
        raise ArgumentError(
            f"refinement follows the pathwise gradient, which site {stuck[0]!r} of the guide does not have. Refine"
            " continuous latents alone."
        )
    return structure.max_plate_nesting


def _check_arguments(guide: object, steps: int, lr: float, particles: int) -> None:
    if not (hasattr(guide, "propose") and hasattr(guide, "posterior") and hasattr(guide, "sample")):
        raise ArgumentError(
            f"guide {type(guide).__name__} has no propose, posterior and sample, so that there are no numbers of a data"
            " point to refine. Use AmortizedNormal, one of its siblings, or what pyrovae.guides.amortize makes."
        )
    for argument, given in (("steps", steps), ("particles", particles)):
        require_count(argument, given)
    require_positive("lr", lr)
