"""Why is an amortized bound not tight: the family of the posterior, or its encoder?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import transform_to

from pyrovae.errors import ArgumentError, ModelGuideError, require_count, require_positive
from pyrovae.evaluation.importance import draw_log_weights, smoothed
from pyrovae.evaluation.likelihood import asking, mean_error
from pyrovae.modes import device_of, evaluating
from pyrovae.progress import progress_bar
from pyrovae.structure import Program, check
from pyrovae.training.data import Data, batches
from pyrovae.weights import Through, log_weights

__all__ = ["Gaps", "gaps", "local_parameters"]

Rebuild = Callable[[list[Tensor]], Any]


@dataclass(frozen=True)
class Gaps:
    r"""Where an amortized guide loses, in nats, for each data point.

    .. math:: \log p(x) - \mathcal{L}[q_\phi] =
        \underbrace{\log p(x) - \mathcal{L}[q^*]}_{\text{approximation}} +
        \underbrace{\mathcal{L}[q^*] - \mathcal{L}[q_\phi]}_{\text{amortization}}

    Args:
        log_likelihood: importance-sampled estimate of ``log p(x_n)`` with q* as the proposal, `n`.
        elbo_optimal: ELBO of q*, the best member of the guide's family for the data point, `n`.
        elbo_amortized: ELBO of the encoder's member, `n`.
        approximation: approximation gap, `n`.
        amortization: amortization gap, `n`.
        approximation_error: Monte Carlo standard error of each approximation gap, `n`.
        amortization_error: of each amortization gap, `n`.
        k: Pareto k̂ of the weights behind each ``log_likelihood``, `n`.
        efficiency: their effective sample size over their number, `n`; where it is low and k̂ above 0.7, the
            log-likelihood is too low, and so is the approximation gap.
        particles: number of draws behind each estimate.
        notes: what makes the figures misleading here, one sentence each.
    """

    log_likelihood: Tensor
    elbo_optimal: Tensor
    elbo_amortized: Tensor
    approximation: Tensor
    amortization: Tensor
    approximation_error: Tensor
    amortization_error: Tensor
    k: Tensor
    efficiency: Tensor
    particles: int
    notes: tuple[str, ...] = ()

    @property
    def inference(self) -> Tensor:
        """Inference gap, the sum of both gaps, `n`."""
        return self.approximation + self.amortization

    def __repr__(self) -> str:
        rows = (
            ("approximation gap", self.approximation, self.approximation_error),
            ("amortization gap", self.amortization, self.amortization_error),
        )
        said = ", ".join(f"{name} {float(gap.mean()):.3f} ± {mean_error(error):.3f}" for name, gap, error in rows)
        noted = "".join(f"\n  note: {note}" for note in self.notes)
        return (
            f"Gaps({said} nats per data point; log-likelihood {float(self.log_likelihood.mean()):.3f};"
            f" {len(self.k)} data points, {self.particles} particles){noted}"
        )


def gaps(
    model: Program,
    guide: Any,
    data: Data,
    *,
    steps: int = 500,
    lr: float = 0.05,
    particles: int = 2000,
    optimization_particles: int = 10,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> Gaps:
    r"""Approximation and amortization gap of an amortized guide.

    .. math:: q^*_n = \arg\max_{q \in \mathcal{Q}} \mathcal{L}[q; x_n], \qquad
        \log \hat p(x_n) = \log \frac{1}{K} \sum_k \frac{p(x_n, z_k)}{q^*_n(z_k)}, \quad z_k \sim q^*_n

    q* is found for a whole batch at once: Adam with a cosine schedule from the encoder's proposal, with a gradient
    whose variance vanishes at the posterior (sticking the landing; the plain pathwise one for a flow whose inverse is
    slow or missing). Both ELBOs use the same random numbers, and the ELBO of q* the same draws as ``log p̂``, so that
    the gaps are more precise than their parts.

    The guide has ``encode(x)``, which returns a distribution of batch shape `n`, and ``sample(q)``, which runs its
    sample statements. Where it also has ``propose(x)`` and ``posterior(raw)`` (most amortized guides of
    ``pyrovae.guides``), the family is all that ``posterior`` makes of any numbers ``raw``, and these are optimized for
    each data point. Of a flow they are base mean, base scale and context; the networks by which the context steers
    the flow are shared by all data points and stay as they are, so that what they cannot do counts as approximation.
    For any other guide the family is that of the distribution: those with unconstrained or transformable parameters
    (diagonal, full and low-rank Normal, Beta, Gamma, …) need nothing more, others join by :func:`local_parameters`.
    What ``sample(q)`` computes from q by networks of its own stays amortized.

    Args:
        model: Pyro model, called with a minibatch.
        guide: amortized Pyro guide of the model.
        data: as for :func:`pyrovae.fit`, of one tensor a minibatch.
        steps: gradient steps of each local optimization.
        lr: its first learning rate; it decays to zero.
        particles: draws from which ELBOs and log-likelihoods are estimated.
        optimization_particles: draws in each gradient step.
        batch_size: data points that are optimized together.
        seed: of all draws; the caller's random state is left as it was.
        progress: whether to show a progress bar.

    Returns:
        A :class:`Gaps`. What makes its figures misleading is warned of and kept in its ``notes``.

    Raises:
        ArgumentError: an argument is out of range, or the guide or its posterior's family lacks the interface.
        ModelGuideError: model and guide do not fit each other, or some latents are shared by all data points.

    References:
        Cremer, Li & Duvenaud 2018, https://arxiv.org/abs/1801.03558; Roeder et al. 2017 (sticking the landing),
        https://arxiv.org/abs/1703.09194.

    Example:
        >>> import pyrovae
        >>> from pyrovae.models import VAE
        >>> from pyrovae.guides import AmortizedNormal
        >>> model = VAE(data_shape=(8, 8), latent_dim=2, hidden=(32,))
        >>> test = pyrovae.datasets.load("digits").test.x[:20]
        >>> found = gaps(model, AmortizedNormal(model), test, steps=200, particles=1000)
        >>> bool(found.amortization.mean() > 0)   # the encoder is untrained
        True
    """
    require_count("steps", steps)
    require_count("particles", particles, 25)
    require_count("optimization_particles", optimization_particles)
    require_count("batch_size", batch_size)
    require_positive("lr", lr)
    if not (hasattr(guide, "encode") and hasattr(guide, "sample")):
        raise ArgumentError(
            f"guide is a {type(guide).__name__} without encode(x) and sample(q); gaps are those of an amortized guide,"
            " such as pyrovae.guides.AmortizedNormal"
        )
    found, rising = [], []
    with asking(model, guide, seed=seed):
        source = batches(data, batch_size, device_of(model, guide), None, "data", getattr(model, "likelihood", None))
        with progress_bar(source.size, " points", progress) as bar:
            for batch in source.epoch(0):
                if len(batch) != 1:
                    raise ArgumentError(f"data has minibatches of {len(batch)} tensors; encode(x) takes one")
                part, rise = _of_batch(model, guide, batch[0], steps, lr, particles, optimization_particles)
                found.append(part)
                rising.append(rise * len(batch[0]) / source.size)
                bar.update(len(batch[0]))
    joined = {field.name: torch.cat([getattr(part, field.name) for part in found]) for field in fields(Gaps)[:-2]}
    notes = _notes(joined, sum(rising))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return Gaps(**joined, particles=particles, notes=notes)


@singledispatch
def local_parameters(q: Any) -> tuple[list[Tensor], Rebuild]:
    """The free parameters of a posterior, one set for each data point, for :func:`gaps`.

    A distribution of torch or Pyro is taken apart by its ``arg_constraints``: each parameter becomes an unconstrained
    tensor. A family with other parameters joins by ``local_parameters.register(ItsClass)``.

    Args:
        q: a distribution of batch shape `n`.

    Returns:
        Unconstrained tensors, and a function from such tensors to a distribution of the same family. With the given
        tensors it returns ``q``.

    Raises:
        ArgumentError: nothing is registered for the family.

    Example:
        >>> import pyro.distributions as dist
        >>> free, rebuild = local_parameters(dist.Normal(torch.zeros(3), torch.ones(3)))
        >>> free
        [tensor([0., 0., 0.]), tensor([0., 0., 0.])]
        >>> rebuild([torch.ones(3), torch.zeros(3)]).mean
        tensor([1., 1., 1.])
    """
    if not getattr(q, "has_rsample", False) or not q.arg_constraints:
        raise _not_optimizable(q)
    return _by_constraints(q, list(q.arg_constraints))


@local_parameters.register(torch.distributions.Independent)
def _(q: Any) -> tuple[list[Tensor], Rebuild]:
    free, rebuild = local_parameters(q.base_dist)
    return free, lambda tensors: type(q)(rebuild(tensors), q.reinterpreted_batch_ndims)


@local_parameters.register(torch.distributions.MultivariateNormal)
def _(q: Any) -> tuple[list[Tensor], Rebuild]:
    return _by_constraints(q, ["loc", "scale_tril"])  # not the covariance and the precision as well


def _by_constraints(q: Any, names: list[str]) -> tuple[list[Tensor], Rebuild]:
    transforms = {name: transform_to(q.arg_constraints[name]) for name in names}
    free = [transforms[name].inv(getattr(q, name).detach()).contiguous().clone() for name in names]

    def rebuild(tensors: list[Tensor]) -> Any:
        given = {name: transforms[name](tensor) for name, tensor in zip(names, tensors, strict=True)}
        return type(q)(**given)

    return free, rebuild


def _family(guide: Any, x: Tensor) -> tuple[list[Tensor], Rebuild]:
    """The guide's family for a batch: the free parameters that the encoder proposes, and how they make a member."""
    if not (hasattr(guide, "propose") and hasattr(guide, "posterior")):
        return local_parameters(guide.encode(x))
    raw = guide.propose(x)
    q = guide.posterior(raw)
    for each in q.values() if isinstance(q, dict) else (q,):
        if not each.has_rsample:
            raise _not_optimizable(each)
    return [raw], lambda tensors: guide.posterior(tensors[0])


