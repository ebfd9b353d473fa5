"""Pictures of a recurrent decoder at work: what is drawn where, and what is left unchanged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides.draw import AmortizedDRAW
from pyrovae.models import VAE
from pyrovae.models.draw import DRAW
from pyrovae.plots.canvas import canvas_animation, canvas_steps
from pyrovae.plots.style import PALETTE

READS, WRITES = to_rgba(PALETTE[0]), to_rgba(PALETTE[2])


@pytest.fixture(autouse=True)
def _no_figure_is_left() -> Iterator[None]:
    plt.close("all")  # that another test left
    yield
    plt.close("all")


def make(data_shape: tuple[int, ...] = (8, 8), steps: int = 4, read: int | None = None, write: int | None = None):
    torch.manual_seed(0)
    model = DRAW(data_shape, steps, latent_dim=2, hidden=6, read_size=read, write_size=write)
    return model, AmortizedDRAW(model), torch.rand(5, *data_shape).round()


def panel(ax: Axes, row: int, column: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    """The pixels of one picture of the grid."""
    canvas = np.asarray(ax.images[0].get_array())
    top, left = row * (size[0] + 1), column * (size[1] + 1)
    return canvas[top : top + size[0], left : left + size[1]]


def frames(ax: Axes, colour: tuple[float, ...]) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle) and patch.get_edgecolor() == colour]


@pytest.mark.parametrize("data_shape", [(8, 8), (1, 8, 8), (3, 8, 8)])
@pytest.mark.parametrize("given", [True, False])
class TestContract:
    def test_draws_in_the_given_axes_without_pyplot(self, data_shape: tuple[int, ...], given: bool) -> None:
        model, guide, x = make(data_shape, read=2, write=3)
        figure = Figure(layout="constrained")
        ax = figure.subplots()
        assert canvas_steps(model, *((guide, x) if given else (None, None)), ax) is ax
        assert ax.get_title()
        assert plt.get_fignums() == []
        figure.draw_without_rendering()

    def test_makes_axes(self, data_shape: tuple[int, ...], given: bool) -> None:
        model, guide, x = make(data_shape)
        ax = canvas_steps(model, *((guide, x) if given else (None, None)))
        assert len(plt.get_fignums()) == 1
        ax.figure.draw_without_rendering()

    def test_leaves_generator_modes_and_gradients(self, data_shape: tuple[int, ...], given: bool) -> None:
        model, guide, x = make(data_shape)
        guide.eval()
        state = torch.get_rng_state()
        canvas_steps(model, *((guide, x) if given else (None, None)), Figure().subplots())
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        assert not guide.training
        assert all(parameter.grad is None for parameter in (*model.parameters(), *guide.parameters()))


@pytest.mark.parametrize("read", [None, 2])
def test_rows_are_data_points_and_columns_are_steps(read: int | None) -> None:
    model, guide, x = make(read=read, write=3)
    ax = canvas_steps(model, guide, x, Figure().subplots(), count=3, seed=7)
    torch.manual_seed(7)
    with torch.no_grad():
        wanted = model.canvases(guide(x[:3])).numpy()
    for row in range(3):
        for step in range(4):
            assert np.allclose(panel(ax, row, step), wanted[step, row])
        assert np.allclose(panel(ax, row, 4), x[row])
    assert ax.images[0].get_array().shape == (3 * 9 - 1, 5 * 9 - 1)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3", "4", "data"]


def test_without_data_it_draws_from_the_prior() -> None:
    model, _, _ = make()
    ax = canvas_steps(model, ax=Figure().subplots(), count=2, seed=7)
    torch.manual_seed(7)
    wanted = model.generate(2)
    assert np.allclose(panel(ax, 1, 3), wanted[3, 1])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("steps", "columns", "shown"),
    [(4, 10, [1, 2, 3, 4]), (64, 4, [1, 22, 43, 64]), (9, 5, [1, 3, 5, 7, 9]), (9, 1, [9])],
)
def test_steps_are_evenly_spaced_and_the_last_one_is_shown(steps: int, columns: int, shown: list[int]) -> None:
    model, _, _ = make(steps=steps)
    ax = canvas_steps(model, ax=Figure().subplots(), count=2, columns=columns)
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(step) for step in shown]
    torch.manual_seed(0)
    assert np.allclose(panel(ax, 1, len(shown) - 1), model.generate(2)[-1, 1])


def still(attention: torch.nn.Module, x: float, y: float, spread: float) -> None:
    """A window that stays: a grid around (x, y) of [-1, 1]², ``spread`` times as wide as the picture."""
    with torch.no_grad():
        attention.place[0].weight.zero_()
        attention.place[0].bias.copy_(torch.tensor([x, y, math.log(4.0), math.log(spread), 0.0]))


def test_frames_surround_the_filters() -> None:
    model, guide, x = make((6, 10), read=2, write=4)
    still(guide.attention, 0.0, 0.0, 5 / 9)  # columns 3 to 8 and rows 1 to 6, around the centre (5.5, 3.5)
    still(model.attention, 1.0, 1.0, 3 / 9)  # around (11, 7), so that three quarters of it lie outside
    ax = canvas_steps(model, guide, x, Figure().subplots(), count=2)
    for colour, box in ((READS, (1.5, -0.5, 6.0, 6.0)), (WRITES, (8.0, 4.0, 1.5, 1.5))):
        found = frames(ax, colour)
        assert len(found) == 2 * 4
        for index, frame in enumerate(found):
            step, row = divmod(index, 2)
            wanted = (box[0] + step * 11, box[1] + row * 7, *box[2:])
            assert (*frame.get_xy(), frame.get_width(), frame.get_height()) == pytest.approx(wanted)
            assert frame.get_linewidth() == pytest.approx(2.5)  # filters of scale 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["reads", "writes"]


def test_a_step_reads_where_the_one_before_it_says() -> None:
    model, guide, x = make(read=2, write=2)
    for each in (guide.attention, model.attention):
        torch.nn.init.normal_(each.place[0].weight, std=0.2)
    ax = canvas_steps(model, guide, x, Figure().subplots(), count=1, seed=3)
    torch.manual_seed(3)
    with torch.no_grad():
        outputs = [drawing.memory.output.expand(1, -1) for drawing in model.drawings(guide(x[:1]))]
        for colour, attention, chosen in (
            (READS, guide.attention, outputs[:-1]),
            (WRITES, model.attention, outputs[1:]),
        ):
            for step, (frame, output) in enumerate(zip(frames(ax, colour), chosen, strict=True)):
                grid = attention(output)
                left = min(max(float(grid.x - grid.stride / 2) - 1.0, 0.0), 8.0)
                assert frame.get_x() == pytest.approx(step * 9 + left - 0.5, abs=1e-4)


def test_without_attention_there_are_no_frames() -> None:
    model, guide, x = make()
    ax = canvas_steps(model, guide, x, Figure().subplots())
    assert not ax.patches
    assert ax.get_legend() is None


@pytest.mark.parametrize("data_shape", [(8, 8), (3, 6, 10)])
def test_an_animation_has_a_frame_a_step_and_stays_at_the_last(tmp_path: Path, data_shape: tuple[int, ...]) -> None:
    model, guide, x = make(data_shape, read=2, write=3)
    state = torch.get_rng_state()
    path = canvas_animation(model, tmp_path / "new" / "drawn.gif", guide, x, count=4, frames_per_second=4)
    assert path == tmp_path / "new" / "drawn.gif"
    assert list(path.parent.iterdir()) == [path]
    with Image.open(path) as image:
        durations = []
        for frame in range(image.n_frames):
            image.seek(frame)
            durations.append(image.info["duration"])
        assert image.n_frames >= 4  # equal frames at the end may be one that stays
    assert sum(durations) == 8 * 250
    assert torch.equal(torch.get_rng_state(), state)
    assert plt.get_fignums() == []


def test_an_animation_of_draws_from_the_prior(tmp_path: Path) -> None:
    model, _, _ = make(write=3)
    assert canvas_animation(model, str(tmp_path / "drawn.GIF"), count=5).stat().st_size > 1000


class TestBadInput:
    def test_what_does_not_draw(self, tmp_path: Path) -> None:
        model, _, _ = make()
        with pytest.raises(ArgumentError, match="model VAE has no 'drawings'"):
            canvas_steps(VAE((8, 8), latent_dim=2, hidden=(8,)))
        with pytest.raises(ArgumentError, match=r"data_shape is \(7,\).*only images can be drawn"):
            canvas_steps(DRAW((7,), steps=2, latent_dim=2, hidden=6))
        with pytest.raises(
            ArgumentError, match="path is .*drawn.mp4; an animation is written as GIF: give .*drawn.gif"
        ):
            canvas_animation(model, tmp_path / "drawn.mp4")
        assert not list(tmp_path.iterdir())

    def test_arguments(self, tmp_path: Path) -> None:
        model, guide, x = make()
        with pytest.raises(ArgumentError, match="x is given without guide"):
            canvas_steps(model, x=x)
        with pytest.raises(ArgumentError, match="guide is given without x"):
            canvas_animation(model, tmp_path / "drawn.gif", guide)
        with pytest.raises(ArgumentError, match="count is 0"):
            canvas_steps(model, count=0)
        with pytest.raises(ArgumentError, match="columns is 0"):
            canvas_steps(model, columns=0)
        with pytest.raises(ArgumentError, match="frames_per_second is 0"):
            canvas_animation(model, tmp_path / "drawn.gif", frames_per_second=0)

    def test_data(self) -> None:
        model, guide, x = make()
        with pytest.raises(DataError, match=r"x has shape \(5, 4, 4\)"):
            canvas_steps(model, guide, torch.zeros(5, 4, 4))
        with pytest.raises(DataError, match="no data points"):
            canvas_steps(model, guide, x[:0])
        with pytest.raises(DataError, match="x has pixels from 0 to 255"):
            canvas_steps(model, guide, 255 * x)
