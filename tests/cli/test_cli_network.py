"""``pyrovae train BNN`` and ``pyrovae evaluate`` of what it made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import answer, complaint, succeed

import pyrovae


@pytest.fixture
def table(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 80))
    y = 1 + 2 * a - b + 0.1 * generator.normal(size=80)
    rows = [f"{a[n]:.6f},{b[n]:.6f},{y[n]:.6f}" for n in range(80)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["a,b,y", *rows]))
    return path


def test_a_table_is_fitted_and_scored(table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = answer("train", "BNN", "--data", table, "--epochs", 300, "--lr", 0.02, "--quiet", "--run-dir", folder)
    assert said["columns"] == "y on a, b, normal"
    found = answer("evaluate", folder)
    assert found == answer("evaluate", folder, "--data", table)
    assert found["rmse"] < 1.0 < np.std(np.loadtxt(table, delimiter=",", skiprows=1)[:, 2])
    assert found["points"] == 80
    assert "RMSE" in succeed("evaluate", folder)
    assert "has no latent space to sample" in complaint("sample", folder)
    assert "which has no latent space to sample" in complaint("report", folder)
    other = tmp_path / "other.csv"
    other.write_text("a,b,c,y\n" + "\n".join("1,2,3,4" for _ in range(5)))
    assert "standardised to inputs of 2 columns" in complaint("evaluate", folder, "--data", other)


def test_columns_are_what_they_were_in_training(table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    roles = ("--response", "a", "--inputs", "b,y")
    answer("train", "BNN", "--data", table, *roles, "--epochs", 2, "--quiet", "--run-dir", folder)
    assert "a on b, y, normal" in succeed("evaluate", folder)
    swapped = tmp_path / "swapped.csv"
    swapped.write_text("y,a,b\n1,2,3\n4,5,6\n")
    assert answer("evaluate", folder, "--data", swapped)["data"].endswith("a on b, y, normal")
    without = tmp_path / "without.csv"
    without.write_text("b,y\n1,2\n3,4\n")
    assert "'a'" in complaint("evaluate", folder, "--data", without)


def test_a_run_of_tensors_does_not_name_its_data(tmp_path: Path) -> None:
    model = pyrovae.models.BNN([2, 3, 1], num_data=20)
    data = torch.randn(20, 2), torch.randn(20)
    pyrovae.fit(model, pyrovae.guides.MeanField(model), data, epochs=1, run_dir=tmp_path / "run", progress=False)
    assert "does not name its data" in complaint("evaluate", tmp_path / "run")


def test_images_are_classified(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    network = ("--option", "net=[64,20,10]", "--epochs", 4, "--lr", 0.01, "--quiet", "--run-dir", folder)
    answer("train", "BNN", "--data", "digits", *network)
    found = answer("evaluate", folder)
    assert found["data"] == "digits, test split"
    assert found["error"] < 0.6  # of ten classes
    assert found["points"] == 300
    assert "has no labels to score predictions by" in complaint("evaluate", folder, "--data", "frey-faces")


def test_uci_is_split_as_published(tmp_path: Path) -> None:
    from pyrovae import datasets
    from pyrovae.errors import DataUnavailableError

    try:
        datasets.uci("yacht")
    except DataUnavailableError as error:
        pytest.skip(str(error))
    folder = tmp_path / "run"
    answer("train", "BNN", "--data", "uci/yacht", "--epochs", 5, "--quiet", "--run-dir", folder)
    assert answer("evaluate", folder)["points"] == 31
    assert answer("evaluate", folder, "--split", "train")["points"] == 277
    assert "give train or test" in complaint("evaluate", folder, "--split", "validation")
