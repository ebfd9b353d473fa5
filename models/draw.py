"""DRAW: a recurrent decoder that adds to a canvas at every step, through a window of attention or all over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, require_count, unknown_name
from pyrovae.models.attention import Attention
from pyrovae.models.likelihoods import LIKELIHOODS, require_batch
from pyrovae.models.networks import as_image, full_precision, mlp
from pyrovae.registry import MODELS

__all__ = ["DRAW", "LSTM", "Drawing", "Memory"]


class Memory(NamedTuple):
    """The state of an LSTM: output and cell, `*batch x hidden` each."""

    output: Tensor
    cell: Tensor


class Drawing(NamedTuple):
    """The state of DRAW between two steps: the canvas `*batch x *data_shape`, and the decoder's memory."""

    canvas: Tensor
    memory: Memory


class LSTM(nn.Module):
    """One step of a long short-term memory that starts from a learned state; batch-polymorphic on the left.

    Weights are Glorot-uniform, gate by gate, and biases zero, but for the forget gate's, which is 1.

    Args:
        inputs: number of input features.
        hidden: number of units.

    References:
        Jozefowicz et al. 2015 (the forget gate's bias), https://proceedings.mlr.press/v37/jozefowicz15.html.

    Example:
        >>> lstm = LSTM(4, 8)
        >>> lstm(torch.zeros(5, 3, 4), lstm.start()).output.shape
        torch.Size([5, 3, 8])
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.step = nn.LSTMCell(inputs, hidden)
        with torch.no_grad():
            for gate in (*self.step.weight_ih.chunk(4), *self.step.weight_hh.chunk(4)):
                nn.init.xavier_uniform_(gate)
            self.step.bias_hh.zero_()
            self.step.bias_ih.zero_().chunk(4)[1].fill_(1.0)  # torch's order: input, forget, cell, output
        self.first_output = nn.Parameter(torch.zeros(hidden))
        self.first_cell = nn.Parameter(torch.zeros(hidden))

    def start(self) -> Memory:
        """The state before the first step, `hidden` each."""
        return Memory(self.first_output, self.first_cell)

    def forward(self, inputs: Tensor, memory: Memory) -> Memory:
        """The state after a step on `*batch x inputs` features, whose batch is that of the memory or larger."""
        batch = inputs.shape[:-1]
        before = (part.to(inputs).expand(*batch, -1).reshape(-1, part.shape[-1]) for part in memory)
        after = self.step(inputs.reshape(-1, inputs.shape[-1]), tuple(before))
        return Memory(*(part.reshape(*batch, -1) for part in after))


@MODELS.register
class DRAW(PyroModule):
    r"""Deep recurrent attentive writer: T steps, each with a latent of its own, add up a canvas.

    .. math:: z_t \sim \mathcal{N}(0, I), \qquad h_t = \mathrm{LSTM}(h_{t-1}, z_t), \qquad
        c_t = c_{t-1} + \mathrm{write}(h_t), \qquad x \sim p(x \mid c_T)

    with :math:`h_0` and :math:`c_0` learned, and p(x | c) = Bernoulli(σ(c)) for ``"bernoulli"``. The sites are ``"z1"``
    to ``"zT"``. Without attention ``write`` is a linear map onto the whole canvas, with it one onto a patch, which an
    N x N grid of Gaussian filters puts into the canvas (:class:`Attention`). ``AmortizedDRAW`` is the guide.
    ``forward(x)`` conditions on a batch `n x *data_shape`; ``forward(size=n)`` generates one, and ``generate(n)`` shows
    how.

    Args:
        data_shape: shape of one data point; with attention ``(H, W)`` or ``(C, H, W)``.
        steps: number T of steps (the paper's for MNIST: 64).
        latent_dim: number of dimensions of each z_t (the paper's for MNIST: 100).
        hidden: number of units of the decoder's LSTM (the guide's encoder mirrors it).
        read_size: N of the grid through which the guide reads the data; ``None`` for all of them (the paper's: 2).
        write_size: N of the grid through which the decoder writes; ``None`` for no attention (the paper's: 5).
        likelihood: ``"bernoulli"`` (data 0 or 1), ``"continuous-bernoulli"`` (data in [0, 1]), or ``"normal"`` (real
            data; one learnable standard deviation for all elements).

    Raises:
        ArgumentError: an argument is unknown or out of range, or attention is asked for and the data are no images.

    References:
        Gregor et al. 2015, https://arxiv.org/abs/1502.04623.

    Example:
        >>> model = DRAW(data_shape=(8, 8), steps=3, latent_dim=2, hidden=16, read_size=2, write_size=3)
        >>> model(size=5).shape
        torch.Size([5, 8, 8])
        >>> model.generate(5).shape   # the canvas after each step
        torch.Size([3, 5, 8, 8])
        >>> sorted(pyro.poutine.trace(model).get_trace(torch.ones(3, 8, 8)).stochastic_nodes)
        ['data', 'z1', 'z2', 'z3']
    """

    default_guide: ClassVar[str] = "AmortizedDRAW"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {"kl": "analytic"}}

    def __init__(
        self,
        data_shape: Sequence[int] = (28, 28),
        steps: int = 10,
        latent_dim: int = 10,
        hidden: int = 256,
        read_size: int | None = None,
        write_size: int | None = None,
        likelihood: str = "bernoulli",
    ) -> None:
        super().__init__()
        self.data_shape, self.read_size, self.write_size = tuple(data_shape), read_size, write_size
        self.steps, self.latent_dim = require_count("steps", steps), require_count("latent_dim", latent_dim)
        self.hidden = require_count("hidden", hidden)
        self._check(likelihood)
        self.likelihood = LIKELIHOODS[likelihood]

        self.decoder = LSTM(latent_dim, hidden)
        self.attention = None if write_size is None else Attention(hidden, self.image_shape[1:], write_size)
        self.stroke = mlp(hidden, (), math.prod(self.stroke_shape))
        self.first_canvas = nn.Parameter(torch.zeros(self.data_shape))
        self.register_buffer("prior_loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("prior_scale", torch.ones(latent_dim), persistent=False)
        self.likelihood_scale = self.likelihood.scale()

    def _check(self, likelihood: str) -> None:
        if not self.data_shape or any(not isinstance(size, int) or size < 1 for size in self.data_shape):
            raise ArgumentError(f"data_shape is {self.data_shape!r}; it must hold whole numbers, at least 1 each")
        for argument, size in (("read_size", self.read_size), ("write_size", self.write_size)):
            if size is not None:
                require_count(argument, size, why=", or None for no attention")
                self.image_shape  # noqa: B018 (it refuses data that are no images)
        drawable = [name for name, family in LIKELIHOODS.items() if family.outputs == 1]  # one number an element
        if likelihood not in drawable:
            raise unknown_name("likelihood of DRAW", likelihood, drawable)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of a data point that is an image."""
        return as_image(self.data_shape, "attention", "read_size=None and write_size=None")

    @property
    def stroke_shape(self) -> tuple[int, ...]:
        """What the decoder's output is mapped to: a patch of the canvas, or all of it."""
        return self.data_shape if self.write_size is None else (self.image_shape[0], self.write_size, self.write_size)

    def start(self) -> Drawing:
        """The canvas and the decoder before the first step, without batch dimensions."""
        return Drawing(self.first_canvas, self.decoder.start())

    def advance(self, drawing: Drawing, z: Tensor) -> Drawing:
        """The next step, for `*batch x latent_dim` latents whose batch is that of the drawing or larger."""
        memory = self.decoder(z, drawing.memory)
        return Drawing(drawing.canvas + self.write(memory.output), memory)

    def write(self, output: Tensor) -> Tensor:
        """What the decoder's output, `*batch x hidden`, adds to the canvas, `*batch x *data_shape`."""
        stroke = full_precision(self.stroke(output)).reshape(*output.shape[:-1], *self.stroke_shape)
        if self.attention is None:
            return stroke
        return self.attention.write(stroke, self.attention(output)).reshape(*output.shape[:-1], *self.data_shape)

    def on(self, canvas: Tensor) -> dist.TorchDistribution:
        """p(x | c) for canvases `*batch x *data_shape`: batch shape `*batch`, event shape ``data_shape``."""
        return self.likelihood.distribution(canvas, self.likelihood_scale).to_event(len(self.data_shape))

    def step_prior(self) -> dist.TorchDistribution:
        """p(z_t): batch shape (), event shape (latent_dim,)."""
        return dist.Normal(self.prior_loc, self.prior_scale).to_event(1)

    def prior(self) -> dist.TorchDistribution:
        """p(z_1, …, z_T), one after the other: batch shape (), event shape (steps · latent_dim,)."""
        return dist.Normal(self.prior_loc.repeat(self.steps), self.prior_scale.repeat(self.steps)).to_event(1)

    def drawings(self, z: Tensor) -> list[Drawing]:
        """The states from the start to the last step, T + 1 of them, for `*batch x (steps · latent_dim)` latents."""
        found = [self.start()]
        for of_step in z.unflatten(-1, (self.steps, self.latent_dim)).unbind(-2):
            found.append(self.advance(found[-1], of_step))
        return found

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for `*batch x (steps · latent_dim)` latents: batch shape `*batch`, event shape ``data_shape``."""
        return self.on(self.drawings(z)[-1].canvas)

    def canvases(self, z: Tensor) -> Tensor:
        """The mean of the data on the canvas after each step, `steps x *batch x *data_shape`, as ``decode`` of z."""
        return torch.stack([self.on(drawing.canvas).mean for drawing in self.drawings(z)[1:]])

    @torch.no_grad()
    def generate(self, size: int = 1) -> Tensor:
        """How the model draws: the mean of the data on the canvas after each step, for draws from the prior.

        Args:
            size: number of data points.

        Returns:
            A `steps x size x *data_shape` tensor; for binary data the probabilities σ(c_t).

        Raises:
            ArgumentError: ``size`` is below 1.
        """
        return self.canvases(self.prior().sample((require_count("size", size),)))

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Conditions on ``x``, or generates ``size`` data points when it is ``None``; returns the data.

        Args:
            x: A `n x *data_shape` tensor, or ``None``.
            size: number of data points to generate.

        Raises:
            DataError: ``x`` is not a batch of data points of this model's shape.
        """
        if x is not None:
            require_batch(x, self.data_shape)
        drawing = self.start()
        with pyro.plate("data", size if x is None else len(x), device=self.prior_loc.device):
            for step in range(1, self.steps + 1):
                drawing = self.advance(drawing, pyro.sample(f"z{step}", self.step_prior()))
            return pyro.sample("x", self.on(drawing.canvas), obs=x)

    @torch.no_grad()
    def initialize_output(self, x: Tensor) -> DRAW:
        """Sets the canvas before the first step to the mean of the data, and returns the model.

        Args:
            x: A `n x *data_shape` tensor of data (or of their intensities).
        """
        self.first_canvas.copy_(self.likelihood.bias(x.to(self.first_canvas).mean(0)))
        return self
