"""Forecast bands: what is drawn is what was computed."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pyrovae.errors import ArgumentError, DataError
from pyrovae.plots.forecast import forecast_bands


def bands(ax):
    """Lower and upper edge of each band at each time, narrowest first."""
    found = []
    for drawn in ax.collections:
        vertices = drawn.get_paths()[0].vertices
        times = np.unique(vertices[:, 0])
        found.append([(vertices[vertices[:, 0] == t, 1].min(), vertices[vertices[:, 0] == t, 1].max()) for t in times])
    return np.array(found)


def test_draws_the_series_and_the_quantiles():
    torch.manual_seed(0)
    series, draws = torch.randn(20), 3.0 + torch.randn(4000, 5)
    ax = forecast_bands(series, draws, Figure().subplots(), start=1871, masses=(0.9, 0.5), future=torch.ones(2))
    observed, median, followed = ax.get_lines()
    np.testing.assert_array_equal(observed.get_xdata(), np.arange(1871, 1891))
    np.testing.assert_allclose(observed.get_ydata(), series)
    np.testing.assert_array_equal(median.get_xdata(), np.arange(1890, 1896))
    np.testing.assert_allclose(median.get_ydata()[1:], np.median(draws, axis=0), atol=1e-3)
    np.testing.assert_array_equal(followed.get_xdata(), [1891, 1892])
    drawn = bands(ax)
    assert drawn.shape == (2, 6, 2)
    np.testing.assert_allclose(drawn[:, 0], float(series[-1]), rtol=1e-6)  # they start at the last value
    for edges, mass in zip(drawn, (0.5, 0.9), strict=True):
        exact = np.quantile(draws.double(), [0.5 - mass / 2, 0.5 + mass / 2], axis=0)
        np.testing.assert_allclose(edges[1:].T, exact, rtol=1e-6)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "observed",
        "median",
        "50%",
        "90%",
        "what followed",
    ]


def test_makes_a_figure_of_its_own():
    ax = forecast_bands(torch.zeros(3), torch.zeros(10, 2), title="costs in $")
    assert ax.get_title() == r"costs in \$"
    plt.close(ax.figure)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"series": torch.zeros(1, 3)}, DataError, "series has shape"),
        ({"draws": torch.zeros(3)}, DataError, "draws has shape"),
        ({"draws": torch.full((2, 3), torch.nan)}, DataError, "NaN"),
        ({"future": torch.zeros(4)}, DataError, "future has 4"),
        ({"masses": (0.5, 1.0)}, ArgumentError, "masses"),
    ],
)
def test_refuses_what_it_cannot_draw(arguments, error, said):
    given = {"series": torch.zeros(5), "draws": torch.zeros(10, 3)} | arguments
    with pytest.raises(error, match=said):
        forecast_bands(given.pop("series"), given.pop("draws"), Figure().subplots(), **given)
