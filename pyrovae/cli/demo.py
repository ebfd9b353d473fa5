"""``pyrovae demo``: from nothing to a page of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyrovae.cli.measure import as_metrics, as_rows, measure
from pyrovae.cli.shared import Json, Quiet, emit, on_terminal, table
from pyrovae.cli.task import model_for
from pyrovae.cli.train import as_rows as training_rows
from pyrovae.cli.train import summary

if TYPE_CHECKING:
    from pyrovae.datasets import Splits
    from pyrovae.training import Run

__all__ = ["demo"]

_PARTICLES = 2000


def demo(
    run_dir: Annotated[Path, typer.Option(help="Folder of the demo's run; a finished one is used again.")] = Path(
        "runs/demo"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 1,197 training digits.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Of initial weights, shuffling and sampling.")] = 0,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train a VAE with two latent dimensions on real digits, evaluate it, and write a report with pictures.

    It takes about a minute on two processor cores; a second call finds the
    finished run and only evaluates it. All figures are in nats per data point.

    Examples:

    pyrovae demo

    pyrovae demo --run-dir runs/quick --epochs 30
    """
    from pyrovae import datasets, plots

    digits = datasets.load("digits", binarization="dynamic")
    run = _trained(digits, run_dir, epochs, seed, progress=not quiet)
    found = measure(run, digits.test, particles=_PARTICLES, seed=seed, progress=on_terminal() and not quiet)
    page = plots.report(run, digits.test, run_dir / "report.html", metrics=as_metrics(found, "test"))
    trained = summary(run)
    lines = table([*training_rows(trained), *as_rows(found, "test"), ("report", str(page))])
    emit({"training": trained, "test": found, "report": page}, lines, json)


def _trained(digits: Splits, run_dir: Path, epochs: int, seed: int, progress: bool) -> Run:
    """The demo's run: a new one, or that in the folder, continued where it is not finished."""
    import torch

    import pyrovae
    from pyrovae.errors import RunError
    from pyrovae.guides import AmortizedNormal

    torch.manual_seed(seed)
    model = model_for(digits, "VAE", latent_dim=2, hidden=(256, 256), activation="relu")
    try:
        return pyrovae.fit(
            model,
            AmortizedNormal(model),
            digits.train,
            objective=pyrovae.ELBO(gradient="stl"),
            validation=digits.validation,
            epochs=epochs,
            batch_size=100,
            lr=3e-3,
            schedule="cosine",
            seed=seed,
            run_dir=run_dir,
            resume=True,
            checkpoint_every=20,
            progress=progress,
        )
    except RunError as error:
        raise RunError(
            f"{run_dir} cannot be used for the demo: delete the folder, or choose another with --run-dir ({error})"
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"demo interrupted; it continues from {run_dir} when it is called again") from None
