"""Amortized posteriors of several layers of real latents: bottom-up, and the ladder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import ArgumentError
from pyrovae.guides.amortized import EncodedLayers, Hidden, held, replayed, require, reshaped, widths_upwards
from pyrovae.guides.families import DiagonalNormal
from pyrovae.models.networks import ACTIVATIONS, full_precision, mlp
from pyrovae.modes import device_of
from pyrovae.registry import GUIDES

__all__ = ["BottomUp", "HierarchicalModel", "Ladder"]


class HierarchicalModel(Protocol):
    """What these guides read from a model of latent layers z_1 (next to the data) to z_L.

    It samples sites ``z1``, …, ``zL`` of event shape (layers[0],), …, (layers[L-1],) in the plate ``"data"``.
    ``hidden`` holds the widths of the hidden layers of all its networks, or a list of them for each.
    """

    data_shape: tuple[int, ...]
    layers: tuple[int, ...]
    hidden: tuple[int, ...] | tuple[tuple[int, ...], ...]
    activation: str

    def below(self, layer: int, z: Tensor) -> dist.TorchDistribution:
        """p(z_layer | z_{layer+1} = z), a Normal of batch shape `*batch` for `*batch x layers[layer]` values z."""


@GUIDES.register
class BottomUp(EncodedLayers):
    r"""Posterior of several layers of real latents, each a diagonal Gaussian computed from the layer below it.

    .. math:: q_\phi(z \mid x) = \prod_{\ell=1}^{L} \mathcal{N}(z_\ell \mid \mu_\ell(z_{\ell-1}),
        \mathrm{diag}\,\sigma_\ell^2(z_{\ell-1})), \qquad z_0 = x

    Args:
        model: the model, a :class:`HierarchicalModel`; it is not kept, and shares no parameters with the guide.
        hidden: widths of the hidden layers of each encoder, from below to above: the same for all, or one list for each
            latent layer from the data upwards, ``((200, 200), (100, 100))``; ``None`` mirrors the model's.
        activation: name of the activation; ``None`` takes the model's.

    Raises:
        ArgumentError: the model is of another kind, or an argument is out of range.

    References:
        Rezende et al. 2014, https://arxiv.org/abs/1401.4082; Burda et al. 2016, https://arxiv.org/abs/1509.00519.

    Example:
        >>> class Model:
        ...     data_shape, layers, hidden, activation = (8, 8), (6, 3), (16,), "tanh"
        ...     def below(self, layer, z):
        ...         return dist.Normal(z.new_zeros(*z.shape[:-1], 6), 1.0).to_event(1)
        >>> BottomUp(Model())(torch.zeros(5, 8, 8)).shape   # the top layer
        torch.Size([5, 3])
    """

    def __init__(
        self,
        model: HierarchicalModel,
        hidden: Hidden | None = None,
        activation: str | None = None,
    ) -> None:
        _require_normal_layers(self, model)
        super().__init__(model, DiagonalNormal, hidden, activation)


@GUIDES.register
class Ladder(PyroModule):
    r"""Posterior that goes down the model's own layers and corrects each by what the data say of it.

    A deterministic pass upwards gives each layer a message :math:`\mathcal{N}(\hat\mu_\ell, \hat\sigma_\ell^2)`; the
    pass downwards multiplies it with the model's conditional :math:`p(z_\ell \mid z_{\ell+1}) = \mathcal{N}(\mu_p,
    \sigma_p^2)`:

    .. math::
        d_\ell = f_\ell(d_{\ell-1}), \quad d_0 = x, \qquad q(z_L \mid x) = \mathcal{N}(\hat\mu_L, \hat\sigma_L^2),
        \qquad q(z_\ell \mid z_{\ell+1}, x) = \mathcal{N}\!\left(
        \frac{\hat\mu_\ell \hat\sigma_\ell^{-2} + \mu_p \sigma_p^{-2}}{\hat\sigma_\ell^{-2} + \sigma_p^{-2}},
        \frac{1}{\hat\sigma_\ell^{-2} + \sigma_p^{-2}} \right)

    The posterior depends on the model's parameters too, and the ELBO's gradient reaches them by this route as well, as
    in the paper. Objectives that train the guide by a loss of its own (wake-sleep) would move the model by it: use
    :class:`BottomUp` with those.

    Args:
        model: the model, a :class:`HierarchicalModel`. The guide calls its ``below``, but does not own it: its
            parameters are not among the guide's, and a copy of both is made by copying them together.
        hidden: widths of the hidden layers of each step upwards, at least one: the same for all, or one list for each
            latent layer from the data upwards; ``None`` mirrors the model's.
        activation: name of the activation; ``None`` takes the model's.

    Raises:
        ArgumentError: the model is of another kind, or an argument is out of range.

    References:
        Sønderby et al. 2016, https://arxiv.org/abs/1602.02282.

    Example:
        >>> class Model:
        ...     data_shape, layers, hidden, activation = (8, 8), (6, 3), (16,), "tanh"
        ...     def below(self, layer, z):
        ...         return dist.Normal(z.new_zeros(*z.shape[:-1], 6), 1.0).to_event(1)
        >>> guide = Ladder(Model())
        >>> [message.event_shape for message in guide.encode(torch.zeros(5, 8, 8))]
        [torch.Size([6]), torch.Size([3])]
        >>> guide(torch.zeros(5, 8, 8)).shape   # the bottom layer
        torch.Size([5, 6])
    """

    def __init__(
        self,
        model: HierarchicalModel,
        hidden: Hidden | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        _require_normal_layers(self, model)
        by_step, activation = widths_upwards(model, hidden), activation or model.activation
        if any(not widths or any(not isinstance(width, int) or width < 1 for width in widths) for widths in by_step):
            given = model.hidden if hidden is None else hidden
            raise ArgumentError(
                f"hidden is {given!r}; a ladder passes hidden units upwards: give each step one width or more, whole"
                " numbers, at least 1 each"
            )
        self.data_shape = model.data_shape
        self._model = (model,)  # in a tuple, so that it is no submodule
        families = [DiagonalNormal(width) for width in model.layers]
        self.families = nn.ModuleList(families)
        inputs = (math.prod(self.data_shape), *(widths[-1] for widths in by_step[:-1]))
        self.upward = nn.ModuleList(
            nn.Sequential(mlp(below, widths[:-1], widths[-1], activation), ACTIVATIONS[activation]())
            for below, widths in zip(inputs, by_step, strict=True)
        )
        self.messages = nn.ModuleList(
            mlp(widths[-1], (), family.outputs) for widths, family in zip(by_step, families, strict=True)
        )

    def encode(self, x: Tensor) -> tuple[dist.TorchDistribution, ...]:
        """What the data say of each layer, from z_1 to z_L: Normals of batch shape `*batch`, event (layers[l],)."""
        units, messages = reshaped(x, self.data_shape, (-1,)), []
        for step, message, family in zip(self.upward, self.messages, self.families, strict=True):
            units = step(units)
            messages.append(family(full_precision(message(units))))
        return tuple(messages)

    def forward(self, x: Tensor) -> Tensor:
        """Samples all layers for a batch `n x *data_shape`; returns the bottom one, `n x layers[0]`."""
        return self.sample(self.encode(x))

    def sample(self, q: Sequence[dist.TorchDistribution]) -> Tensor:
        """The guide's sample statements, from the top down, given the messages for n data points."""
        with pyro.plate("data", q[0].batch_shape[-1], device=device_of(self)):
            z = pyro.sample(f"z{len(q)}", q[-1])
            for layer in range(len(q) - 1, 0, -1):
                z = pyro.sample(f"z{layer}", _product(q[layer - 1], self._prior(layer, z)))
            return z

    def _prior(self, layer: int, z: Tensor) -> dist.TorchDistribution:
        """The model's conditional, its parameters held fixed where the guide scores draws that are given.

        Sticking the landing and its kin hold all that log q depends on fixed there, and the draws carry the gradient.
        """
        (model,) = self._model
        with held(model, when=replayed()):
            return model.below(layer, z)


def _product(message: dist.TorchDistribution, prior: dist.TorchDistribution) -> dist.TorchDistribution:
    """The normalised product of two diagonal Gaussians (Sønderby et al. 2016, equations 17 to 19)."""
    total = message.variance + prior.variance
    loc = (message.mean * prior.variance + prior.mean * message.variance) / total
    return dist.Normal(loc, (message.variance * prior.variance / total).sqrt()).to_event(1)


@torch.no_grad()
def _require_normal_layers(guide: object, model: HierarchicalModel) -> None:
    """Raises an error unless the model's layers are Normals of the widths that it says."""
    require(guide, model, "layers", "below")
    name = f"guide {type(guide).__name__} does not fit model {type(model).__name__}"
    tensors = itertools.chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    place = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))
    for layer, (below, above) in enumerate(itertools.pairwise(model.layers), 1):
        p = model.below(layer, place.new_zeros(1, above))
        if not isinstance(getattr(p, "base_dist", None), dist.Normal) or tuple(p.event_shape) != (below,):
            raise ArgumentError(
                f"{name}: below({layer}, z) is a {p} with event shape {tuple(p.event_shape)}; it must be"
                f" Normal(…).to_event(1) with event shape ({below},). Binary layers take AmortizedBernoulli."
            )
    if hasattr(model, "top") and model.top().support.is_discrete:
        raise ArgumentError(f"{name}: its layers are binary. Use AmortizedBernoulli.")
