"""``pyrovae evaluate``: how good a run is on data that it did not see."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from pyrovae.cli.measure import as_rows, measure
from pyrovae.cli.network import is_network, network_scores
from pyrovae.cli.shared import (
    Compile,
    Device,
    EvaluationSeed,
    Json,
    RunFolder,
    WhichOption,
    data_of,
    emit,
    on_terminal,
    open_run,
    table,
)

__all__ = ["evaluate"]


class SplitName(str, Enum):
    """Parts of a data set."""

    test = "test"
    validation = "validation"
    train = "train"


def evaluate(
    run_dir: RunFolder,
    data: Annotated[
        str | None,
        typer.Option(help="Data set, see: pyrovae list datasets", show_default="the one the run was trained on"),
    ] = None,
    binarization: Annotated[
        str | None,
        typer.Option(
            help="How intensities become pixels: none, static (drawn once) or dynamic (training split drawn anew).",
            show_default="as for training",
        ),
    ] = None,
    split: Annotated[SplitName, typer.Option(help="Part of the data set to evaluate on.")] = SplitName.test,
    particles: Annotated[
        int, typer.Option(min=1, help="Importance samples for each data point; more give a tighter, slower estimate.")
    ] = 5000,
    which: WhichOption = None,
    seed: EvaluationSeed = 0,
    device: Device = "auto",
    compile: Annotated[
        Compile,
        typer.Option(
            help="Run the evaluation as one compiled graph: the same draws, several times faster, after some 10 s of"
            " compiling. auto does so for long evaluations.",
        ),
    ] = Compile.auto,
    json: Json = False,
) -> None:
    """Print a run's log-likelihood in nats per data point, and how its latent space is used.

    Of a Bayesian network (BNN): the scores of its predictions, with 200 posterior draws.

    The log-likelihood is importance-sampled with the guide as the proposal: in
    expectation a lower bound, which rises to the exact value with the number of
    particles. Trust it where the effective sample size is far above 1.

    Examples:

    pyrovae evaluate runs/digits-VAE-seed0

    pyrovae evaluate runs/mnist --split validation --particles 500 --json
    """
    if is_network(run_dir):
        kept = None if which is None else which.value
        scores, text = network_scores(run_dir, data, split.value, which=kept, seed=seed, device=device)
        emit({"run_dir": run_dir, "split": split.value, **scores}, [f"{run_dir}: BNN on {text}"], json)
        return
    run = open_run(run_dir, which, device)
    splits = data_of(run, data, binarization)
    chosen = getattr(splits, split.value)
    found = measure(run, chosen, particles=particles, seed=seed, compile=compile.argument, progress=on_terminal())
    document = {
        "run_dir": run_dir,
        "data": splits.name,
        "binarization": splits.binarization,
        "split": split.value,
        "best_epoch": run.best_epoch,
        **found,
    }
    head = f"{run_dir}: {type(run.model).__name__} on {splits.name}, {split.value} split of {len(chosen):,} data points"
    emit(document, [head, *table(as_rows(found, split.value))], json)
