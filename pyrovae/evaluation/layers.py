"""What each layer of a hierarchical posterior costs, and which layers it leaves unused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrovae.errors import ArgumentError, ModelGuideError, require_count
from pyrovae.evaluation.latents import ActiveUnits
from pyrovae.evaluation.likelihood import asking, mean_error, require_plain
from pyrovae.modes import device_of
from pyrovae.structure import Program, check
from pyrovae.training.data import Data, batches
from pyrovae.weights import LogWeights, log_weights

__all__ = ["LayerKL", "kl_per_layer"]


@dataclass(frozen=True)
class LayerKL:
    """The KL of each latent layer and its use of the data; layers are named by their sites, from the data upwards.

    Args:
        kl: mean contribution of each layer to KL(q(z | x) ‖ p(z)), in nats per data point.
        error: Monte Carlo standard error of each, in nats per data point (that of the particles, not of the data).
        active: the activity of each layer's units, in squared units of the latent.
        threshold: contribution below which a layer counts as inactive, in nats per data point.
        points: number of data points.
        particles: number of draws for each data point.
    """

    kl: dict[str, float]
    error: dict[str, float]
    active: dict[str, ActiveUnits]
    threshold: float
    points: int
    particles: int

    @property
    def total(self) -> float:
        """Mean KL(q(z | x) ‖ p(z)) of all layers together, in nats per data point."""
        return sum(self.kl.values())

    @property
    def inactive(self) -> tuple[str, ...]:
        """Names of the layers whose contribution is smaller than the threshold."""
        return tuple(name for name, kl in self.kl.items() if abs(kl) < self.threshold)

    def __repr__(self) -> str:
        rows = [
            f"{name} {self.kl[name]:.3f} ± {self.error[name]:.3f}"
            f" ({units.count} of {units.activity.numel()} units active)"
            for name, units in self.active.items()
        ]
        inactive = ", ".join(self.inactive) or "none"
        return (
            f"LayerKL({', '.join(rows)} nats per data point; inactive layers: {inactive}; {self.points} data points,"
            f" {self.particles} particles)"
        )


def kl_per_layer(
    model: Program,
    guide: Program,
    data: Data,
    particles: int = 100,
    threshold: float = 0.01,
    *,
    active_threshold: float = 0.01,
    seed: int = 0,
) -> LayerKL:
    r"""Mean KL contribution of each latent layer, the activity of its units, and the layers that are not used.

    .. math:: \mathrm{KL}_\ell = \frac{1}{N} \sum_n \mathbb{E}_{q(z \mid x_n)}
        [\log q(z_\ell \mid \cdot) - \log p(z_\ell \mid \cdot)], \qquad
        A_{\ell j} = \mathrm{Var}_x\, \mathbb{E}_{q(z \mid x)} \mathbb{E}_q[z_{\ell j} \mid \cdot]

    where · is what the guide, or the model, draws the layer given. The contributions add up to KL(q(z | x) ‖ p(z)).
    Where the guide draws downwards as the model does (``Ladder``), each is an expected KL; where it draws upwards
    (``BottomUp``) only that of the top layer is, and others may be negative. A layer that follows its prior whatever
    the data contributes nothing, and none of its units is active. A unit is active where its A, the variance over the
    data of its posterior mean, is above ``active_threshold``. The posterior mean of a layer that is drawn given other
    layers is an average over the particles, whose noise is subtracted from A.

    Args:
        model: Pyro model whose latents are all in the data plate, called with a minibatch.
        guide: Pyro guide that draws the same latent sites, from distributions that have a mean.
        data: as for :func:`pyrovae.fit`; the memory grows with a minibatch (100 data points) times ``particles``.
        particles: number of draws of all layers for each data point, at least 2.
        threshold: contribution below which a layer counts as inactive, in nats per data point; at least 0.
        active_threshold: activity above which a unit counts as active, in squared units of the latent; at least 0.
        seed: of the draws; the caller's random state is left as it was.

    Returns:
        A :class:`LayerKL`, whose ``repr`` names the inactive layers.

    Raises:
        ArgumentError: an argument is out of range.
        DataError: the data are empty, not finite, or of the wrong shape.
        ModelGuideError: model and guide do not fit each other, some latents are shared by the data points, the guide
            draws auxiliary sites, or the data plate is subsampled.

    References:
        Sønderby et al. 2016, section 3.2 (KL per layer), https://arxiv.org/abs/1602.02282; Burda et al. 2016,
        section 5.1 (active units), https://arxiv.org/abs/1509.00519.

    Example:
        >>> import pyrovae
        >>> from pyrovae.models.hierarchical_vae import HierarchicalVAE
        >>> from pyrovae.guides import BottomUp
        >>> model = HierarchicalVAE(data_shape=(8, 8), layers=(6, 3))
        >>> with torch.no_grad():   # z_1 does not depend on z_2, and q(z_2 | z_1) is the prior
        ...     guide = BottomUp(model)
        ...     for network in (model.decoders[1], guide.encoders[1]):
        ...         _ = network[-1].weight.zero_()
        >>> kl_per_layer(model, guide, pyrovae.datasets.load("digits").test, particles=5).inactive
        ('z2',)
    """
    require_count("particles", particles, 2)
    for argument, given in (("threshold", threshold), ("active_threshold", active_threshold)):
        if not isinstance(given, int | float) or not given >= 0.0:
            raise ArgumentError(f"{argument} is {given!r}; it must be a number, at least 0")
    noted, parts = _Means(guide), []
    with asking(model, guide, seed=seed):
        source = batches(data, None, device_of(model, guide), None, "data", getattr(model, "likelihood", None))
        first = source.first()
        nesting = check(model, guide, *first).max_plate_nesting
        _require_layers(log_weights(model, guide, *first, max_plate_nesting=nesting), nesting, len(first[0]))
        for batch in source.epoch(0):
            weights = log_weights(model, noted, *batch, particles=particles, max_plate_nesting=nesting)
            parts.append((weights.kl(), noted.found))
    names = list(reversed(parts[0][0]))  # the model draws from the top down
    terms = {name: torch.cat([kl[name].double() for kl, _ in parts], -1) for name in names}  # particles x n
    return LayerKL(
        kl={name: float(term.mean()) for name, term in terms.items()},
        error={name: mean_error(term.std(0) / math.sqrt(particles)) for name, term in terms.items()},
        active={name: ActiveUnits(_activity([found[name] for _, found in parts]), active_threshold) for name in names},
        threshold=float(threshold),
        points=terms[names[0]].shape[-1],
        particles=particles,
    )


def _activity(means: list[Tensor]) -> Tensor:
    """Variance over the data of the particles' mean of `particles x n x units` means, without these means' noise."""
    center = torch.cat([part.mean(0) for part in means])
    noise = torch.cat([part.var(0) / len(part) if len(part) > 1 else torch.zeros_like(part[0]) for part in means])
    noise = noise.mean(0) * (1.0 - 1.0 / len(center))  # what it adds to the variance over the n data points
    return (center.var(0, correction=0) - noise).clamp(min=0.0)


class _Means(Messenger):
    """A guide that notes the mean of each latent, `particles x n x units`, or `1 x n x units` without other latents."""

    def __init__(self, guide: Program) -> None:
        super().__init__()
        self.guide = guide
        self.found: dict[str, Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.found = {}
        with self:
            return self.guide(*args, **kwargs)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        """Sees the distribution in the guide's own plate, before the one of the particles outside expands it."""
        if site_is_subsample(msg) or msg["is_observed"]:
            return
        try:
            mean = msg["fn"].mean.double()
        except NotImplementedError as error:
            raise ModelGuideError(
                f"the guide draws {msg['name']!r} from a {type(msg['fn']).__name__}, which has no mean, so that the"
                " activity of its units is not known; a KL per layer needs distributions that have one"
            ) from error
        points = mean.dim() - msg["fn"].event_dim  # the dimensions of the data plate and of the particles
        self.found[msg["name"]] = mean.reshape(-1, mean.shape[points - 1], math.prod(mean.shape[points:]))


def _require_layers(weights: LogWeights, nesting: int, points: int) -> None:
    """Refuses models whose latents are not layers of each data point, and guides that draw other sites."""
    require_plain(weights)
    latent, drawn = (tuple(sorted(sites)) for sites in (weights.log_prior, weights.log_guide))
    if [size for _, size in weights.plates] != [points] or nesting > 1 or not latent:
        raise ModelGuideError(
            f"the weights of model and guide are over the plates {dict(weights.plates)} and the latent sites {latent},"
            f" but a KL per layer needs latents of each of the {points} data points: put every latent and observed site"
            " into the data plate, and into no other"
        )
    if latent != drawn:
        raise ModelGuideError(
            f"the guide draws the sites {drawn}, and the model {latent}; a KL per layer needs a guide without auxiliary"
            " sites"
        )
