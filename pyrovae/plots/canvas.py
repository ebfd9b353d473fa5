"""How a recurrent decoder draws: the canvas after each of its steps, as one picture or as an animation."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from pyrovae.atomic import write_atomically
from pyrovae.errors import ArgumentError, require_count
from pyrovae.modes import evaluating
from pyrovae.plots.images import PADDING, grid_figsize, image_grid, image_shape, intensities, label_columns
from pyrovae.plots.state import attribute_of, require_data
from pyrovae.plots.style import PALETTE, axes_or_new

__all__ = ["canvas_animation", "canvas_steps"]

_COLOURS = {"reads": PALETTE[0], "writes": PALETTE[2]}
_PAUSE = 5  # frames for which an animation shows the last canvas


class Drawer(Protocol):
    """A model that draws step by step, as :class:`pyrovae.models.draw.DRAW`.

    ``attention`` makes the window of a step from the output of its decoder: a grid of filters with ``x``, ``y``,
    ``stride`` and ``variance``, in pixels counted from 1, and ``size`` filters along each axis; ``None`` for no window.
    """

    data_shape: tuple[int, ...]
    attention: Any

    def prior(self) -> Any:
        """The distribution of the latents of all steps."""

    def drawings(self, z: Tensor) -> Sequence[Any]:
        """The states from the start to the last step, each with ``canvas`` and ``memory.output``."""

    def on(self, canvas: Tensor) -> Any:
        """The distribution of the data on a canvas."""


class _Steps(NamedTuple):
    """Canvases `steps x n x *data_shape` in [0, 1], and the windows by what they do: boxes `steps x n x 5`."""

    canvases: Tensor
    windows: dict[str, Tensor]


def canvas_steps(
    model: Drawer,
    guide: Any = None,
    x: Tensor | None = None,
    ax: Axes | None = None,
    *,
    count: int = 6,
    columns: int = 10,
    seed: int = 0,
) -> Axes:
    """The canvas after each step: a row for each data point, time to the right.

    With ``guide`` and ``x`` the latents are a draw of the posterior, and the last column holds the data; without them
    the model draws from its prior. Frames show where attention reads and writes, as far as it lies in the picture; the
    wider the border, the wider the filters.

    Args:
        model: a model that draws step by step, such as ``DRAW``.
        guide: its guide, which returns the latents of all steps; it shows where it reads if it has ``attention``.
        x: A `n x *data_shape` tensor of images; the first ``count`` are drawn.
        ax: the Axes to draw in; by default those of a new figure.
        count: the most data points to show.
        columns: the most steps to show, evenly spaced, the last one among them.
        seed: seeds the draws; the global generators stay as they are.

    Returns:
        The Axes.

    Raises:
        ArgumentError: the data are no images, the model does not draw in steps, only one of ``guide`` and ``x`` is
            given, or a number is below one.
        DataError: ``x`` is empty, of another shape, or out of range.

    References:
        Gregor et al. 2015, figures 1 and 7, https://arxiv.org/abs/1502.04623.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from pyrovae.models.draw import DRAW
        >>> ax = canvas_steps(DRAW((8, 8), steps=4, latent_dim=2, hidden=8), ax=Figure().subplots(), count=3)
        >>> ax.images[0].get_array().shape  # 3 rows and 4 steps of 8 pixels, with the gaps
        (26, 35)
    """
    require_count("columns", columns)
    found = _draw(model, guide, x, count, seed)
    steps, points = found.canvases.shape[:2]
    shown = torch.linspace(steps, 1, min(columns, steps)).round().long().flip(0)
    pictures = list(found.canvases[shown - 1])
    labels = {column: str(int(step)) for column, step in enumerate(shown)}
    if x is not None:
        labels[len(pictures)] = "data"
        pictures.append(intensities(x[:points], "x"))
    height, width = image_shape(model.data_shape)
    ax = axes_or_new(ax, grid_figsize(points, len(pictures), (height, width), (_beside(found), 0.6)))
    title = "Samples, step by step" if x is None else "Reconstructions, step by step"
    image_grid(torch.stack(pictures, 1).flatten(0, 1), ax, len(pictures), title=title)
    label_columns(ax, labels, width)
    ax.set_xlabel("step")
    for name, boxes in found.windows.items():
        for column, step in enumerate(shown):
            for row, box in enumerate(boxes[step - 1]):
                _frame(ax, box, (row, column), (height, width), _COLOURS[name])
    _legend(ax, found.windows)
    return ax


def canvas_animation(
    model: Drawer,
    path: str | Path,
    guide: Any = None,
    x: Tensor | None = None,
    *,
    count: int = 16,
    frames_per_second: int = 5,
    seed: int = 0,
) -> Path:
    """Writes an animated GIF of the canvases, one step a frame.

    Args:
        model: as for :func:`canvas_steps`.
        path: of the file, ``….gif``; its folder is made where it is missing.
        guide: as for :func:`canvas_steps`.
        x: as for :func:`canvas_steps`.
        count: the most data points to show, in a square grid.
        frames_per_second: the pace, in steps a second; the last canvas stays for five.
        seed: seeds the draws; the global generators stay as they are.

    Returns:
        The path.

    Raises:
        ArgumentError: ``path`` does not end in ``.gif``, the pace is below 1, or as for :func:`canvas_steps`.
        DataError: as for :func:`canvas_steps`.

    Example:
        >>> import tempfile
        >>> from pyrovae.models.draw import DRAW
        >>> model = DRAW((8, 8), steps=2, latent_dim=2, hidden=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     canvas_animation(model, folder + "/drawn.gif", count=4).read_bytes()[:6]
        b'GIF89a'
    """
    path = Path(path)
    if path.suffix.lower() != ".gif":
        raise ArgumentError(f"path is {path}; an animation is written as GIF: give {path.with_suffix('.gif')}")
    require_count("frames_per_second", frames_per_second)
    found = _draw(model, guide, x, count, seed)
    steps, points = found.canvases.shape[:2]
    columns = math.ceil(math.sqrt(points))
    size = image_shape(model.data_shape)
    inches = grid_figsize(math.ceil(points / columns), columns, size, (_beside(found), 0.4))
    figure = Figure(figsize=inches, layout="constrained")
    writer = PillowWriter(fps=frames_per_second)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.gif"
        writer.setup(figure, made, dpi=100)
        for step in [*range(steps), *[steps - 1] * (_PAUSE - 1)]:
            figure.clear()
            ax = image_grid(found.canvases[step], figure.subplots(), columns, title=f"step {step + 1} of {steps}")
            for name, boxes in found.windows.items():
                for index, box in enumerate(boxes[step]):
                    _frame(ax, box, divmod(index, columns), size, _COLOURS[name])
            _legend(ax, found.windows)
            writer.grab_frame()
        writer.finish()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, made.read_bytes())
    return path


def _draw(model: Drawer, guide: Any, x: Tensor | None, count: int, seed: int) -> _Steps:
    """Runs the model once, on latents of the guide or of the prior."""
    image_shape(tuple(attribute_of(model, "model", "data_shape")))
    require_count("count", count)
    if (guide is None) != (x is None):
        given, missing = ("x", "guide") if guide is None else ("guide", "x")
        raise ArgumentError(f"{given} is given without {missing}; give both, or neither for draws from the prior")
    draw = attribute_of(model, "model", "drawings")
    if x is not None:
        require_data(x, tuple(model.data_shape))
        intensities(x, "x")
    with evaluating(model, guide, seed=seed) as device:
        z = model.prior().sample((count,)) if x is None else guide(x[:count].to(device))
        states = draw(z)
        canvases = torch.stack([model.on(state.canvas).mean for state in states[1:]])
        outputs = [state.memory.output.expand(len(z), -1) for state in states]
        windows = {  # a step reads as the output before it says, and writes by its own
            name: torch.stack([_box(attention, output) for output in chosen]).cpu()
            for name, attention, chosen in (
                ("reads", getattr(guide, "attention", None), outputs[:-1]),
                ("writes", model.attention, outputs[1:]),
            )
            if attention is not None
        }
    return _Steps(canvases.float().cpu().clamp(0.0, 1.0), windows)


def _box(attention: Any, output: Tensor) -> Tensor:
    """Column and row of the upper left and of the lower right filter, and the filters' scale: `n x 5` pixels."""
    grid = attention(output)
    reach = (attention.size - 1) / 2 * grid.stride
    return torch.stack(
        [grid.x - reach, grid.y - reach, grid.x + reach, grid.y + reach, grid.variance.sqrt()], dim=-1
    ).float()


def _frame(ax: Axes, box: Tensor, tile: tuple[int, int], size: tuple[int, int], colour: str) -> None:
    """The window of a step on the picture in a row and column of a grid of pictures, cut off at the picture's edge."""
    (row, column), (height, width) = tile, size
    left, top, right, bottom, scale = box.tolist()
    # A filter's centre is that of a pixel where it is a whole number, so that pixel 1 lies between the edges 0 and 1.
    left, right = (min(max(edge, 0.0), float(width)) for edge in (left - 1.0, right))
    top, bottom = (min(max(edge, 0.0), float(height)) for edge in (top - 1.0, bottom))
    corner = (column * (width + PADDING) + left - 0.5, row * (height + PADDING) + top - 0.5)
    line = min(0.5 + scale, 3.0)
    ax.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=colour, linewidth=line))


def _beside(found: _Steps) -> float:
    """Inches for what is written beside the pictures."""
    return 1.1 if found.windows else 0.1


def _legend(ax: Axes, windows: dict[str, Tensor]) -> None:
    """What the colours of the frames say."""
    if windows:
        handles = [Line2D([], [], color=_COLOURS[name], label=name) for name in windows]
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
