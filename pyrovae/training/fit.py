"""``pyrovae.fit``: from model, guide, data and objective to a run."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.elbo import ELBO as PyroELBO
from torch.utils.data import DataLoader

from pyrovae.devices import resolve_device
from pyrovae.errors import ArgumentError, DataError, ModelGuideError, RunError, require_count, require_positive
from pyrovae.objectives import ELBO, Objective
from pyrovae.registry import configuration
from pyrovae.structure import Program, check, check_enumerated, data_size, shared_latents
from pyrovae.training import checkpoint
from pyrovae.training.compiled import CompiledStep, check_compile
from pyrovae.training.data import Batches, Data, batches
from pyrovae.training.loop import Loop
from pyrovae.training.optimizers import OptimizerSpec, ScheduleSpec, make_optimizer, make_schedule
from pyrovae.training.programs import local_params, named_parameters, state_of, untouched
from pyrovae.training.run import Run
from pyrovae.training.step import EagerStep

__all__ = ["fit"]

# A continued run may train longer, on another machine, with other shows of progress; all else must be as it was.
_MAY_DIFFER = ("epochs", "device", "versions")


def fit(
    model: Program,
    guide: Program,
    data: Data,
    *,
    objective: PyroELBO | None = None,
    validation: Data | None = None,
    epochs: int = 10,
    batch_size: int | None = None,
    lr: float = 1e-3,
    optimizer: OptimizerSpec = "adam",
    schedule: ScheduleSpec = "constant",
    clip_norm: float | None = None,
    early_stopping: int | None = None,
    callbacks: Sequence[Callable[[Run], Any]] = (),
    precision: Literal["float32", "bf16"] = "float32",
    device: str | torch.device = "auto",
    compile: Literal["auto", True, False] = "auto",
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 1,
    progress: bool = True,
) -> Run:
    r"""Maximises an objective over the parameters of a model and a guide by stochastic gradients.

    .. math:: \max_{\theta, \phi} \frac{1}{N} \sum_{n=1}^N \mathcal{L}(x_n; \theta, \phi)

    Model and guide are trained in place. The loss is taken per data point, so that ``lr``, ``clip_norm`` and every
    reported number (nats per data point) do not depend on the size of the minibatch or of the data. The caller's random
    state is left as it was; the fit's own follows from ``seed``.

    Args:
        model: Pyro model: a ``PyroModule`` or a function, called with a minibatch.
        guide: Pyro guide, called with the same; any ``PyroModule``, Pyro autoguide or function.
        data: a tensor `n x *event`, a tuple of such tensors (the arguments of model and guide), a data set split, a
            ``Dataset`` or a ``DataLoader``. Tensors live on the device and are shuffled there.
        objective: ``pyrovae.ELBO()`` when ``None``; any objective of pyrovae, or a loss of ``pyro.infer``.
        validation: data like ``data``, for a bound after each epoch; needed for early stopping.
        epochs: passes over the data in all (a resumed run continues to this number).
        batch_size: data points a minibatch; ``None`` for 100; it must be ``None`` with a ``DataLoader``.
        lr: learning rate.
        optimizer: ``"adam"``, ``"adamax"``, ``"adamw"``, ``"nadam"``, ``"radam"``, ``"rmsprop"``, ``"sgd"``, a
            ``torch.optim`` class, or a function from a list of parameters to an optimizer.
        schedule: of the learning rate: ``"constant"``, ``"cosine"``, ``"linear"``, or a function from the optimizer to
            a ``torch.optim.lr_scheduler`` object; stepped once a gradient step.
        clip_norm: largest norm of the gradient of the loss per data point; ``None`` for no clipping.
        early_stopping: epochs without a better validation bound after which the fit stops; model and guide then
            hold the parameters of the best epoch (also when all epochs were run).
        callbacks: functions of the :class:`Run` so far, called after each epoch; one that returns ``True`` stops the
            fit.
        precision: ``"float32"`` (really: the parameters' own), or ``"bf16"`` for bfloat16 autocast of the networks; the
            log-densities are summed in float32.
        device: ``"auto"`` (the GPU where there is one), ``"cpu"``, ``"cuda"``, ….
        compile: whether loss, gradient and update run as one compiled graph (the same numbers up to rounding, several
            times faster; the second step of each shape then takes some 10 s). ``"auto"`` measures a few eager steps
            and compiles when those that remain pay for it (give ``True`` or ``False`` where two runs must agree bit for
            bit; a resumed run does as it did before). A step that cannot be compiled, since its structure is not
            static (a Python number or a branch changes from step to step), says why in a warning and runs eagerly.
        seed: of shuffling and sampling. The same seed gives the same numbers on the same machine.
        run_dir: folder for configuration, parameters, training state, metrics and TensorBoard events (where the
            ``tensorboard`` extra is installed).
        resume: continue the run in ``run_dir``, bit for bit; a folder without a run starts one.
        checkpoint_every: epochs between two checkpoints (the last epoch and an interruption always write one).
        progress: whether to show a progress bar (never without a terminal or notebook).

    Returns:
        A :class:`Run` with ``model``, ``guide``, ``history`` (one row an epoch) and ``plot()``.

    Raises:
        ArgumentError: an argument is unknown or out of range.
        DataError: the data are empty, not finite, of the wrong shape, or outside the support of the likelihood.
        ModelGuideError: model and guide do not fit each other.
        NonFiniteError: the loss or a gradient became NaN or infinite; the parameters are the last good ones.
        RunError: ``run_dir`` holds another run.
        KeyboardInterrupt: Ctrl-C; a checkpoint and the history so far are in ``run_dir`` (``SystemExit`` for SIGTERM).

    References:
        Kingma & Welling 2014, https://arxiv.org/abs/1312.6114.

    Example:
        >>> import pyrovae
        >>> from pyrovae.models import VAE
        >>> from pyrovae.guides import AmortizedNormal
        >>> digits = pyrovae.datasets.load("digits")
        >>> model = VAE(data_shape=(8, 8), latent_dim=2, hidden=(32,))
        >>> run = fit(model, AmortizedNormal(model), digits.train, epochs=3, progress=False)
        >>> run.history[-1]["bound"] > run.history[0]["bound"]
        True
    """
    objective = ELBO() if objective is None else objective
    _check_arguments(objective, callbacks, clip_norm, precision, compile, seed)
    require_count("epochs", epochs)
    require_count("checkpoint_every", checkpoint_every)
    if early_stopping is not None:
        require_count("early_stopping", early_stopping)
    if early_stopping is not None and validation is None:
        raise ArgumentError("early_stopping needs data to watch: pass validation=…, or leave early_stopping out")
    place = resolve_device(device)
    _move((model, guide, objective), place)
    if isinstance(objective, Objective):
        objective.step.zero_()  # it may have served another fit, and its schedules begin anew
    with torch.random.fork_rng([place] if place.type == "cuda" else []), local_params(model, guide):
        torch.manual_seed(seed)
        likelihood = getattr(model, "likelihood", None)
        train = batches(data, batch_size, place, seed, "data", likelihood)
        valid = None
        if validation is not None:
            size = None if isinstance(validation, DataLoader) else batch_size
            valid = batches(validation, size, place, None, "validation", likelihood)
        if getattr(model, "num_data", 0) is None:
            setattr(model, "num_data", train.size)  # noqa: B010  (a program need not have it)
        with untouched(model, guide):
            first = train.first()
            parameters, full_size = _look(model, guide, objective, first)
            _check_scale(model, guide, first, full_size, train.size)
            optim = make_optimizer(optimizer, list(parameters.values()), lr)
            step = _step(
                compile,
                epochs * train.steps,
                model=model,
                guide=guide,
                objective=objective,
                parameters=parameters,
                optimizer=optim,
                schedule=make_schedule(schedule, optim, epochs * train.steps),
                data_size=full_size if full_size != len(first[0]) else None,
                clip_norm=clip_norm,
                autocast=precision == "bf16",
            )
            _warn_without_gradient(step, first)
            if valid is not None:
                step.evaluate(valid.first())  # what does not fit the model shows now, not after an epoch
        settings = {
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "optimizer": _name(optimizer),
            "schedule": _name(schedule),
            "clip_norm": clip_norm,
            "early_stopping": early_stopping,
            "precision": precision,
            "seed": seed,
            "device": str(place),
        }
        config = _configuration(model, guide, objective, train, valid, settings)
        run = Run(model, guide, [], config, None if run_dir is None else Path(run_dir))
        state = state_of(model, guide, parameters)
        loop = Loop(
            run, step, train, valid, state, place, epochs, early_stopping, callbacks, checkpoint_every, progress
        )
        torch.manual_seed(seed)
        _open_folder(loop, resume)
        with pyro.validation_enabled(False):
            loop.train()
    return run


def _configuration(
    model: Program,
    guide: Program,
    objective: PyroELBO,
    train: Batches,
    validation: Batches | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What ``config.json`` holds."""
    return {
        "model": configuration(model),
        "guide": configuration(guide),
        "objective": _described(objective),
        "data": train.describe(),
        "validation": None if validation is None else validation.describe(),
        "fit": settings,
        "versions": {"torch": torch.__version__, "pyro": pyro.__version__},
    }


def _step(compile: Literal["auto", True, False], steps: int, **parts: Any) -> EagerStep:
    """The step that was asked for, for a fit of that number of steps."""
    return EagerStep(**parts) if compile is False else CompiledStep(**parts, mode=compile, steps=steps)


def _move(things: tuple[Any, ...], device: torch.device) -> None:
    for thing in things:
        if isinstance(thing, torch.nn.Module | Objective):
            thing.to(device)


def _look(
    model: Program, guide: Program, objective: PyroELBO, batch: tuple[torch.Tensor, ...]
) -> tuple[dict[str, torch.Tensor], int | None]:
    """Checks that all fits together; the learnable parameters and the full size of the data plate."""
    for kind, program in (("model", model), ("guide", guide)):
        _check_call(kind, program, batch)
    if hasattr(model, "likelihood") and isinstance(model, torch.nn.Module):
        own = next((p.dtype for p in model.parameters()), batch[0].dtype)
        if batch[0].dtype != own:
            raise DataError(
                f"data are {batch[0].dtype}, the model's parameters {own}; convert the data: data.to({own})"
            )
    if isinstance(objective, Objective):
        objective.structure(model, guide, *batch)
    else:  # the guide need not have the sites that TraceEnum_ELBO sums out
        (check_enumerated if isinstance(objective, TraceEnum_ELBO) else check)(model, guide, *batch)
    parameters = named_parameters(model, guide, *batch)
    if not parameters:
        raise ArgumentError("model and guide have no parameters to learn: use nn.Parameter, PyroParam or pyro.param")
    return parameters, data_size(model, guide, *batch)


def _check_scale(
    model: Program, guide: Program, batch: tuple[torch.Tensor, ...], full_size: int | None, size: int
) -> None:
    """Where latents are shared by the data, a minibatch must count for all of them."""
    points = len(batch[0])
    if points >= size or full_size in (None, size):
        return
    shared = shared_latents(model, guide, *batch)
    if shared:
        raise ModelGuideError(
            f"latent site {shared[0]!r} is shared by the data, and the model's data plate has {full_size} data points"
            f" where there are {size}, in minibatches of {points}: its KL would count {-(-size // points)} times. Give"
            f" the plate its full size, as in pyro.plate('data', {size}, subsample=torch.arange(len(x))), or all data"
            f" at once: batch_size={size}"
        )


def _check_call(kind: str, program: Program, batch: tuple[torch.Tensor, ...]) -> None:
    """The program takes as many tensors as a minibatch has."""
    called = program.forward if isinstance(program, torch.nn.Module) else program
    try:
        inspect.signature(called).bind(*batch)
    except TypeError as error:
        shapes = ", ".join(str(tuple(part.shape)) for part in batch)
        raise ArgumentError(
            f"the {kind} cannot be called with a minibatch of {len(batch)} tensors of shapes {shapes} ({error}). Give"
            " data that hold just its arguments: of a data set with labels, often the first tensor alone"
        ) from error


def _described(objective: PyroELBO) -> dict[str, Any]:
    """An objective of ours with the estimator in use; a Pyro loss by name and plain attributes."""
    ours = configuration(objective)
    if isinstance(objective, Objective):
        return {**(ours or {"name": type(objective).__name__}), "estimator": objective.estimator}
    plain = {
        key: value
        for key, value in vars(objective).items()
        if isinstance(value, bool | int | float | str) and key != "max_plate_nesting" and not key.startswith("_")
    }
    return {"name": type(objective).__name__, "arguments": plain}


def _name(spec: Any) -> str:
    return spec if isinstance(spec, str) else getattr(spec, "__name__", type(spec).__name__)


def _check_arguments(objective: Any, callbacks: Any, clip_norm: Any, precision: Any, compile: Any, seed: Any) -> None:
    if not isinstance(objective, PyroELBO):
        raise ArgumentError(
            f"objective is a {type(objective).__name__}; it must be an objective such as pyrovae.ELBO(), or a loss of"
            " pyro.infer"
        )
    if not isinstance(callbacks, Sequence) or not all(callable(callback) for callback in callbacks):
        raise ArgumentError(f"callbacks is {callbacks!r}; it must be a list of functions of a run")
    if clip_norm is not None:
        require_positive("clip_norm", clip_norm, ", or None")
    if precision not in ("float32", "bf16"):
        raise ArgumentError(f"precision is {precision!r}; it must be 'float32' or 'bf16'")
    check_compile(compile)
    require_count("seed", seed, 0)


def _warn_without_gradient(step: EagerStep, batch: tuple[torch.Tensor, ...]) -> None:
    """Names, once, every parameter that the objective gives no gradient."""
    step.backward(batch, len(batch[0]))
    idle = [name for name, parameter in step.parameters.items() if parameter.grad is None]
    step.optimizer.zero_grad(set_to_none=True)
    if idle:
        warnings.warn(
            f"these parameters get no gradient from {type(step.objective).__name__} and will not be learned:"
            f" {', '.join(idle)}",
            stacklevel=3,
        )


def _open_folder(loop: Loop, resume: bool) -> None:
    """Starts a run folder, or continues the run in it after checking that it is the same one."""
    folder = loop.run.folder
    if folder is None:
        if resume:
            raise ArgumentError("resume=True needs run_dir, the folder of the run to continue")
        return
    if folder.exists() and not folder.is_dir():
        raise RunError(f"run_dir {folder} is a file; give a folder")
    path = folder / checkpoint.CONFIG
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(path, loop.run.config)
        return
    if not resume:
        raise RunError(
            f"run_dir {folder} already holds a run. Pass resume=True to continue it, or choose another folder."
        )
    theirs, ours = _flat(checkpoint.read_json(path)), _flat(loop.run.config)
    differing = [
        f"{key} {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and not any(part in _MAY_DIFFER for part in key.split("."))
    ]
    if differing:
        raise RunError(
            f"run_dir {folder} holds another run: {'; '.join(differing)}. Use the same settings, or choose another"
            " folder."
        )
    loop.restore()
    checkpoint.write_json(path, loop.run.config)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
