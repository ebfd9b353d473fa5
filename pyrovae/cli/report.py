"""``pyrovae report``: a run on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyrovae.cli.measure import as_metrics, measure
from pyrovae.cli.shared import (
    Device,
    EvaluationSeed,
    Json,
    RunFolder,
    WhichOption,
    data_of,
    emit,
    on_terminal,
    open_run,
)

__all__ = ["report"]


def report(
    run_dir: RunFolder,
    output: Annotated[Path | None, typer.Option(help="HTML file to write.", show_default="RUN_DIR/report.html")] = None,
    particles: Annotated[
        int, typer.Option(min=1, help="Importance samples for each data point, for the log-likelihood in nats.")
    ] = 500,
    seed: EvaluationSeed = 0,
    which: WhichOption = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Write one HTML page about a run: test log-likelihood, curves, pictures, configuration.

    The page needs no other file and no network. The data are the test split of
    the data set that the run was trained on; numbers are in nats per data point.

    Examples:

    pyrovae report runs/digits-VAE-seed0

    pyrovae report runs/digits-VAE-seed0 --particles 5000 --output digits.html
    """
    from pyrovae import plots

    run = open_run(run_dir, which, device)
    test = data_of(run).test
    found = measure(run, test, particles=particles, seed=seed, progress=on_terminal())
    path = plots.report(run, test, output or run_dir / "report.html", metrics=as_metrics(found, "test"))
    emit({"run_dir": run_dir, "report": path, "split": "test", **found}, [str(path)], json)
