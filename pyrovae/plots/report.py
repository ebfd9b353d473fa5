"""A run on one page: how good the fit is, and what the model has learnt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyrovae.atomic import write_atomically
from pyrovae.errors import ArgumentError, DataError
from pyrovae.modes import evaluating
from pyrovae.plots.curves import bound_parts, learning_curves
from pyrovae.plots.images import grid_figsize, image_shape
from pyrovae.plots.interfaces import FittedRun, History, Split
from pyrovae.plots.latent import class_grid, interpolation, manifold, reconstructions, samples
from pyrovae.plots.page import flatten, format_value, page, picture, table, tiles
from pyrovae.plots.scatter import active_dimensions, latent_scatter
from pyrovae.plots.state import encode_means, require_data

__all__ = ["report"]

SCATTERED = 5000
"""Points of the scatter plot at most."""

SHOWN = 10
"""Data points that are reconstructed, and rows of the history that are listed."""


class Plot(NamedTuple):
    """A picture of the report: its name, what it says, its size in inches, and how it is drawn."""

    name: str
    caption: str
    figsize: tuple[float, float]
    draw: Callable[[Axes], object]
    wide: bool = False


def report(run: FittedRun, data: Split, path: str | Path, *, metrics: Mapping[str, object] | None = None) -> Path:
    """Writes one self-contained HTML file about a run: figures of merit, pictures, configuration, history.

    Pictures that do not apply (data that are no images, a guide without ``encode``, a line between binary codes) are
    left out, and the page says which and why. The file is written atomically and needs no other file, no network and
    no script.

    Args:
        run: a run with ``model``, ``guide``, ``history`` and ``config``.
        data: the test split: ``x``, a `n x *data_shape` tensor, and ``y``, a `n` tensor of labels or ``None``.
        path: the file to write; missing folders above it are made.
        metrics: headline numbers by name with unit, as ``{"test log-likelihood, nats per data point": -86.1}``.

    Returns:
        The path of the file.

    Raises:
        DataError: ``data`` is empty.
        ArgumentError: ``path`` is a folder.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from types import SimpleNamespace
        >>> history = [{"epoch": 1, "bound": -12.0}, {"epoch": 2, "bound": -10.5}]
        >>> run = SimpleNamespace(model=None, guide=None, history=history, config={"seed": 0})
        >>> data = SimpleNamespace(x=torch.zeros(3, 7), y=None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = report(run, data, folder + "/report.html", metrics={"bound, nats per data point": -10.5})
        ...     text = file.read_text(encoding="utf-8")
        >>> "-10.50" in text and "Left out" in text
        True
    """
    path = Path(path)
    require_data(data.x, name="data.x")
    if path.is_dir():
        raise ArgumentError(f"path is the folder {path}, but must be a file; give {path / 'report.html'}")
    document = page(f"{_name(run.model)} with {_name(run.guide)}", _body(run, data, metrics or {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, document.encode())
    return path


def _body(run: FittedRun, data: Split, metrics: Mapping[str, object]) -> Iterator[str]:
    event = " × ".join(map(str, data.x.shape[1:])) or "scalar"
    yield f"<p>{len(run.history):,} epochs; {len(data.x):,} test data points of shape {event}</p>"
    if metrics:
        yield tiles(flatten(metrics))
    left_out: list[str] = []
    for heading, plots in (("Fit", _fit_plots(run)), ("Model", _model_plots(run, data))):
        pictures = list(_draw(plots, left_out))
        if pictures:
            yield f'<h2>{heading}</h2><div class="pictures">{"".join(pictures)}</div>'
    if left_out:
        yield "<h2>Left out</h2>"
        yield table(["picture", "why"], (line.split("\n", 1) for line in left_out))
    if run.history:
        shown = f"the last {min(len(run.history), SHOWN)} of {len(run.history):,} epochs"
        yield f"<h2>History</h2><p>{shown}; bound, log-likelihood and KL in nats per data point</p>"
        yield _history_table(run.history)
    yield "<h2>Configuration</h2>"
    settings = ((key, _setting(value)) for key, value in flatten(run.config).items())
    yield table(["setting", "value"], settings)


def _fit_plots(run: FittedRun) -> list[Plot]:
    return [
        Plot(
            "Learning curves",
            "Training and validation bound; a gap that widens is overfitting.",
            (6.4, 4.2),
            lambda ax: learning_curves(run.history, ax),
        ),
        Plot(
            "Parts of the bound",
            "Expected log-likelihood and KL divergence; a KL near zero says that the latent variable is not used.",
            (6.4, 4.2),
            lambda ax: bound_parts(run.history, ax),
        ),
    ]


def _model_plots(run: FittedRun, data: Split) -> list[Plot]:
    model, guide, x, y = run.model, run.guide, data.x, data.y
    some = _spread(len(x), SHOWN)
    many = _spread(len(x), SCATTERED)

    def scatter(ax: Axes) -> Axes:
        return latent_scatter(guide, x[many], None if y is None else y[many], ax)

    def between(ax: Axes) -> Axes:
        first, second = _pair(y, len(x))
        return interpolation(model, guide, x[first], x[second], ax)

    def grid(ax: Axes) -> Axes:
        return manifold(model, ax, dims=_grid_dimensions(run, x[many]))

    tile = _tile(tuple(x.shape[1:]))
    square = grid_figsize(8, 8, tile)
    return [
        Plot(
            "Reconstructions",
            "Test data, and the means to which their posteriors decode.",
            grid_figsize(2, len(some), tile, (1.2, 0.0)),
            lambda ax: reconstructions(model, guide, x[some], ax),
            wide=True,
        ),
        Plot(
            "Interpolation",
            "The decoded line between the posterior means of two test data points.",
            grid_figsize(1, 12, tile, (0.1, 0.25)),
            between,
            wide=True,
        ),
        *_class_plots(model, tile),
        Plot("Samples", "Decoded means of draws from the prior.", square, lambda ax: samples(model, ax=ax)),
        Plot("Latent grid", "Decoded means over two latent dimensions, at quantiles of the prior.", square, grid),
        Plot(
            "Latent space",
            f"Posterior means of {len(many):,} test data points" + ("." if y is None else ", coloured by label."),
            (6.4, 5.2),
            scatter,
        ),
    ]


def _class_plots(model: Any, tile: tuple[int, int]) -> list[Plot]:
    if not hasattr(model, "classes"):
        return []
    said = "Decoded means: each row a class, each column a draw from the prior."
    return [Plot("Classes", said, grid_figsize(model.classes, 10, tile), lambda ax: class_grid(model, ax=ax))]


def _draw(plots: list[Plot], left_out: list[str]) -> Iterator[str]:
    """Draws each plot; one that does not apply goes to ``left_out`` instead, with the reason."""
    for plot in plots:
        # A Figure of its own: no pyplot state, no display.
        figure = Figure(figsize=plot.figsize, layout="constrained")
        try:
            plot.draw(figure.subplots())
        except (ArgumentError, DataError) as error:
            left_out.append(f"{plot.name}\n{error}")
        else:
            yield str(picture(figure, f"{plot.name}: {plot.caption}", plot.caption, plot.wide))


def _tile(data_shape: tuple[int, ...]) -> tuple[int, int]:
    try:
        return image_shape(data_shape)
    except ArgumentError:
        return 1, 1  # each plot that needs an image says so itself


def _spread(length: int, count: int) -> Tensor:
    """At most ``count`` indices over all the data, which may be sorted by label."""
    return torch.linspace(0, length - 1, min(length, count)).long()


def _pair(y: Tensor | None, length: int) -> tuple[int, int]:
    """Two data points, of different labels where there are any."""
    if length < 2:
        raise DataError(f"data.x holds {length} data point, but an interpolation needs 2; give more")
    others = [] if y is None else (y != y[0]).nonzero()[:, 0].tolist()
    return 0, others[0] if others else 1


def _grid_dimensions(run: FittedRun, x: Tensor) -> tuple[int, int]:
    """The most active dimensions; without a guide that encodes, the first two."""
    if getattr(run.model, "latent_dim", 0) <= 2 or not hasattr(run.guide, "encode"):
        return 0, 1
    with evaluating(run.model, run.guide) as device:
        return active_dimensions(encode_means(run.guide, x, device))


def _history_table(history: History) -> str:
    rows = history[-SHOWN:]
    keys = list(dict.fromkeys(["epoch", *(key for row in rows for key in row)]))
    cells = [[_cell(row.get(key)) for key in keys] for row in rows]
    return table(keys, cells, numbers=True)


def _cell(value: object) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else format_value(value)


def _setting(value: object) -> str:
    # As it was given: a learning rate keeps all its digits.
    return repr(value) if isinstance(value, (int, float)) else format_value(value)


def _name(thing: object) -> str:
    return "no model" if thing is None else str(getattr(thing, "__name__", type(thing).__name__))
