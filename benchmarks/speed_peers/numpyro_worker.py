"""NumPyro's SVI in an interpreter of its own: one command a line on standard input, one answer a line.

    run jit|scan WORKLOAD STEPS    seconds that the steps took, measured around blocking execution
    loss jit|scan WORKLOAD         negative bound in nats per data point
    versions                       versions as JSON

What needs compiling is compiled before the clock starts. Needs numpyro; imports neither torch nor pyro.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.infer.initialization import init_to_value

from benchmarks.speed_peers.workloads import (
    NOISE,
    SCALE,
    WORKLOADS,
    Workload,
    bnn_layers,
    initial,
    minibatches,
)

Program = Callable[..., Any]


class NumPyroSVI:
    """``numpyro.infer.SVI``, one jitted update at a time or many in a ``lax.scan``.

    Args:
        workload: what to fit.
        scan: whether one call runs all updates.
    """

    def __init__(self, workload: Workload, scan: bool) -> None:
        self.workload, self.scan = workload, scan
        batches = [tuple(map(jnp.asarray, batch)) for batch in minibatches(workload)]
        self.batches = batches
        self.stacked = tuple(jnp.stack(parts) for parts in zip(*batches, strict=True))
        model, guide = _PROGRAMS[workload.kind](workload)
        many = {"num_particles": workload.particles}
        loss = RenyiELBO(alpha=0.0, **many) if workload.iwae else Trace_ELBO(**many)
        self.svi = SVI(model, guide, numpyro.optim.Adam(workload.lr), loss)
        self.state = self.svi.init(jax.random.PRNGKey(0), *batches[0])
        self.update = jax.jit(self.svi.update)
        self.scans: dict[int, Callable[..., Any]] = {}  # compiled, by number of steps
        jax.block_until_ready(self.update(self.state, *batches[0]))  # compiles

    def _updates(self, state: Any, stacked: tuple[jax.Array, ...], steps: int) -> tuple[Any, jax.Array]:
        def body(state: Any, step: jax.Array) -> tuple[Any, jax.Array]:
            return self.svi.update(state, *(part[step % len(part)] for part in stacked))

        return lax.scan(body, state, jnp.arange(steps))

    def _run(self, steps: int) -> Any:
        state = self.state
        if self.scan:
            return self.scans[steps](state, self.stacked)[0]
        for step in range(steps):
            state, _ = self.update(state, *self.batches[step % len(self.batches)])
        return state

    def run(self, steps: int) -> float:
        """Seconds that a number of steps takes."""
        if self.scan and steps not in self.scans:
            updates = jax.jit(functools.partial(self._updates, steps=steps))
            self.scans[steps] = updates.lower(self.state, self.stacked).compile()
        start = time.perf_counter()
        self.state = jax.block_until_ready(self._run(steps))
        return time.perf_counter() - start

    def loss(self) -> float:
        """The negative bound in nats per data point."""
        count = self.workload.evaluations

        def one(step: jax.Array) -> jax.Array:
            state = self.state._replace(rng_key=jax.random.fold_in(jax.random.PRNGKey(1), step))
            return self.svi.evaluate(state, *(part[step % len(part)] for part in self.stacked))

        values = jax.jit(functools.partial(lax.map, one))(jnp.arange(count))
        return float(values.mean()) / self.workload.batch


# ---------------------------------------------------------------------------------------------------------
# Models and guides


def _vae(workload: Workload) -> tuple[Program, Program]:
    weights = initial(workload)
    activation = {"tanh": jnp.tanh, "relu": jax.nn.relu}[workload.activation]
    latent, event_dim = workload.latent, len(workload.data_shape)
    coarse = [side // 2 ** len(workload.channels) for side in workload.data_shape]

    def parameters(network: str) -> list[tuple[jax.Array, jax.Array]]:
        return [
            (numpyro.param(f"{network}.{i}.weight", weight), numpyro.param(f"{network}.{i}.bias", bias))
            for i, (weight, bias) in enumerate(weights[network])
        ]

    def encode(x: jax.Array) -> jax.Array:
        layers = parameters("encoder")
        h = x[..., None] if workload.channels else x.reshape(len(x), -1)
        for i, (weight, bias) in enumerate(layers):
            if weight.ndim == 2:
                h = h.reshape(len(x), -1)
            h = (h @ weight if weight.ndim == 2 else _convolution(h, weight, stride=2)) + bias
            h = activation(h) if i < len(layers) - 1 else h
        return h

    def decode(z: jax.Array) -> jax.Array:
        layers = parameters("decoder")
        h = z
        for i, (weight, bias) in enumerate(layers):
            if weight.ndim == 4:
                h = h.reshape(len(z), *coarse, -1) if h.ndim == 2 else h
                h = _convolution(h.repeat(2, axis=1).repeat(2, axis=2), weight, stride=1) + bias
            else:
                h = h @ weight + bias
            h = activation(h) if i < len(layers) - 1 else h
        return h.reshape(len(z), *workload.data_shape)

    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(event_dim), obs=x)

    def guide(x: jax.Array) -> None:
        loc, log_scale = jnp.split(encode(x), 2, axis=-1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(jnp.clip(log_scale, -10.0, 10.0))).to_event(1))

    return model, guide


def _convolution(h: jax.Array, weight: jax.Array, stride: int) -> jax.Array:
    """Of images with their channels last, which is the faster order for XLA."""
    padding = ((1, 1), (1, 1))
    return lax.conv_general_dilated(h, weight, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _bnn(workload: Workload) -> tuple[Program, Program]:
    start = jnp.concatenate([jnp.ravel(part) for layer in initial(workload)["network"] for part in layer])

    def mean(w: jax.Array, x: jax.Array) -> jax.Array:
        layers = bnn_layers()
        ends = list(itertools.accumulate(size for inputs, outputs in layers for size in (inputs * outputs, outputs)))
        parts, h = jnp.split(w, ends[:-1]), x
        for index, (inputs, outputs) in enumerate(layers):
            matrix, bias = parts[2 * index].reshape(inputs, outputs), parts[2 * index + 1]
            h = (h if index == 0 else jnp.tanh(h)) @ matrix / math.sqrt(inputs) + bias
        return h[:, 0]

    def model(x: jax.Array, y: jax.Array) -> None:
        w = numpyro.sample("w", dist.Normal(jnp.zeros(len(start)), 1.0).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(mean(w, x), NOISE), obs=y)

    def guide(x: jax.Array, y: jax.Array) -> None:
        loc = numpyro.param("loc", start)
        log_scale = numpyro.param("log_scale", jnp.full_like(start, math.log(SCALE)))
        numpyro.sample("w", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return model, guide


def _schools(workload: Workload) -> tuple[Program, Program]:
    def model(y: jax.Array, sigma: jax.Array) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", len(y)):
            theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)

    values = {"mu": jnp.zeros(()), "tau": jnp.ones(()), "theta": jnp.zeros(workload.batch)}
    return model, AutoMultivariateNormal(model, init_loc_fn=init_to_value(values=values))


_PROGRAMS = {"vae": _vae, "bnn": _bnn, "schools": _schools}


@functools.lru_cache(maxsize=2)  # the two competitors of one workload
def _competitor(kind: str, workload: str) -> NumPyroSVI:
    return NumPyroSVI(WORKLOADS[workload], scan=kind == "scan")


def answer(command: str, *words: str) -> str:
    """The answer to one command."""
    if command == "versions":
        device = jax.devices()[0].platform
        return json.dumps({"numpyro": numpyro.__version__, "jax": jax.__version__, "jax device": device})
    competitor = _competitor(*words[:2])
    return repr(competitor.run(int(words[2])) if command == "run" else competitor.loss())


def main() -> None:
    """Answers commands until standard input ends."""
    for line in sys.stdin:
        try:
            print(answer(*line.split()), flush=True)
        except Exception as error:  # said to the other side, which shows it in the table
            print(f"error {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)


if __name__ == "__main__":
    main()
