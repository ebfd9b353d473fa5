"""How near the log-likelihood comes to the time of its matrix products alone.

    python -m benchmarks.log_likelihood [--points 100] [--particles 5000] [--repeats 5] [--json FILE]

For the 784-200-200-50 VAE, prints the median time of ``pyrovae.evaluation.log_likelihood`` and of the decoder's matrix
products alone on the same number of latents, measured in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import machine
from pyrovae.evaluation import log_likelihood
from pyrovae.guides import AmortizedNormal
from pyrovae.models import VAE

_ROWS = 1000  # latents multiplied at a time; larger batches are slower on the CPU, as they leave the cache


def measure(points: int, particles: int, repeats: int) -> dict[str, float]:
    """Median seconds of each contender, interleaved.

    Args:
        points: data points.
        particles: particles for each.
        repeats: timings of each contender.
    """
    torch.manual_seed(0)
    model = VAE(data_shape=(28, 28), latent_dim=50, hidden=(200, 200))
    guide = AmortizedNormal(model)
    x = torch.bernoulli(torch.full((points, 28, 28), 0.13))
    contenders: dict[str, Callable[[], object]] = {
        "matrix products": lambda: _products(model, points * particles),
        "log_likelihood": lambda: log_likelihood(model, guide, x, particles),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def _products(model: VAE, latents: int) -> None:
    weights = [layer.weight for layer in model.decoder if isinstance(layer, torch.nn.Linear)]
    inputs = [torch.randn(_ROWS, weight.shape[1]) for weight in weights]
    for _ in range(latents // _ROWS):
        for weight, rows in zip(weights, inputs, strict=True):
            F.linear(rows, weight)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100, help="data points (default 100)")
    parser.add_argument("--particles", type=int, default=5000, help="particles for each data point (default 5000)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each contender (default 5)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    medians = measure(options.points, options.particles, options.repeats)
    products = medians["matrix products"]
    print(f"{machine.describe()}")
    print(f"{options.points} data points, K = {options.particles}, medians of {options.repeats}, interleaved")
    for name, seconds in medians.items():
        print(f"  {name:24s} {seconds:7.2f} s   {seconds / products:5.2f} x the matrix products")
    if options.json:
        figures = {"machine": machine.describe(), "options": {k: v for k, v in vars(options).items() if k != "json"}}
        options.json.write_text(json.dumps({**figures, "median_seconds": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
