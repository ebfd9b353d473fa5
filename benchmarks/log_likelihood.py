"""How near the log-likelihood comes to the time of its matrix products alone.

    python -m benchmarks.log_likelihood [--points 100] [--particles 5000] [--repeats 9] [--json FILE]

For the 784-200-200-50 VAE, prints the median time of ``pyrovae.evaluation.log_likelihood`` and of the decoder's matrix
products alone on the same number of latents, measured in turn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks import timing
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
    contenders = {
        "matrix products": lambda: _products(model, points * particles),
        "log_likelihood": lambda: log_likelihood(model, guide, x, particles),
    }
    return timing.medians(contenders, repeats)


@torch.no_grad()
def _products(model: VAE, latents: int) -> None:
    weights = [layer.weight for layer in model.decoder if isinstance(layer, torch.nn.Linear)]
    inputs = [torch.randn(_ROWS, weight.shape[1]) for weight in weights]
    for _ in range(latents // _ROWS):
        for weight, rows in zip(weights, inputs, strict=True):
            F.linear(rows, weight)


def main() -> None:
    """Prints the table."""
    parser = timing.parser(__doc__, repeats=9)
    parser.add_argument("--points", type=int, default=100, help="data points (default 100)")
    parser.add_argument("--particles", type=int, default=5000, help="particles for each data point (default 5000)")
    options = parser.parse_args()
    found = measure(options.points, options.particles, options.repeats)
    timing.show(f"{options.points} data points, K = {options.particles}", found, options)


if __name__ == "__main__":
    main()
