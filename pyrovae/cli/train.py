"""``pyrovae train``: from the name of a data set to a run folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrovae.cli.shared import Compile, Json, Quiet, emit, table
from pyrovae.cli.task import Columns, arguments_of, described, task_for, widths

if TYPE_CHECKING:
    from pyrovae.training import Run

__all__ = ["as_rows", "summary", "train"]
_DATA, _TABLE, _MODEL, _OBJECTIVE, _FIT, _RUN = "Data", "Tables", "Model and guide", "Objective", "Optimization", "Run"


def train(
    data: Annotated[
        str,
        typer.Option(
            rich_help_panel=_DATA,
            help="Data set: digits (embedded), mnist, …; see: pyrovae list datasets. Or your own: the path of a .npy,"
            " .npz, .csv or folder of images (table.csv?labels=species&seed=1). Models of tables take nile, sleepstudy,"
            " … or the path of a .csv with named columns.",
        ),
    ],
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="Generative model; see: pyrovae list models", show_default="VAE")
    ] = "VAE",
    binarization: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_DATA,
            help="How intensities become pixels: none (they stay intensities), static (drawn once), dynamic (drawn"
            " anew at every step).",
            show_default="the data set's own",
        ),
    ] = None,
    labels: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_DATA,
            help="Labels of the training split that SemiSupervisedVAE gets to see, as many of each class.",
            show_default="all",
        ),
    ] = None,
    response: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            rich_help_panel=_TABLE,
            help="What is explained, or the series.",
            show_default="the last column of numbers",
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMNS",
            rich_help_panel=_TABLE,
            help="What explains it, with commas between; of GaussianMixture, the data.",
            show_default="all other columns of numbers",
        ),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            rich_help_panel=_TABLE,
            help="Grouping column of LinearMixedModel, once for each, and of HierarchicalNormal: Subject, or"
            " Subject:Days where the coefficient of Days varies too.",
        ),
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MODEL,
            help="Approximate posterior; see: pyrovae list guides",
            show_default="the model's own",
        ),
    ] = None,
    latent_dim: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_MODEL,
            help="Number of latent dimensions; 2 can be drawn as a map.",
            show_default="2",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MODEL,
            help="Numbers of units of the latent layers of SigmoidBeliefNet and HierarchicalVAE, from the data upwards,"
            " with commas between.",
            show_default="200; 100,50",
        ),
    ] = None,
    hidden: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MODEL,
            help="Widths of the decoder's hidden layers from latent to data, with commas between; the encoder mirrors"
            " them.",
            show_default="200,200; none in SigmoidBeliefNet",
        ),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MODEL,
            help="Of the hidden layers: tanh, relu, gelu, silu, elu, leaky_relu, softplus, sigmoid.",
            show_default="tanh",
        ),
    ] = None,
    likelihood: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MODEL,
            help="p(x | z): bernoulli (pixels 0 or 1), continuous-bernoulli (in 0 … 1), normal or laplace (real"
            " numbers), categorical-256, discretized-logistic or discretized-logistic-mixture (8-bit levels).",
            show_default="bernoulli; continuous-bernoulli with --binarization none",
        ),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MODEL,
            help="p(z) of VAE: standard, N(0, I); learnable or full, a Gaussian whose mean and scales, or covariance,"
            " are learned; or a flow: coupling, maf, radial, spline.",
            show_default="standard",
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MODEL,
            help="mlp (fully connected) or conv (convolutions, for images).",
            show_default="mlp",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            rich_help_panel=_MODEL,
            help="Any other argument of the model, its value as in JSON: --option blocks=2 --option write_size=5.",
        ),
    ] = None,
    guide_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            rich_help_panel=_MODEL,
            help="Any argument of the guide: --guide-option flow=planar --guide-option depth=8.",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_OBJECTIVE,
            help="Bound to maximise; see: pyrovae list objectives",
            show_default="the model's own",
        ),
    ] = None,
    particles: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_OBJECTIVE,
            help="Posterior draws for each data point and step; more mean less noise, and more work.",
            show_default="1",
        ),
    ] = None,
    gradient: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_OBJECTIVE,
            help="Estimator: pathwise (reparameterization); stl (sticking the landing, ELBO, less noise near the"
            " optimum); dreg (doubly reparameterized, for several particles); score (REINFORCE); vimco; or auto, the"
            " best that is defined.",
            show_default="the objective's own",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(rich_help_panel=_OBJECTIVE, help="Order of Renyi: 0 is IWAE, 1 the ELBO.", show_default="none"),
    ] = None,
    order: Annotated[
        int | None,
        typer.Option(min=0, rich_help_panel=_OBJECTIVE, help="Order of the jackknife of JVI.", show_default="1"),
    ] = None,
    partitions: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=_OBJECTIVE, help="Intervals of TVO's integral.", show_default="5"),
    ] = None,
    wake: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_OBJECTIVE,
            help="Share of the wake phase in ReweightedWakeSleep, 0 (sleep alone) to 1.",
            show_default="1.0",
        ),
    ] = None,
    kl: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_OBJECTIVE,
            help="KL term: sampled, or analytic (closed form; not with --gradient stl).",
            show_default="sampled",
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_OBJECTIVE,
            help="Coefficient of the KL term, at least 0; 1 is the plain bound. Reported bounds are always plain.",
            show_default="1.0",
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            rich_help_panel=_OBJECTIVE,
            help="Let the KL's coefficient rise linearly from 0 to --beta over this number of gradient steps.",
            show_default="no warm-up",
        ),
    ] = None,
    free_bits: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_OBJECTIVE,
            help="Floor of the KL in nats per data point, below which it is not penalised.",
            show_default="0",
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=1, rich_help_panel=_FIT, help="Passes over the training data in all.")
    ] = 100,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=_FIT, help="Data points a gradient step.", show_default="100; of a table, all rows"
        ),
    ] = None,
    lr: Annotated[
        float, typer.Option(rich_help_panel=_FIT, help="Learning rate, for the loss in nats per data point.")
    ] = 1e-3,
    optimizer: Annotated[
        str, typer.Option(rich_help_panel=_FIT, help="adam, adamax, adamw, nadam, radam, rmsprop or sgd.")
    ] = "adam",
    schedule: Annotated[
        str,
        typer.Option(
            rich_help_panel=_FIT, help="Of the learning rate: constant; cosine or linear, down to 0 at the last step."
        ),
    ] = "constant",
    clip_norm: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_FIT,
            help="Largest norm of the gradient of the loss per data point; longer ones are shortened.",
            show_default="no clipping",
        ),
    ] = None,
    early_stopping: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="EPOCHS",
            rich_help_panel=_FIT,
            help="Stop after this number of epochs without a better validation bound, and keep the best parameters.",
            show_default="never",
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(rich_help_panel=_FIT, help="Of the networks: float32, or bf16 (faster on a recent GPU).")
    ] = "float32",
    device: Annotated[
        str,
        typer.Option(rich_help_panel=_FIT, help="auto (the GPU where there is one), cpu, cuda, cuda:1, …"),
    ] = "auto",
    compile: Annotated[
        Compile,
        typer.Option(
            rich_help_panel=_FIT,
            help="Run each gradient step as one compiled graph: the same numbers up to rounding, several times faster,"
            " after some 10 s of compiling. auto does so where the steps to come pay for it.",
        ),
    ] = Compile.auto,
    seed: Annotated[
        int,
        typer.Option(min=0, rich_help_panel=_RUN, help="Of initial weights, shuffling and sampling."),
    ] = 0,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_RUN,
            help="Folder for parameters, checkpoints, metrics and configuration.",
            show_default="runs/<data>-<model>-seed<seed>",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", rich_help_panel=_RUN, help="Continue the run in the folder, bit for bit; --epochs may be more."
        ),
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train a model on a data set and write a run folder; bounds are in nats per data point.

    Early stopping goes by the validation split; the test split is not touched
    (see: pyrovae evaluate). Ctrl-C writes a checkpoint; --resume continues it.

    Examples:

    pyrovae train --data digits

    pyrovae train --data digits --activation relu --gradient stl --epochs 300

    pyrovae train --data mnist --latent-dim 50 --objective IWAE --particles 5 --gradient dreg --early-stopping 20

    pyrovae train SigmoidBeliefNet --data digits --layers 200,100

    pyrovae train DRAW --data digits --option steps=8 --option write_size=3 --option read_size=3

    pyrovae train SemiSupervisedVAE --data mnist --latent-dim 20 --labels 100

    pyrovae train LinearMixedModel --data sleepstudy --response Reaction --group Subject:Days --epochs 3000
    """
    import torch

    import pyrovae
    from pyrovae import registry
    from pyrovae.errors import ArgumentError
    from pyrovae.modes import device_of

    beta_or_schedule = beta if warmup is None else pyrovae.LinearWarmup(warmup, end=1.0 if beta is None else beta)
    chosen = {"particles": particles, "gradient": gradient, "kl": kl, "beta": beta_or_schedule, "free_bits": free_bits}
    special = {"alpha": alpha, "order": order, "partitions": partitions, "wake": wake}
    kind = registry.MODELS[model]  # names are cheaper to check than data to load
    bound = registry.OBJECTIVES.build(_objective(kind, objective, **chosen, **special))
    posterior = kind.default_guide if guide is None else guide  # type: ignore[attr-defined]
    registry.GUIDES[posterior]
    torch.manual_seed(seed)
    flags = {
        "latent_dim": latent_dim,
        "layers": widths("layers", layers),
        "hidden": widths("hidden", hidden),
        "activation": activation,
        "likelihood": likelihood,
        "prior": prior,
        "network": network,
    }
    task = task_for(
        model,
        data,
        {**flags, **arguments_of("--option", option)},
        binarization=binarization,
        labels=labels,
        columns=Columns(response, inputs, tuple(group or ())),
        seed=seed,
    )
    if task.whole and batch_size is not None:
        raise ArgumentError(
            f"--batch-size is {batch_size}, but {model} takes all rows of a table at once; leave it out"
        )
    run = pyrovae.fit(
        task.model,
        registry.GUIDES.build(described(posterior, **arguments_of("--guide-option", guide_option)), task.model),
        task.train,
        objective=bound,
        validation=task.validation,
        epochs=epochs,
        batch_size=len(task.whole[0]) if task.whole else batch_size,
        lr=lr,
        optimizer=optimizer,
        schedule=schedule,
        clip_norm=clip_norm,
        early_stopping=early_stopping,
        precision=precision,  # type: ignore[arg-type]  # fit checks it
        device=device,
        compile=compile.argument,
        seed=seed,
        run_dir=run_dir or Path("runs") / f"{_stem(data)}-{model}-seed{seed}",
        resume=resume,
        progress=not quiet,
    )
    said = summary(run)
    lines = table(as_rows(said))
    if task.whole:
        data_on_device = [part.to(device_of(run.model, run.guide)) for part in task.whole]
        found = pyrovae.evaluation.posterior_summary(run.model, run.guide, *data_on_device)
        said |= {"columns": task.used, **asdict(found)}
        lines += ["", f"{task.used}; of the guide:", str(found)]
    emit(said, lines, json)


