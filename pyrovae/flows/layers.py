"""What every layer of a flow has in common: its arguments, its context, and where its parameters come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import zuko
from torch import Tensor, nn
from torch.distributions import Transform

from pyrovae.errors import ArgumentError, require_count
from pyrovae.flows.transforms import FlowTransform

__all__ = ["SMALL", "Layer", "Parametrized"]

SMALL = 0.01  # scale of what moves a layer away from the identity at the start


class Layer(zuko.lazy.LazyTransform):
    """A layer of a flow: a module that returns its transform, given a context or none.

    Args:
        features: size of the vectors that it transforms.
        context: size of the context vector that it depends on; 0 for none.

    Raises:
        ArgumentError: an argument is out of range; and, when called, a context where none was declared or the reverse.
    """

    scores: ClassVar[Literal["quick", "sequential", "own draws"]]
    """What it costs to score a given vector; ``"own draws"``: there is no inverse, only draws can be scored."""
    reverses: ClassVar[bool] = False
    """Whether layers stacked on each other should visit the features in alternating order (argument ``reverse``)."""

    def __init__(self, features: int, context: int) -> None:
        super().__init__()
        self.features = require_count("features", features)
        self.context = require_count("context", context, 0)

    def forward(self, c: Tensor | None = None) -> Transform:
        """The transform of `*batch x features` vectors, given a context `*batch x context`, or ``None``."""
        if (c is not None) != (self.context > 0) or (c is not None and c.shape[-1] != self.context):
            given = "none" if c is None else f"a context of shape {tuple(c.shape)}"
            raise ArgumentError(
                f"this {type(self).__name__} layer was built with context={self.context} and is called with {given}."
                " Build it with context= the size of the last dimension of what it is called with, or 0 for none."
            )
        return self.transform(c.float() if c is not None and c.dtype.itemsize < 4 else c)

    def transform(self, c: Tensor | None) -> Transform:
        """The transform at a context that has been checked."""
        raise NotImplementedError


class Parametrized(Layer):
    """A layer with a fixed number of parameters: learnt as they are, or all computed from the context.

    Without a context each parameter is an ``nn.Parameter``. With one they are the outputs of a network, whose last
    layer starts with small weights and with the initial parameters as its bias.

    Args:
        features: size of the vectors.
        context: size of the context vector.
        hidden: widths of the network's hidden layers; empty for a linear map.
        **initial: the initial value of each parameter.
    """

    kind: ClassVar[type[FlowTransform]]
    """The transform, built from the parameters by name."""

    def __init__(self, features: int, context: int, hidden: Sequence[int], **initial: Tensor) -> None:
        super().__init__(features, context)
        widths = [require_count("hidden", width) for width in hidden]
        self.shapes = {name: value.shape for name, value in initial.items()}
        if self.context:
            flat = torch.cat([value.flatten() for value in initial.values()])
            self.head = zuko.nn.MLP(context, len(flat), widths, activation=nn.ELU)
            with torch.no_grad():
                self.head[-1].weight.mul_(SMALL)
                self.head[-1].bias.copy_(flat)
        else:
            self.values = nn.ParameterDict({name: nn.Parameter(value) for name, value in initial.items()})

    def transform(self, c: Tensor | None) -> Transform:
        """The transform with the parameters that belong to the context."""
        return self.kind(**self.parameters_at(c))

    def parameters_at(self, c: Tensor | None) -> dict[str, Tensor]:
        """Each parameter by name, `*batch x *shape`."""
        if c is None:
            return dict(self.values.items())
        out = self.head(c)
        out = out.float() if out.dtype.itemsize < 4 else out  # 16 bits under autocast
        parts = out.split([math.prod(shape) for shape in self.shapes.values()], dim=-1)
        return {
            name: part.reshape(*part.shape[:-1], *shape)
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }
