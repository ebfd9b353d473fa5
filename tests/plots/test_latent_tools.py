"""Figures of walks through a latent space: what is drawn where, the slider, and mistakes."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal

from pyrovae import latent
from pyrovae.errors import ArgumentError, DataError
from pyrovae.plots import latent_tools


class Both(nn.Module):
    """A linear decoder and a linear encoder; dropout and a draw would betray a careless caller."""

    def __init__(self, data_shape: tuple[int, ...] = (4, 5)) -> None:
        super().__init__()
        self.data_shape, self.latent_dim = data_shape, 2
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, *data_shape, generator=generator))
        self.dropout = nn.Dropout(0.5)

    def decode(self, z: Tensor) -> Independent:
        torch.rand(1)
        logits = self.dropout(torch.tensordot(z, self.weight, 1))
        return Independent(Bernoulli(logits=logits), len(self.data_shape))

    def encode(self, x: Tensor) -> Independent:
        torch.rand(1)
        mean = self.dropout(torch.tensordot(x, self.weight.movedim(0, -1), len(self.data_shape)))
        return Independent(Normal(mean, 1.0), 1)

    def means(self, x: Tensor) -> Tensor:
        return torch.tensordot(x, self.weight.movedim(0, -1), len(self.data_shape)).detach()

    def pixels(self, z: Tensor) -> Tensor:
        return torch.tensordot(z, self.weight, 1).sigmoid().detach()


@pytest.fixture(params=[(4, 5), (1, 4, 5), (3, 4, 5)])
def both(request: pytest.FixtureRequest) -> Both:
    return Both(request.param)


def images(both: Both, count: int = 3, seed: int = 1) -> Tensor:
    return torch.rand(count, *both.data_shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _no_figure_is_left() -> Iterator[None]:
    yield
    plt.close("all")


def assert_tile(ax: Axes, row: int, column: int, expected: Tensor) -> None:
    """The picture in a row and a column of the grid."""
    canvas = np.asarray(ax.images[0].get_array())
    tile = canvas[row * 5 : row * 5 + 4, column * 6 : column * 6 + 5]
    if expected.dim() == 3:
        expected = expected[0] if len(expected) == 1 else expected.movedim(0, -1)
    np.testing.assert_allclose(tile, expected, atol=1e-5)


def labels(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels()]


@pytest.mark.parametrize("path", ["straight", "great-circle"])
def test_interpolation_strips(both: Both, path: latent.Path) -> None:
    x0, x1 = images(both), images(both, seed=2)
    ax = latent_tools.interpolation_strips(both, both, x0, x1, steps=4, path=path)
    z = latent.interpolate(both.means(x0), both.means(x1), 4, path)
    for row in range(3):
        assert_tile(ax, row, 0, x0[row])
        assert_tile(ax, row, 5, x1[row])
        for k in range(4):
            assert_tile(ax, row, 1 + k, both.pixels(z[row, k]))
    assert labels(ax) == ["data", "0 %", "100 %", "data"]
    assert path.replace("-", " ") in ax.get_title()


def test_attribute_strip(both: Both) -> None:
    x, vector = images(both), torch.tensor([0.5, -1.0])
    ax = latent_tools.attribute_strip(both, both, x, vector, strengths=(-1.5, 0, 2))
    for row in range(3):
        assert_tile(ax, row, 0, x[row])
        for column, strength in enumerate((-1.5, 0, 2), start=1):
            assert_tile(ax, row, column, both.pixels(both.means(x)[row] + strength * vector))
    assert labels(ax) == ["data", "−1.5", "0", "+2"]


@pytest.mark.parametrize("metric", ["euclidean", "kl"])
def test_neighbours(both: Both, metric: latent.Metric) -> None:
    data = images(both, 9)
    found = latent.nearest_neighbours(both, data[4:6], data, 3, metric).indices
    assert found[:, 0].tolist() == [4, 5]
    ax = latent_tools.neighbours(both, data[4:6], data, k=3, metric=metric)
    for row in range(2):
        assert_tile(ax, row, 0, data[4 + row])
        for rank in range(3):
            assert_tile(ax, row, 1 + rank, data[found[row, rank]])
    assert labels(ax) == ["query", "1", "2", "3"]


def test_analogies(both: Both) -> None:
    a, b, c = (images(both, seed=seed) for seed in (1, 2, 3))
    ax = latent_tools.analogies(both, both, a, b, c)
    for row in range(3):
        for column, data in enumerate((a, b, c)):
            assert_tile(ax, row, column, data[row])
        answer = both.means(c)[row] + both.means(b)[row] - both.means(a)[row]
        assert_tile(ax, row, 3, both.pixels(answer))
    assert labels(ax) == ["a", "b", "c", "c + b − a"]


def test_the_slider_redraws_as_it_moves(both: Both) -> None:
    vector = torch.tensor([2.0, -1.0])
    box = latent_tools.attribute_slider(both, both, images(both), vector, limits=(-1.0, 3.0), step=0.5)
    slider, shown = box.children
    assert (slider.value, slider.min, slider.max, slider.step) == (0.0, -1.0, 3.0, 0.5)
    start = shown.value
    slider.value = 3.0
    moved = shown.value
    assert imread(io.BytesIO(moved), format="png").shape == imread(io.BytesIO(start), format="png").shape
    assert moved != start
    slider.value = 0.0
    assert shown.value == start
    assert plt.get_fignums() == []
    assert latent_tools.attribute_slider(both, both, images(both), vector, limits=(0.5, 1.0)).children[0].value == 0.5


def test_the_slider_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both()
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ArgumentError, match="needs ipywidgets, which is not installed: pip install"):
        latent_tools.attribute_slider(both, both, images(both), torch.ones(2))


DRAW: dict[str, Callable[[Both, Axes | None], Axes]] = {
    "strips": lambda b, ax: latent_tools.interpolation_strips(b, b, images(b), images(b, seed=2), ax),
    "attribute": lambda b, ax: latent_tools.attribute_strip(b, b, images(b), torch.ones(2), ax),
    "neighbours": lambda b, ax: latent_tools.neighbours(b, images(b), images(b, 9, 2), ax),
    "analogies": lambda b, ax: latent_tools.analogies(b, b, images(b), images(b), images(b), ax),
}


@pytest.mark.parametrize("name", DRAW)
def test_draws_in_the_given_axes_and_changes_nothing(name: str) -> None:
    both, ax, state = Both(), Figure().subplots(), torch.get_rng_state()
    assert DRAW[name](both, ax) is ax
    assert plt.get_fignums() == []
    assert torch.equal(torch.get_rng_state(), state)
    assert both.training
    assert DRAW[name](both, None).figure.number in plt.get_fignums()


X = torch.rand(3, 4, 5)
MISTAKES: dict[str, tuple[type[Exception], str, Callable[[Both], object]]] = {
    "vectors": (
        ArgumentError,
        "only images can be drawn",
        lambda b: latent_tools.attribute_strip(Both((7,)), b, X, torch.ones(2)),
    ),
    "count": (
        ArgumentError,
        "x0 holds 3 data points and x1 2",
        lambda b: latent_tools.interpolation_strips(b, b, X, X[:2]),
    ),
    "shape": (
        DataError,
        r"x1 has shape \(3, 5, 4\)",
        lambda b: latent_tools.interpolation_strips(b, b, X, X.mT),
    ),
    "scale": (
        DataError,
        r"x has pixels .* must lie in \[0, 1\]",
        lambda b: latent_tools.attribute_strip(b, b, 255 * X, torch.ones(2)),
    ),
    "strengths": (
        ArgumentError,
        "strengths is empty",
        lambda b: latent_tools.attribute_strip(b, b, X, torch.ones(2), strengths=()),
    ),
    "vector": (
        ArgumentError,
        r"vector has shape \(3,\)",
        lambda b: latent_tools.attribute_strip(b, b, X, torch.ones(3)),
    ),
    "no encode": (
        ArgumentError,
        "guide Linear has no 'encode'",
        lambda b: latent_tools.attribute_strip(b, nn.Linear(1, 1), X, torch.ones(2)),
    ),
    "limits": (
        ArgumentError,
        r"limits is \(1.0, 1.0\)",
        lambda b: latent_tools.attribute_slider(b, b, X, torch.ones(2), limits=(1.0, 1.0)),
    ),
    "analogies": (
        ArgumentError,
        "a, b and c hold 3, 3 and 1",
        lambda b: latent_tools.analogies(b, b, X, X, X[:1]),
    ),
    "k": (ArgumentError, "k is 8, but data holds 3", lambda b: latent_tools.neighbours(b, X, X)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_leave_no_figure(mistake: str) -> None:
    error, message, call = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call(Both())
    assert plt.get_fignums() == []
