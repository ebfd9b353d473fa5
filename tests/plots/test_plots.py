"""The plots: what is drawn, what is left unchanged, and what the report holds."""

from __future__ import annotations

import base64
import html
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal

from pyrovae import models, plots
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides import AmortizedBernoulli
from pyrovae.models import SigmoidBeliefNet
from pyrovae.plots.images import intensities
from pyrovae.plots.scatter import active_dimensions

HISTORY = [
    {
        "epoch": epoch,
        "bound": -120.0 + 5 * epoch,
        "validation_bound": -118.0 - (epoch - 4) ** 2,
        "log_likelihood": -125.0 + 6 * epoch,
        "kl": 5.0 + epoch,
        "kl/z": 5.0 + epoch,
    }
    for epoch in range(1, 8)
]


class Model(nn.Module):
    """A linear decoder; dropout and a draw from the global generator would betray a careless caller."""

    def __init__(self, data_shape: tuple[int, ...], latent_dim: int = 2) -> None:
        super().__init__()
        self.data_shape, self.latent_dim = data_shape, latent_dim
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(latent_dim, math.prod(data_shape), generator=generator))
        self.dropout = nn.Dropout(0.5)

    def prior(self) -> Independent:
        return Independent(Normal(torch.ones(self.latent_dim), torch.full((self.latent_dim,), 2.0)), 1)

    def decode(self, z: Tensor) -> Independent:
        torch.rand(1)
        logits = self.dropout(z @ self.weight).reshape(*z.shape[:-1], *self.data_shape)
        return Independent(Bernoulli(logits=logits), len(self.data_shape))


