"""``pyrovae demo``: trains once, is quick the second time, and says what is in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_helpers import answer, call, complaint, rows, succeed, trained

import pyrovae
from pyrovae.cli import demo


def test_demo_trains_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo._PARTICLES >= 1000
    monkeypatch.setattr(demo, "_PARTICLES", 50)  # which is quick
    text = succeed("demo", "--epochs", 2)
    folder = Path("runs/demo")
    assert str(folder / "report.html") in text
    assert (folder / "report.html").exists()
    history, before = rows(folder), (folder / "metrics.jsonl").read_bytes()
    assert history[-1]["bound"] > history[0]["bound"]

    found = answer("demo", "--epochs", 2)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert found["training"]["validation_bound_nats"] == history[-1]["validation_bound"]
    test = found["test"]
    assert f"{test['log_likelihood_nats']:.3f} nats per data point" in text
    assert test["particles"] == 50
    run, digits = pyrovae.load(folder), pyrovae.datasets.load("digits")
    direct = pyrovae.evaluation.log_likelihood(run.model, run.guide, digits.test, test["particles"])
    assert test["log_likelihood_nats"] == direct.mean

    assert answer("demo", "--epochs", 3)["training"]["epochs"] == 3
    assert rows(folder)[:2] == history


def test_demo_does_not_touch_another_run(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "--epochs", "1")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    line = complaint("demo", "--run-dir", folder)
    assert line.startswith(f"{folder} cannot be used for the demo: delete the folder, or choose another with --run-dir")
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_ctrl_c_in_the_demo_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("fit interrupted")

    monkeypatch.setattr(pyrovae, "fit", interrupted)
    result = call("demo", "--run-dir", tmp_path)
    assert result.exit_code == 130
    assert result.stderr == (
        f"pyrovae: error: demo interrupted; it continues from {tmp_path} when it is called again\n"
    )


def test_demo_refuses() -> None:
    assert "--epochs" in complaint("demo", "--epochs", 0)
    assert "--seed" in complaint("demo", "--seed", -1)
