"""What a model and a posterior say of the response at new inputs: a mixture, one component for each posterior draw."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from pyrovae.errors import ArgumentError, ModelGuideError, require_count
from pyrovae.modes import evaluating, modules_of
from pyrovae.structure import Program, sample_sites
from pyrovae.training.programs import local_params

__all__ = ["Posterior", "Prediction", "predict"]

Posterior = Program | Mapping[str, Tensor]

_FAMILIES: dict[type, tuple[str, ...]] = {
    dist.Normal: ("loc", "scale"),
    dist.StudentT: ("df", "loc", "scale"),
    dist.Bernoulli: ("logits",),
    dist.Categorical: ("logits",),
    dist.Poisson: ("rate",),
}
_BISECTIONS = 60
_ROWS = 2000  # inputs at a time
_NUMBERS = 20_000_000  # latent numbers at a time


@dataclass(frozen=True, eq=False)
class Prediction:
    r"""The predictive distribution of a response, as a mixture over S posterior draws.

    .. math:: p(y \mid x, \mathcal{D}) \approx \frac{1}{S} \sum_{s=1}^S p(y \mid x, w_s)

    Every tensor below is `*members x n`, in the units of y, unless said otherwise.

    Args:
        family: of the components: ``dist.Normal``, ``StudentT``, ``Bernoulli``, ``Categorical`` or ``Poisson``.
        parameters: of the components, by name, each `samples x *members x n` (`… x classes` for ``Categorical``).

    References:
        Depeweg et al. 2018 (epistemic and aleatoric parts), https://arxiv.org/abs/1710.07283.

    Example:
        >>> two = Prediction(dist.Normal, {"loc": torch.tensor([[0.0], [2.0]]), "scale": torch.ones(2, 1)})
        >>> two.mean, two.epistemic, two.aleatoric
        (tensor([1.]), tensor([1.]), tensor([1.]))
    """

    family: type
    parameters: Mapping[str, Tensor] = field(repr=False)

    @property
    def components(self) -> Any:
        """The distribution of y for each draw, of batch shape `samples x *members x n`."""
        return self.family(**self.parameters)

    @property
    def samples(self) -> int:
        """Number of posterior draws."""
        return int(self.components.batch_shape[0])

    def __len__(self) -> int:
        return int(self.components.batch_shape[-1])

    @property
    def classes(self) -> int | None:
        """Number of classes; ``None`` where y is no class."""
        if self.family is dist.Categorical:
            return int(self.parameters["logits"].shape[-1])
        return 2 if self.family is dist.Bernoulli else None

    @property
    def mean(self) -> Tensor:
        """Mean of y (the probability of 1, for a Bernoulli)."""
        self._numeric("mean")
        return self.components.mean.mean(0)

    @property
    def epistemic(self) -> Tensor:
        """Variance of the components' means: what more data would remove, in squared units of y."""
        self._numeric("epistemic")
        return self.components.mean.var(0, correction=0)

    @property
    def aleatoric(self) -> Tensor:
        """Mean of the components' variances: noise, which stays, in squared units of y."""
        self._numeric("aleatoric")
        return self.components.variance.mean(0)

    @property
    def variance(self) -> Tensor:
        """Variance of y, the sum of both parts."""
        return self.epistemic + self.aleatoric

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of y."""
        return self.variance.sqrt()

    @property
    def probs(self) -> Tensor:
        """Probability of each class, `*members x n x classes`."""
        self._classes("probs")
        each = self.components.probs
        return (each if self.family is dist.Categorical else torch.stack([1 - each, each], -1)).mean(0)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the predicted class, in nats: total uncertainty."""
        self._classes("entropy")
        return dist.Categorical(self.probs).entropy()

    @property
    def mutual_information(self) -> Tensor:
        """Mutual information of class and weights, in nats: the epistemic part of the entropy."""
        return (self.entropy - self.components.entropy().mean(0)).clamp_min(0.0)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log-density of the mixture at ``y`` (`*members x n`), in nats: the test log-likelihood of each point."""
        return torch.logsumexp(self.components.log_prob(y), 0) - math.log(self.samples)

    def gaussian_log_prob(self, y: Tensor) -> Tensor:
        """Log-density at ``y`` of the Gaussian that has the mixture's mean and variance, in nats."""
        return dist.Normal(self.mean, self.stddev).log_prob(y)

    def draw(self, seed: int = 0) -> Tensor:
        """One y from each component, `samples x *members x n`."""
        with evaluating(seed=seed):
            return self.components.sample()

    def cdf(self, y: Tensor) -> Tensor:
        """Probability that the response is at most ``y`` (`*members x n`)."""
        self._numeric("cdf")
        return self._component_cdf(y).mean(0)

    def quantile(self, level: float) -> Tensor:
        """The y at which the CDF reaches a level in (0, 1), by bisection."""
        self._numeric("quantile")
        spread = 50.0 * self.components.stddev.amax(0)
        low, high = self.components.mean.amin(0) - spread, self.components.mean.amax(0) + spread
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            below = self.cdf(middle) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high.round() if self.family is dist.Poisson else high

    def interval(self, coverage: float = 0.9) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the equal-tailed interval that holds y with this probability.

        Raises:
            ArgumentError: ``coverage`` does not lie between 0 and 1, or y is a class.
        """
        if not 0.0 < coverage < 1.0:
            raise ArgumentError(f"coverage is {coverage!r}; it must lie between 0 and 1, as 0.9")
        return self.quantile((1 - coverage) / 2), self.quantile((1 + coverage) / 2)

    def pooled(self) -> Prediction:
        """The mixture over draws and members together, as of an ensemble: `samples·members` components."""
        return Prediction(
            self.family, {name: _merged(value, self._event(name)) for name, value in self.parameters.items()}
        )

    def __getitem__(self, rows: Any) -> Prediction:
        """The prediction at some of the inputs."""
        rows = slice(rows, rows + 1) if isinstance(rows, int) else rows
        taken = {n: v[..., rows, :] if self._event(n) else v[..., rows] for n, v in self.parameters.items()}
        return Prediction(self.family, taken)

    def _event(self, name: str) -> int:
        return int(self.family is dist.Categorical and name == "logits")

    def _component_cdf(self, y: Tensor) -> Tensor:
        if self.family is dist.Normal:
            return self.components.cdf(y)
        from scipy import special

        parameters = {name: value.detach().cpu().numpy() for name, value in self.parameters.items()}
        at = y.detach().cpu().numpy()
        if self.family is dist.StudentT:
            below = special.stdtr(parameters["df"], (at - parameters["loc"]) / parameters["scale"])
        else:  # P(Y <= y) of a Poisson, 0 below 0
            below = special.pdtr(at.clip(0), parameters["rate"]) * (at >= 0)
        return torch.as_tensor(below).to(y)

    def _numeric(self, asked: str) -> None:
        if self.family is dist.Categorical or (self.family is dist.Bernoulli and asked in ("cdf", "quantile")):
            raise ArgumentError(f"{asked} is of numbers, and this response is a class: see probs, entropy, log_prob")

    def _classes(self, asked: str) -> None:
        if self.classes is None:
            raise ArgumentError(f"{asked} is of classes, and this response is a number: see mean, interval, log_prob")


def predict(
    model: Program,
    posterior: Posterior,
    *inputs: Tensor,
    samples: int = 100,
    batch_size: int = _ROWS,
    data: tuple[Tensor, ...] | None = None,
    dropout: bool = False,
    seed: int = 0,
) -> Prediction:
    r"""The predictive distribution of a response at new inputs.

    Works for any Pyro model ``model(*inputs, y=None)`` that samples one unobserved site which the posterior does not
    have, the response, inside its innermost plate, the data. The draws are the same for all inputs, and run at most as
    many at a time as memory needs.

    Args:
        model: Pyro model, called with the inputs and without the response.
        posterior: a guide whose latents are shared by the data, or draws by site, each `samples x …` in the shape of
            the site's value, as NUTS gives them.
        *inputs: with the data points along the first dimension.
        samples: number S of posterior draws; of given draws all are used.
        batch_size: data points at a time.
        data: what the guide is called with, where it runs the model itself (``ASVI``) and so has to see the response:
            the data that it was fitted to; ``None`` for the first of the inputs.
        dropout: whether dropout layers stay on, anew for each draw (MC dropout).
        seed: of the draws.

    Returns:
        A :class:`Prediction`.

    Raises:
        ArgumentError: an argument is out of range, or nothing was given to predict at.
        ModelGuideError: the model has no such response, or several, or one of another family.

    References:
        Gal & Ghahramani 2016 (MC dropout), https://arxiv.org/abs/1506.02142.

    Example:
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(torch.zeros(()), 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)
        >>> draws = {"slope": torch.tensor([1.0, 3.0])}
        >>> predict(model, draws, torch.tensor([1.0, 2.0])).mean
        tensor([2., 4.])
    """
    require_count("samples", samples)
    require_count("batch_size", batch_size)
    if not inputs:
        raise ArgumentError("there are no inputs to predict at; give predict(model, posterior, x)")
    with (
        local_params(model),
        evaluating(model, posterior, seed=seed),
        poutine.block(),
        _dropping_out(model) if dropout else contextlib.nullcontext(),
    ):
        first = tuple(part[:1] for part in inputs)
        given = first if data is None else data
        nesting, latents = _survey(model, posterior, first, given)
        batches = [
            tuple(part[start : start + batch_size] for part in inputs) for start in range(0, len(inputs[0]), batch_size)
        ]
        parts = [
            _concatenated([_response(model, draws, batch, nesting) for batch in batches], rows=True)
            for draws in _draws(posterior, samples, nesting, latents, given)
        ]
    return _concatenated(parts, rows=False)


def _survey(
    model: Program, posterior: Posterior, inputs: tuple[Tensor, ...], data: tuple[Tensor, ...]
) -> tuple[int, dict[str, int]]:
    """Number of plates around the deepest site, and the number of batch dimensions of each latent site."""
    given: dict[str, Tensor] = {}
    frames: list[Any] = []
    if callable(posterior):
        with local_params(posterior):
            trace = poutine.trace(posterior).get_trace(*data)
        sites = {name: site for name, site in sample_sites(trace).items() if not site["is_observed"]}
        given = {name: site["value"] for name, site in sites.items() if not site["infer"].get("is_auxiliary")}
        frames = [frame for site in sites.values() for frame in site["cond_indep_stack"]]
    else:
        given = {name: value[0] for name, value in posterior.items()}
    trace = poutine.trace(poutine.condition(model, data=given)).get_trace(*inputs)
    sites = sample_sites(trace)
    missing = [name for name in given if name not in sites]
    if missing:
        raise ModelGuideError(f"the posterior has {missing[0]!r}, which the model does not sample")
    frames += [frame for site in sites.values() for frame in site["cond_indep_stack"]]
    nesting = -min((frame.dim for frame in frames if frame.vectorized), default=0)
    return nesting, {name: given[name].dim() - sites[name]["fn"].event_dim for name in given}


def _draws(
    posterior: Posterior, samples: int, nesting: int, latents: dict[str, int], data: tuple[Tensor, ...]
) -> Iterator[dict[str, Tensor]]:
    """Values of the latents, `draws x …` with all batch dimensions there, in chunks that fit in memory."""
    if not callable(posterior):
        whole = {
            name: value.reshape(len(value), *[1] * (nesting - latents[name]), *value.shape[1:])
            for name, value in posterior.items()
        }
        count = len(next(iter(whole.values())))
        size = _chunk(sum(value[0].numel() for value in whole.values()))
        for start in range(0, count, size):
            yield {name: value[start : start + size] for name, value in whole.items()}
        return
    with local_params(posterior):
        one = sample_sites(poutine.trace(posterior).get_trace(*data))
    size = _chunk(sum(site["value"].numel() for site in one.values()))
    for start in range(0, samples, size):
        with local_params(posterior), pyro.plate("samples", min(size, samples - start), dim=-nesting - 1):
            sites = sample_sites(poutine.trace(posterior).get_trace(*data))
        yield {name: sites[name]["value"] for name in latents}


def _chunk(numbers: int) -> int:
    return max(1, _NUMBERS // max(1, numbers))


def _response(model: Program, draws: dict[str, Tensor], inputs: tuple[Tensor, ...], nesting: int) -> Prediction:
    """The response's distribution at some inputs, one component for each draw."""
    count = len(next(iter(draws.values())))
    with pyro.plate("samples", count, dim=-nesting - 1):
        trace = poutine.trace(poutine.condition(model, data=draws)).get_trace(*inputs)
    free = {name: site["fn"] for name, site in sample_sites(trace).items() if name not in draws}
    if len(free) != 1:
        found = ", ".join(map(repr, free)) or "none"
        raise ModelGuideError(
            "predict needs one site that the model samples and the posterior does not, the response; it found"
            f" {found}. Call it with the inputs alone, without the response, and a posterior of all latents"
        )
    (name, law), = free.items()  # fmt: skip
    if type(law) not in _FAMILIES:
        raise ModelGuideError(
            f"the response {name!r} is a {type(law).__name__}; predict knows"
            f" {', '.join(family.__name__ for family in _FAMILIES)}"
        )
    event = 1 if type(law) is dist.Categorical else 0
    shape = torch.Size((count, *law.batch_shape[1:]))
    values = {key: getattr(law, key) for key in _FAMILIES[type(law)]}
    return Prediction(type(law), {k: v.expand(shape + v.shape[v.dim() - event :]).detach() for k, v in values.items()})


def _concatenated(parts: list[Prediction], rows: bool) -> Prediction:
    """Predictions of consecutive inputs, or of consecutive draws at the same inputs."""
    first = parts[0]
    joined = {
        name: torch.cat([part.parameters[name] for part in parts], dim=-1 - first._event(name) if rows else 0)
        for name in first.parameters
    }
    return Prediction(first.family, joined)


def _merged(value: Tensor, event: int) -> Tensor:
    """Draws and members as one dimension."""
    return value.flatten(0, value.dim() - 2 - event)


@contextlib.contextmanager
def _dropping_out(model: Program) -> Iterator[None]:
    """Dropout layers in training mode, all others as they are."""
    layers = [part for module in modules_of(model) for part in module.modules() if isinstance(part, _DropoutNd)]
    if not layers:
        raise ArgumentError("dropout=True, but the model has no dropout layer")
    for layer in layers:
        layer.train()
    yield  # evaluating() restores the modes
