"""The vectorized IWAE step against a Python loop over particles and against Pyro's own objective.

    python -m benchmarks.objectives [--particles 50] [--batch 20] [--repeats 30] [--json FILE]

For the 784-200-200-50 VAE, prints the median time of loss and gradients for ``pyrovae.IWAE`` (pathwise and doubly
reparameterized), for the same bound by K passes of one particle each, and for ``pyro.infer.RenyiELBO(alpha=0,
vectorize_particles=True)``, measured in turn; validation of distributions is off for all. "compiled" is the pathwise
objective as ``pyrovae.SVI`` and ``pyrovae.fit`` run it once it is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import torch
from pyro.infer import RenyiELBO
from torch import Tensor

import pyrovae
from benchmarks import timing
from pyrovae.guides import AmortizedNormal
from pyrovae.models import VAE
from pyrovae.training.graph import compile_function
from pyrovae.training.programs import local_params


def measure(particles: int, batch: int, repeats: int) -> dict[str, float]:
    """Median seconds of each contender, interleaved.

    Args:
        particles: number K of particles.
        batch: data points a minibatch.
        repeats: timings of each contender.
    """
    torch.manual_seed(0)
    model = VAE(data_shape=(28, 28), latent_dim=50, hidden=(200, 200))
    guide = AmortizedNormal(model)
    x = torch.bernoulli(torch.full((batch, 28, 28), 0.13))
    renyi = RenyiELBO(alpha=0.0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)

    def ours(gradient: str) -> Callable[[], object]:
        objective = pyrovae.IWAE(particles, gradient)
        return lambda: objective.differentiable_loss(model, guide, x).backward()

    def loop() -> None:
        one = [pyrovae.log_weights(model, guide, x, max_plate_nesting=1).log_w for _ in range(particles)]
        (-(torch.cat(one).logsumexp(0) - math.log(particles)).sum()).backward()

    def compiled() -> Callable[[], object]:
        objective = pyrovae.IWAE(particles)
        objective.structure(model, guide, x)  # a validated run, which is not to be part of the graph
        parameters = [*model.parameters(), *guide.parameters()]

        def function(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            loss = objective.differentiable_loss(model, guide, x)
            return [loss.detach()], list(torch.autograd.grad(loss, parameters))

        graph = compile_function(function, [x], [])
        return lambda: graph(x)

    contenders = {
        "IWAE, pathwise": ours("pathwise"),
        "IWAE, dreg": ours("dreg"),
        "loop over particles": loop,
        "Pyro's RenyiELBO": lambda: renyi.loss_and_grads(model, guide, x),
    }
    with local_params(model, guide):
        timing.medians(contenders, repeats=1)  # with validation, as the first step of a fit
        contenders["IWAE, compiled"] = compiled()
        with pyro.validation_enabled(False):
            return timing.medians(contenders, repeats, warmup=2)


def main() -> None:
    """Prints the table."""
    parser = timing.parser(__doc__, repeats=30)
    parser.add_argument("--particles", type=int, default=50, help="number K of particles (default 50)")
    parser.add_argument("--batch", type=int, default=20, help="data points a minibatch (default 20)")
    options = parser.parse_args()
    found = measure(options.particles, options.batch, options.repeats)
    timing.show(f"loss and gradients, K = {options.particles}, batch {options.batch}", found, options)


if __name__ == "__main__":
    main()
