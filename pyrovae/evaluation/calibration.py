"""Simulation-based calibration: are posteriors right on average over data that the model makes itself?"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, ModelGuideError, require_count
from pyrovae.evaluation.likelihood import asking
from pyrovae.progress import progress_bar
from pyrovae.structure import Program, Site, independent_frames, sample_sites
from pyrovae.training.programs import local_params

__all__ = ["SBC", "posterior_samples", "sbc"]

Samples = Mapping[str, Tensor]

_ENVELOPE_SIMULATIONS = 2000  # of the null distribution of the ECDF's largest deviation


@dataclass(frozen=True)
class SBC:
    r"""Ranks of the true latents among posterior draws, one column for each scalar latent.

    If the posteriors are exact, each rank is uniform on 0, …, L. A ∪-shaped histogram says that they are too narrow, a
    ∩-shaped one too wide, a slope that they are biased.

    Args:
        ranks: whole numbers in 0, …, L, `simulations x latents`.
        names: of the latents: ``"z[0]"``, ….
        draws: number L of posterior draws in each simulation.
        bins: number of bins of the chi-square test; it divides L + 1.
    """

    ranks: Tensor
    names: tuple[str, ...]
    draws: int
    bins: int

    @property
    def counts(self) -> Tensor:
        """Histogram of the ranks, `bins x latents`."""
        return _tally(self.ranks * self.bins // (self.draws + 1), self.bins)

    @property
    def chi_square(self) -> Tensor:
        """P-value of the chi-square test of uniform ``counts``, `latents`."""
        from scipy.stats import chisquare

        return torch.as_tensor(chisquare(self.counts.double().numpy(), axis=0).pvalue, dtype=torch.double)

    @property
    def _below(self) -> Tensor:
        """Number of ranks below 1, …, L, `draws x latents`."""
        return _tally(self.ranks, self.draws + 1).cumsum(0)[:-1]

    @property
    def ecdf(self) -> Tensor:
        """Share of the ranks below 1, …, L, `draws x latents`; it is uniform at (1, …, L) / (L + 1)."""
        return self._below.double() / len(self.ranks)

    @property
    def ecdf_p(self) -> Tensor:
        """P-value of the largest deviation of the ECDF from the uniform one, `latents`."""
        null = _null_extremes(len(self.ranks), self.draws)
        observed = _extremes(self._below.mT.numpy(), len(self.ranks), self.draws)
        # The +1 counts the observed ECDF itself, so that the test holds its level.
        at_most = np.searchsorted(null, observed, side="right")
        return torch.as_tensor((at_most + 1) / (len(null) + 1), dtype=torch.double)

    def envelope(self, coverage: float = 0.95) -> tuple[Tensor, Tensor]:
        """Band that the whole ECDF of uniform ranks stays in with this probability.

        Args:
            coverage: between 0 and 1.

        Returns:
            Its lower and upper edge at 1, …, L, both `draws`.

        Raises:
            ArgumentError: ``coverage`` is out of range.
        """
        from scipy.stats import binom

        if not 0.0 < coverage < 1.0:
            raise ArgumentError(f"coverage is {coverage!r}; it must lie between 0 and 1")
        n = len(self.ranks)
        level = np.quantile(_null_extremes(n, self.draws), 1.0 - coverage)
        uniform = np.arange(1, self.draws + 1) / (self.draws + 1)
        low, high = (binom.ppf(tail, n, uniform) / n for tail in (level / 2, 1.0 - level / 2))
        return torch.as_tensor(low), torch.as_tensor(high)

    def __repr__(self) -> str:
        p = torch.minimum(self.chi_square, self.ecdf_p)
        worst, tests = int(p.argmin()), 2 * len(self.names)
        adjusted = min(1.0, float(p[worst]) * tests)
        return (
            f"SBC({'uniform' if adjusted > 0.05 else 'not uniform'}: smallest of {tests} p-values {float(p[worst]):.2g}"
            f" at {self.names[worst]!r}, {adjusted:.2g} after Bonferroni; {len(self.ranks)} simulations,"
            f" {self.draws} draws)"
        )


def sbc(
    model: Program,
    posterior: Callable[..., Any],
    *args: Any,
    simulations: int = 200,
    draws: int = 99,
    bins: int = 20,
    arguments: Callable[[dict[str, Tensor]], tuple[Any, ...]] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> SBC:
    r"""Simulation-based calibration of a guide, or of any way to find posteriors.

    .. math:: z \sim p(z), \quad x \sim p(x \mid z), \quad z_1, \ldots, z_L \sim q(z \mid x), \quad
        \mathrm{rank} = \#\{\ell : z_\ell < z\}

    The model is run forward with its observations dropped (``poutine.uncondition``), and the posterior is asked for
    on what it generated. Where a plate encloses all latents and observations (a VAE), each of its elements is a
    simulation. Ties of discrete latents are broken at random. The parameters stay as they are.

    Args:
        model: Pyro model, called with ``*args``.
        posterior: an amortized guide (a module, called with the simulated arguments); or a function that is called with
            them once a simulation and returns a guide fitted to them, or a dictionary of `draws x *shape` samples
            of each latent site. Pyro's param store is empty at each of its calls.
        *args: arguments of the model that show the shapes; the simulated observations take their place.
        simulations: number N of simulations; about 10 a bin or more.
        draws: number L of posterior draws, independent ones (thin those of a chain).
        bins: of the chi-square test; ``draws + 1`` must be a multiple of it.
        arguments: from the simulated observations by site to the arguments for ``posterior``; ``None`` where each
            observed site gets one of ``args`` as it is (``obs=x``).
        seed: of all draws; the caller's random state is left as it was.
        progress: whether to show a progress bar.

    Returns:
        An :class:`SBC` with ranks, tests of uniformity and the ECDF's envelope.

    Raises:
        ArgumentError: an argument is out of range, the simulated observations cannot be put in the place of ``args``,
            or the samples have the wrong shape.
        ModelGuideError: the model has no latent or no observed site or a ``pyro.factor``, or the posterior lacks a
            latent site.

    References:
        Talts et al. 2018, https://arxiv.org/abs/1804.06788; Säilynoja et al. 2022 (the envelope),
        https://doi.org/10.1007/s11222-022-10090-6.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def exact(x):   # draws from the posterior
        ...     return {"z": dist.Normal(x / 2, 0.5**0.5).sample((99,))}
        >>> found = sbc(model, exact, torch.zeros(()), simulations=200)
        >>> bool(found.chi_square > 0.01), bool(found.ecdf_p > 0.01)
        (True, True)
    """
    for name, value in dict(simulations=simulations, draws=draws, bins=bins).items():
        require_count(name, value)
    if (draws + 1) % bins or bins < 2:
        raise ArgumentError(f"bins is {bins}; draws + 1 = {draws + 1} must be a multiple of it, and it of at least 2")
    ranks: list[Tensor] = []
    names: tuple[str, ...] = ()
    found = 0
    with asking(model, posterior, seed=seed), progress_bar(simulations, " simulations", progress) as bar:
        sites = _observed_sites(model, args)
        place = arguments or _places(sites, args)
        while found < simulations:
            truth, observed, over = _simulate(model, args, sites.keys())
            samples = _samples(posterior, place(observed), truth, draws)
            names, part = _ranks(truth, samples, over)
            ranks.append(part)
            bar.update(min(len(part), simulations - found))
            found += len(part)
    return SBC(torch.cat(ranks)[:simulations].cpu(), names, draws, bins)


@torch.no_grad()
def posterior_samples(guide: Program, *args: Any, draws: int = 1000) -> dict[str, Tensor]:
    """Draws from a guide, all in one vectorized pass.

    Args:
        guide: Pyro guide, called with ``*args``.
        *args: passed to it.
        draws: number of draws.

    Returns:
        The values of each latent by name, `draws x *plates x *event`, without a guide's auxiliary sites.

    Example:
        >>> import pyro.distributions as dist
        >>> def guide():
        ...     with pyro.plate("group", 3):
        ...         pyro.sample("z", dist.Normal(torch.zeros(()), 1.0).expand([2]).to_event(1))
        >>> posterior_samples(guide, draws=10)["z"].shape
        torch.Size([10, 3, 2])
    """
    with local_params(guide), poutine.block():
        sites = sample_sites(poutine.trace(guide).get_trace(*args))
        frames = [frame for site in sites.values() for frame in site["cond_indep_stack"] if frame.vectorized]
        nesting = -min((frame.dim for frame in frames), default=0)
        with pyro.plate("particles", draws, dim=-nesting - 1):
            drawn = sample_sites(poutine.trace(guide).get_trace(*args))
    return {
        name: site["value"].expand(site["fn"].shape()).reshape(draws, *sites[name]["value"].shape)
        for name, site in drawn.items()
        if not site["infer"].get("is_auxiliary")
    }


def _tally(numbers: Tensor, size: int) -> Tensor:
    """How often each of 0, …, size − 1 is in each column of `n x columns` whole numbers, `size x columns`."""
    return numbers.new_zeros(size, numbers.shape[1]).scatter_add_(0, numbers, torch.ones_like(numbers))


def _observed_sites(model: Program, args: tuple[Any, ...]) -> dict[str, Site]:
    """The observed sites by name, of a model that can be run forward."""
    sites = sample_sites(poutine.trace(model).get_trace(*args))
    observed = {name: site for name, site in sites.items() if site["is_observed"]}
    if not observed or len(observed) == len(sites):
        raise ModelGuideError(
            f"the model has the latent sites {sorted(sites.keys() - observed)} and the observed sites"
            f" {sorted(observed)}; calibration needs some of both"
        )
    for name, site in observed.items():
        if isinstance(site["fn"], Unit):
            raise ModelGuideError(
                f"site {name!r} is a pyro.factor: a run of the model forward leaves it out, so that its latents are not"
                " draws from the prior. Write the factor as sample statements."
            )
    return observed


def _simulate(
    model: Program, args: tuple[Any, ...], observed: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """One run of the model forward: its latents, its observations, and the dimension of the independent plate.

    The dimension of a site's value that the plate occupies is given by site, and missing where there is no such plate.
    """
    sites = sample_sites(poutine.trace(poutine.uncondition(model)).get_trace(*args))
    frames = independent_frames(list(sites.values()))
    over = {}
    if len(frames) == 1:
        over = {name: frames[0].dim - site["fn"].event_dim for name, site in sites.items()}
    values = {name: site["value"] for name, site in sites.items()}
    return (
        {name: value for name, value in values.items() if name not in observed},
        {name: value for name, value in values.items() if name in observed},
        over,
    )


def _places(observed: dict[str, Site], args: tuple[Any, ...]) -> Callable[[dict[str, Tensor]], tuple[Any, ...]]:
    """Puts the simulated observations where the model takes them from among its arguments."""
    place = {}
    for name, site in observed.items():
        at = [index for index, arg in enumerate(args) if arg is site["value"]]
        if not at:
            raise ArgumentError(
                f"observed site {name!r} gets none of the model's arguments as it is, so the simulated observations"
                " have no place among them; pass arguments=…, a function from a dictionary of the observations"
                " by site to the arguments"
            )
        place[name] = at[0]

    def put(simulated: dict[str, Tensor]) -> tuple[Any, ...]:
        given = list(args)
        for name, index in place.items():
            given[index] = simulated[name].detach()
        return tuple(given)

    return put


def _samples(posterior: Any, args: tuple[Any, ...], truth: Samples, draws: int) -> Samples:
    """Posterior draws of each latent site, whose shapes are those of the truth behind `draws`."""
    if isinstance(posterior, nn.Module):
        found: Any = posterior_samples(posterior, *args, draws=draws)
    else:
        with pyro.get_param_store().scope():  # a fit of its own each time, whatever the last one left
            found = _fitted(posterior, args)
            if not isinstance(found, Mapping):
                with local_params(found):
                    found = posterior_samples(found, *args, draws=draws)
    for name, value in truth.items():
        if name not in found:
            raise ModelGuideError(f"the posterior lacks the model's latent site {name!r}; it has: {', '.join(found)}")
        if tuple(found[name].shape) != (draws, *value.shape):
            raise ArgumentError(
                f"the posterior's samples of {name!r} have shape {tuple(found[name].shape)}; with draws={draws} they"
                f" must have {(draws, *value.shape)}"
            )
    return found


def _fitted(posterior: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What the function finds, run as a user runs it: with gradients, and with Pyro's own store of parameters."""
    with torch.enable_grad(), pyro.settings.context(module_local_params=False):
        found = posterior(*args)
    if not isinstance(found, Mapping) and not callable(found):
        raise ArgumentError(
            f"posterior returned a {type(found).__name__}; it must return a guide, or a dictionary of samples"
        )
    return found


