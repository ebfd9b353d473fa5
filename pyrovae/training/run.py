"""What a fit returns and a run folder holds: model, guide, history, configuration."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pyrovae.devices import resolve_device
from pyrovae.errors import ArgumentError, RunError
from pyrovae.registry import GUIDES, MODELS
from pyrovae.structure import Program
from pyrovae.training import checkpoint
from pyrovae.training.programs import local_params, named_parameters, restore_state, state_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Run", "load"]


@dataclass
class Run:
    """A fitted model and guide with the history of the fit.

    Args:
        model: the fitted Pyro model.
        guide: the fitted Pyro guide.
        history: one row an epoch; every bound and its parts in nats per data point: ``bound`` (training, mean over the
            epoch), ``log_likelihood``, ``kl`` and ``kl/<site>``, ``validation_bound``, ``lr``, ``seconds``,
            ``steps_per_second``.
        config: what the run was made from, ready for JSON.
        folder: the run folder, or ``None``.
        best_epoch: the epoch whose parameters model and guide hold, when that is not the last one.
    """

    model: Program
    guide: Program
    history: list[dict[str, Any]]
    config: dict[str, Any]
    folder: Path | None = None
    best_epoch: int | None = field(default=None)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the learning curves; see :func:`pyrovae.plots.learning_curves`."""
        from pyrovae import plots

        return plots.learning_curves(self.history, ax=ax)


def load(
    run_dir: str | Path,
    model: Program | None = None,
    guide: Program | None = None,
    *,
    which: Literal["best", "last"] | None = None,
    example: tuple[Tensor, ...] | Tensor | None = None,
    device: str | torch.device = "cpu",
) -> Run:
    """Rebuilds model, guide and history from a run folder; no code of the folder is executed.

    Args:
        run_dir: a folder that :func:`pyrovae.fit` wrote.
        model: needed only when the run's model is not one of ``pyrovae.models``; the saved parameters are copied into
            it.
        guide: likewise.
        which: ``"last"`` for the parameters at the end of the fit, ``"best"`` for those of the best validation bound;
            ``None`` takes the best where they were kept.
        example: a minibatch to run model and guide on once, so that parameters which exist only after a first run
            (``pyro.param``, Pyro's autoguides) are there to be filled.
        device: where model and guide are put; ``"auto"`` for the GPU where there is one.

    Returns:
        A :class:`Run`.

    Raises:
        RunError: the folder holds no run, or its parameters do not fit the model and guide.
        CorruptFileError: a file is truncated or altered.
        ArgumentError: the configuration names what this version does not know, or there is no such device.

    Example:
        >>> import tempfile, torch, pyrovae
        >>> from pyrovae.models import VAE
        >>> from pyrovae.guides import AmortizedNormal
        >>> model = VAE(data_shape=(4,), latent_dim=1, hidden=(8,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data = torch.ones(20, 4)
        ...     run = pyrovae.fit(model, AmortizedNormal(model), data, epochs=2, run_dir=folder, progress=False)
        ...     again = pyrovae.load(folder)
        >>> again.history == run.history, type(again.model).__name__
        (True, 'VAE')
    """
    folder = Path(run_dir)
    config = checkpoint.read_json(folder / checkpoint.CONFIG)
    place = resolve_device(device)
    if which not in (None, "best", "last"):
        raise ArgumentError(f"which is {which!r}; it must be 'best', 'last' or None")
    has_best = (folder / checkpoint.BEST).exists()
    if which == "best" and not has_best:
        raise RunError(f"{folder} keeps no best parameters (the fit had no early_stopping); use which='last'")
    best = has_best and which != "last"
    saved = checkpoint.read_tensors(folder / (checkpoint.BEST if best else checkpoint.MODEL))
    with torch.random.fork_rng([]):  # initial weights are drawn, and then overwritten
        model = _rebuilt("model", model, config, MODELS)
        guide = _rebuilt("guide", guide, config, GUIDES, model)
    for program in (model, guide):
        if isinstance(program, torch.nn.Module):
            program.to(place)
    if hasattr(model, "adopt_shapes"):  # buffers that take their shape from the data
        model.adopt_shapes({name.removeprefix("model."): value.shape for name, value in saved.items()})
    parameters: dict[str, Tensor] = {}
    with local_params(model, guide):
        if example is not None:
            batch = (example,) if isinstance(example, Tensor) else tuple(example)
            parameters = named_parameters(model, guide, *batch)
        state = state_of(model, guide, parameters)
        if example is None and saved.keys() > state.keys():
            lacking = _some(saved.keys() - state.keys())
            raise RunError(
                f"the run in {folder} has parameters that this model and guide lack: {lacking}. If these exist only"
                " after a first run (pyro.param, autoguides), pass a minibatch: pyrovae.load(run_dir, model, guide,"
                " example=a_minibatch); else build the model and guide that the run was made with."
            )
        restore_state(state, saved, f"the run in {folder}")
    history = checkpoint.read_history(folder / checkpoint.METRICS)
    return Run(model, guide, history, config, folder, _best_epoch(history) if best else None)


def _rebuilt(kind: str, given: Program | None, config: dict[str, Any], registry: Any, *args: Any) -> Program:
    if given is not None:
        return given
    if not config.get(kind):
        raise RunError(
            f"this run's {kind} is not one of pyrovae.{kind}s, so config.json cannot rebuild it; build it as it was"
            f" built for the fit and pass it: pyrovae.load(run_dir, {kind}=…, example=a_minibatch)"
        )
    return registry.build(config[kind], *args)


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _best_epoch(history: list[dict[str, Any]]) -> int | None:
    rows = [row for row in history if "validation_bound" in row]
    return max(rows, key=lambda row: row["validation_bound"])["epoch"] if rows else None
