"""The networks that packaged models and guides are made of; batch-polymorphic on the left."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, require_count, unknown_name

__all__ = ["ACTIVATIONS", "ConvDecoder", "ConvEncoder", "ResidualBlock", "as_image", "hidden_by_network", "mlp"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def mlp(inputs: int, hidden: Sequence[int], outputs: int, activation: str = "tanh") -> nn.Sequential:
    """A fully connected network with Glorot-uniform weights (He-uniform under relu) and zero biases.

    Args:
        inputs: number of input features.
        hidden: widths of the hidden layers; empty for a linear map.
        outputs: number of output features.
        activation: name of the activation after each hidden layer, one of ``ACTIVATIONS``.

    Returns:
        A module from `*batch x inputs` to `*batch x outputs`.

    Raises:
        ArgumentError: unknown activation, or a width below 1.

    Example:
        >>> mlp(4, [8], 2)(torch.zeros(5, 3, 4)).shape
        torch.Size([5, 3, 2])
    """
    if any(not isinstance(width, int) or width < 1 for width in hidden):
        raise ArgumentError(f"hidden is {tuple(hidden)!r}; it must hold whole numbers, at least 1 each")
    widths = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), _activation(activation)]
    return initialize(nn.Sequential(*layers[:-1]), activation)


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def initialize(network: nn.Sequential, activation: str) -> nn.Sequential:
    """Glorot-uniform weights (He-uniform under rectifiers), zero biases; the last layer keeps gain 1."""
    weighted = [layer for layer in network if isinstance(layer, nn.Linear | nn.Conv2d)]
    for layer in weighted:
        rectified = activation.endswith("relu") and layer is not weighted[-1]
        nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2.0) if rectified else 1.0)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return network


class _LeftBatch(nn.Module):
    """Runs a network that takes one batch dimension on inputs that have any number of them."""

    def __init__(self, network: nn.Sequential, event_dim: int) -> None:
        super().__init__()
        self.network = network
        self.event_dim = event_dim

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.dim() - self.event_dim]
        out = self.network(x.reshape(-1, *x.shape[x.dim() - self.event_dim :]))
        return out.reshape(*batch, *out.shape[1:])


class ResidualBlock(nn.Module):
    r"""A pre-activation residual block of two convolutions, without batch normalisation.

    .. math:: y = x + W_2 * a(W_1 * a(x))

    The weights W₂ are drawn smaller by √depth, so that the variance of what ``depth`` blocks add to their input does
    not grow with their number.

    Args:
        channels: of input and output, `n x channels x H x W`.
        activation: name of the activation a, one of ``ACTIVATIONS``.
        depth: number of blocks of the network that this one is part of.

    References:
        He et al. 2016, "Identity mappings in deep residual networks", https://arxiv.org/abs/1603.05027; Zhang et al.
        2019 (Fixup: depth-dependent initialisation without normalisation), https://arxiv.org/abs/1901.09321.

    Example:
        >>> ResidualBlock(4, "silu")(torch.zeros(3, 4, 7, 9)).shape
        torch.Size([3, 4, 7, 9])
    """

    def __init__(self, channels: int, activation: str, depth: int = 1) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        layers = nn.Sequential(_activation(activation), first, _activation(activation), second)
        self.residual = initialize(layers, activation)
        with torch.no_grad():
            second.weight.div_(math.sqrt(depth))

    def forward(self, x: Tensor) -> Tensor:
        """The block of `n x channels x H x W` features."""
        return x + self.residual(x)


def _blocks(blocks: int, channels: int, levels: int, activation: str) -> list[nn.Module]:
    """The residual blocks of one of the levels."""
    return [ResidualBlock(channels, activation, blocks * levels) for _ in range(blocks)]


class ConvEncoder(_LeftBatch):
    """Convolutions of stride 2, then a fully connected head: `*batch x C x H x W` to `*batch x outputs`.

    Args:
        image_shape: channels, height and width.
        channels: output channels of each convolution; each halves height and width.
        hidden: widths of the fully connected layers after the convolutions.
        outputs: number of output features.
        activation: name of the activation, one of ``ACTIVATIONS``.
        blocks: number of residual blocks after each convolution.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    Example:
        >>> ConvEncoder((1, 8, 8), (4, 8), (16,), 6, "relu")(torch.zeros(3, 5, 1, 8, 8)).shape
        torch.Size([3, 5, 6])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: Sequence[int],
        hidden: Sequence[int],
        outputs: int,
        activation: str,
        blocks: int = 0,
    ) -> None:
        sizes = _pyramid(image_shape, channels)
        require_count("blocks", blocks, least=0)
        layers: list[nn.Module] = []
        for before, after in zip([image_shape[0], *channels[:-1]], channels, strict=True):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                *_blocks(blocks, after, len(channels), activation),
                _activation(activation),
            ]
        head = mlp(channels[-1] * sizes[-1][0] * sizes[-1][1], hidden, outputs, activation)
        super().__init__(
            nn.Sequential(*initialize(nn.Sequential(*layers), activation), nn.Flatten(), *head), event_dim=3
        )