def _not_optimizable(q: Any) -> ArgumentError:
    return ArgumentError(
        f"the guide's posterior is a {type(q).__name__}, whose parameters for one data point gaps cannot optimize;"
        " register a function for its class with pyrovae.evaluation.local_parameters.register"
    )


class _Local(nn.Module):
    """A guide with free posterior parameters for each data point of a batch."""

    def __init__(self, guide: Any, free: list[Tensor], rebuild: Rebuild) -> None:
        super().__init__()
        self.free = nn.ParameterList(tensor.clone() for tensor in free)
        self.rebuild = rebuild
        self.sample = guide.sample  # the method: the guide's own parameters are none of these

    def forward(self, x: Tensor) -> Any:
        return self.sample(self.rebuild(list(self.free)))


def _of_batch(
    model: Program, guide: Any, x: Tensor, steps: int, lr: float, particles: int, optimization_particles: int
) -> tuple[Gaps, float]:
    """The gaps of a batch, and by how much the mean ELBO still rose late in the optimization, in nats."""
    free, rebuild = _family(guide, x)
    q, local = rebuild(free), _Local(guide, free, rebuild)
    rise = _optimize(model, local, x, steps, lr, optimization_particles)
    draws = int(torch.randint(2**31, ()))
    with evaluating(model, guide, seed=draws):
        optimal, rounding = draw_log_weights(model, local, (x,), {}, particles)
    with evaluating(model, guide, seed=draws):
        amortized, _ = draw_log_weights(model, lambda x: guide.sample(q), (x,), {}, particles)
    tails = smoothed(optimal, rounding)
    elbo = optimal.mean(0)
    log_likelihood = optimal.logsumexp(0) - math.log(particles)
    # Delta method: the error of log p̂ − ELBO is that of the mean of w / p̂ − log w.
    influence = (optimal - log_likelihood).exp() - optimal
    found = Gaps(
        log_likelihood=log_likelihood,
        elbo_optimal=elbo,
        elbo_amortized=amortized.mean(0),
        approximation=log_likelihood - elbo,
        amortization=(optimal - amortized).mean(0),
        approximation_error=influence.std(0) / particles**0.5,
        amortization_error=(optimal - amortized).std(0) / particles**0.5,
        k=tails.k,
        efficiency=tails.efficiency,
        particles=particles,
    )
    return found, rise


