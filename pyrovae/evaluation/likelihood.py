"""How likely is the data: importance-sampled estimates of log p(x), one for each data point."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyrovae.devices import resolve_device
from pyrovae.errors import ArgumentError, ModelGuideError, require_count
from pyrovae.modes import device_of, evaluating
from pyrovae.progress import progress_bar
from pyrovae.structure import Program, check
from pyrovae.training.compiled import Graphs, check_compile
from pyrovae.training.data import Batches, Data, batches
from pyrovae.training.graph import Compiled
from pyrovae.training.programs import local_params
from pyrovae.weights import LogWeights, log_weights

__all__ = ["LogLikelihood", "effective_sample_size", "log_likelihood"]

# Numbers that one pass holds at its widest. On a CPU a pass should stay in the cache, on a GPU it should fill it.
_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
_POINTS = 100  # data points that are encoded together
_WORTH_ELEMENTS = 2**32  # numbers at the widest in all from which "auto" compiles (some 20 s eagerly on two cores)


@dataclass(frozen=True)
class LogLikelihood:
    """Estimates of ``log p(x_n)`` in nats, one for each data point.

    Each is the logarithm of an unbiased estimate of ``p(x_n)``: in expectation a lower bound, which rises to the exact
    value as the number of particles grows. The mean log-weight of the same particles is the evidence lower bound of
    the guide, whatever their number.

    Args:
        values: the estimates, `n`.
        standard_error: of each estimate, by the delta method, `n` (NaN for one particle).
        elbo: the evidence lower bound of each data point, `n`.
        elbo_error: the standard error of each, `n` (NaN for one particle).
        effective_sample_size: of each data point's weights, between 1 and ``particles``, `n`.
        particles: the number K of particles.
    """

    values: Tensor
    standard_error: Tensor
    elbo: Tensor
    elbo_error: Tensor
    effective_sample_size: Tensor
    particles: int

    @property
    def mean(self) -> float:
        """Mean estimate over the data, in nats per data point."""
        return float(self.values.double().mean())

    @property
    def mean_error(self) -> float:
        """Monte Carlo standard error of ``mean``, in nats per data point (that of the particles, not of the data)."""
        return mean_error(self.standard_error)

    @property
    def mean_elbo(self) -> float:
        """Mean evidence lower bound over the data, in nats per data point."""
        return float(self.elbo.mean())

    @property
    def mean_elbo_error(self) -> float:
        """Monte Carlo standard error of ``mean_elbo``, in nats per data point."""
        return mean_error(self.elbo_error)

    def __repr__(self) -> str:
        error = f" ± {self.mean_error:.3f}" if self.particles > 1 else ""
        return (
            f"LogLikelihood(mean {self.mean:.3f}{error} nats per data point, {len(self.values)} data points,"
            f" {self.particles} particles)"
        )


def log_likelihood(
    model: Program,
    guide: Program,
    data: Data,
    particles: int = 5000,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    compile: Literal["auto", True, False] = "auto",
    progress: bool = False,
) -> LogLikelihood:
    r"""Importance-sampled log-likelihood with the guide as the proposal.

    .. math:: \log \hat p(x_n) = \log \frac{1}{K} \sum_{k=1}^K \frac{p(x_n, z_k)}{q(z_k \mid x_n)}, \quad
        z_k \sim q(z \mid x_n)

    The particles are drawn in chunks, so the memory does not grow with their number. A guide with ``encode(x)`` and
    ``sample(q)`` (those of ``pyrovae.guides``) encodes each data point once; any other guide is run once a chunk.
    A model whose latents are shared by all data points gets one estimate, of the evidence of all data together.

    Args:
        model: Pyro model, called with a minibatch.
        guide: Pyro guide, called with the same.
        data: as for :func:`pyrovae.fit`; a split that is binarized dynamically is drawn once.
        particles: number K of particles for each data point.
        seed: of the particles; the caller's random state is left as it was.
        device: where the data are put; ``None`` for where the parameters are.
        compile: whether a chunk runs as one compiled graph, with the same draws and several times faster; compiling
            takes some 10 s. ``"auto"`` does so for long evaluations.
        progress: whether to show a progress bar.

    Returns:
        A :class:`LogLikelihood` with an estimate, its standard error and the effective sample size of each data point.

    Raises:
        ArgumentError: ``particles`` is out of range.
        DataError: the data are empty, not finite, or of the wrong shape.
        ModelGuideError: model and guide do not fit each other, or the data plate is subsampled.

    References:
        Burda et al. 2016, https://arxiv.org/abs/1509.00519.

    Example:
        >>> import pyrovae
        >>> from pyrovae.models import VAE
        >>> from pyrovae.guides import AmortizedNormal
        >>> model = VAE(data_shape=(8, 8), latent_dim=2, hidden=(32,))
        >>> test = pyrovae.datasets.load("digits").test
        >>> result = log_likelihood(model, AmortizedNormal(model), test, particles=50)
        >>> result.values.shape, result.mean > -100
        (torch.Size([300]), True)
    """
    require_count("particles", particles)
    place = resolve_device(device) if device is not None else device_of(model, guide)
    check_compile(compile)
    _keep_freed_memory()
    with asking(model, guide, seed=seed):
        source = _source(model, data, _POINTS, place)
        first = source.first()
        nesting = check(model, guide, *first).max_plate_nesting
        probe = log_weights(model, guide, *first, max_plate_nesting=nesting)
        require_plain(probe)
        if not probe.plates:  # one evidence of all data together
            source = _source(model, data, source.size, place)
            if source.steps > 1:
                raise ArgumentError(
                    "data is a DataLoader of several minibatches, but the model's latents are shared by"
                    " all data points; give the data as tensors"
                )
        if compile == "auto":
            compile = particles * source.size * max(part[0].numel() for part in first) > _WORTH_ELEMENTS
        chunks = _Chunks(model, guide, nesting, compile)
        with progress_bar(source.size, " points", progress) as bar:
            found = []
            for batch in source.epoch(0):
                found.append(chunks.sums(batch, particles))
                bar.update(len(batch[0]))
    first_power, second_power, total, squares = (torch.cat(parts) for parts in zip(*found, strict=True))
    ess = (2.0 * first_power - second_power).exp()
    elbo = total / particles
    spread = 1.0 / (particles - 1) if particles > 1 else math.nan
    return LogLikelihood(
        values=first_power - math.log(particles),
        standard_error=((particles / ess - 1.0) * spread).clamp(min=0.0).sqrt(),
        elbo=elbo,
        elbo_error=((squares / particles - elbo.square()) * spread).clamp(min=0.0).sqrt(),
        effective_sample_size=ess,
        particles=particles,
    )


def effective_sample_size(log_w: Tensor) -> Tensor:
    r"""Effective sample size of importance weights, between 1 and the number of particles.

    .. math:: \mathrm{ESS} = \left(\sum_k w_k\right)^2 / \sum_k w_k^2

    Args:
        log_w: log-weights, `particles x *batch`, as :func:`pyrovae.log_weights` gives them.

    Returns:
        A `*batch` tensor.

    References:
        Kong 1992; Liu 2001, "Monte Carlo strategies in scientific computing", section 2.5.3.

    Example:
        >>> effective_sample_size(torch.tensor([[0.0, 0.0], [0.0, -1000.0]]))
        tensor([2., 1.])
    """
    w = (log_w - log_w.amax(0)).exp()
    return w.sum(0).square() / w.square().sum(0)


def mean_error(errors: Tensor) -> float:
    """Standard error of the mean of independent estimates, given that of each."""
    return float(errors.double().square().sum().sqrt()) / errors.numel()


def _keep_freed_memory() -> None:
    """Lets the C library keep what one chunk frees for the next.

    glibc gives large freed blocks back to the system, which then faults every page in anew (up to a quarter of the
    time). Once it has seen a block just below its limit of 32 MiB freed, it keeps twice as much.
    """
    torch.empty(2**23 - 2**12)


def _source(model: Program, data: Data, size: int, place: torch.device) -> Batches:
    own_size = isinstance(data, DataLoader)
    return batches(data, None if own_size else size, place, None, "data", getattr(model, "likelihood", None))


def require_plain(weights: LogWeights) -> None:
    """Refuses log-densities that are scaled: their ratio is no importance weight."""
    if not isinstance(weights.scale, float) or weights.scale != 1.0:
        raise ModelGuideError(
            "the model scales its log-densities (a subsampled plate, or poutine.scale), so that their ratio is no"
            " importance weight. Build model and guide for the data they are evaluated on, without subsample_size."
        )


class _Sums(NamedTuple):
    """Sums over particles, `n` each: ``log Σ w``, ``log Σ w²``, ``Σ log w`` and ``Σ (log w)²``."""

    log_w: Tensor
    log_w_squared: Tensor
    of_log: Tensor
    of_log_squared: Tensor

    def plus(self, other: _Sums) -> _Sums:
        """The sums over both sets of particles."""
        powers = (torch.logaddexp(mine, theirs) for mine, theirs in zip(self[:2], other[:2], strict=True))
        return _Sums(*powers, *(mine + theirs for mine, theirs in zip(self[2:], other[2:], strict=True)))


@dataclass
class _Chunks:
    """Runs model and guide for chunks of particles.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        nesting: number of batch dimensions that plates occupy.
        compile: whether full chunks of the first minibatch's shape run as one compiled graph.
    """

    model: Program
    guide: Program
    nesting: int
    compile: bool
    graphs: Graphs = field(default_factory=lambda: Graphs("this evaluation"))

    def sums(self, batch: tuple[Tensor, ...], particles: int) -> _Sums:
        """The sums over the particles for each data point of a minibatch, chunk by chunk."""
        propose = _proposal(self.guide, batch)
        widest = max(part.numel() for part in batch)
        size = max(1, min(particles, _ELEMENTS.get(batch[0].device.type, _ELEMENTS["cpu"]) // widest))
        graph = self._graph(batch, size) if self.compile else None
        total: _Sums | None = None
        for start in range(0, particles, size):
            count = min(size, particles - start)
            if graph is not None and count == size:
                found = _Sums(*graph(*batch)[0])
            else:
                found = self._sums(propose, batch, count)
            total = found if total is None else total.plus(found)
        assert total is not None
        return total

    def _sums(self, propose: Program, batch: tuple[Tensor, ...], count: int) -> _Sums:
        """The sums over the particles of one chunk."""
        weights = log_weights(self.model, propose, *batch, particles=count, max_plate_nesting=self.nesting)
        log_w = weights.log_w.flatten(1) if weights.plates else weights.log_w.unsqueeze(1)
        exact = log_w.double()
        return _Sums(log_w.logsumexp(0), (2.0 * log_w).logsumexp(0), exact.sum(0), exact.square().sum(0))

    def _graph(self, batch: tuple[Tensor, ...], size: int) -> Compiled | None:
        """The graph of a chunk for minibatches of this shape; ``None``, after a warning, where there can be none."""
        key = (size, *(part.shape for part in batch))
        return self.graphs.get(key, lambda *args: (self._sums(self.guide, args, size), ()), batch, lambda: ())


def _proposal(guide: Any, batch: tuple[Tensor, ...]) -> Program:
    """The guide with its data points encoded once, where it can do that."""
    if len(batch) == 1 and hasattr(guide, "encode") and hasattr(guide, "sample"):
        posterior = guide.encode(batch[0])
        return lambda x: guide.sample(posterior)
    return guide


@contextlib.contextmanager
def asking(*programs: Program, seed: int) -> Iterator[None]:
    """Evaluation mode, parameters in the modules, no validation of every distribution."""
    with evaluating(*programs, seed=seed), local_params(*programs), pyro.validation_enabled(False):
        yield
