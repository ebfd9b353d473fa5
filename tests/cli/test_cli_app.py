"""The command line as a whole: help, version, lists, exit codes, and the installed entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points, version
from typing import Any

import pytest
from cli_helpers import answer, call, complaint, succeed
from typer.testing import CliRunner

import pyrovae
from pyrovae.cli import app
from pyrovae.cli.group import _in_options
from pyrovae.registry import GUIDES, MODELS, OBJECTIVES

COMMANDS = ("train", "evaluate", "sample", "report", "list", "demo")
OPTIONS = (
    "data", "binarization", "guide", "option", "guide-option", "latent-dim", "hidden", "activation", "likelihood",
    "prior", "network",
    "objective", "particles", "gradient", "kl", "beta", "warmup", "free-bits", "epochs", "batch-size", "lr",
    "optimizer", "schedule", "clip-norm", "early-stopping", "precision", "device", "seed", "run-dir", "resume", "quiet",
    "json",
)  # fmt: skip


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "from pyrovae.cli import app; app()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_gives_examples(command: str) -> None:
    text = succeed(command, "--help")
    assert "Examples:" in text
    assert text.count(f"pyrovae {command}") >= 2


@pytest.mark.parametrize("command", ["train", "evaluate", "report", "demo"])
def test_help_names_the_unit(command: str) -> None:
    assert "nats per data point" in " ".join(succeed(command, "--help").split())


def test_help_of_train_describes_every_option() -> None:
    result = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for option in OPTIONS:
        assert f" --{option} " in result.stdout, option
    for unit in ("nats per data point", "gradient steps", "[default: (runs/<data>-<model>-seed<seed>)]"):
        assert unit in result.stdout


def test_no_arguments_are_a_call_for_help() -> None:
    text = succeed()
    assert text == succeed("--help")
    assert all(f" {command} " in text for command in COMMANDS)


def test_version() -> None:
    assert succeed("--version") == f"pyrovae {version('pyrovae')}\n"


def test_list_names_all_that_is_registered() -> None:
    found = answer("list")
    assert list(found) == ["models", "guides", "objectives", "datasets"]
    assert list(found["models"]) == list(MODELS)
    assert list(found["guides"]) == list(GUIDES)
    assert list(found["objectives"]) == list(OBJECTIVES)
    assert found["datasets"] == {name: pyrovae.datasets.describe(name) for name in pyrovae.datasets.names()}
    assert all(line.strip() and "\n" not in line for names in found.values() for line in names.values())
    text = succeed("list")
    assert all(name in text and line in text for names in found.values() for name, line in names.items())


def test_list_one_kind() -> None:
    assert list(answer("list", "guides")) == ["guides"]
    assert "digits" not in succeed("list", "guides")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing",), "nothing"),
        (("list", "pictures"), "models"),
        (("train",), "--data"),
        (("train", "--data", "digits", "--wings", "2"), "--wings"),
        (("evaluate",), "RUN_DIR"),
        (("evaluate", "x", "--particles", "many"), "--particles"),
    ],
)
def test_usage_errors_are_one_line(arguments: tuple[str, ...], said: str) -> None:
    line = complaint(*arguments)
    assert said in line
    assert "(see pyrovae " in line
    assert line.endswith("--help)")


def test_advice_speaks_of_options() -> None:
    assert _in_options("pass resume=True, or gradient='stl' with particles=8") == (
        "pass --resume, or --gradient stl with --particles 8"
    )
    assert _in_options("load with binarization='dynamic'.") == "load with --binarization dynamic."
    assert _in_options("resume=False, lr=1, spread_which='best'") == "resume=False, lr=1, spread_which='best'"


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pyrovae.datasets, "names", broken)
    with pytest.raises(ZeroDivisionError):
        call("list")


def test_ctrl_c_ends_any_command_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pyrovae.datasets, "names", interrupted)
    result = call("list", "--json")
    assert (result.exit_code, result.stderr) == (130, "pyrovae: error: interrupted\n")
    assert json.loads(result.stdout) == {"error": "interrupted"}


def test_entry_point_is_the_app() -> None:
    (script,) = [point for point in entry_points(group="console_scripts") if point.name == "pyrovae"]
    assert script.load() is app


@pytest.mark.slow
def test_process_prints_and_exits_as_the_runner_says() -> None:
    done = run_process("evaluate", "no/such/folder", "--json")
    assert done.returncode == 2
    assert list(json.loads(done.stdout)) == ["error"]
    assert done.stderr.startswith("pyrovae: error: no/such/folder does not exist")
    assert done.stderr.count("\n") == 1
