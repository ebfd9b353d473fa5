"""One gradient step of a Bayesian network by four means, interleaved: ``python -m benchmarks.bnn_speed``.

Pyro with a site for each parameter (``AutoNormal``, ``Trace_ELBO``, whose particles are a loop, since such sites cannot
be vectorized), mean-field on one flat site by pyrovae (eager and compiled), and the same written by hand in PyTorch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

import pyrovae
from benchmarks import timing
from pyrovae.guides import MeanField
from pyrovae.models import BNN

ROWS, NOISE, RATE, STEPS = 100, 0.5, 1e-3, 20
SIZES: dict[str, tuple[list[int], int]] = {
    "13-50-1, 1 particle": ([13, 50, 1], 1),
    "13-50-1, 10 particles": ([13, 50, 1], 10),
    "10-(20 x 50)-1, 10 particles": ([10, *[50] * 20, 1], 10),
}


def by_pyro(widths: Sequence[int], particles: int, x: Tensor, y: Tensor) -> Callable[[], object]:
    """Priors for each parameter, as Pyro's tutorial on Bayesian regression has them."""
    net = _mlp(widths)
    to_pyro_module_(net)
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(0.0, 1.0).expand(parameter.shape).to_event(parameter.dim())
            setattr(module, name, PyroSample(prior))

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, NOISE), obs=y)

    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": RATE}), Trace_ELBO(num_particles=particles))

    return lambda: [svi.step(x, y) for _ in range(STEPS)]


def by_pyrovae(widths: Sequence[int], particles: int, x: Tensor, y: Tensor, compiled: bool) -> Callable[[], object]:
    """One flat site; the same pathwise estimator."""
    model = BNN(_mlp(widths), likelihood={"name": "normal", "scale": NOISE})
    loss = pyrovae.ELBO(particles, gradient="pathwise")
    optimizer = pyro.optim.Adam({"lr": RATE})
    if compiled:
        svi = pyrovae.SVI(model, MeanField(model), optimizer, loss)
        return lambda: svi.steps(STEPS, x, y)
    plain = SVI(model, MeanField(model), optimizer, loss)

    return lambda: [plain.step(x, y) for _ in range(STEPS)]


def by_hand(widths: Sequence[int], particles: int, x: Tensor, y: Tensor) -> Callable[[], object]:
    """Mean-field in PyTorch: batched products over the particles, one fused Adam."""
    shapes = [shape for a, b in itertools.pairwise(widths) for shape in ((b, a), (b,))]
    start = nn.utils.parameters_to_vector(_mlp(widths).parameters()).detach()
    loc, raw = start.clone().requires_grad_(), torch.full_like(start, -2.25).requires_grad_()
    optimizer = torch.optim.Adam([loc, raw], lr=RATE, fused=True)
    sizes = [torch.Size(shape).numel() for shape in shapes]

    def step() -> Tensor:
        scale = nn.functional.softplus(raw)
        w = loc + scale * torch.randn(particles, len(start))
        parts = [part.view(particles, *shape) for part, shape in zip(w.split(sizes, -1), shapes, strict=True)]
        h = x.expand(particles, *x.shape)
        for layer in range(0, len(parts), 2):
            h = torch.baddbmm(parts[layer + 1].unsqueeze(1), h, parts[layer].mT)
            h = h.relu() if layer < len(parts) - 2 else h.squeeze(-1)
        log_likelihood = dist.Normal(h, NOISE).log_prob(y).sum(-1)
        prior, guide = dist.Normal(0.0, 1.0).log_prob(w).sum(-1), dist.Normal(loc, scale).log_prob(w).sum(-1)
        loss = -(log_likelihood + prior - guide).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return lambda: [step() for _ in range(STEPS)]


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def main() -> None:
    options = timing.parser(__doc__, repeats=15).parse_args()
    torch.manual_seed(0)
    found: dict[str, float] = {}
    path, options.json = options.json, None
    for title, (widths, particles) in SIZES.items():
        pyro.clear_param_store()
        x = torch.randn(ROWS, widths[0])
        arguments = (widths, particles, x, torch.sin(x[:, 0]))
        contenders = {
            "pyrovae, compiled": by_pyrovae(*arguments, compiled=True),
            "pyrovae, eager": by_pyrovae(*arguments, compiled=False),
            "PyTorch by hand": by_hand(*arguments),
            "Pyro, site by site": by_pyro(*arguments),
        }
        medians = {name: seconds / STEPS for name, seconds in timing.medians(contenders, options.repeats, 3).items()}
        timing.show(title, medians, options)
        found |= {f"{title}: {name}": seconds for name, seconds in medians.items()}
    if path:
        options.json = path
        timing.show("all", found, options)


if __name__ == "__main__":
    main()