class ConvDecoder(_LeftBatch):
    """A fully connected head, then upsampling and convolutions: `*batch x inputs` to `*batch x outputs x H x W`.

    Nearest-neighbour upsampling before each convolution reaches every size exactly and leaves no checkerboard
    (Odena et al. 2016, https://doi.org/10.23915/distill.00003). With ``blocks`` it mirrors an encoder that has as many.

    Args:
        inputs: number of input features.
        hidden: widths of the fully connected layers before the convolutions.
        channels: channels from the coarsest level to the finest.
        image_shape: channels, height and width of the image; the channels are ignored.
        outputs: output channels.
        activation: name of the activation, one of ``ACTIVATIONS``.
        blocks: number of residual blocks before each upsampling.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    Example:
        >>> ConvDecoder(6, (16,), (8, 4), (1, 7, 9), 2, "relu")(torch.zeros(3, 5, 6)).shape
        torch.Size([3, 5, 2, 7, 9])
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        channels: Sequence[int],
        image_shape: tuple[int, int, int],
        outputs: int,
        activation: str,
        blocks: int = 0,
    ) -> None:
        sizes = _pyramid(image_shape, channels)
        require_count("blocks", blocks, least=0)
        height, width = sizes[-1]
        head = mlp(inputs, hidden, channels[0] * height * width, activation)
        layers: list[nn.Module] = []
        for size, before, after in zip(reversed(sizes[:-1]), channels, [*channels[1:], outputs], strict=True):
            layers += [
                *_blocks(blocks, before, len(channels), activation),
                _activation(activation),
                nn.Upsample(size=size),
                nn.Conv2d(before, after, 3, padding=1),
            ]
        coarsest = nn.Unflatten(1, (channels[0], height, width))
        super().__init__(nn.Sequential(*head, coarsest, *initialize(nn.Sequential(*layers), activation)), event_dim=1)


def hidden_by_network(
    hidden: Sequence[int] | Sequence[Sequence[int]], layers: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """The widths of the hidden layers of each of a layered model's or guide's networks, one for each latent layer.

    Args:
        hidden: widths that all networks share, or a list for each network.
        layers: numbers of dimensions of the latent layers.

    Raises:
        ArgumentError: there are lists, but not one for each layer.

    Example:
        >>> hidden_by_network((8, 4), layers=(6, 3))
        ((8, 4), (8, 4))
        >>> hidden_by_network(((8, 4), ()), layers=(6, 3))
        ((8, 4), ())
    """
    lists = [tuple(part) for part in hidden if isinstance(part, Sequence)]
    if not lists:
        return (tuple(part for part in hidden if not isinstance(part, Sequence)),) * len(layers)
    if not len(lists) == len(hidden) == len(layers):
        raise ArgumentError(
            f"hidden is {hidden!r}; for the {len(layers)} latent layers {tuple(layers)} give one list of widths that"
            f" all networks share, or {len(layers)} lists, from the data upwards"
        )
    return tuple(lists)


def as_image(data_shape: tuple[int, ...], what: str, otherwise: str) -> tuple[int, int, int]:
    """Channels, height and width of a data point that is an image.

    Args:
        data_shape: ``(H, W)`` or ``(C, H, W)``.
        what: that needs images, for the message.
        otherwise: what to use for other data, for the message.

    Raises:
        ArgumentError: data points of this shape are no images.

    Example:
        >>> as_image((28, 20), "network='conv'", "network='mlp'")
        (1, 28, 20)
    """
    if len(data_shape) not in (2, 3):
        raise ArgumentError(
            f"data_shape is {data_shape}; {what} needs images (H, W) or (C, H, W). Use {otherwise} for other data."
        )
    channels, height, width = (1, *data_shape)[-3:]
    return channels, height, width


def _pyramid(image_shape: tuple[int, int, int], channels: Sequence[int]) -> list[tuple[int, int]]:
    """Heights and widths from the image down to the coarsest level."""
    if not channels or any(not isinstance(c, int) or c < 1 for c in channels):
        raise ArgumentError(f"channels is {tuple(channels)!r}; a convolutional network needs whole numbers, at least 1")
    sizes = [(image_shape[1], image_shape[2])]
    for _ in channels:
        height, width = sizes[-1]
        sizes.append((math.ceil(height / 2), math.ceil(width / 2)))
    return sizes


def full_precision(out: Tensor) -> Tensor:
    """Network outputs that autocast left in 16 bits, back in float32, so that log-densities are summed there."""
    return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out
