"""Calling the command line, and comparisons that its tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from pyrovae.cli import app

SMALL = ("--hidden", "16", "--epochs", "2", "--quiet")


def call(*arguments: object) -> Any:
    """Runs a command line; an exception that is no exit is raised here, with its traceback."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*arguments: object) -> str:
    """What a command that succeeds prints; nothing else goes to stderr."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def answer(*arguments: object) -> Any:
    """The JSON document that a command prints."""
    return json.loads(succeed(*arguments, "--json"))


def complaint(*arguments: object) -> str:
    """The one line of a command that fails on a user's mistake; the same with ``--json``."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("pyrovae: error: ")
    assert result.stderr.count("\n") == 1
    line = result.stderr.removeprefix("pyrovae: error: ").rstrip("\n")
    as_json = call(*arguments, "--json")
    assert as_json.exit_code == 2
    assert json.loads(as_json.stdout) == {"error": line}
    assert as_json.stderr == result.stderr
    return line


def trained(folder: Path, *arguments: object) -> Path:
    """A small run on the digits."""
    succeed("train", "--data", "digits", "--run-dir", folder, *SMALL, *arguments)
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    """The run's history without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in ("seconds", "steps_per_second")}
        for line in lines
    ]
