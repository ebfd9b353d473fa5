"""What is fitted: sizes, data and initial weights, the same for every competitor. Needs NumPy alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

__all__ = ["EIGHT_SCHOOLS", "LAYERS", "NOISE", "SCALE", "WORKLOADS", "Workload", "bnn_layers", "initial", "minibatches"]

Weights = list[tuple[np.ndarray, np.ndarray]]  # of each layer: `in x out` or `3 x 3 x in x out`, and the bias

LAYERS, WIDTH, FEATURES = 20, 50, 10  # of the Bayesian network
NOISE = 0.5  # its standard deviation
SCALE = 0.05  # initial standard deviation of its guide
EIGHT_SCHOOLS = (
    np.array([28, 8, -3, 7, -1, 1, 18, 12], np.float32),
    np.array([15, 10, 16, 11, 9, 11, 10, 18], np.float32),
)


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Args:
        title: what it is.
        kind: ``"vae"``, ``"bnn"`` or ``"schools"``.
        batch: data points a minibatch.
        data_shape: of one data point (VAEs).
        hidden: widths of the decoder's hidden layers; the encoder mirrors them (VAEs).
        latent: dimensions of the latent (VAEs).
        channels: of the convolutions, from the coarsest to the finest; empty for a fully connected network (VAEs).
        particles: drawn at a time.
        iwae: whether the bound is the importance-weighted one, in place of the ELBO.
        dreg: whether its gradient is the doubly reparameterized one.
        lr: learning rate of Adam.
        minibatches: how many there are, taken in turn.
        evaluations: of the loss, averaged when competitors are compared.
    """

    title: str
    kind: str
    batch: int
    data_shape: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    latent: int = 0
    channels: tuple[int, ...] = ()
    particles: int = 1
    iwae: bool = False
    dreg: bool = False
    lr: float = 1e-3
    minibatches: int = 16
    evaluations: int = 32

    @property
    def activation(self) -> str:
        return "relu" if self.channels else "tanh"


_IWAE = {"batch": 20, "data_shape": (28, 28), "hidden": (200, 200), "latent": 50, "particles": 50, "iwae": True}

WORKLOADS = {
    "tiny": Workload("tiny VAE, 64-64-8, B 32", "vae", 32, (64,), (64,), 8),
    "mnist": Workload("MNIST VAE, 784-400-20, B 128", "vae", 128, (28, 28), (400,), 20),
    "iwae": Workload("IWAE-50, 784-200-200-50, B 20", "vae", **_IWAE),
    "dreg": Workload("IWAE-50, DReG, same sizes", "vae", **_IWAE, dreg=True),
    "conv": Workload("convolutional VAE, 28x28, B 64", "vae", 64, (28, 28), (200,), 20, (64, 32)),
    "bnn": Workload("Bayesian network 20 x 50, K 10, B 100", "bnn", 100, particles=10, minibatches=1),
    "schools": Workload("eight schools, full-rank guide", "schools", 8, lr=1e-2, minibatches=1, evaluations=200),
}


def minibatches(workload: Workload) -> list[tuple[np.ndarray, ...]]:
    """The minibatches: for each, the arrays that the model is called with, in float32."""
    if workload.kind == "schools":
        return [EIGHT_SCHOOLS]
    rng = np.random.default_rng(0)
    shape = (workload.minibatches, workload.batch)
    if workload.kind == "bnn":
        x = rng.normal(size=(*shape, FEATURES)).astype(np.float32)
        y = np.sin(2 * x[..., 0]) + x[..., 1] * x[..., 2] + NOISE * rng.normal(size=shape)
        return list(zip(x, y.astype(np.float32), strict=True))
    size = math.prod(workload.data_shape)
    logits = rng.normal(size=(*shape, 10)) @ rng.normal(size=(10, size)) - 2.0
    x = (rng.random(logits.shape) < 1.0 / (1.0 + np.exp(-logits))).astype(np.float32)
    return [(each,) for each in x.reshape(*shape, *workload.data_shape)]


def initial(workload: Workload) -> dict[str, Weights]:
    """Initial weights of the encoder and the decoder of a VAE (Glorot-uniform; biases zero).

    Convolutions come first in the encoder and last in the decoder. For the Bayesian network, the initial means of
    its guide, layer by layer, as ``"network"``.
    """
    rng = np.random.default_rng(1)

    def dense(widths: list[int]) -> Weights:
        return [_glorot(rng, (before, after)) for before, after in itertools.pairwise(widths)]

    def convolutions(widths: list[int]) -> Weights:
        return [_glorot(rng, (3, 3, before, after)) for before, after in itertools.pairwise(widths)]

    if workload.kind == "bnn":
        return {"network": [(rng.normal(size=shape).astype(np.float32), np.zeros(shape[1], np.float32))
                            for shape in bnn_layers()]}  # fmt: skip
    if workload.kind != "vae":
        return {}
    hidden, latent = list(workload.hidden), workload.latent
    if not workload.channels:
        size = math.prod(workload.data_shape)
        return {"encoder": dense([size, *reversed(hidden), 2 * latent]), "decoder": dense([latent, *hidden, size])}
    channels = [*workload.channels, 1]
    flat = channels[0] * math.prod(side // 2 ** len(workload.channels) for side in workload.data_shape)
    return {
        "encoder": convolutions(channels[::-1]) + dense([flat, *reversed(hidden), 2 * latent]),
        "decoder": dense([latent, *hidden, flat]) + convolutions(channels),
    }


def bnn_layers() -> list[tuple[int, int]]:
    """Inputs and outputs of each layer of the Bayesian network: 20 hidden layers and the output."""
    return list(itertools.pairwise([FEATURES, *[WIDTH] * LAYERS, 1]))


def _glorot(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    field = math.prod(shape[:-2])
    limit = math.sqrt(6.0 / (field * (shape[-2] + shape[-1])))
    return rng.uniform(-limit, limit, size=shape).astype(np.float32), np.zeros(shape[-1], np.float32)
