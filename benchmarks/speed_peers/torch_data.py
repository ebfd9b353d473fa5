"""Data and networks of a workload as PyTorch has them."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from benchmarks.speed_peers.workloads import Workload, initial, minibatches

__all__ = ["batches", "load_initial", "networks", "synchronize"]


def batches(workload: Workload, device: torch.device) -> list[tuple[Tensor, ...]]:
    """The minibatches on the device."""
    return [tuple(torch.from_numpy(part).to(device) for part in batch) for batch in minibatches(workload)]


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def networks(workload: Workload) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder of a VAE, at the initial weights."""
    activation = {"tanh": nn.Tanh, "relu": nn.ReLU}[workload.activation]
    size, hidden, latent = math.prod(workload.data_shape), workload.hidden, workload.latent

    def dense(widths: list[int]) -> list[nn.Module]:
        return [
            part for before, after in itertools.pairwise(widths) for part in (nn.Linear(before, after), activation())
        ]

    if not workload.channels:
        encoder = nn.Sequential(nn.Flatten(), *dense([size, *hidden[::-1], 2 * latent])[:-1])
        decoder = nn.Sequential(*dense([latent, *hidden, size])[:-1])
    else:
        channels = [*workload.channels, 1]
        coarse = [side // 2 ** len(workload.channels) for side in workload.data_shape]
        flat = channels[0] * math.prod(coarse)
        down = [
            part
            for before, after in itertools.pairwise(channels[::-1])
            for part in (nn.Conv2d(before, after, 3, stride=2, padding=1), activation())
        ]
        up = [
            part
            for before, after in itertools.pairwise(channels)
            for part in (nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1), activation())
        ]
        image = nn.Unflatten(1, (1, *workload.data_shape))
        encoder = nn.Sequential(
            nn.Flatten(), image, *down, nn.Flatten(), *dense([flat, *hidden[::-1], 2 * latent])[:-1]
        )
        decoder = nn.Sequential(*dense([latent, *hidden, flat]), nn.Unflatten(1, (channels[0], *coarse)), *up[:-1])
    load_initial(workload, encoder, decoder)
    return encoder, decoder


@torch.no_grad()
def load_initial(workload: Workload, encoder: nn.Module, decoder: nn.Module) -> None:
    """Sets the weights of encoder and decoder to the initial ones, layer by layer."""
    for network, weights in zip((encoder, decoder), initial(workload).values(), strict=True):
        layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for layer, (weight, bias) in zip(layers, weights, strict=True):
            order = (3, 2, 0, 1) if weight.ndim == 4 else (1, 0)
            layer.weight.copy_(torch.from_numpy(weight).permute(order))
            layer.bias.copy_(torch.from_numpy(bias))
