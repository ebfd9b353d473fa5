"""From the words of a command line to a model and the data that it is fitted to."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from json import loads as json_value
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pyrovae.datasets import Splits, Table
    from pyrovae.training.data import Data

__all__ = ["FLAGS", "Task", "arguments_of", "described", "model_for", "option", "table_of", "task_for", "widths"]

FLAGS = ("latent_dim", "layers", "hidden", "activation", "likelihood", "prior", "network")  # of train, for models


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are, as the command line says it.

    Args:
        response: the column that is explained.
        inputs: columns that explain, with commas between.
        groups: grouping columns.
    """

    response: str | None = None
    inputs: str | None = None
    groups: tuple[str, ...] = ()

    @property
    def given(self) -> list[str]:
        """The options that were given."""
        named = {"--response": self.response, "--inputs": self.inputs, "--group": self.groups}
        return [name for name, value in named.items() if value]

    @property
    def roles(self) -> dict[str, Any]:
        """The same as ``tabular.prepare`` takes it."""
        inputs = None if self.inputs is None else [name.strip() for name in self.inputs.split(",")]
        return {"response": self.response, "inputs": inputs, "groups": list(self.groups)}


@dataclass(frozen=True)
class Task:
    """A model, and what it is fitted to.

    Args:
        model: the model.
        train: the data.
        validation: what early stopping goes by; ``None`` where the latents belong to all rows of a table.
        used: what became of the columns of such a table, in one line.
    """

    model: Any
    train: Data
    validation: Data | None = None
    used: str = ""

    @property
    def whole(self) -> tuple[Tensor, ...]:
        """The tensors of a table, which are one minibatch; empty for other data."""
        from pyrovae.training.data import Described

        return self.train.tensors if isinstance(self.train, Described) else ()


def task_for(
    name: str,
    data: str,
    arguments: dict[str, Any],
    *,
    binarization: str | None = None,
    labels: int | None = None,
    columns: Columns | None = None,
    seed: int = 0,
) -> Task:
    """The registered model for a data set, a table or a file of one's own.

    Args:
        name: of the model.
        data: name of a data set or a table, or a path.
        arguments: of the model; those that are ``None`` keep its defaults.
        binarization: of a data set.
        labels: number of labels to keep, for a model that may lack some.
        columns: of a table.
        seed: of the choice of labels.

    Raises:
        ArgumentError: an argument is unknown or out of range, or one that this model or these data do not take.
    """
    from pyrovae import datasets, registry, tabular
    from pyrovae.errors import ArgumentError
    from pyrovae.training.data import Described

    columns = Columns() if columns is None else columns
    takes = inspect.signature(registry.MODELS[name]).parameters
    given = {argument: value for argument, value in arguments.items() if value is not None}
    series = name in tabular.SERIES and data.lower().endswith((".npy", ".npz"))
    if labels is not None and name != "SemiSupervisedVAE":
        raise ArgumentError(f"--labels is {labels}, but {name} has no labels that may be missing; leave it out")
    if name == "BNN" and data in datasets.names():
        return _classifier(name, data, given, binarization)
    if name in tabular.TABULAR and not series:
        if binarization is not None:
            raise ArgumentError(f"--binarization is {binarization!r}, but {name} is of a table; leave it out")
        _require_arguments(name, given)
        roles = columns.roles
        prepared = tabular.prepare(name, table_of(data, name), **roles, **given)
        return Task(prepared.model, Described(prepared.data, {"name": data} | roles), used=prepared.used)
    if columns.given:
        raise ArgumentError(f"{columns.given[0]} is for tables, and {name} is not fitted to one here; leave it out")
    splits = datasets.load(data, binarization=binarization)
    if "classes" in takes and not splits.classes:
        raise ArgumentError(
            f"--data is {data!r}, which has no labels, and {name} takes them; give digits, mnist, …, a folder of images"
            " with a subfolder for each class, or table.csv?labels=COLUMN"
        )
    model = model_for(splits, name, **given)
    if "classes" in takes:
        return Task(model, splits.train.labelled(labels, seed=seed), splits.validation.labelled())
    return Task(model, splits.train, splits.validation)


def table_of(data: str, name: str) -> Table:
    """A table by name, or from a file with named columns or an array of numbers."""
    from pyrovae import datasets
    from pyrovae.errors import ArgumentError

    if data in datasets.tables() or data.lower().endswith(".csv"):
        return datasets.table(data)
    if data.removeprefix("uci/") in datasets.uci_names():
        return _regression(data)
    if data.lower().endswith(".npy"):
        return _array(Path(data).expanduser())
    raise ArgumentError(
        f"--data is {data!r}, but {name} is of a table: give one of {', '.join(datasets.tables())}, one of"
        f" {', '.join(f'uci/{each}' for each in datasets.uci_names())} (the training part of split 0), the path of a"
        " .csv whose first line names the columns, or of a .npy with a row each data point (columns x1, x2, …)"
    )