def summary(run: Run) -> dict[str, Any]:
    """The end of a fit by name with unit: the row of the epoch whose parameters the run holds."""
    epochs = len(run.history)
    row = run.history[(run.best_epoch or epochs) - 1]
    return {
        "run_dir": run.folder,
        "epochs": epochs,
        "best_epoch": run.best_epoch,
        "bound_nats": row["bound"],
        "validation_bound_nats": row.get("validation_bound"),
        "kl_nats": row.get("kl"),
    }


def as_rows(said: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary for a reader."""
    best = said["best_epoch"]
    kept = f" (parameters and bounds are those of epoch {best}, the best)" if best is not None else ""
    rows = [
        ("run folder", str(said["run_dir"])),
        ("epochs", f"{said['epochs']:,}{kept}"),
        ("training bound", f"{said['bound_nats']:.3f} nats per data point"),
    ]
    if said["validation_bound_nats"] is not None:
        rows.append(("validation bound", f"{said['validation_bound_nats']:.3f} nats per data point"))
    return rows


def _objective(model: type, name: str | None, **arguments: Any) -> dict[str, Any]:
    """The configuration of the objective: the model's own, where none is named, with the arguments that were given."""
    own = model.default_objective  # type: ignore[attr-defined]
    if name is not None:
        return described(name, **arguments)
    given = {key: value for key, value in arguments.items() if value is not None}
    return described(own["name"], **own["arguments"] | given)


def _stem(data: str) -> str:
    """What a folder is named after: the data set, or the file without what is asked of it."""
    return Path(data.partition("?")[0]).name if "/" in data else data.partition("?")[0]
