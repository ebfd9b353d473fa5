"""A network as a function of one flat vector of the parameters that are latent, for any number of such vectors."""

from __future__ import annotations

import copy
import fnmatch
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from pyrovae.errors import ArgumentError
from pyrovae.noise import Law, Spread

__all__ = ["Block", "FlatNetwork", "Selection"]

Selection = str | Sequence[str] | Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class Block:
    """Where one parameter of a network lies in the flat vector.

    Args:
        name: of the parameter, as ``named_parameters`` has it.
        shape: of the parameter.
        start: its first place in the flat vector.
        fan_in: numbers that each of its outputs is computed from; 1 for a bias.
    """

    name: str
    shape: torch.Size
    start: int
    fan_in: int

    @property
    def layer(self) -> str:
        """The module that the parameter belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class FlatNetwork(nn.Module):
    r"""A network ``f(x; w)`` whose chosen parameters w are one vector, given anew at each call.

    The network that was given is not touched: a copy of it is called through ``torch.func.functional_call``, under
    ``vmap`` over the leading dimensions of w (layers that ``vmap`` lacks, such as an LSTM, run in a loop). The
    parameters that are not chosen are parameters of this module. Tied parameters stay tied, and count once.

    Args:
        net: any module from a minibatch `n x *event` to outputs `n x …`.
        chosen: ``"all"``; ``"last"`` for the last module that has parameters; a list of patterns of names, as in
            ``["head.*"]``; or a function of name and parameter that returns whether it is chosen.
        initialize: gives the network new initial parameters, in place; ``None`` for the ``reset_parameters`` of each
            module that has one.

    Raises:
        ArgumentError: nothing is chosen, a pattern fits no parameter, or the network has a batch norm in training
            mode.

    Example:
        >>> flat = FlatNetwork(nn.Linear(3, 1))
        >>> flat.size, [block.name for block in flat.blocks]
        (4, ['weight', 'bias'])
        >>> flat(torch.zeros(5, 2, flat.size), torch.zeros(7, 3)).shape   # 5 x 2 networks at once
        torch.Size([5, 2, 7, 1])
    """

    def __init__(
        self, net: nn.Module, chosen: Selection = "all", initialize: Callable[[nn.Module], Any] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise ArgumentError(f"net is a {type(net).__name__}; it must be a torch.nn.Module, or a list of widths")
        _refuse_batch_norm(net)
        self.net = copy.deepcopy(net)
        self.initialize = initialize or _reset
        parameters = dict(self.net.named_parameters())
        self.blocks = tuple(_blocks({name: parameters[name] for name in _choose(self.net, parameters, chosen)}))
        self.size = sum(block.size for block in self.blocks)
        places = {id(parameters[block.name]): parameters[block.name].detach() for block in self.blocks}
        for module in self.net.modules():  # a place for the values of each call, and no parameter any more
            for name, parameter in list(module._parameters.items()):
                if id(parameter) in places:
                    delattr(module, name)
                    module.register_buffer(name, places[id(parameter)], persistent=False)
        self._frozen = tuple(module for module in self.net.modules() if not module.training)
        self.vectorized = not any(isinstance(module, nn.RNNBase) for module in self.net.modules())

    def train(self, mode: bool = True) -> FlatNetwork:
        """Training mode, but for the modules that were in evaluation mode when the network was given."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    def start(self) -> Tensor:
        """The parameters of the network that was given, as a vector."""
        return self._flat(self.net)

    def fresh(self) -> Tensor:
        """New initial parameters, as a vector."""
        net = copy.deepcopy(self.net)
        self.initialize(net)
        return self._flat(net)

    def _flat(self, net: nn.Module) -> Tensor:
        buffers = dict(net.named_buffers())
        return torch.cat([buffers[block.name].flatten() for block in self.blocks])

    def unflatten(self, weights: Tensor) -> dict[str, Tensor]:
        """The parameters, by name, that a vector `size` holds."""
        parts = weights.split([block.size for block in self.blocks])
        return {block.name: part.view(block.shape) for block, part in zip(self.blocks, parts, strict=True)}

    def forward(self, weights: Tensor, x: Tensor, law: Spread | None = None, *, own_inputs: bool = False) -> Tensor:
        """The outputs, `*lead x n x …`.

        Args:
            weights: `*lead x size`.
            x: inputs, `n x *event`; with ``own_inputs``, `lead[-1] x n x *event`.
            law: mean and standard deviation of the weights where their noise is drawn elsewhere (:mod:`pyrovae.noise`).
            own_inputs: whether each network along the last leading dimension has inputs of its own.
        """
        return self._over((weights, *(law or (None, None))), x, own_inputs)

    def _over(self, given: tuple[Tensor | None, ...], x: Tensor, own_inputs: bool) -> Tensor:
        """Runs :meth:`_call` over the leading dimensions, from the first one inwards."""
        weights = given[0]
        assert weights is not None
        if weights.dim() == 1:
            return self._call(given, x)
        inner = own_inputs and weights.dim() == 2
        lead = weights.shape[0]
        mapped = tuple(0 if part is not None and part.dim() == weights.dim() and len(part) == lead else None
                       for part in given)  # fmt: skip
        given = tuple(
            part[0] if place is None and part is not None and part.dim() == weights.dim() else part
            for part, place in zip(given, mapped, strict=True)
        )

        def one(parts: tuple[Tensor | None, ...], inputs: Tensor) -> Tensor:
            return self._over(parts, inputs, own_inputs)

        if self.vectorized:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop because")
                return vmap(one, in_dims=(mapped, 0 if inner else None), randomness="different")(given, x)
        rows = [
            one(
                tuple(p[i] if place == 0 and p is not None else p for p, place in zip(given, mapped, strict=True)),
                x[i] if inner else x,
            )
            for i in range(lead)
        ]
        return torch.stack(rows)

    def _call(self, given: tuple[Tensor | None, ...], x: Tensor) -> Tensor:
        weights, loc, scale = given
        assert weights is not None
        named = self.unflatten(weights)
        if loc is None or scale is None:
            return functional_call(self.net, named, (x,))
        laws = zip(self.unflatten(loc).values(), self.unflatten(scale).values(), strict=True)
        with Law.tracking(list(named.values()), list(laws)):
            return functional_call(self.net, named, (x,))


