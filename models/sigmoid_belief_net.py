"""The sigmoid belief net: layers of binary latents, the generative half of a Helmholtz machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.errors import ArgumentError
from pyrovae.models.layers import Layered
from pyrovae.models.likelihoods import LIKELIHOODS
from pyrovae.models.networks import full_precision, mlp
from pyrovae.registry import MODELS

__all__ = ["SigmoidBeliefNet"]


@MODELS.register
class SigmoidBeliefNet(Layered):
    r"""Layers of binary latents above binary data, each layer independent given the one above it.

    .. math:: z_L \sim \mathrm{Bern}(\sigma(b)), \qquad
        z_\ell \mid z_{\ell+1} \sim \mathrm{Bern}(\sigma(g_\ell(2 z_{\ell+1} - 1))), \qquad
        x \mid z_1 \sim \mathrm{Bern}(\sigma(g_0(2 z_1 - 1)))

    Without ``hidden`` every g is linear, and the model is Neal's sigmoid belief net. With a recognition net of the same
    kind, ``AmortizedBernoulli``, it is Dayan's Helmholtz machine: b is its generative bias, learned with the rest, and
    :class:`pyrovae.WakeSleep` the algorithm that trains both (see the example). ``IWAE(particles, "vimco")`` and
    ``ReweightedWakeSleep(particles)`` come nearer to the maximum of the likelihood.

    The sites are ``"z1"`` (next to the data) to ``"zL"``. ``forward(x)`` conditions on a batch `n x *data_shape` of
    zeros and ones; ``forward(size=n)`` generates one.

    Args:
        data_shape: shape of one data point.
        layers: numbers of binary units of the latent layers, from the data upwards.
        hidden: widths of the deterministic hidden layers of each network g, from above to below (the guide's encoders
            mirror them).
        activation: of the hidden layers, one of ``pyrovae.models.networks.ACTIVATIONS``.

    Raises:
        ArgumentError: an argument is out of range.

    References:
        Neal 1992, https://doi.org/10.1016/0004-3702(92)90065-6; Dayan et al. 1995 (Helmholtz machine),
        https://doi.org/10.1162/neco.1995.7.5.889; Hinton et al. 1995 (wake-sleep),
        https://doi.org/10.1126/science.7761831; Yin & Zhou 2019 (as a variational autoencoder, linear and not),
        https://arxiv.org/abs/1807.11143.

    Example:
        >>> model = SigmoidBeliefNet(data_shape=(8, 8), layers=(20, 10))
        >>> model(size=5).shape
        torch.Size([5, 8, 8])
        >>> import pyro
        >>> sorted(pyro.poutine.trace(model).get_trace(torch.ones(3, 8, 8)).stochastic_nodes)
        ['data', 'z1', 'z2']

        A Helmholtz machine learns that two pixels agree:

        >>> import pyrovae
        >>> from pyrovae.guides import AmortizedBernoulli
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(50, 1)
        >>> _ = torch.manual_seed(0)
        >>> model = SigmoidBeliefNet(data_shape=(2,), layers=(1,))
        >>> guide = AmortizedBernoulli(model)
        >>> settings = {"epochs": 60, "batch_size": 20, "lr": 0.05, "seed": 0, "progress": False}
        >>> run = pyrovae.fit(model, guide, x, objective=pyrovae.WakeSleep(), **settings)
        >>> run.history[-1]["bound"] > -0.8   # nats per data point; log 2 is the entropy, 2 log 2 without the latent
        True
    """

    default_guide: ClassVar[str] = "AmortizedBernoulli"
    default_objective: ClassVar[dict[str, Any]] = {"name": "IWAE", "arguments": {"particles": 5, "gradient": "vimco"}}

    likelihood = replace(
        LIKELIHOODS["bernoulli"], advice="Binarize the data, as datasets.load does with binarization='dynamic'."
    )

    def __init__(
        self,
        data_shape: Sequence[int],
        layers: Sequence[int] = (200,),
        hidden: Sequence[int] = (),
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        self.data_shape, self.layers, self.hidden = tuple(data_shape), tuple(layers), tuple(hidden)
        self.activation = activation
        for argument, given in (("data_shape", self.data_shape), ("layers", self.layers)):
            if not given or any(not isinstance(size, int) or size < 1 for size in given):
                raise ArgumentError(f"{argument} is {given!r}; it must hold whole numbers, at least 1 each")
        self.latent_dim = self.layers[0]  # of what prior() draws and decode(z) takes
        self.prior_logits = nn.Parameter(torch.zeros(self.layers[-1]))
        widths = (math.prod(self.data_shape), *self.layers)
        self.decoders = nn.ModuleList(
            mlp(above, self.hidden, below, activation) for below, above in itertools.pairwise(widths)
        )

    def top(self) -> dist.TorchDistribution:
        """p(z_L) of the top layer: batch shape (), event shape (layers[-1],)."""
        return dist.Bernoulli(logits=self.prior_logits).to_event(1)

    def below(self, layer: int, z: Tensor) -> dist.TorchDistribution:
        """p(z_layer | z) for `*batch x layers[layer]` units z of the layer above: batch shape `*batch`."""
        return dist.Bernoulli(logits=full_precision(self.decoders[layer](2.0 * z - 1.0))).to_event(1)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z_1) for `*batch x layers[0]` units: batch shape `*batch`, event shape ``data_shape``."""
        logits = full_precision(self.decoders[0](2.0 * z - 1.0)).reshape(*z.shape[:-1], *self.data_shape)
        return dist.Bernoulli(logits=logits).to_event(len(self.data_shape))

    @torch.no_grad()
    def initialize_output(self, x: Tensor) -> SigmoidBeliefNet:
        """Sets the bias of the data so that the model starts at their mean, and returns the model.

        Args:
            x: A `n x *data_shape` tensor of data (or of their intensities).
        """
        last = [module for module in self.decoders[0].modules() if isinstance(module, nn.Linear)][-1]
        last.bias.copy_(self.likelihood.bias(x.to(self.prior_logits).mean(0)).reshape(-1))
        return self
