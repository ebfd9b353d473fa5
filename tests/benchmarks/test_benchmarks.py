"""The recipes and benchmarks run the package's own code; here on a tiny loader."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyrovae
from benchmarks import classics, log_likelihood, objectives
from benchmarks.reproduce.__main__ import main as reproduce_command
from benchmarks.reproduce.recipes import RECIPES, reproduce
from pyrovae.datasets import Split, Splits
from pyrovae.errors import ArgumentError

ROOT = Path(__file__).parents[2]


# Of recipes that differ in the data alone, one.
TWINS = ("residual-olivetti", "residual-fashion-mnist", "residual-cifar10-subset")
TRIED = [name for name in RECIPES if name not in TWINS]
QUICK = ("vae-1l-static", "sbn-vimco-static")
NAMES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in TRIED]


@pytest.fixture
def tiny():
    """Sixty statically binarized digits in the shape of MNIST."""
    x = torch.nn.functional.interpolate(
        pyrovae.datasets.load("digits", binarization="none").train.x[:60, None], (28, 28)
    )
    x = (x[:, 0] > 0.5).float()
    parts = [Split(part, None, "static", "tiny") for part in (x[:40], x[40:50], x[50:])]
    return Splits("tiny", *parts, (), "static")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_and_evaluates(name, tiny):
    result = reproduce(name, tiny, particles=20, epochs=3, progress=False)
    start = reproduce(name, tiny, particles=20, epochs=1, lr=1e-9, progress=False)
    assert result.bound > start.bound
    assert result.nll_error > 0
    assert 1 <= result.epoch <= 3


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_fixes_the_result_and_a_run_folder_continues_it(name, tiny, tmp_path):
    first = reproduce(name, tiny, particles=10, epochs=2, progress=False)
    again = reproduce(name, tiny, particles=10, epochs=2, progress=False, runs=tmp_path)
    reused = reproduce(name, tiny, particles=10, epochs=2, progress=False, runs=tmp_path)
    assert first.nll == again.nll == reused.nll


def test_an_unknown_recipe_is_named():
    with pytest.raises(ArgumentError, match="unknown recipe 'vae'.*vae-1l-static"):
        reproduce("vae")


@pytest.mark.slow
def test_the_command_line_names_the_recipes(monkeypatch, capsys):
    command = [sys.executable, "-m", "benchmarks.reproduce", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "vae-1l-static" in shown
    monkeypatch.setattr(sys, "argv", ["benchmarks.reproduce", "nope"])
    with pytest.raises(SystemExit, match="2"):
        reproduce_command()
    assert "unknown recipe 'nope'" in capsys.readouterr().err


def test_the_speed_benchmark_measures_what_it_names():
    medians = log_likelihood.measure(points=2, particles=4000, repeats=1)
    assert set(medians) == {"matrix products", "log_likelihood"}
    assert all(seconds > 0 for seconds in medians.values())


@pytest.mark.slow
def test_the_objectives_benchmark_measures_what_it_names():
    medians = objectives.measure(particles=3, batch=4, repeats=1)
    named = {"IWAE, pathwise", "IWAE, dreg", "loop over particles", "Pyro's RenyiELBO", "IWAE, compiled"}
    assert set(medians) == named
    assert all(seconds > 0 for seconds in medians.values())


def test_the_classics_agree_with_what_was_published():
    """To the digits that the sources print."""
    if not os.environ.get("PYROVAE_DATA"):
        pytest.skip("needs PYROVAE_DATA")
    for what, ours, published, _ in [*classics.mixture(), *classics.level(), *classics.sleep(), *classics.schools()]:
        if published is not None:
            assert ours == pytest.approx(published, rel=5e-4), what
