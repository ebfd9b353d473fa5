"""Plain PyTorch, no Pyro: modules, losses and a training loop as one writes them for one's own model."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed_peers.torch_data import batches, networks, synchronize
from benchmarks.speed_peers.workloads import EIGHT_SCHOOLS, NOISE, SCALE, Workload, bnn_layers, initial

__all__ = ["HandWritten"]

_LOG_2PI = math.log(2.0 * math.pi)


# CUDA graphs on a GPU; on a CPU torch's own random numbers, as Inductor's are up to three times slower there.
_FASTEST = {"cuda": {"mode": "reduce-overhead"}, "cpu": {"options": {"fallback_random": True}}}


class HandWritten:
    """A PyTorch module under Adam, eager or with ``torch.compile``.

    Args:
        workload: what to fit.
        device: where.
        compile: compile the loss, and so its backward pass (with CUDA graphs on a GPU).
    """

    def __init__(self, workload: Workload, device: torch.device, compile: bool) -> None:
        torch.manual_seed(0)
        self.workload, self.device = workload, device
        self.module = _MODULES[workload.kind](workload).to(device)
        self.batches = batches(workload, device)
        self.loss_of = torch.compile(self.module, fullgraph=True, **_FASTEST[device.type]) if compile else self.module
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=workload.lr, fused=True)
        self.update = self.optimizer.step
        self.compile = compile

    def run(self, steps: int) -> float:
        """Seconds that a number of steps takes."""
        synchronize(self.device)
        start = time.perf_counter()
        for step in range(steps):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss_of(*self.batches[step % len(self.batches)]).backward()
            self.update()
        synchronize(self.device)
        return time.perf_counter() - start

    def tune(self) -> None:
        """Takes the compiled update in place of the fused one where it is quicker."""
        if not self.compile:
            return
        fused = self.optimizer, self.update
        optimizer = torch.optim.Adam(self.module.parameters(), lr=self.workload.lr)
        compiled = optimizer, torch.compile(optimizer.step)
        quickest = {}
        for turn in range(4):
            for pair in (fused, compiled):
                self.optimizer, self.update = pair
                seconds = self.run(10)
                if turn:  # the first one compiles
                    quickest[pair] = min(seconds, quickest.get(pair, math.inf))
        self.optimizer, self.update = min(quickest, key=quickest.__getitem__)

    @torch.no_grad()
    def loss(self) -> float:
        """The negative bound in nats per data point."""
        values = [self.module.bound(*self.batches[i % len(self.batches)]) for i in range(self.workload.evaluations)]
        return -float(torch.stack(values).mean()) / self.workload.batch


class _VAE(nn.Module):
    """ELBO or IWAE of a VAE with Bernoulli likelihood."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.encoder, self.decoder = networks(workload)
        self.particles, self.iwae, self.dreg = workload.particles, workload.iwae, workload.dreg

    def forward(self, x: Tensor) -> Tensor:
        log_w, z = self.log_weights(x)
        if self.dreg:  # Tucker et al. 2019: the decoder's gradient has weights w̃, the encoder's w̃²
            normalised = log_w.detach().softmax(0)
            z.register_hook(lambda gradient: normalised.unsqueeze(-1) * gradient)
            return -(normalised * log_w).sum()
        return -self._bound(log_w)

    def bound(self, x: Tensor) -> Tensor:
        return self._bound(self.log_weights(x)[0])

    def _bound(self, log_w: Tensor) -> Tensor:
        return (log_w.logsumexp(0) - math.log(self.particles)).sum() if self.iwae else log_w.sum() / self.particles

    def log_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        log_scale = log_scale.clamp(-10.0, 10.0)
        scale = log_scale.exp()
        z = loc + scale * torch.randn(self.particles, *loc.shape, device=x.device)
        if self.dreg:
            loc, log_scale, scale = loc.detach(), log_scale.detach(), scale.detach()
        log_q = -(0.5 * ((z - loc) / scale).square() + log_scale).sum(-1)
        log_p = -0.5 * z.square().sum(-1)  # the terms log 2π cancel
        logits = self.decoder(z.flatten(0, 1)).view(self.particles, len(x), -1)
        target = x.flatten(1).expand_as(logits)
        log_likelihood = -F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
        return log_likelihood + log_p - log_q, z


