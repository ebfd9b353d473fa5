"""The workloads as Pyro models and guides, for Pyro's own SVI and for pyrovae."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import infer
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyrovae
from benchmarks.speed_peers.hand_written import bnn_mean, flat_initial
from benchmarks.speed_peers.torch_data import load_initial
from benchmarks.speed_peers.workloads import NOISE, SCALE, Workload, bnn_layers
from pyrovae.guides import AmortizedNormal
from pyrovae.models import VAE

__all__ = ["our_objective", "programs", "pyro_loss"]

Program = Callable[..., Any]


def programs(workload: Workload, device: torch.device) -> tuple[Program, Program]:
    """Model and guide at the initial parameters."""
    if workload.kind == "schools":
        with device:
            values = {"mu": torch.zeros(()), "tau": torch.ones(()), "theta": torch.zeros(8)}
        guide = AutoMultivariateNormal(_schools, init_loc_fn=init_to_value(values=values)).to(device)
        return _schools, guide
    if workload.kind == "bnn":
        return _bnn, _MeanField(flat_initial(workload)).to(device)
    network = {"network": "conv", "channels": workload.channels} if workload.channels else {}
    model = VAE(workload.data_shape, workload.latent, workload.hidden, activation=workload.activation, **network)
    guide = AmortizedNormal(model)
    load_initial(workload, guide.encoder, model.decoder)
    return model.to(device), guide.to(device)


def pyro_loss(workload: Workload) -> infer.ELBO:
    """Pyro's loss; of IWAE, which has a plain gradient alone there, ``RenyiELBO(alpha=0)``."""
    many: dict[str, Any] = {"num_particles": workload.particles, "vectorize_particles": workload.particles > 1}
    many["max_plate_nesting"] = 1  # the data plate
    return infer.RenyiELBO(alpha=0.0, **many) if workload.iwae else infer.Trace_ELBO(**many)


def our_objective(workload: Workload) -> pyrovae.Objective:
    """The same bound and gradient by pyrovae."""
    if workload.iwae:
        return pyrovae.IWAE(workload.particles, gradient="dreg" if workload.dreg else "pathwise")
    return pyrovae.ELBO(workload.particles, gradient="pathwise")


def _bnn(x: Tensor, y: Tensor) -> None:
    """Regression by 20 layers of 50 units, whose weights are one site."""
    size = sum((inputs + 1) * outputs for inputs, outputs in bnn_layers())
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), x.new_ones(())).expand([size]).to_event(1))
    mean = bnn_mean(w.reshape(-1, size), x)  # particles are on the left of w
    with pyro.plate("data", len(x), device=x.device):
        pyro.sample("y", dist.Normal(mean.reshape(*w.shape[:-2], len(x)), x.new_full((), NOISE)), obs=y)


class _MeanField(PyroModule):
    """Independent normal distributions of all weights."""

    def __init__(self, loc: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc)
        self.log_scale = nn.Parameter(torch.full_like(loc, math.log(SCALE)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return pyro.sample("w", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))


def _schools(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, non-centred."""
    five = y.new_full((), 5.0)
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), five))
    tau = pyro.sample("tau", dist.HalfCauchy(five))
    with pyro.plate("schools", len(y), device=y.device):
        theta = pyro.sample("theta", dist.Normal(y.new_zeros(()), y.new_ones(())))
        pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)