class Guide(nn.Module):
    """A linear encoder with dropout; dimension k of the latent space has k + 1 times the scale."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        generator = torch.Generator().manual_seed(1)
        width, latent_dim = math.prod(model.data_shape), model.latent_dim
        scale = torch.arange(1.0, latent_dim + 1) / math.sqrt(width)
        self.weight = nn.Parameter(torch.randn(width, latent_dim, generator=generator) * scale)
        self.dropout = nn.Dropout(0.5)

    def encode(self, x: Tensor) -> Independent:
        torch.rand(1)
        return Independent(Normal(self.dropout(x.flatten(1)) @ self.weight, 1.0), 1)


class Case(SimpleNamespace):
    model: Model
    guide: Guide
    x: Tensor
    y: Tensor


def make(data_shape: tuple[int, ...], latent_dim: int = 2, count: int = 24) -> Case:
    model = Model(data_shape, latent_dim)
    x = torch.rand(count, *data_shape, generator=torch.Generator().manual_seed(2))
    return Case(model=model, guide=Guide(model), x=x, y=torch.arange(count) % 3)


def means(case: Case, x: Tensor) -> Tensor:
    """The decoded posterior means, written out."""
    shape = (-1, *case.model.data_shape)
    return torch.sigmoid(x.flatten(1) @ case.guide.weight @ case.model.weight).detach().reshape(shape)


def panel(ax: Axes, row: int, column: int, size: int = 8) -> np.ndarray:
    """The pixels of one picture of the grid."""
    canvas = np.asarray(ax.images[0].get_array())
    top, left = row * (size + 1), column * (size + 1)
    return canvas[top : top + size, left : left + size]


def as_drawn(event: Tensor) -> np.ndarray:
    return (event.movedim(0, -1) if event.ndim == 3 else event).numpy()


DRAW: dict[str, Callable[[Case, Axes | None], Axes]] = {
    "learning_curves": lambda case, ax: plots.learning_curves(HISTORY, ax),
    "bound_parts": lambda case, ax: plots.bound_parts(HISTORY, ax),
    "image_grid": lambda case, ax: plots.image_grid(case.x, ax),
    "reconstructions": lambda case, ax: plots.reconstructions(case.model, case.guide, case.x, ax),
    "samples": lambda case, ax: plots.samples(case.model, 9, ax),
    "latent_scatter": lambda case, ax: plots.latent_scatter(case.guide, case.x, case.y, ax),
    "manifold": lambda case, ax: plots.manifold(case.model, ax, 4),
    "interpolation": lambda case, ax: plots.interpolation(case.model, case.guide, case.x[0], case.x[1], ax),
}
IMAGES_ONLY = ["image_grid", "reconstructions", "samples", "manifold", "interpolation"]


@pytest.fixture(autouse=True)
def _no_figure_is_left() -> Iterator[None]:
    yield
    plt.close("all")


def test_every_plot_is_under_contract() -> None:
    elsewhere = {"contour_panels", "ecdf_difference", "posterior_contours", "rank_histogram"}  # test_posterior.py
    elsewhere |= {"analogies", "attribute_slider", "attribute_strip", "interpolation_strips", "neighbours"}
    elsewhere |= {"canvas_animation", "canvas_steps", "forecast_bands"}  # test_canvas.py, test_forecast.py
    elsewhere |= {"pit_histogram", "predictive_band", "reliability_diagram", "risk_coverage_curve"}  # of predictions
    elsewhere |= {"class_grid"}  # of a model of labelled data, below
    assert set(DRAW) | {"report"} | elsewhere == set(plots.__all__)


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize("data_shape", [(8, 8), (1, 8, 8), (3, 8, 8)])
class TestContract:
    def test_draws_in_the_given_axes_without_pyplot(self, name: str, data_shape: tuple[int, ...]) -> None:
        figure = Figure(layout="constrained")
        ax = figure.subplots()
        assert DRAW[name](make(data_shape), ax) is ax
        assert ax.get_title() or name == "image_grid"
        assert plt.get_fignums() == []
        figure.draw_without_rendering()

    def test_makes_axes(self, name: str, data_shape: tuple[int, ...]) -> None:
        ax = DRAW[name](make(data_shape), None)
        assert isinstance(ax, Axes)
        assert len(plt.get_fignums()) == 1
        ax.figure.draw_without_rendering()

    @pytest.mark.parametrize("training", [True, False])
    def test_leaves_generator_modes_and_gradients(self, name: str, data_shape: tuple[int, ...], training: bool) -> None:
        case = make(data_shape)
        case.guide.train(training)
        case.model.dropout.train(not training)
        state = torch.get_rng_state()
        DRAW[name](case, Figure().subplots())
        assert torch.equal(torch.get_rng_state(), state)
        assert case.guide.training is training
        assert case.guide.dropout.training is training
        assert case.model.dropout.training is not training
        assert all(weight.grad is None for weight in case.guide.parameters())


@pytest.mark.parametrize("name", IMAGES_ONLY)
def test_only_images_are_drawn(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"data_shape is \(7,\).*only images can be drawn"):
        DRAW[name](make((7,)), Figure().subplots())


def test_modes_come_back_after_an_error() -> None:
    case = make((8, 8))
    case.model.weight = nn.Parameter(torch.zeros(5, 5))
    with pytest.raises(RuntimeError):
        plots.samples(case.model)
    assert case.model.training
    assert case.model.dropout.training


class TestImages:
    def test_grid_holds_each_image_and_white_gaps(self) -> None:
        images = torch.rand(5, 8, 8)
        ax = plots.image_grid(images, columns=3, title="five")
        for index, image in enumerate(images):
            assert np.allclose(panel(ax, index // 3, index % 3), image)
        assert np.all(panel(ax, 1, 2) == 1)
        assert np.all(np.asarray(ax.images[0].get_array())[8] == 1)
        assert ax.images[0].get_clim() == (0.0, 1.0)
        assert ax.get_title() == "five"
        assert list(ax.get_xticks()) == list(ax.get_yticks()) == []

    def test_colours_come_last(self) -> None:
        images = torch.rand(2, 3, 8, 8)
        assert np.allclose(panel(plots.image_grid(images), 0, 1), images[1].movedim(0, -1))

    def test_bytes_are_scaled_and_not_changed(self) -> None:
        images = torch.full((1, 2, 2), 51, dtype=torch.uint8)
        assert torch.allclose(intensities(images), torch.tensor(0.2))
        assert images.dtype == torch.uint8

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.zeros(0, 8, 8), "no pixels"),
            (torch.full((1, 8, 8), math.nan), "not finite"),
            (torch.full((1, 8, 8), 255.0), r"from 255 to 255.*\[0, 1\]"),
        ],
    )
    def test_bad_pixels(self, images: Tensor, message: str) -> None:
        with pytest.raises(DataError, match=message):
            plots.image_grid(images)

    def test_bad_shape_and_columns(self) -> None:
        with pytest.raises(ArgumentError, match=r"data_shape is \(2, 8, 8\)"):
            plots.image_grid(torch.zeros(4, 2, 8, 8))
        with pytest.raises(ArgumentError, match="columns=0"):
            plots.image_grid(torch.zeros(4, 8, 8), columns=0)
        assert plt.get_fignums() == []


class TestCurves:
    def test_draws_the_history(self) -> None:
        training, validation, best = plots.learning_curves(HISTORY).lines
        for line, key in ((training, "bound"), (validation, "validation_bound")):
            assert list(line.get_xdata()) == [row["epoch"] for row in HISTORY]
            assert list(line.get_ydata()) == [row[key] for row in HISTORY]
        assert (list(best.get_xdata()), list(best.get_ydata())) == ([4], [-118.0])
        assert best.get_label() == "best validation: −118.00 in epoch 4"

    def test_units_are_named(self) -> None:
        assert plots.learning_curves(HISTORY).get_ylabel() == "bound, nats per data point"
        assert all("nats per data point" in ax.get_ylabel() for ax in plots.bound_parts(HISTORY).figure.axes)

    def test_one_epoch_without_validation(self) -> None:
        ax = plots.learning_curves([{"epoch": 1, "bound": -3.0}])
        (line,) = ax.lines
        assert line.get_marker() == "o"
        ax.figure.draw_without_rendering()
        plots.bound_parts(HISTORY[:1]).figure.draw_without_rendering()

    def test_validation_in_some_epochs_and_values_that_are_not_finite(self) -> None:
        history = [
            {"epoch": 1, "bound": math.nan, "validation_bound": -9.0},
            {"epoch": 2, "bound": -8.0, "validation_bound": None},
            {"epoch": 3, "bound": -7.0},
            {"epoch": 4, "bound": -6.0, "validation_bound": -7.0},
            {"epoch": 5, "bound": -6.0, "validation_bound": math.nan},
        ]
        _, validation, best = plots.learning_curves(history).lines
        assert list(validation.get_xdata()) == [1, 4]
        assert list(best.get_xdata()) == [4]

    def test_parts(self) -> None:
        history = [row | {"kl/z": row["kl"] - 1, "kl/$w$": 1.0} for row in HISTORY]
        ax = plots.bound_parts(history)
        left, right = ax.figure.axes
        assert list(left.lines[0].get_ydata()) == [row["log_likelihood"] for row in history]
        drawn = [list(line.get_ydata()) for line in right.lines]
        assert drawn == [[row[key] for row in history] for key in ("kl", "kl/$w$", "kl/z")]
        assert right.get_ylim()[0] == 0.0
        assert [text.get_text() for text in ax.get_legend().get_texts()] == [
            "expected log-likelihood (left)",
            "KL divergence, all sites (right)",
            r"KL of \$w\$ (right)",
            "KL of z (right)",
        ]
        ax.figure.draw_without_rendering()

    @pytest.mark.parametrize("function", [plots.learning_curves, plots.bound_parts])
    def test_bad_history(self, function: Callable[..., Axes]) -> None:
        with pytest.raises(DataError, match="history has no rows"):
            function([])
        with pytest.raises(ArgumentError, match="without 'epoch'"):
            function([{"bound": 1.0, "log_likelihood": 1.0, "kl": 1.0}])
        with pytest.raises(ArgumentError, match=r"no '(bound|log_likelihood)'.*its rows hold: epoch, loss"):
            function([{"epoch": 1, "loss": 1.0}])
        assert plt.get_fignums() == []


@pytest.mark.parametrize("data_shape", [(8, 8), (3, 8, 8)])
class TestDecoded:
    def test_reconstructions(self, data_shape: tuple[int, ...]) -> None:
        case = make(data_shape)
        ax = plots.reconstructions(case.model, case.guide, case.x, count=4)
        decoded = means(case, case.x)
        assert ax.images[0].get_array().shape[:2] == (17, 35)
        for column in range(4):
            assert np.allclose(panel(ax, 0, column), as_drawn(case.x[column]))
            assert np.allclose(panel(ax, 1, column), as_drawn(decoded[column]), atol=1e-6)

    def test_interpolation(self, data_shape: tuple[int, ...]) -> None:
        case = make(data_shape)
        ax = plots.interpolation(case.model, case.guide, case.x[3], case.x[7], steps=5)
        decoded = means(case, case.x)
        for column, event in ((0, case.x[3]), (1, decoded[3]), (5, decoded[7]), (6, case.x[7])):
            assert np.allclose(panel(ax, 0, column), as_drawn(event), atol=1e-6)
        # Its decoder is linear before the sigmoid, so the middle is the mean of the logits.
        middle = torch.sigmoid((decoded[3].logit() + decoded[7].logit()) / 2)
        assert np.allclose(panel(ax, 0, 3), as_drawn(middle), atol=1e-5)

    def test_manifold_lies_at_quantiles_of_the_prior(self, data_shape: tuple[int, ...]) -> None:
        case = make(data_shape, latent_dim=3)
        ax = plots.manifold(case.model, size=3, dims=(0, 2))
        quantile = 2.0 * Normal(0.0, 1.0).icdf(torch.tensor(5 / 6)).item()  # the prior is N(1, 2²)
        for row, column, z in (
            (1, 1, [1.0, 1.0, 1.0]),
            (0, 1, [1.0, 1.0, 1.0 + quantile]),
            (2, 0, [1.0 - quantile, 1.0, 1.0 - quantile]),
        ):
            expected = case.model.eval().decode(torch.tensor(z)).mean.detach()
            assert np.allclose(panel(ax, row, column), as_drawn(expected), atol=1e-5)
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent dimension 0", "latent dimension 2")
        assert [label.get_text() for label in ax.get_xticklabels()] == ["−0.9", "1.0", "2.9"]

    def test_samples_follow_the_seed(self, data_shape: tuple[int, ...]) -> None:
        case = make(data_shape)
        drawn = [np.asarray(plots.samples(case.model, 6, seed=seed).images[0].get_array()) for seed in (0, 0, 1)]
        assert np.array_equal(drawn[0], drawn[1])
        assert not np.array_equal(drawn[0], drawn[2])


class TestBinaryCodes:
    @pytest.fixture(params=[(3,), (3, 2)])
    def model(self, request: pytest.FixtureRequest) -> SigmoidBeliefNet:
        return SigmoidBeliefNet(data_shape=(8, 8), layers=request.param)

    def test_a_reconstruction_is_the_mean_over_the_codes(self, model: SigmoidBeliefNet) -> None:
        guide, x = AmortizedBernoulli(model), torch.bernoulli(torch.full((2, 8, 8), 0.5))
        torch.nn.init.normal_(model.decoders[0][0].weight)
        codes = torch.cartesian_prod(*3 * [torch.tensor([0.0, 1.0])])
        with torch.no_grad():
            q = torch.stack([guide.encode(x).log_prob(code).exp() for code in codes])
            exact = torch.einsum("cn,chw->nhw", q, model.decode(codes).mean)
        ax = plots.reconstructions(model, guide, x)
        for column, expected in enumerate(exact):  # 128 pixels, 0.05 their largest standard error
            assert np.allclose(panel(ax, 1, column), expected, atol=0.2)

    def test_samples_come_from_the_top_layer(self, model: SigmoidBeliefNet) -> None:
        with torch.no_grad():
            model.prior_logits.fill_(-50.0)  # no unit of the top layer is on
            for decoder in model.decoders[1:]:
                decoder[0].weight.fill_(50.0)  # and so none below it
            expected = model.decode(torch.zeros(3)).mean
        assert np.allclose(panel(plots.samples(model, 4), 1, 1), expected, atol=1e-6)

    def test_nothing_is_decoded_between_codes(self, model: SigmoidBeliefNet) -> None:
        with pytest.raises(ArgumentError, match="the prior is over discrete codes"):
            plots.manifold(model)
        with pytest.raises(ArgumentError, match="the posterior is over discrete codes"):
            plots.interpolation(model, AmortizedBernoulli(model), torch.zeros(8, 8), torch.ones(8, 8))


class TestPriors:
    def test_a_mixture_has_moments(self) -> None:
        case = make((8, 8))
        components = Independent(Normal(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 1.0), 1)
        case.model.prior = lambda: MixtureSameFamily(Categorical(torch.ones(2)), components)
        labels = plots.manifold(case.model, size=3).get_xticklabels()
        assert labels[2].get_text() == f"{math.sqrt(5) * 0.9674:.1f}"

    def test_a_prior_without_moments_is_sampled(self) -> None:
        class Opaque(Independent):
            @property
            def mean(self) -> Tensor:
                raise NotImplementedError

        case = make((8, 8))
        case.model.prior = lambda: Opaque(Normal(torch.zeros(2), torch.ones(2)), 1)
        labels = plots.manifold(case.model, size=3).get_xticklabels()
        assert float(labels[2].get_text()) == pytest.approx(0.97, abs=0.1)


class TestLatentScatter:
    def test_points_are_posterior_means_by_label(self) -> None:
        case = make((8, 8))
        ax = plots.latent_scatter(case.guide, case.x, case.y)
        expected = (case.x.flatten(1) @ case.guide.weight).detach()
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0", "1", "2"]
        for label, drawn in enumerate(ax.collections):
            assert np.allclose(drawn.get_offsets(), expected[case.y == label], atol=1e-5)

    def test_shows_the_most_active_dimensions_and_says_so(self) -> None:
        case = make((7,), latent_dim=5)
        case.guide.weight.data[:, [0, 2, 4]] *= 0.01
        ax = plots.latent_scatter(case.guide, case.x)
        assert ax.get_xlabel() == "posterior mean, latent dimension 1\n(of 5, one of the two most active)"
        assert "latent dimension 3" in ax.get_ylabel()
        assert ax.get_legend() is None
        expected = (case.x @ case.guide.weight)[:, [1, 3]].detach()
        assert np.allclose(ax.collections[0].get_offsets(), expected, atol=1e-5)

    def test_many_labels(self) -> None:
        case = make((8, 8), count=60)
        ax = plots.latent_scatter(case.guide, case.x, torch.arange(60) % 25)
        assert len(ax.get_legend().get_texts()) == 25
        looks = {(tuple(c.get_facecolor()[0]), len(c.get_paths()[0].vertices)) for c in ax.collections}
        assert len(looks) == 25
        assert len(plots.latent_scatter(case.guide, case.x, torch.arange(60)).figure.axes) == 2

    def test_real_labels_get_a_colour_bar(self) -> None:
        case = make((8, 8))
        ax = plots.latent_scatter(case.guide, case.x, torch.linspace(0, 1, 24))
        assert ax.get_legend() is None
        assert len(ax.figure.axes) == 2

    def test_active_dimensions_are_sorted(self) -> None:
        assert active_dimensions(torch.tensor([[5.0, 0.0, 1.0], [-5.0, 0.0, -6.0], [0.0, 0.1, 0.0]])) == (0, 2)


MISTAKES: dict[str, tuple[type[Exception], str, Callable[[Case], object]]] = {
    "shape of x": (
        DataError,
        r"x has shape \(24, 64\), but must be `n x 8 x 8`",
        lambda c: plots.reconstructions(c.model, c.guide, c.x.flatten(1)),
    ),
    "one x": (
        DataError,
        r"x has shape \(8, 8\).*x\[None\]",
        lambda c: plots.reconstructions(c.model, c.guide, c.x[0]),
    ),
    "no x": (
        DataError,
        "x holds no data points",
        lambda c: plots.reconstructions(c.model, c.guide, c.x[:0]),
    ),
    "x on another scale": (
        DataError,
        r"x has pixels .* must lie in \[0, 1\]",
        lambda c: plots.reconstructions(c.model, c.guide, c.x * 255),
    ),
    "count of x": (
        ArgumentError,
        "count is 0",
        lambda c: plots.reconstructions(c.model, c.guide, c.x, count=0),
    ),
    "no encode": (
        ArgumentError,
        "guide Linear has no 'encode'",
        lambda c: plots.reconstructions(c.model, nn.Linear(1, 1), c.x),
    ),
    "no data_shape": (
        ArgumentError,
        "model Linear has no 'data_shape'",
        lambda c: plots.samples(nn.Linear(1, 1)),
    ),
    "samples": (ArgumentError, "count is 0", lambda c: plots.samples(c.model, 0)),
    "nothing to scatter": (DataError, "x holds no", lambda c: plots.latent_scatter(c.guide, c.x[:0])),
    "length of y": (
        DataError,
        r"y has shape \(3,\).*n=24",
        lambda c: plots.latent_scatter(c.guide, c.x, c.y[:3]),
    ),
    "one dimension to scatter": (
        ArgumentError,
        "latent_dim=1, but this plot needs at least 2",
        lambda c: plots.latent_scatter(make((8, 8), 1).guide, c.x),
    ),
    "one dimension to decode": (
        ArgumentError,
        "latent_dim=1",
        lambda c: plots.manifold(make((8, 8), 1).model),
    ),
    "dims": (ArgumentError, r"dims=\(0, 2\).*0 … 1", lambda c: plots.manifold(c.model, dims=(0, 2))),
    "equal dims": (ArgumentError, "two different", lambda c: plots.manifold(c.model, dims=(1, 1))),
    "size": (ArgumentError, "size is 1", lambda c: plots.manifold(c.model, size=1)),
    "steps": (
        ArgumentError,
        "steps is 1",
        lambda c: plots.interpolation(c.model, c.guide, c.x[0], c.x[1], steps=1),
    ),
    "batch of ends": (
        DataError,
        r"x0 has shape \(2, 8, 8\)",
        lambda c: plots.interpolation(c.model, c.guide, c.x[:2], c.x[1]),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_leave_no_figure(mistake: str) -> None:
    error, message, call = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call(make((8, 8)))
    assert plt.get_fignums() == []


def test_decoded_shape_must_be_data_shape() -> None:
    case = make((8, 8))
    case.model.decode = lambda z: Independent(Normal(torch.zeros(*z.shape[:-1], 64), 1.0), 1)
    with pytest.raises(ArgumentError, match=r"event shape \(64,\), but data_shape is \(8, 8\)"):
        plots.samples(case.model)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", DRAW)
def test_on_cuda(name: str) -> None:
    case = make((8, 8))
    case.guide.cuda()
    case.model.prior = lambda: Independent(Normal(torch.zeros(2).cuda(), torch.ones(2).cuda()), 1)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    DRAW[name](case, Figure().subplots())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])


def make_run(case: Case, **config: object) -> SimpleNamespace:
    return SimpleNamespace(model=case.model, guide=case.guide, history=HISTORY, config=config)


PNG = re.compile(r'<img width="\d+" height="\d+" alt="[^"]+" src="data:image/png;base64,([^"]*)">')


def without_pictures(text: str) -> str:
    return PNG.sub("", text)


class TestReport:
    @pytest.mark.parametrize(("data_shape", "latent_dim"), [((8, 8), 2), ((3, 8, 8), 4)])
    def test_holds_all_pictures_and_nothing_from_outside(
        self, tmp_path: Path, data_shape: tuple[int, ...], latent_dim: int
    ) -> None:
        case = make(data_shape, latent_dim)
        state = torch.get_rng_state()
        path = plots.report(make_run(case), case, tmp_path / "new" / "report.html")
        text = path.read_text(encoding="utf-8")
        pictures = PNG.findall(text)
        assert len(pictures) == text.count("<img") == 7
        assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
        rest = without_pictures(text)
        assert not re.search(r"http|<script|<link|@import|url\(", rest)
        assert "Left out" not in rest
        assert "Model with Guide" in rest
        assert [file.name for file in path.parent.iterdir()] == ["report.html"]
        assert plt.get_fignums() == []
        assert torch.equal(torch.get_rng_state(), state)
        assert case.guide.training

    def test_numbers_configuration_and_history(self, tmp_path: Path) -> None:
        case = make((8, 8))
        run = make_run(case, lr=0.00123456, model={"name": "VAE", "arguments": {"hidden": [200, 200]}})
        metrics = {"test log-likelihood, nats per data point": -86.12345, "points": torch.tensor(10000)}
        text = plots.report(run, case, tmp_path / "report.html", metrics=metrics).read_text(encoding="utf-8")
        for needed in (
            "<dt>test log-likelihood, nats per data point</dt><dd>-86.12</dd>",
            "<dt>points</dt><dd>10,000</dd>",
            '<th scope="row">lr</th><td>0.00123456</td>',
            '<th scope="row">model.arguments.hidden</th><td>[200, 200]</td>',
            '<th scope="col">validation_bound</th>',
            "<td>-127.00</td>",
        ):
            assert needed in text

    def test_escapes_what_it_is_given(self, tmp_path: Path) -> None:
        evil = '<script>alert("x")</script>'
        case = make((8, 8))
        run = make_run(case, **{evil: {evil: evil}}, names=[evil])
        run.history = [row | {evil: 1.0} for row in HISTORY]
        path = plots.report(run, case, tmp_path / "report.html", metrics={evil: evil})
        text = path.read_text(encoding="utf-8")
        assert "<script" not in text
        assert html.escape(evil) in text

    def test_says_what_it_left_out_for_vectors(self, tmp_path: Path) -> None:
        case = make((7,))
        text = plots.report(make_run(case), case, tmp_path / "report.html").read_text(encoding="utf-8")
        assert len(PNG.findall(text)) == 3
        assert plt.get_fignums() == []
        for name in ("Reconstructions", "Interpolation", "Samples", "Latent grid"):
            assert f'<th scope="row">{name}</th><td>data_shape is (7,), but only images' in text

    def test_says_what_it_left_out_without_encoder(self, tmp_path: Path) -> None:
        case = make((8, 8), latent_dim=3)
        run = make_run(case)
        run.guide = nn.Linear(1, 1)
        text = plots.report(run, case, tmp_path / "report.html").read_text(encoding="utf-8")
        assert len(PNG.findall(text)) == 4
        assert text.count("guide Linear has no &#x27;encode&#x27;") == 3

    def test_one_data_point_without_label_and_no_history(self, tmp_path: Path) -> None:
        case = make((8, 8), count=1)
        run = make_run(case)
        run.history = []
        data = SimpleNamespace(x=case.x, y=None)
        text = plots.report(run, data, tmp_path / "report.html").read_text(encoding="utf-8")
        assert "an interpolation needs 2" in text
        assert text.count("history has no rows") == 2
        assert len(PNG.findall(text)) == 4

    @pytest.mark.parametrize("broken", ["replace", "fsync"])
    def test_an_error_while_writing_leaves_the_old_report(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError("disk full")

        path = tmp_path / "report.html"
        path.write_text("old", encoding="utf-8")
        case = make((7,))
        monkeypatch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="disk full"):
            plots.report(make_run(case), case, path)
        assert path.read_text(encoding="utf-8") == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_bad_arguments(self, tmp_path: Path) -> None:
        case = make((8, 8))
        with pytest.raises(ArgumentError, match="is the folder"):
            plots.report(make_run(case), case, tmp_path)
        with pytest.raises(DataError, match=r"data\.x holds no data points"):
            plots.report(make_run(case), SimpleNamespace(x=case.x[:0], y=None), tmp_path / "report.html")


def test_class_grid_has_a_row_each_class() -> None:
    """A model that ignores its latent has equal columns, and one that ignores the label equal rows."""
    model = models.ConditionalVAE(data_shape=(4, 4), latent_dim=2, classes=3, hidden=())
    for inputs, axis in ((slice(0, 2), 1), (slice(2, None), 0)):
        with torch.no_grad():
            weight = model.decoder[0].weight
            torch.nn.init.normal_(weight)
            weight[:, inputs] = 0.0
        shown = plots.class_grid(model, 5, Figure().subplots()).images[0].get_array()
        tiles = np.pad(np.asarray(shown)[..., 0] if np.ndim(shown) == 3 else np.asarray(shown), ((0, 1), (0, 1)))
        tiles = tiles.reshape(3, 5, 5, 5).swapaxes(1, 2)[..., :4, :4]
        same = tiles.std(axis).max()
        assert same < 1e-6 < tiles.std(1 - axis).max()
    with pytest.raises(ArgumentError, match="no 'classes'"):
        plots.class_grid(models.VAE(data_shape=(4, 4), latent_dim=2, hidden=(8,)))
    with pytest.raises(ArgumentError, match="needs the label of each data point; plots.class_grid"):
        plots.samples(model)
