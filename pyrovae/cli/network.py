"""Bayesian networks on the command line: what their predictions are worth on data that they did not see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["is_network", "network_scores"]

_SAMPLES = 200  # posterior draws of a prediction


def is_network(folder: Path) -> bool:
    """Whether a run folder holds a run of a ``BNN``; ``False`` where it holds none that can be read."""
    from pyrovae.errors import PyrovaeError
    from pyrovae.training import checkpoint

    try:
        return (checkpoint.read_json(folder / checkpoint.CONFIG).get("model") or {}).get("name") == "BNN"
    except (OSError, PyrovaeError):
        return False


def network_scores(
    folder: Path, data: str | None, split: str, *, which: str | None, seed: int, device: str
) -> tuple[dict[str, Any], str]:
    """Scores of a run's predictions, as numbers by name and as text.

    Args:
        folder: of the run.
        data: a data set with labels, ``uci/…`` (its split 0) or a table, whose columns are what they were in training;
            ``None`` for the data that the run names.
        split: ``"test"``, ``"validation"`` or ``"train"``; a table is scored as a whole.
        which: parameters to load.
        seed: of the posterior draws.
        device: where to compute.

    Raises:
        ArgumentError: the run does not name its data, or these are not of its kind.
        RunError: the folder holds no such run.
    """
    import pyrovae
    from pyrovae.evaluation import classification_scores, regression_scores
    from pyrovae.modes import device_of
    from pyrovae.training import checkpoint

    trained_on = checkpoint.read_json(folder / checkpoint.CONFIG)["data"]
    roles = {role: trained_on.get(role) for role in ("response", "inputs")}
    x, y, said = _held_out(folder, data or trained_on.get("name"), split, roles)
    run = pyrovae.load(folder, which=which, example=(x[:2], y[:2]), device=device)  # type: ignore[arg-type]
    place = device_of(run.model, run.guide)
    prediction = pyrovae.predict(run.model, run.guide, x.to(place), samples=_SAMPLES, seed=seed)
    classifies = prediction.classes is not None
    scores: Any = (classification_scores if classifies else regression_scores)(prediction, y.to(place))
    numbers = {name: float(value) for name, value in vars(scores).items() if getattr(value, "dim", lambda: 1)() == 0}
    head = {"data": said, "points": len(y), "samples": _SAMPLES, "seed": seed, "best_epoch": run.best_epoch}
    return head | numbers, f"{said}: {scores}"


def _held_out(folder: Path, name: str | None, split: str, roles: dict[str, Any]) -> tuple[Tensor, Tensor, str]:
    """Inputs, targets, and what they are; of a table, by the roles of its columns."""
    from pyrovae import datasets, tabular
    from pyrovae.cli.task import table_of
    from pyrovae.errors import ArgumentError

    if name is None:
        raise ArgumentError(
            f"the run in {folder} does not name its data; give --data uci/boston (or another of its kind), a table, or"
            " a data set with labels"
        )
    if name.removeprefix("uci/") in datasets.uci_names():
        train, test = datasets.uci(name).split(0)
        if split == "validation":
            raise ArgumentError(f"--split is validation, and {name} has training and test parts; give train or test")
        return *(train if split == "train" else test), f"{name}, split 0, {split} part"
    if name not in datasets.names():
        prepared = tabular.prepare("BNN", table_of(name, "BNN"), **roles)
        x, y = prepared.data
        return x, y, f"{name}, all rows, {prepared.used}"
    splits = datasets.load(name, binarization="none")
    if not splits.classes:
        raise ArgumentError(f"--data is {name!r}, which has no labels to score predictions by")
    x, y = getattr(splits, split).labelled()[:]
    return x, y, f"{name}, {split} split"
