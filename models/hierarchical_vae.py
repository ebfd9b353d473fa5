"""The hierarchical variational autoencoder: several layers of real latents above the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, unknown_name
from pyrovae.models.layers import Layered
from pyrovae.models.likelihoods import LIKELIHOODS, by_element, start_at_mean
from pyrovae.models.networks import full_precision, hidden_by_network, mlp
from pyrovae.registry import MODELS

__all__ = ["HierarchicalVAE"]

_LOG_SCALE_LIMIT = 10.0  # as of the guides' posteriors: a first step, or data far out, leave every density finite


@MODELS.register
class HierarchicalVAE(Layered):
    r"""Layers of real latents above the data, each a diagonal Gaussian whose moments a network computes from above.

    .. math:: z_L \sim \mathcal{N}(0, I), \qquad
        z_\ell \mid z_{\ell+1} \sim \mathcal{N}(\mu_\ell(z_{\ell+1}), \mathrm{diag}\,\sigma_\ell^2(z_{\ell+1})), \qquad
        x \mid z_1 \sim p(x \mid g(z_1))

    The sites are ``"z1"`` (next to the data) to ``"zL"``. ``BottomUp`` and ``Ladder`` are its guides. ``forward(x)``
    conditions on a batch `n x *data_shape`; ``forward(size=n)`` generates one.

    The defaults are the networks of Burda et al. with two stochastic layers, for data of 784 elements: 50-100-100-100
    from z_2 to z_1, 100-200-200-784 from z_1 to x, and the same upwards in the guide.

    Args:
        data_shape: shape of one data point: ``(28, 28)``, ``(3, 32, 32)``, ``(7,)``, ….
        layers: numbers of dimensions of the latent layers, from the data upwards.
        hidden: widths of the hidden layers of each network, from above to below (the guides' encoders mirror them): the
            same for all networks, ``(200, 200)``, or one list for each latent layer from the data upwards,
            ``((200, 200), (100, 100))``; ``None`` gives the network below each latent layer two hidden layers of twice
            its dimensions.
        activation: name of the activation, one of ``pyrovae.models.networks.ACTIVATIONS``.
        likelihood: name of the likelihood, one of ``pyrovae.models.likelihoods.LIKELIHOODS``.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    References:
        Rezende et al. 2014, https://arxiv.org/abs/1401.4082; Burda et al. 2016 (two stochastic layers),
        https://arxiv.org/abs/1509.00519; Sønderby et al. 2016 (up to five), https://arxiv.org/abs/1602.02282.

    Example:
        >>> model = HierarchicalVAE(data_shape=(8, 8), layers=(6, 3))
        >>> model(size=5).shape
        torch.Size([5, 8, 8])
        >>> p = model.below(1, torch.zeros(4, 5, 3))   # p(z_1 | z_2)
        >>> p.batch_shape, p.event_shape
        (torch.Size([4, 5]), torch.Size([6]))
        >>> model.hidden
        ((12, 12), (6, 6))
    """

    default_guide: ClassVar[str] = "BottomUp"
    default_objective: ClassVar[dict[str, Any]] = {"name": "IWAE", "arguments": {"particles": 5, "gradient": "dreg"}}

    prior_loc: Tensor
    prior_scale: Tensor

    def __init__(
        self,
        data_shape: Sequence[int],
        layers: Sequence[int] = (100, 50),
        hidden: Sequence[int] | Sequence[Sequence[int]] | None = None,
        activation: str = "tanh",
        likelihood: str = "bernoulli",
    ) -> None:
        super().__init__()
        self.data_shape, self.layers = tuple(data_shape), tuple(layers)
        for argument, given in (("data_shape", self.data_shape), ("layers", self.layers)):
            if not given or any(not isinstance(size, int) or size < 1 for size in given):
                raise ArgumentError(f"{argument} is {given!r}; it must hold whole numbers, at least 1 each")
        if likelihood not in LIKELIHOODS:
            raise unknown_name("likelihood", likelihood, LIKELIHOODS)
        self.activation, self.likelihood = activation, LIKELIHOODS[likelihood]
        self.hidden = hidden_by_network(
            [[2 * n, 2 * n] for n in self.layers] if hidden is None else hidden, self.layers
        )
        self.latent_dim = self.layers[0]  # of what prior() draws and decode(z) takes

        outputs = (math.prod(self.data_shape) * self.likelihood.outputs, *(2 * width for width in self.layers[:-1]))
        self.decoders = nn.ModuleList(
            mlp(above, widths, below, activation)
            for above, widths, below in zip(self.layers, self.hidden, outputs, strict=True)
        )
        self.register_buffer("prior_loc", torch.zeros(self.layers[-1]), persistent=False)
        self.register_buffer("prior_scale", torch.ones(self.layers[-1]), persistent=False)
        self.likelihood_scale = self.likelihood.scale()

    def top(self) -> dist.TorchDistribution:
        """p(z_L) of the top layer: batch shape (), event shape (layers[-1],)."""
        return dist.Normal(self.prior_loc, self.prior_scale).to_event(1)

    def below(self, layer: int, z: Tensor) -> dist.TorchDistribution:
        """p(z_layer | z) for `*batch x layers[layer]` values z of the layer above: batch shape `*batch`."""
        loc, log_scale = full_precision(self.decoders[layer](z)).chunk(2, -1)
        return dist.Normal(loc, log_scale.clamp(-_LOG_SCALE_LIMIT, _LOG_SCALE_LIMIT).exp()).to_event(1)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z_1) for `*batch x layers[0]` values: batch shape `*batch`, event shape ``data_shape``."""
        out = by_element(full_precision(self.decoders[0](z)), self.likelihood.outputs, self.data_shape, False)
        return self.likelihood.distribution(out, self.likelihood_scale).to_event(len(self.data_shape))

    def initialize_output(self, x: Tensor) -> HierarchicalVAE:
        """Sets the decoder's last bias so that it starts at the mean of the data, and returns the model.

        Args:
            x: A `n x *data_shape` tensor of data (or of their intensities).
        """
        start_at_mean(self.decoders[0], self.likelihood, x.to(self.prior_loc).mean(0), convolutional=False)
        return self
