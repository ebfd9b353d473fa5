"""Contours, rank histograms and ECDF differences: what is drawn is what was computed."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from torch.distributions import Independent, MultivariateNormal, Normal

from pyrovae.errors import ArgumentError, DataError
from pyrovae.evaluation.calibration import SBC
from pyrovae.plots.posterior import contour_panels, ecdf_difference, posterior_contours, rank_histogram

TRUE = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))


def lines(ax):
    """The guide's contours, outermost first, each as its longest path."""
    drawn = ax.collections[-1]
    return [max(path.to_polygons(closed_only=False), key=len) for path in drawn.get_paths()]


@pytest.mark.parametrize("form", ["distribution", "function", "draws"])
def test_contours_enclose_their_mass(form):
    torch.manual_seed(0)
    guide = Independent(Normal(torch.zeros(2), 0.8), 1)
    given = {"distribution": guide, "function": lambda z: guide.log_prob(z) + 3.0, "draws": guide.sample((100_000,))}
    ax = posterior_contours(TRUE.log_prob, given[form], Figure().subplots())
    drawn = lines(ax)
    assert len(drawn) == 3
    for mass, line in zip((0.95, 0.8, 0.5), drawn, strict=True):
        radius = 0.8 * (-2 * np.log(1 - mass)) ** 0.5  # of a two-dimensional Normal
        found = np.linalg.norm(line, axis=1)
        tolerance = 0.15 if form == "draws" else 0.02
        assert abs(found - radius).max() < tolerance


def test_exact_guide_lies_on_the_true_contours():
    ax = posterior_contours(TRUE.log_prob, TRUE, Figure().subplots(), limits=((-4, 4), (-4, 4)))
    for mass, line in zip((0.95, 0.8, 0.5), lines(ax), strict=True):
        distance = np.einsum("ni,ij,nj->n", line, TRUE.precision_matrix.numpy(), line)
        np.testing.assert_allclose(distance, -2 * np.log(1 - mass), rtol=0.03)
    assert ax.get_xlim() == (-4, 4)


def test_panels_share_limits_and_name_the_guides():
    guides = {"mean-field $": Independent(Normal(torch.zeros(2), 0.8), 1), "full rank": TRUE}
    panels = contour_panels(TRUE.log_prob, guides)
    assert [ax.get_title() for ax in panels] == [r"mean-field \$", "full rank"]
    assert panels[0].get_ylabel()
    assert not panels[1].get_ylabel()
    (legend,) = panels[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["posterior", "guide (50%, 80%, 95% of the mass)"]
    plt.close(panels[0].figure)
    own = contour_panels(TRUE.log_prob, guides, Figure().subplots(1, 2))
    assert own[0].get_legend() is not None


def test_true_contours_alone():
    ax = posterior_contours(TRUE.log_prob)
    assert len(ax.collections) == 1
    plt.close(ax.figure)


@pytest.mark.parametrize(
    ("log_density", "guide", "limits", "error", "words"),
    [
        (TRUE.log_prob, 3.0, None, ArgumentError, "guide is a float"),
        (TRUE.log_prob, torch.zeros(500, 3), None, DataError, r"draws have shape \(500, 3\)"),
        (TRUE.log_prob, torch.full((500, 2), 9.0), None, DataError, "no draw lies within limits"),
        (TRUE.log_prob, torch.zeros(50, 2), None, DataError, "n at least 100"),
        (lambda z: z, None, None, DataError, r"log_density gives log-densities of shape \(\d+, 2\)"),
        (lambda z: z[:, 0].log(), None, None, DataError, "NaN or"),
        (TRUE.log_prob, None, ((3, -3), (-3, 3)), ArgumentError, "limits is"),
    ],
)
def test_bad_densities_are_named(log_density, guide, limits, error, words):
    with pytest.raises(error, match=words):
        posterior_contours(log_density, guide, Figure().subplots(), limits=limits or ((-3, 3), (-3, 3)))


def test_bad_panels_are_named():
    with pytest.raises(ArgumentError, match="guides is empty"):
        contour_panels(TRUE.log_prob, {})
    with pytest.raises(ArgumentError, match="axes holds 3 Axes for 1 guides"):
        contour_panels(TRUE.log_prob, {"one": TRUE}, Figure().subplots(1, 3))


def found(latents=2, simulations=300):
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(100, (simulations, latents), generator=generator)
    ranks[:, 0] = (ranks[:, 0] - 50) // 3 + 50  # far too wide
    return SBC(ranks, tuple(f"z[{i}]" for i in range(latents)), 99, 20)


def test_bars_are_the_counts():
    one = found()
    for latent, index in ((0, 0), ("z[1]", 1), (1, 1)):
        ax = rank_histogram(one, latent, Figure().subplots())
        assert [bar.get_height() for bar in ax.containers[0]] == one.counts[:, index].tolist()
        assert ax.get_title() == f"Ranks of z[{index}]"
    with pytest.raises(ArgumentError, match=r"latent is 'w'; there are: z\[0\], z\[1\]"):
        rank_histogram(one, "w")
    with pytest.raises(ArgumentError, match="latent is 2"):
        rank_histogram(one, 2)


def test_curves_are_the_ecdf_minus_the_uniform_one_and_the_band_its_envelope():
    one = found()
    ax = ecdf_difference(one, Figure().subplots(), coverage=0.9)
    uniform = np.arange(1, 100) / 100
    for index, line in enumerate(ax.lines[1:]):
        np.testing.assert_allclose(line.get_ydata(), one.ecdf[:, index].numpy() - uniform)
        assert line.get_label() == f"z[{index}]"
    (band,) = [part for part in ax.collections if isinstance(part, PolyCollection)]
    low, high = one.envelope(0.9)
    drawn = band.get_paths()[0].vertices[:, 1]
    assert drawn.max() == pytest.approx(float((high - torch.as_tensor(uniform)).max()))
    assert drawn.min() == pytest.approx(float((low - torch.as_tensor(uniform)).min()))
    plain, above = one.ecdf[:, 0].numpy() - uniform, (high - torch.as_tensor(uniform)).numpy()
    assert (plain > above).any()  # too wide: it leaves the band


def test_many_latents_share_a_colour_but_for_those_that_leave_the_band():
    ax = ecdf_difference(found(latents=30), Figure().subplots())
    colours = [line.get_color() for line in ax.lines[1:31]]
    assert colours[0] != max(set(colours), key=colours.count)
    assert [text.get_text() for text in ax.get_legend().get_texts()][1:] == ["30 latents", "those that leave the band"]
