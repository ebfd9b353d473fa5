"""Every bad argument is refused before the first step, in words that name it and what is allowed."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from fit_helpers import (
    LocalNormal,
    Regression,
    Rows,
    after_steps,
    binary,
    fit,
    no_latents,
    regression_data,
    vae,
)
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import pyrovae
from pyrovae.errors import ArgumentError, DataError, ModelGuideError


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(binary())


class Empty(Rows):
    def __init__(self) -> None:
        super().__init__(torch.zeros(0, 4))


def with_value(value: float, row: int) -> Tensor:
    x = binary()
    x[row, 2] = value
    return x


DATA: dict[str, tuple[Any, type[Exception], str]] = {
    "empty tensor": (torch.zeros(0, 4), DataError, "data is empty; give at least one data point"),
    "empty dataset": (Empty(), DataError, "data is empty"),
    "empty loader": (DataLoader(Empty(), 4), DataError, "data is empty"),
    "empty tuple": ((), ArgumentError, "data is a tuple; it must be a tensor"),
    "scalar": (torch.tensor(1.0), DataError, "a batch has the data points along its first dimension"),
    "NaN": (with_value(float("nan"), 17), DataError, "NaN or infinite values .the first in row 17"),
    "infinity": (with_value(float("inf"), 3), DataError, "NaN or infinite values .the first in row 3"),
    "numpy": (np.zeros((24, 4)), ArgumentError, r"data is a ndarray.*torch\.as_tensor"),
    "list of numbers": ([1.0, 2.0], ArgumentError, "data is a list; it must be a tensor"),
    "None": (None, ArgumentError, "data is a NoneType"),
    "lengths": ((binary(24), binary(23)), DataError, r"different lengths \[24, 23\]"),
    "stream": (DataLoader(Stream(), 4), ArgumentError, "iterable data set without a length"),
    "shape": (torch.zeros(24, 5), DataError, r"x has shape \(8, 5\); this \w+ \w+ .*\*\(4,\)"),
    "shape of a loader": (DataLoader(torch.zeros(24, 5), 8), DataError, r"x has shape \(8, 5\)"),
    "no whole minibatch": (DataLoader(binary(3), 8, drop_last=True), DataError, "data gives no minibatch"),
}


@pytest.mark.parametrize("kind", DATA)
def test_bad_data_are_refused(kind: str, tmp_path: Path) -> None:
    data, error, said = DATA[kind]
    size = None if isinstance(data, DataLoader) else 8
    with pytest.raises(error, match=said):
        fit(*vae(), data, batch_size=size, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [kind for kind in DATA if kind != "None"])
def test_bad_validation_data_are_refused_before_the_first_step(kind: str) -> None:
    data, error, said = DATA[kind]
    steps: list[int] = []
    with after_steps(1, lambda: steps.append(1)), pytest.raises(error, match=re.sub("^data", "validation", said)):
        fit(*vae(), binary(), validation=data)
    assert not steps


def test_training_tensor_and_validation_loader_go_together() -> None:
    """``batch_size`` is then that of the tensor, and the other way round there is none to give."""
    x = binary(16, 2)
    objective = pyrovae.ELBO(kl="analytic")
    loaded = fit(*vae(), binary(), validation=DataLoader(x, 8), objective=objective)
    plain = fit(*vae(), binary(), validation=x, objective=objective)
    assert [row["bound"] for row in loaded.history] == [row["bound"] for row in plain.history]
    # A loader draws a number of its own, so the draws of z differ: 16 of deviation 0.5, say.
    for ours, theirs in zip(loaded.history, plain.history, strict=True):
        assert ours["validation_bound"] == pytest.approx(theirs["validation_bound"], abs=0.5)
    fit(*vae(), DataLoader(binary(), 8), batch_size=None, validation=x)


def test_first_row_that_is_not_finite_is_named_in_a_vector_too() -> None:
    x, y = regression_data()
    y[5] = float("nan")
    with pytest.raises(DataError, match="first in row 5"):
        fit(Regression(), no_latents, (x, y))


OUTSIDE: dict[str, tuple[Tensor, str]] = {
    "bernoulli": (with_value(0.5, 20), "data holds 0.5, outside the support.*likelihood='continuous-bernoulli'"),
    "continuous-bernoulli": (with_value(1.5, 20), r"data holds 1.5, outside the support.*Scale the data to \[0, 1\]"),
    "categorical-256": (with_value(0.7001, 20), r"data holds 0.7001, outside the support.*\(x \* 255\)\.round\(\)"),
    "normal": (with_value(float("nan"), 20), "data holds NaN or infinite values .the first in row 20"),
}


@pytest.mark.parametrize("likelihood", OUTSIDE)
def test_data_outside_the_support_of_a_likelihood_are_refused(likelihood: str) -> None:
    x, said = OUTSIDE[likelihood]
    with pytest.raises(DataError, match=said):
        fit(*vae(likelihood=likelihood), x)
    with pytest.raises(DataError, match=said.replace("data holds", "validation holds")):
        fit(*vae(likelihood=likelihood), binary(), validation=x)
    fit(*vae(likelihood=likelihood), binary(), epochs=1)  # 0 and 1 lie in the support of each


@pytest.mark.parametrize("kind", ["loader", "dataset"])
def test_data_outside_the_support_are_found_in_loaders(kind: str) -> None:
    x = torch.full((24, 4), 0.5)
    data = DataLoader(x, 8) if kind == "loader" else Rows(x)
    with pytest.raises(DataError, match=r"data holds 0\.5, outside the support"):
        fit(*vae(), data, batch_size=None)


def test_grey_images_fit_a_bernoulli_when_they_are_drawn_and_not_as_they_are() -> None:
    grey = torch.full((24, 4), 0.5)
    fit(*vae(), pyrovae.datasets.Split(grey, None, "dynamic"), epochs=1)
    with pytest.raises(DataError, match="binarization='dynamic'"):
        fit(*vae(), pyrovae.datasets.Split(grey, None, "none"), epochs=1)


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"optimizer": "adamm"}, r"unknown optimizer 'adamm' \(did you mean 'adamw?'\?\); there are: adam, "),
    "optimizer object": ({"optimizer": 3}, "optimizer gave a int; it must be a name"),
    "optimizer factory": ({"optimizer": lambda p: None}, "optimizer gave a NoneType; it must be a name"),
    "schedule": ({"schedule": "cosin"}, r"unknown schedule 'cosin' \(did you mean 'cosine'\?\)"),
    "schedule factory": ({"schedule": lambda o: 3}, "schedule gave a int; it must be a name"),
    "precision": ({"precision": "fp16"}, "precision is 'fp16'; it must be 'float32' or 'bf16'"),
    "device": ({"device": "gpu"}, "device is 'gpu', which cannot be used here .*; use 'auto' or 'cpu'"),
    "compile": ({"compile": "inductor"}, "compile is 'inductor'; it must be 'auto', True or False"),
    "compile number": ({"compile": 1}, "compile is 1;"),
    "epochs 0": ({"epochs": 0}, "epochs is 0; it must be a whole number, at least 1"),
    "epochs float": ({"epochs": 2.0}, "epochs is 2.0; it must be a whole number"),
    "epochs bool": ({"epochs": True}, "epochs is True; it must be a whole number"),
    "checkpoint_every": ({"checkpoint_every": 0}, "checkpoint_every is 0; it must be a whole number, at least 1"),
    "lr negative": ({"lr": -1}, "lr is -1; it must be a finite number above 0"),
    "lr zero": ({"lr": 0.0}, "lr is 0.0; it must be a finite number above 0"),
    "lr NaN": ({"lr": float("nan")}, "lr is nan; it must be a finite number above 0"),
    "lr word": ({"lr": "1e-3"}, "lr is '1e-3'; it must be a finite number above 0"),
    "batch_size": ({"batch_size": 0}, "batch_size is 0; it must be a whole number, at least 1"),
    "batch_size float": ({"batch_size": 8.0}, "batch_size is 8.0; it must be a whole number"),
    "clip_norm": ({"clip_norm": 0.0}, "clip_norm is 0.0; it must be a finite number above 0, or None"),
    "early_stopping": ({"early_stopping": 3}, "early_stopping needs data to watch: pass validation=…"),
    "patience": ({"early_stopping": 0, "validation": binary()}, "early_stopping is 0; it must be a whole number"),
    "seed": ({"seed": -1}, "seed is -1; it must be a whole number, at least 0"),
    "objective": ({"objective": "elbo"}, r"objective is a str; it must be an objective such as pyrovae\.ELBO\(\)"),
    "resume": ({"resume": True}, "resume=True needs run_dir, the folder of the run to continue"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_argument_is_refused_by_name(name: str) -> None:
    settings, said = ARGUMENTS[name]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model, guide = vae()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=said):
        fit(model, guide, binary(), **settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())


def test_batch_size_with_a_loader_is_refused() -> None:
    with pytest.raises(ArgumentError, match="batch_size=8 was given with a DataLoader, which has its own"):
        fit(*vae(), DataLoader(binary(), 8), batch_size=8)


def test_large_seed_is_a_seed() -> None:
    """time.time_ns() is what people use."""
    run = fit(*vae(), binary(), seed=1_763_000_000_123_456_789)
    assert run.history[0]["bound"] != fit(*vae(), binary(), seed=1).history[0]["bound"]


def test_model_without_parameters_is_refused() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(ArgumentError, match=r"no parameters to learn: use nn\.Parameter, PyroParam or pyro\.param"):
        fit(LocalNormal(), guide, torch.randn(24))


def test_guide_without_a_latent_site_is_refused() -> None:
    with pytest.raises(ModelGuideError, match="the guide lacks the model's latent site 'z'"):
        fit(LocalNormal(), no_latents, torch.randn(24))


class Idle(PyroModule):
    """A guide with two parameters that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.1))
        self.forgotten = nn.Parameter(torch.tensor(3.0))
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, 1.0))