def _ranks(truth: Samples, samples: Samples, over: dict[str, int]) -> tuple[tuple[str, ...], Tensor]:
    """Ranks of each scalar latent, `simulations x latents`, and the latents' names."""
    names: list[str] = []
    columns = []
    for name, value in truth.items():
        drawn = samples[name]
        below, ties = (drawn < value).sum(0), (drawn == value).sum(0)
        rank = below + (torch.rand(value.shape, device=value.device) * (ties + 1)).long()
        rank = rank.movedim(over[name], 0) if over else rank.unsqueeze(0)
        shape = rank.shape[1:]
        names += [f"{name}[{', '.join(map(str, index))}]" if index else name for index in np.ndindex(*shape)]
        columns.append(rank.reshape(len(rank), math.prod(shape)))
    return tuple(names), torch.cat(columns, 1)


def _extremes(below: np.ndarray, n: int, draws: int) -> np.ndarray:
    """For each ECDF, given as counts below 1, …, L, `… x draws`, its least two-sided binomial tail probability."""
    from scipy.stats import binom

    uniform = np.arange(1, draws + 1) / (draws + 1)
    tails = np.minimum(binom.cdf(below, n, uniform), binom.sf(below - 1, n, uniform))
    return np.minimum(2.0 * tails, 1.0).min(-1)


@functools.lru_cache(maxsize=16)
def _null_extremes(n: int, draws: int) -> np.ndarray:
    """Sorted :func:`_extremes` of simulated sets of n uniform ranks (Säilynoja et al. 2022, algorithm 1)."""
    ranks = np.random.default_rng(0).multinomial(n, np.full(draws + 1, 1.0 / (draws + 1)), _ENVELOPE_SIMULATIONS)
    return np.sort(_extremes(ranks.cumsum(-1)[:, :-1], n, draws))
