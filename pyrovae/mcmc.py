"""Posterior draws by Hamiltonian Monte Carlo: Pyro's NUTS, as a reference for what a guide approximates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from torch.distributions import biject_to

from pyrovae.errors import ArgumentError, ModelGuideError, require_count, unknown_name
from pyrovae.modes import evaluating
from pyrovae.structure import Program, sample_sites
from pyrovae.training.programs import local_params

__all__ = ["Draws", "nuts"]


@dataclass(frozen=True, eq=False)
class Draws(Mapping[str, Tensor]):
    """Draws of the latents by site, `samples x …`, one chain after the other; :func:`pyrovae.predict` takes them.

    Args:
        sites: the draws, `chains·samples x …` in the shape of each site's value.
        divergences: of each chain, the number of draws whose trajectory diverged; any at all says that a part of the
            posterior may be missing.
        acceptance: of each chain, the mean acceptance probability of its draws.

    Example:
        >>> draws = Draws({"z": torch.arange(6.0)}, divergences=(0, 0), acceptance=(0.8, 0.9))
        >>> draws["z"].shape, draws.chains, draws.by_chain["z"][1]
        (torch.Size([6]), 2, tensor([3., 4., 5.]))
    """

    sites: Mapping[str, Tensor] = field(repr=False)
    divergences: tuple[int, ...]
    acceptance: tuple[float, ...]

    def __getitem__(self, site: str) -> Tensor:
        return self.sites[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def chains(self) -> int:
        """Number of chains."""
        return len(self.divergences)

    @property
    def by_chain(self) -> dict[str, Tensor]:
        """The draws, `chains x samples x …`."""
        return {name: value.unflatten(0, (self.chains, -1)) for name, value in self.sites.items()}

    @property
    def r_hat(self) -> dict[str, Tensor]:
        """Split-R̂ of each number of each site: near 1 where the chains agree; 1.01 is a usual limit.

        References:
            Gelman et al. 2013, Bayesian Data Analysis, section 11.4, https://sites.stat.columbia.edu/gelman/book/.
        """
        return {name: split_gelman_rubin(value) for name, value in self.by_chain.items()}

    @property
    def effective_samples(self) -> dict[str, Tensor]:
        """Number of independent draws that would give the mean of each number of each site as precisely."""
        return {name: effective_sample_size(value) for name, value in self.by_chain.items()}


def nuts(
    model: Program,
    *data: Any,
    warmup: int = 500,
    samples: int = 500,
    chains: int = 4,
    start: Mapping[str, Tensor] | None = None,
    jitter: float = 0.1,
    seed: int = 0,
    progress: bool = True,
    max_tree_depth: int = 10,
    target_accept: float = 0.8,
    full_mass: bool = False,
) -> Draws:
    """Draws from the posterior of the latents by the No-U-Turn sampler, chain after chain.

    Step size and mass matrix adapt during the warm-up, whose draws are dropped. What the model *learns* (a noise scale
    that is a parameter, layers that are not Bayesian) is held at its current value, so that the posterior is given it:
    fit it before, or, to be fully Bayesian about it, make it a latent site of the model. All data are used at each
    step, and layers such as dropout are in evaluation mode.

    Args:
        model: Pyro model with continuous latents (discrete ones of finite support are summed out by Pyro).
        *data: all data, as for the model.
        warmup: steps of each chain for adaptation.
        samples: draws of each chain.
        chains: number of chains; they run one after the other in this process.
        start: values of latent sites where the chains start; sites without one start at the model's
            ``start_values``, or else uniformly in (−2, 2) in unconstrained space.
        jitter: standard deviation of the noise, in unconstrained space, that tells the starts of the chains apart.
        seed: of all chains, each of which has numbers of its own.
        progress: whether to show a bar for each chain.
        max_tree_depth: a trajectory has at most ``2**max_tree_depth`` steps.
        target_accept: acceptance probability for which the step size is adapted; nearer 1 for fewer divergences.
        full_mass: whether the mass matrix is dense; else it is diagonal.

    Returns:
        :class:`Draws`, with `chains·samples` of each site.

    Raises:
        ArgumentError: an argument is out of range, or ``start`` does not fit the model.
        ModelGuideError: the model has no latent site that can be drawn, or its log-density is not finite at the start.

    References:
        Hoffman & Gelman 2014, https://jmlr.org/papers/v15/hoffman14a.html.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> draws = nuts(model, torch.tensor([1.0, 2.0]), warmup=100, samples=100, chains=2, progress=False)
        >>> draws["mean"].shape, abs(float(draws["mean"].mean()) - 1.0) < 0.4   # the exact posterior: N(1, 1/3)
        (torch.Size([200]), True)
    """
    for argument, value in (("samples", samples), ("chains", chains), ("max_tree_depth", max_tree_depth)):
        require_count(argument, value)
    require_count("warmup", warmup, least=0)
    require_count("seed", seed, least=0)
    if not 0.0 < target_accept < 1.0:
        raise ArgumentError(f"target_accept is {target_accept!r}; it must lie between 0 and 1, as 0.8")
    if not jitter >= 0.0:
        raise ArgumentError(f"jitter is {jitter!r}; it must be a number, at least 0")
    begin = _start(model, data, start)

    def near_start(site: dict[str, Any]) -> Tensor:
        value = begin.get(site["name"])
        if value is None:
            return init_to_uniform(site)
        transform = biject_to(site["fn"].support)
        unconstrained = transform.inv(value)
        return transform(unconstrained + jitter * torch.randn_like(unconstrained))

    seeds = torch.randint(2**31, (chains,), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[dict[str, Tensor]] = []
    divergences, acceptance = [0] * chains, [0.0] * chains

    def watch(kernel: NUTS, state: Any, stage: str, step: int) -> None:
        if stage != "Warmup":
            divergences[len(found)] = len(kernel.diagnostics()["divergences"])
            acceptance[len(found)] = float(kernel.logging()["acc. prob"])

    for chain_seed in seeds:
        with local_params(model), evaluating(model, seed=chain_seed), torch.enable_grad():
            kernel = NUTS(
                model,
                init_strategy=near_start,
                max_tree_depth=max_tree_depth,
                target_accept_prob=target_accept,
                full_mass=full_mass,
            )
            sampler = MCMC(kernel, samples, warmup, hook_fn=watch, disable_progbar=not progress)
            _run(sampler, data)
        found.append({name: value.detach() for name, value in sampler.get_samples().items()})
    sites = {name: torch.cat([chain[name] for chain in found]) for name in found[0]}
    return Draws(sites, tuple(divergences), tuple(acceptance))


def _run(sampler: MCMC, data: tuple[Any, ...]) -> None:
    try:
        sampler.run(*data)
    except ValueError as error:
        if "valid initial params" not in str(error):
            raise
        raise ModelGuideError(
            "the log-density of the model, or its gradient, is not finite where the chain starts: look for data outside"
            " the support of the likelihood, or give start= values where it is"
        ) from error


def _start(model: Program, data: tuple[Any, ...], given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Values at which the chains start, checked against the latent sites of the model."""
    if not callable(model):
        raise ArgumentError(f"model is {model!r}; it must be a Pyro model: a function or module with pyro.sample")
    with local_params(model), evaluating(model), poutine.block():
        sites = sample_sites(poutine.trace(model).get_trace(*data))
        offered = model.start_values(*data) if hasattr(model, "start_values") else {}
    latents = {name: site["fn"] for name, site in sites.items() if not site["is_observed"]}
    continuous = {name: fn for name, fn in latents.items() if not fn.support.is_discrete}
    if not continuous:
        raise ModelGuideError(
            "the model has no continuous latent site to draw"
            f" ({'its latents are discrete: ' + ', '.join(latents) if latents else 'it observes all of its sites'})"
        )
    for name, value in (given or {}).items():
        if name not in continuous:
            raise unknown_name("latent site in start", name, continuous)
        if value.shape != continuous[name].shape():
            raise ArgumentError(
                f"start[{name!r}] has shape {tuple(value.shape)}; this site has {tuple(continuous[name].shape())}"
            )
    return {name: value.detach() for name, value in {**offered, **(given or {})}.items() if name in continuous}
