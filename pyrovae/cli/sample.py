"""``pyrovae sample``: data points that a model generates."""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrovae.cli.shared import EvaluationSeed, Json, RunFolder, WhichOption, emit, open_run

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["sample"]


def sample(
    run_dir: RunFolder,
    count: Annotated[int, typer.Option(min=1, help="Number of data points to generate.")] = 64,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write: .png for a picture of the data points' means, .npy for a NumPy array"
            " (count x data shape, float32) of data points drawn from the likelihood.",
            show_default="RUN_DIR/samples.png",
        ),
    ] = None,
    mean: Annotated[
        bool, typer.Option("--mean", help="Write means of the likelihood to the .npy file too, as a picture shows.")
    ] = False,
    seed: EvaluationSeed = 0,
    which: WhichOption = None,
    json: Json = False,
) -> None:
    """Generate data points: latents from the prior, then data from the likelihood.

    A picture shows the mean of each data point (a row each class, where the model
    takes labels); an array holds draws (pixels 0 or 1 under a Bernoulli
    likelihood), or, with --mean, the means. The same seed gives the same latents
    for both.

    Examples:

    pyrovae sample runs/digits-VAE-seed0

    pyrovae sample runs/digits-VAE-seed0 --count 1000 --output draws.npy --seed 1
    """
    from pyrovae.errors import ArgumentError
    from pyrovae.training.checkpoint import write_atomically

    output = run_dir / "samples.png" if output is None else output
    if output.suffix.lower() not in (".png", ".npy"):
        raise ArgumentError(f"--output is {str(output)!r}; its name must end in .png (a picture) or .npy (an array)")
    run = open_run(run_dir, which)
    if output.suffix.lower() == ".png":
        mean, content = True, _picture(run.model, count, seed)
    else:
        content = _npy(_draws(run.model, count, seed, mean))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, content)
    kind = "means" if mean else "draws"
    document = {"run_dir": run_dir, "output": output, "count": count, "kind": kind, "seed": seed}
    emit(document, [f"{count:,} {kind} in {output}"], json)


def _picture(model: Any, count: int, seed: int) -> bytes:
    """A PNG file with a grid of the means of ``count`` data points."""
    from matplotlib.figure import Figure

    from pyrovae import plots

    figure = Figure(figsize=(6.0, 6.0), layout="constrained")
    if hasattr(model, "classes"):
        plots.class_grid(model, max(count // model.classes, 1), figure.subplots(), seed=seed)
    else:
        plots.samples(model, count, figure.subplots(), seed=seed)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, facecolor="white", bbox_inches="tight")
    return buffer.getvalue()


def _draws(model: Any, count: int, seed: int, mean: bool) -> NDArray[Any]:
    """Draws from the model, or their means: an array `count x *data_shape`."""
    import torch

    from pyrovae.errors import ArgumentError
    from pyrovae.evaluation.likelihood import evaluating

    latent = hasattr(model, "prior") and hasattr(model, "decode") and not hasattr(model, "classes")
    if not latent and (mean or "size" not in inspect.signature(model.forward).parameters):
        raise ArgumentError(
            f"model {type(model).__name__} has no prior() and decode(z) to sample from"
            + (" means; leave --mean out" if mean else "; it generates from its inputs, in Python")
        )
    with evaluating(model, seed=seed):
        if not latent:
            drawn: NDArray[Any] = model(size=count).cpu().numpy()
            return drawn
        latents = model.prior().sample((count,))
        likelihoods = map(model.decode, latents.split(1000))
        return torch.cat([p.mean if mean else p.sample() for p in likelihoods]).numpy()


def _npy(array: NDArray[Any]) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
