"""What several commands have in common: options, the run and its data, and the two kinds of output."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from pyrovae.datasets import Splits
    from pyrovae.training import Run

__all__ = [
    "Compile",
    "Device",
    "EvaluationSeed",
    "Json",
    "Quiet",
    "RunFolder",
    "Which",
    "WhichOption",
    "data_of",
    "emit",
    "on_terminal",
    "open_run",
    "table",
]


class Compile(str, Enum):
    """Whether to compile."""

    auto = "auto"
    yes = "yes"
    no = "no"

    @property
    def argument(self) -> Literal["auto", True, False]:
        """The same as Python functions take it."""
        return "auto" if self is Compile.auto else self is Compile.yes


class Which(str, Enum):
    """Parameters that a run folder may hold."""

    best = "best"
    last = "last"


RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, as pyrovae train or pyrovae.fit wrote it.")
]
WhichOption = Annotated[
    Which | None,
    typer.Option(
        help="Parameters to use: those of the epoch with the best validation bound (kept by --early-stopping),"
        " or the last ones.",
        show_default="best where they were kept, else last",
    ),
]
EvaluationSeed = Annotated[int, typer.Option(min=0, help="Seed of the random draws; same seed, same numbers.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto (the GPU where there is one), cpu, cuda, cuda:1, …")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bar (there is none without a terminal).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text; its keys name the units.")]


def open_run(folder: Path, which: Which | None = None, device: str = "cpu") -> Run:
    """The run in a folder, on a device.

    Args:
        folder: a run folder.
        which: parameters to load; ``None`` for the best where they were kept.
        device: as a user names it.

    Raises:
        RunError: the folder is missing or holds no run.
        CorruptFileError: a file of the run is truncated or altered.
        ArgumentError: the device is unknown or not there.
    """
    import pyrovae
    from pyrovae.cli.network import is_network
    from pyrovae.errors import RunError

    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise RunError(f"{folder} {problem}; give the folder of a run, as pyrovae train printed it")
    if is_network(folder):
        raise RunError(
            f"{folder} is a run of a BNN, which has no latent space to sample or draw; score its predictions with"
            f" pyrovae evaluate {folder}"
        )
    return pyrovae.load(folder, which=None if which is None else which.value, device=device)


def data_of(run: Run, name: str | None = None, binarization: str | None = None) -> Splits:
    """The data set that a run was trained on, or another one.

    Args:
        run: the run.
        name: of the data set; ``None`` for the run's own.
        binarization: of the data; ``None`` for the run's own.

    Raises:
        ArgumentError: the run does not name its data, or is of a table, or there is no such data set.
    """
    from pyrovae import datasets
    from pyrovae.errors import ArgumentError

    said = run.config.get("data") or {}
    if name is None and "response" in said:
        raise ArgumentError(
            f"the run in {run.folder} is of the table {said['name']}, which has no splits; pyrovae train has printed"
            " its posterior, and pyrovae.evaluation.posterior_summary does so for a run that is loaded"
        )
    name = name or said.get("name")
    if not name:
        allowed = ", ".join(datasets.names())
        raise ArgumentError(f"the run in {run.folder} does not name its data set; give it with --data: {allowed}")
    return datasets.load(name, binarization=binarization or said.get("binarization"))


def on_terminal() -> bool:
    """Whether somebody is there to look at a progress bar."""
    return sys.stderr.isatty()


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Names and values in two columns, one line each.

    Example:
        >>> table([("KL", "6.1 nats"), ("active units", "2 of 2")])
        ['KL            6.1 nats', 'active units  2 of 2']
    """
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {value}" for name, value in rows]


def emit(document: dict[str, Any], lines: Iterable[str], as_json: bool) -> None:
    """Prints a command's result: one JSON document, or lines of text.

    Args:
        document: the result by name with unit; paths become strings, numbers that are not finite ``null``.
        lines: the same for a reader.
        as_json: which of them.
    """
    typer.echo(json.dumps(_plain(document), indent=2, ensure_ascii=False) if as_json else "\n".join(lines))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
