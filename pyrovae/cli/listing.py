"""``pyrovae list``: what there is to choose from."""

from __future__ import annotations

import inspect
from enum import Enum
from typing import Annotated

import typer

from pyrovae.cli.shared import Json, emit, table

__all__ = ["list_names"]


class Kind(str, Enum):
    """What can be listed."""

    models = "models"
    guides = "guides"
    objectives = "objectives"
    datasets = "datasets"


def list_names(
    kind: Annotated[Kind | None, typer.Argument(help="What to list.", show_default="all four")] = None,
    json: Json = False,
) -> None:
    """List models, guides, objectives and data sets, each with one line on what it is.

    A model's line ends with the guide and the objective that fit it by default.

    Examples:

    pyrovae list

    pyrovae list datasets --json
    """
    wanted = list(Kind) if kind is None else [kind]
    found = {one.value: _described(one) for one in wanted}
    width = max(len(name) for names in found.values() for name in names)
    lines: list[str] = []
    for heading, names in found.items():
        rows = table((name.ljust(width), line) for name, line in names.items())
        lines += [f"{heading}:", *(f"  {row}" for row in rows), ""]
    emit(found, lines[:-1], json)


def _described(kind: Kind) -> dict[str, str]:
    """Each name with one line."""
    from pyrovae import datasets, registry

    if kind is Kind.datasets:
        return {name: datasets.describe(name) for name in datasets.names()}
    classes = {Kind.models: registry.MODELS, Kind.guides: registry.GUIDES, Kind.objectives: registry.OBJECTIVES}[kind]
    return {name: _line(cls) for name, cls in classes.items()}


def _line(cls: type) -> str:
    """The first line of a class's docstring, and what fits a model by default."""
    line = (inspect.getdoc(cls) or "").partition("\n")[0]
    if hasattr(cls, "default_guide"):
        line += f" [{cls.default_guide}; {cls.default_objective['name']}]"  # type: ignore[attr-defined]
    return line
