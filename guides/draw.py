"""The posterior of DRAW: an encoder that watches the drawing and proposes the next latent."""

from __future__ import annotations

import math

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.errors import ArgumentError, require_count
from pyrovae.guides.amortized import held, replayed, reshaped
from pyrovae.guides.families import DiagonalNormal
from pyrovae.models.attention import Attention
from pyrovae.models.draw import DRAW, LSTM, Drawing
from pyrovae.models.networks import full_precision, mlp
from pyrovae.modes import device_of
from pyrovae.registry import GUIDES

__all__ = ["AmortizedDRAW"]


@GUIDES.register
class AmortizedDRAW(PyroModule):
    r"""Posterior of DRAW's latents: an LSTM reads the data and what the drawing still lacks, and proposes the next one.

    .. math::
        \hat x_t = x - \mathbb{E}[x \mid c_{t-1}], \qquad
        r_t = \mathrm{read}(x, \hat x_t, h_{t-1}), \qquad
        e_t = \mathrm{LSTM}(e_{t-1}, [r_t, h_{t-1}]), \qquad
        q(z_t \mid x, z_{<t}) = \mathcal{N}(\mu(e_t), \mathrm{diag}\,\sigma^2(e_t))

    where the canvas c and the decoder's output h follow the model's own recurrences from the latents drawn so far.
    Without attention ``read`` gives both images, with it a patch of both (:class:`pyrovae.models.draw.Attention`).

    The posterior depends on the model's parameters too, and the bound's gradient reaches them by this route as well, as
    in the paper. ELBO, IWAE and their kin are right with any gradient (``"stl"`` and ``"dreg"`` hold the parameters of
    both fixed where draws are scored). Objectives that train the guide by a loss of its own, which is not the model's
    (``ReweightedWakeSleep`` and ``WakeSleep``), would move the model's decoder by it: do not use them here.

    Args:
        model: the :class:`pyrovae.models.draw.DRAW`. The guide runs its ``start``, ``advance`` and ``on``, but does not
            own it: its parameters are not among the guide's, and a copy of both is made by copying them together.
        hidden: number of units of the encoder's LSTM; ``None`` takes the model's.

    Raises:
        ArgumentError: the model is of another kind, or an argument is out of range.

    References:
        Gregor et al. 2015, https://arxiv.org/abs/1502.04623.

    Example:
        >>> model = DRAW(data_shape=(8, 8), steps=3, latent_dim=2, hidden=16, read_size=2, write_size=3)
        >>> guide = AmortizedDRAW(model)
        >>> guide(torch.zeros(5, 8, 8)).shape   # the latents of all steps
        torch.Size([5, 6])
    """

    def __init__(self, model: DRAW, hidden: int | None = None) -> None:
        super().__init__()
        if not isinstance(model, DRAW):
            raise ArgumentError(
                f"guide {type(self).__name__} does not fit model {type(model).__name__}: it follows the canvas of a"
                " DRAW. Use another guide (AmortizedNormal for a VAE), or model DRAW."
            )
        hidden = model.hidden if hidden is None else require_count("hidden", hidden)
        self.data_shape = model.data_shape
        self._model = (model,)  # in a tuple, so that it is no submodule
        size = model.read_size
        self.attention = None if size is None else Attention(model.hidden, model.image_shape[1:], size)
        seen = math.prod(self.data_shape) if size is None else model.image_shape[0] * size**2
        self.encoder = LSTM(2 * seen + model.hidden, hidden)
        self.family = DiagonalNormal(model.latent_dim)
        self.head = mlp(hidden, (), self.family.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Samples z_1 to z_T for a batch `n x *data_shape`; returns them in a row, `n x (steps · latent_dim)`."""
        (model,) = self._model
        x = reshaped(x, self.data_shape, self.data_shape)
        latents, drawing, memory = [], model.start(), self.encoder.start()
        # Where draws that are given are scored, all that log q depends on is held fixed (sticking the landing and kin).
        with held(model, when=replayed()), pyro.plate("data", len(x), device=device_of(self)):
            for step in range(1, model.steps + 1):
                memory = self.encoder(self.read(x, drawing), memory)
                q = self.family(full_precision(self.head(memory.output)))
                latents.append(pyro.sample(f"z{step}", q))
                drawing = model.advance(drawing, latents[-1])
        return torch.cat(latents, -1)

    def read(self, x: Tensor, drawing: Drawing) -> Tensor:
        """What the encoder sees of the data, `*batch x *data_shape`, of the drawing's errors, and of its decoder."""
        (model,) = self._model
        error = x - model.on(drawing.canvas).mean
        both = torch.stack([x.expand_as(error), error], -1 - len(self.data_shape))
        batch = error.shape[: error.dim() - len(self.data_shape)]
        if self.attention is not None:
            grid = self.attention(drawing.memory.output)
            both = self.attention.read(both.reshape(*batch, -1, *self.attention.image_shape), grid)
        return torch.cat([both.reshape(*batch, -1), drawing.memory.output.expand(*batch, -1)], -1)