class _BNN(nn.Module):
    """ELBO of a Bayesian network with a mean-field guide; all weights are one vector."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.particles = workload.particles
        self.loc = nn.Parameter(flat_initial(workload))
        self.log_scale = nn.Parameter(torch.full_like(self.loc, math.log(SCALE)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.bound(x, y)

    def bound(self, x: Tensor, y: Tensor) -> Tensor:
        noise = torch.randn(self.particles, len(self.loc), device=x.device)
        w = self.loc + self.log_scale.exp() * noise
        log_q = -0.5 * noise.square().sum() - self.particles * self.log_scale.sum()
        log_p = -0.5 * w.square().sum()
        error = (y - bnn_mean(w, x)) / NOISE
        log_likelihood = -0.5 * error.square().sum() - error.numel() * (math.log(NOISE) + 0.5 * _LOG_2PI)
        return (log_likelihood + log_p - log_q) / self.particles


def flat_initial(workload: Workload) -> Tensor:
    """Initial means of the Bayesian network's weights as one vector: each layer's matrix, then its bias."""
    return torch.cat([torch.from_numpy(part).flatten() for layer in initial(workload)["network"] for part in layer])


def bnn_mean(w: Tensor, x: Tensor) -> Tensor:
    """Output of the Bayesian network, `particles x n`, for weights `particles x weights` and inputs `n x features`."""
    layers = bnn_layers()
    parts = w.split([size for inputs, outputs in layers for size in (inputs * outputs, outputs)], dim=1)
    h = x.expand(len(w), *x.shape)
    for index, (inputs, outputs) in enumerate(layers):
        matrix, bias = parts[2 * index].view(-1, inputs, outputs), parts[2 * index + 1].unsqueeze(1)
        h = torch.baddbmm(bias, h if index == 0 else h.tanh(), matrix, alpha=1.0 / math.sqrt(inputs))
    return h.squeeze(-1)


class _Schools(nn.Module):
    """ELBO of the non-centred eight schools with a full-rank Gaussian guide of (mu, log tau, theta)."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        size = 2 + len(EIGHT_SCHOOLS[0])
        self.loc = nn.Parameter(torch.zeros(size))
        self.raw_scale = nn.Parameter(torch.full((size,), math.log(math.expm1(0.1))))
        self.raw_tril = nn.Parameter(torch.zeros(size, size))

    def forward(self, y: Tensor, sigma: Tensor) -> Tensor:
        return -self.bound(y, sigma)

    def bound(self, y: Tensor, sigma: Tensor) -> Tensor:
        noise = torch.randn_like(self.loc)
        scale = F.softplus(self.raw_scale)
        z = self.loc + scale * (noise + self.raw_tril.tril(-1) @ noise)
        log_q = -0.5 * noise.square().sum() - scale.log().sum() - 0.5 * len(noise) * _LOG_2PI
        mu, log_tau, theta = z[0], z[1], z[2:]
        tau = log_tau.exp()
        log_p = _normal(mu / 5.0) - math.log(5.0) + _normal(theta).sum()
        log_p = log_p + math.log(2.0 / (5.0 * math.pi)) - torch.log1p((tau / 5.0).square()) + log_tau
        log_likelihood = (_normal((y - mu - tau * theta) / sigma) - sigma.log()).sum()
        return log_likelihood + log_p - log_q


def _normal(standardised: Tensor) -> Tensor:
    return -0.5 * (standardised.square() + _LOG_2PI)


_MODULES = {"vae": _VAE, "bnn": _BNN, "schools": _Schools}