@torch.enable_grad()
def _optimize(model: Program, local: _Local, x: Tensor, steps: int, lr: float, particles: int) -> float:
    """Maximises each data point's ELBO; the rise of their mean in the second half of the steps.

    Less than a fiftieth of the whole rise counts as none.
    """
    structure = check(model, local, x)
    through: Through = "path" if structure.quick else "both"
    parameters = list(local.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bounds = []
    for _ in range(steps):
        weights = log_weights(
            model, local, x, particles=particles, through=through, max_plate_nesting=structure.max_plate_nesting
        )
        if [size for _, size in weights.plates] != [len(x)]:
            raise ModelGuideError(
                f"the weights of model and guide are over the plates {dict(weights.plates)}, but gaps need one weight"
                f" for each of the {len(x)} data points: put every latent and observed site into the data plate"
            )
        bound = weights.log_w.mean(0).sum()
        gradients = torch.autograd.grad(-bound, parameters)  # the model's and the guide's own get none
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        bounds.append(bound.detach())
    history = torch.stack(bounds).double() / len(x)
    tenth = max(1, steps // 10)
    first, middle, last = (float(history[at:][:tenth].mean()) for at in (0, (steps - tenth) // 2, steps - tenth))
    return last - middle if last - middle > 0.02 * (last - first) else 0.0


def _notes(found: dict[str, Tensor], rise: float) -> tuple[str, ...]:
    amortization, error = float(found["amortization"].mean()), mean_error(found["amortization_error"])
    notes = []
    heavy = float(((found["k"] > 0.7) & (found["efficiency"] < 0.9)).double().mean())
    if heavy > 0.05:
        notes.append(
            f"For {heavy:.0%} of the data points k̂ of q* is above 0.7 and its efficiency below 0.9: log p̂(x) is too low"
            " there, and the approximation gap is a lower bound. Take more particles, or a richer family."
        )
    if rise > 0.05:
        notes.append(
            f"The ELBO of q* still rose by {rise:.2f} nats in the second half of its optimization: the amortization gap"
            " is a lower bound. Take more steps, or a larger lr."
        )
    if amortization < -3.0 * error - 1e-3:
        notes.append(
            "q* has a lower ELBO than the encoder's posterior, so its optimization fell short: take more steps, a"
            " smaller lr or more optimization_particles."
        )
    return tuple(notes)