def _regression(data: str) -> Table:
    """The training part of the first standard split: columns x1, x2, … and y."""
    from pyrovae import datasets

    (x, y), _ = datasets.uci(data).split(0)
    return datasets.Table(data, {**{f"x{number}": column for number, column in enumerate(x.T, start=1)}, "y": y})


def _classifier(name: str, data: str, given: dict[str, Any], binarization: str | None) -> Task:
    """A network from images to classes: one hidden layer of 200 unless ``net`` says otherwise."""
    from pyrovae import datasets, registry
    from pyrovae.errors import ArgumentError

    splits = datasets.load(data, binarization=binarization or "none")
    if not splits.classes:
        raise ArgumentError(f"--data is {data!r}, which has no labels, and {name} is to give the class; try mnist")
    _require_arguments(name, given)
    net = [splits.event_shape.numel(), 200, len(splits.classes)]
    model = registry.MODELS.build(described(name, **({"net": net, "likelihood": "categorical"} | given)))
    return Task(model, splits.train.labelled(), splits.validation.labelled())


def _array(path: Path) -> Table:
    import numpy as np
    import torch

    from pyrovae.datasets import Table, own_files
    from pyrovae.errors import ArgumentError

    array, _ = own_files.read(path, None)
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.number):
        raise ArgumentError(f"{path} is {array.dtype} of shape {array.shape}; it must be numbers, rows x columns")
    values = torch.as_tensor(array.reshape(len(array), -1)).to(torch.get_default_dtype())
    return Table(str(path), {f"x{number}": column for number, column in enumerate(values.T, start=1)})


def model_for(splits: Splits, name: str, **arguments: Any) -> Any:
    """The registered model for a data set, its output starting at the mean of the training split.

    Args:
        splits: the data set, of which the model takes shapes and classes and, unless it is given, the likelihood.
        name: of the model.
        **arguments: of the model; those that are ``None`` keep the model's default.

    Raises:
        ArgumentError: an argument is unknown, out of range, or none of this model's.
    """
    from pyrovae import registry
    from pyrovae.errors import ArgumentError

    given = {argument: value for argument, value in arguments.items() if value is not None}
    takes = _require_arguments(name, given)
    shape = tuple(splits.event_shape)
    if "steps" in takes and "data_shape" not in takes and len(shape) not in (1, 2):
        raise ArgumentError(f"a data point has shape {shape}; {name} takes series, (T,) or (T, variables)")
    intensities = splits.binarization == "none"
    defaults = {
        "data_shape": shape,
        "latent_dim": 2,
        "classes": len(splits.classes),
        "likelihood": "continuous-bernoulli" if intensities else "bernoulli",
        "steps": None if "data_shape" in takes else shape[0],
        "features": shape[-1],
    }
    given = {argument: value for argument, value in defaults.items() if argument in takes} | given
    model = registry.MODELS.build(described(name, **given))
    if hasattr(model, "initialize_output"):
        model.initialize_output(splits.train.x)
    return model


def _require_arguments(name: str, given: dict[str, Any]) -> list[str]:
    """The arguments that the model takes, after a check that these are among them."""
    from pyrovae import registry
    from pyrovae.errors import ArgumentError

    takes = list(inspect.signature(registry.MODELS[name]).parameters)
    for argument in given:
        if argument not in takes:
            flags = [option(other) if other in FLAGS else f"--option {other}=…" for other in takes]
            allowed = ", ".join(flag for flag, other in zip(flags, takes, strict=True) if other != "data_shape")
            said = option(argument) if argument in FLAGS else f"--option {argument}=…"
            raise ArgumentError(f"model {name} has no {said}; its options are {allowed}")
    return takes


def arguments_of(flag: str, given: list[str] | None) -> dict[str, Any]:
    """The arguments of ``NAME=VALUE`` texts, whose values are JSON, or else words."""
    from pyrovae.errors import ArgumentError

    found = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ArgumentError(f"{flag} is {text!r}; give NAME=VALUE, as steps=8")
        try:
            found[name.replace("-", "_")] = json_value(value)
        except ValueError:
            found[name.replace("-", "_")] = value
    return found


def described(name: str, **arguments: Any) -> dict[str, Any]:
    """A configuration for a registry, with the arguments that were given."""
    return {"name": name, "arguments": {key: value for key, value in arguments.items() if value is not None}}


def option(argument: str) -> str:
    return f"--{argument.replace('_', '-')}"


def widths(argument: str, given: str | None) -> tuple[int, ...] | None:
    from pyrovae.errors import ArgumentError

    if given is None:
        return None
    try:
        return tuple(int(width) for width in given.split(",") if given.strip())
    except ValueError:
        raise ArgumentError(
            f"{option(argument)} is {given!r}; give whole numbers with commas between, as 200,200"
        ) from None