@pytest.mark.parametrize("objective", [pyrovae.ELBO(), pyro.infer.Trace_ELBO()], ids=lambda o: type(o).__name__)
def test_parameters_without_a_gradient_are_named_once(objective: Any) -> None:
    guide = Idle()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(LocalNormal(), guide, torch.randn(24), objective=objective, epochs=3)
    assert len(caught) == 1
    said = str(caught[0].message)
    assert f"get no gradient from {type(objective).__name__} and will not be learned" in said
    assert said.endswith(": guide.forgotten, guide.layer.weight, guide.layer.bias")
    assert caught[0].filename.endswith("fit_helpers.py"), "it points at the call of fit"
    assert float(guide.forgotten.detach()) == 3.0


def test_data_with_labels_for_a_model_without_are_explained() -> None:
    data = (torch.bernoulli(torch.full((6, 4), 0.5)), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ArgumentError, match=r"the model cannot be called with a minibatch of 2 tensors"):
        fit(*vae(), data)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.ones(6, 4, dtype=torch.uint8), r"torch\.uint8.*data\.float\(\) / 255"),
        (torch.ones(6, 4, dtype=torch.float64), r"torch\.float64.*torch\.float32; convert"),
    ],
)
def test_data_of_another_type_than_the_model_are_explained(x: torch.Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        fit(*vae(), x)


def test_a_single_callback_must_come_in_a_list() -> None:
    with pytest.raises(ArgumentError, match="callbacks is .*must be a list"):
        fit(*vae(), torch.ones(6, 4), callbacks=print)
