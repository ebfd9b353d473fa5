"""``pyrovae train`` of every model: of pictures, of pictures with labels, of tables and of series."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import answer, complaint, succeed

import pyrovae
from pyrovae.registry import MODELS
from pyrovae.tabular import SERIES, TABULAR, prepare

OF_PICTURES = sorted(set(MODELS) - set(TABULAR))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Sixty rows: a response, two inputs, two columns of zeros and ones, two groups."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 60))
    y = 1 + 2 * a - b + 0.1 * generator.normal(size=60)
    rows = [
        f"{a[n]:.6f},{b[n]:.6f},{n % 2},{(n // 2) % 2},{'uvwxz'[n % 5]},{y[n]:.6f},{0.5 + n % 3}" for n in range(60)
    ]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["a,b,left,right,who,y,error", *rows]))
    return path


COLUMNS: dict[str, dict[str, Any]] = {
    "BNN": {"response": "y", "inputs": ["a", "b"]},
    "BayesianLinearRegression": {"response": "y", "inputs": ["a", "b"]},
    "GaussianProcess": {"response": "y", "inputs": ["a", "b"]},
    "GaussianMixture": {"inputs": ["a", "b"]},
    "TwoBernoulli": {"inputs": ["left", "right"]},
    "HierarchicalNormal": {"response": "y", "groups": ["who"]},
    "LinearMixedModel": {"response": "y", "inputs": ["a"], "groups": ["who:b"]},
    "EightSchools": {"response": "y", "inputs": ["error"]},
    **{name: {"response": "y"} for name in SERIES},
}


def options(response: str | None = None, inputs: list[str] | None = None, groups: list[str] | None = None) -> list[str]:
    """The roles of columns on the command line."""
    given = [] if response is None else ["--response", response]
    given += [] if inputs is None else ["--inputs", ",".join(inputs)]
    return given + [part for group in groups or [] for part in ("--group", group)]


def test_every_model_of_tables_is_tried() -> None:
    assert COLUMNS.keys() == TABULAR.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TABULAR))
def test_a_table_is_fitted_and_the_run_loads(name: str, table: Path, tmp_path: Path) -> None:
    arguments = (
        name,
        "--data",
        table,
        *options(**COLUMNS[name]),
        "--epochs",
        2,
        "--quiet",
        "--run-dir",
        tmp_path / "run",
    )
    said = answer("train", *arguments)
    assert np.isfinite(said["bound_nats"])
    assert said["validation_bound_nats"] is None
    assert said["columns"]
    assert said["latents"] or said["parameters"] or said["left_out"]
    made = prepare(name, pyrovae.datasets.table(table), **COLUMNS[name])
    run = pyrovae.load(tmp_path / "run", example=made.data)
    assert type(run.model) is type(made.model)
    assert said["columns"] == made.used


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_PICTURES)
def test_every_other_model_is_fitted_to_pictures(name: str, tmp_path: Path) -> None:
    small = ["--option", "steps=2"] if name == "DRAW" else []
    said = answer("train", name, "--data", "digits", "--epochs", 1, "--quiet", "--run-dir", tmp_path / "run", *small)
    assert np.isfinite(said["validation_bound_nats"])


def test_columns_mean_what_they_say(table: Path, tmp_path: Path) -> None:
    """y = 1 + 2 a − b + noise of 0.1; the last weight is the intercept. The standard errors are 0.1 / √60 = 0.013."""
    said = answer(
        "train", "BayesianLinearRegression", "--data", table, "--response", "y", "--inputs", "a,b", "--epochs", 200,
        "--lr", 0.02, "--quiet", "--compile", "no", "--run-dir", tmp_path / "run",
    )  # fmt: skip
    means = {row["name"]: row["mean"] for row in said["latents"]}
    assert [means[f"weights[{place}]"] for place in range(3)] == pytest.approx([2.0, -1.0, 1.0], abs=0.06)
    text = succeed(
        "train", "GaussianMixture", "--data", table, "--inputs", "a,b", "--epochs", 1, "--quiet", "--run-dir",
        tmp_path / "other",
    )  # fmt: skip
    assert "a, b; of the guide:" in text
    assert "means[1, 1]" in text


def test_a_table_has_no_splits_to_evaluate(table: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed("train", "DeepKalmanFilter", "--data", table, "--inputs", "a,b", "--epochs", 1, "--quiet", "--run-dir", run)
    assert "is of the table" in complaint("evaluate", run)


def test_an_array_is_a_table_and_a_batch_of_series(tmp_path: Path) -> None:
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(30, 2)))
    path = tmp_path / "points.npy"
    said = answer("train", "GaussianMixture", "--data", path, "--epochs", 1, "--quiet", "--run-dir", tmp_path / "a")
    assert said["columns"] == "x1, x2"
    np.save(tmp_path / "series.npy", np.random.default_rng(0).normal(size=(30, 7, 2)))
    path = tmp_path / "series.npy"
    said = answer("train", "DeepKalmanFilter", "--data", path, "--epochs", 1, "--quiet", "--run-dir", tmp_path / "b")
    assert np.isfinite(said["validation_bound_nats"])
    assert pyrovae.load(tmp_path / "b").model.features == 2


def test_labels_reach_the_model(tmp_path: Path) -> None:
    """Of a conditional model the likelihood is given the label; of a semi-supervised one the guide guesses it."""
    run = tmp_path / "conditional"
    small = ("--data", "digits", "--hidden", "16", "--epochs", 2, "--quiet")
    succeed("train", "ConditionalVAE", *small, "--run-dir", run)
    digits = pyrovae.datasets.load("digits")
    loaded = pyrovae.load(run)
    found = answer("evaluate", run, "--particles", 5, "--compile", "no")
    expected = pyrovae.evaluation.log_likelihood(loaded.model, loaded.guide, digits.test.labelled(), 5, compile=False)
    assert found["log_likelihood_nats"] == pytest.approx(expected.mean, abs=1e-5)
    assert found["accuracy"] is None
    picture = succeed("sample", run, "--output", tmp_path / "all.png")
    assert "means" in picture
    succeed("sample", run, "--output", tmp_path / "draws.npy", "--count", 5)
    assert np.load(tmp_path / "draws.npy").shape == (5, 8, 8)
    succeed("report", run, "--particles", 5)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Each row a class" in page or "each row a class" in page

    run = tmp_path / "partly"
    succeed("train", "SemiSupervisedVAE", *small, "--labels", 20, "--run-dir", run)
    assert json.loads((run / "config.json").read_text())["data"]["labels"] == 20
    found = answer("evaluate", run, "--particles", 5, "--compile", "no")
    assert 0.0 <= found["accuracy"] <= 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("LinearMixedModel", "--data", "TABLE"), "groups is empty"),
        (("LinearMixedModel", "--data", "TABLE", "--group", "nobody"), "unknown column.*'nobody'.*who"),
        (("HierarchicalNormal", "--data", "TABLE", "--response", "who", "--group", "who"), "'who'.* is text"),
        (("GaussianProcess", "--data", "TABLE", "--batch-size", 5), "all rows of a table at once"),
        (("GaussianProcess", "--data", "digits"), "is of a table: give one of .*nile"),
        (("GaussianProcess", "--data", "nowhere.csv"), "nowhere.csv cannot be read"),
        (("GaussianProcess", "--data", "TABLE", "--binarization", "none"), "is of a table; leave it out"),
        (("GaussianProcess", "--data", "TABLE", "--option", "steps=3"), "has no --option steps"),
        (("TwoBernoulli", "--data", "TABLE", "--inputs", "a,b"), "other numbers than 0 and 1"),
        (("TwoBernoulli", "--data", "TABLE", "--inputs", "a"), "two columns of zeros and ones"),
        (("VAE", "--data", "digits", "--response", "y"), "--response is for tables"),
        (("VAE", "--data", "digits", "--labels", 10), "VAE has no labels that may be missing"),
        (("SemiSupervisedVAE", "--data", "digits", "--labels", 5000), "count is 5000, but there are 1197 labels"),
        (("ConditionalVAE", "--data", "POINTS"), "has no labels"),
        (("EightSchools", "--data", "TABLE", "--response", "y"), "this model takes one: the standard errors"),
        (("DeepKalmanFilter", "--data", "digits"), "is of a table"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: tuple[Any, ...], said: str, table: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "points.npy", np.zeros((20, 2)))
    places = {"TABLE": table, "POINTS": tmp_path / "points.npy"}
    given = [places.get(part, part) for part in arguments]
    line = complaint("train", *given, "--epochs", 1, "--quiet", "--run-dir", tmp_path / "run")
    assert re.search(said, line), line
    assert not (tmp_path / "run").exists()
