"""Small models, data and comparisons that the tests of ``pyrovae.training`` share."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import Dataset

import pyrovae
from pyrovae.guides import AmortizedNormal
from pyrovae.models import VAE

TIMINGS = ("seconds", "steps_per_second")
POINTS, BATCH = 24, 8  # three gradient steps an epoch


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def binary(points: int = POINTS, seed: int = 1) -> Tensor:
    """Data points of four pixels with unequal means."""
    return torch.bernoulli(torch.tensor([0.9, 0.7, 0.3, 0.1]).expand(points, 4), generator=seeded(seed))


def vae(seed: int = 0, **arguments: Any) -> tuple[VAE, AmortizedNormal]:
    """Model and guide for data points of four elements, initialized from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VAE(**{"data_shape": (4,), "latent_dim": 2, "hidden": (8,), **arguments})
        return model, AmortizedNormal(model)


def fit(model: Any, guide: Any, data: Any, **settings: Any) -> pyrovae.Run:
    """``pyrovae.fit`` with the defaults of these tests: batches of 8, silent, a rate that moves the parameters."""
    defaults = {"batch_size": BATCH, "epochs": 2, "lr": 1e-2, "progress": False}
    return pyrovae.fit(model, guide, data, **(defaults | settings))


class Rows(Dataset):
    """A map-style data set without a tensor to look at."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        return self.x[i]


class NormedGuide(PyroModule):
    """An encoder with batch normalization, so that the guide has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        loc, log_scale = self.net(x).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class LocalNormal(PyroModule):
    """z_n ~ N(0, 1), x_n ~ N(z_n, 1): the evidence of a data point is N(x_n; 0, 2)."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class LinearGuide(PyroModule):
    """q(z | x) = N(a x, s); the posterior of :class:`LocalNormal` is a = 1/2, s² = 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.1))
        self.scale = PyroParam(torch.tensor(1.0), constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, self.scale))


def local_evidence(x: Tensor) -> float:
    """Exact log evidence of :class:`LocalNormal`, per data point."""
    return float(dist.Normal(0.0, 2.0**0.5).log_prob(x).mean())


class Regression(PyroModule):
    """p(y | x) = N(y; w·x + b, s), without latents: maximum likelihood is least squares."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.bias = nn.Parameter(torch.zeros(()))
        self.scale = PyroParam(torch.tensor(1.0), constraints.positive)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ self.weight + self.bias, self.scale), obs=y)


def no_latents(*_: Any) -> None:
    """The guide of a model that has no latents."""


def regression_data(points: int = POINTS) -> tuple[Tensor, Tensor]:
    x = torch.randn(points, 2, generator=seeded(3))
    return x, x @ torch.tensor([1.0, -0.5]) + 0.3 + 0.5 * torch.randn(points, generator=seeded(4))


def parameters(run: pyrovae.Run) -> dict[str, Tensor]:
    """Copies of all parameters and buffers of a run's model and guide."""
    return {
        f"{prefix}.{name}": value.detach().clone()
        for prefix, program in (("model", run.model), ("guide", run.guide))
        if isinstance(program, nn.Module)
        for name, value in program.state_dict().items()
    }


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without what depends on the clock."""
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in history]


def training_state(folder: Path) -> dict[str, Any]:
    """What ``training.pt`` holds, without what depends on the clock."""
    state = torch.load(folder / "training.pt", weights_only=True)
    del state["seconds"]
    return state | {"history": untimed(state["history"])}


def assert_identical(ours: Any, theirs: Any, where: str = "") -> None:
    """Compares nested dictionaries, sequences, tensors and numbers bit for bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_identical(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_identical(a, b, f"{where}[{i}]")
    elif isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_same_run(ours: pyrovae.Run, theirs: pyrovae.Run) -> None:
    """Parameters, buffers, history and best epoch are the same numbers."""
    assert_identical(parameters(ours), parameters(theirs))
    assert_identical(untimed(ours.history), untimed(theirs.history))
    assert ours.best_epoch == theirs.best_epoch


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def after_steps(steps: int, do: Callable[[], Any]) -> Iterator[None]:
    """Calls ``do`` right after the optimizer's update number ``steps``."""
    done = 0

    def hook(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == steps:
            do()

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def signal_after(steps: int, number: int = signal.SIGINT) -> contextlib.AbstractContextManager[None]:
    """Sends this process a signal right after the optimizer's update number ``steps``."""
    return after_steps(steps, lambda: os.kill(os.getpid(), number))
