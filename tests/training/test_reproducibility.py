"""One seed, one set of numbers; and nobody else's random numbers are touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from fit_helpers import (
    BATCH,
    LinearGuide,
    LocalNormal,
    NormedGuide,
    Rows,
    assert_identical,
    assert_same_run,
    binary,
    fit,
    parameters,
    seeded,
    signal_after,
    untimed,
    vae,
)
from torch import nn
from torch.utils.data import DataLoader

import pyrovae
from pyrovae.datasets import Split

DATA: dict[str, Callable[[], dict[str, Any]]] = {
    "tensor": lambda: {"data": binary()},
    "dynamic split": lambda: {"data": Split(torch.rand(24, 4, generator=seeded(5)), None, "dynamic")},
    "dataset": lambda: {"data": Rows(binary())},
    "loader": lambda: {"data": DataLoader(binary(), BATCH, shuffle=True), "batch_size": None},
}


@pytest.mark.parametrize("kind", DATA)
def test_same_seed_same_numbers_and_another_seed_others(kind: str) -> None:
    torch.manual_seed(1)
    first = fit(*vae(), **DATA[kind](), seed=3)
    torch.manual_seed(2)
    assert_same_run(fit(*vae(), **DATA[kind](), seed=3), first)
    other = fit(*vae(), **DATA[kind](), seed=4)
    assert all(a["bound"] != b["bound"] for a, b in zip(first.history, other.history, strict=True))


def test_seed_shuffles_the_data_and_not_the_draws_alone() -> None:
    seen: list[list[torch.Tensor]] = [[], []]

    class Spy(torch.nn.Module):
        def __init__(self, program: Any, rows: list[torch.Tensor]) -> None:
            super().__init__()
            self.program, self.rows = program, rows

        def forward(self, x: torch.Tensor) -> Any:
            self.rows.append(x.flatten())
            return self.program(x)

    x = torch.linspace(-1.0, 1.0, 24)
    for seed, rows in enumerate(seen):
        fit(Spy(LocalNormal(), rows), LinearGuide(), x, seed=seed, epochs=2)
    orders = [torch.cat(rows[-6:]) for rows in seen]  # two epochs of three minibatches end the list
    for order in orders:
        assert torch.equal(order[:24].sort().values, x)
        assert torch.equal(order[24:].sort().values, x)
        assert not torch.equal(order[:24], order[24:])
    assert not torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("kind", DATA)
def test_callers_random_state_is_left_as_it_was(kind: str, tmp_path: Any) -> None:
    arguments = DATA[kind]()
    programs = vae()
    torch.manual_seed(11)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit(*programs, **arguments, validation=binary(16, 2), run_dir=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    fit(*programs, **arguments, validation=binary(16, 2), run_dir=tmp_path, epochs=3, resume=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


def test_callers_random_state_is_left_as_it_was_by_an_interrupted_fit() -> None:
    programs = vae()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with signal_after(4), pytest.raises(KeyboardInterrupt):
        fit(*programs, binary())
    assert torch.equal(torch.get_rng_state(), before)


def test_two_fits_in_one_process_agree() -> None:
    """Nothing leaks from one fit to the next through Pyro's parameter store or its settings."""
    pyro.clear_param_store()
    setting = pyro.settings.get("module_local_params")
    x = torch.randn(24, generator=seeded(0))
    first, constrained = fit(*vae(), binary()), fit(LocalNormal(), LinearGuide(), x)
    assert not list(pyro.get_param_store().keys())
    assert pyro.settings.get("module_local_params") is setting
    fit(*vae(seed=7), 1.0 - binary(), seed=5)
    fit(LocalNormal(), LinearGuide(), x + 1.0, seed=5)
    assert_same_run(fit(*vae(), binary()), first)
    assert_same_run(fit(LocalNormal(), LinearGuide(), x), constrained)


def test_one_objective_serves_two_fits_alike() -> None:
    """The warm-up of the second fit begins at its own first step."""
    objective = pyrovae.ELBO(beta=pyrovae.LinearWarmup(steps=100))
    first = fit(*vae(), binary(), objective=objective, epochs=3)
    assert_same_run(fit(*vae(), binary(), objective=objective, epochs=3), first)


def test_plain_functions_fit_again_alike_after_the_store_is_cleared() -> None:
    def model(x: torch.Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, 0.7))

    x = torch.randn(24, generator=seeded(0))
    histories, learned = [], []
    for _ in range(2):
        pyro.clear_param_store()
        histories.append(untimed(fit(model, guide, x).history))
        learned.append({name: pyro.param(name).detach().clone() for name in ("loc", "shift")})
    pyro.clear_param_store()
    assert_identical(histories[0], histories[1])
    assert_identical(learned[0], learned[1])
    assert float(learned[0]["shift"]) != 0.0


def test_checks_before_the_fit_leave_batch_norm_statistics_alone() -> None:
    """After one epoch of three steps the counter says three, and the averages are those of these minibatches."""
    torch.manual_seed(0)
    guide = NormedGuide()
    run = fit(vae()[0], guide, binary(), epochs=1, lr=1e-12, validation=binary(16, 2))
    norm = guide.net[1]
    assert int(norm.num_batches_tracked) == 3
    expected = torch.zeros(8)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for rows in order.split(8):
        expected = 0.9 * expected + 0.1 * guide.net[0](binary()[rows]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected.detach())
    assert parameters(run)["guide.net.1.running_mean"] is not None


def test_validation_keeps_the_mode_of_every_module() -> None:
    """A batch normalization that its owner froze (eval mode) stays frozen; the others go on training."""
    torch.manual_seed(0)
    guide = NormedGuide()
    guide.net.append(nn.BatchNorm1d(4))
    guide.net[1].eval()
    before = guide.net[1].running_mean.clone()
    fit(vae()[0], guide, binary(), epochs=2, validation=binary(16, 2))
    assert not guide.net[1].training
    assert guide.net[4].training
    assert torch.equal(guide.net[1].running_mean, before)
    assert int(guide.net[4].num_batches_tracked) == 6