def _reset(net: nn.Module) -> None:
    """The initial values that each layer gives itself."""
    for module in net.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def _refuse_batch_norm(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ArgumentError(
                f"net has a batch norm in training mode ({name or type(module).__name__}): it makes the outputs of a"
                " data point depend on the rest of its minibatch, so that the likelihood does not factorize. Use"
                " LayerNorm or GroupNorm, or freeze its statistics: net.eval() before it is given"
            )


def _choose(net: nn.Module, parameters: Mapping[str, nn.Parameter], chosen: Selection) -> list[str]:
    if not parameters:
        raise ArgumentError("net has no parameters, so that none can be latent")
    if callable(chosen):
        names = [name for name, parameter in parameters.items() if chosen(name, parameter)]
        if not names:
            raise ArgumentError("bayesian is a function that chooses no parameter of the network")
        return names
    if chosen == "all":
        return list(parameters)
    if chosen == "last":
        layers = [
            name for name, module in net.named_modules() if next(module.parameters(recurse=False), None) is not None
        ]
        prefix = f"{layers[-1]}." if layers[-1] else ""
        return [name for name in parameters if name.startswith(prefix) and "." not in name[len(prefix) :]]
    patterns = [chosen] if isinstance(chosen, str) else list(chosen)
    for pattern in patterns:
        if not fnmatch.filter(parameters, pattern):
            raise ArgumentError(
                f"bayesian names {pattern!r}, which fits no parameter; it must be 'all', 'last', a function, or"
                f" patterns of these names: {', '.join(parameters)}"
            )
    return [name for name in parameters if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _blocks(parameters: Mapping[str, Tensor]) -> Iterator[Block]:
    start = 0
    for name, parameter in parameters.items():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        yield Block(name, parameter.shape, start, fan_in)
        start += parameter.numel()
