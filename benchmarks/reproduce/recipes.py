"""One recipe a published figure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import pyrovae
from pyrovae.datasets import Splits
from pyrovae.errors import unknown_name
from pyrovae.guides import AmortizedBernoulli, AmortizedDRAW, AmortizedFlow, AmortizedNormal, BottomUp
from pyrovae.models import DRAW, VAE, HierarchicalVAE, SigmoidBeliefNet
from pyrovae.training import Run

__all__ = ["RECIPES", "Recipe", "Result", "reproduce"]


@dataclass(frozen=True)
class Recipe:
    """A published figure and how to reach it.

    Args:
        about: what is trained on what, in one line.
        dataset: name of the data set, with its fixed (S) or dynamic (D) binarization.
        paper: the published figure, in the unit of ``figure``; ``None`` where none was published for such a model.
        source: where it was published.
        build: makes model and guide for the training images.
        objective: makes the objective.
        fit: arguments of :func:`pyrovae.fit`.
        note: how the recipe departs from the paper's.
        figure: what is compared: ``"nll"``, the test negative log-likelihood in nats per data point,
            ``"negative_elbo"``, the negative evidence lower bound of the test data, likewise, or
            ``"bits_per_dimension"``, that likelihood in bits per element of a data point.
        start: name of the recipe whose result is the starting point, or ``None`` to begin at random.
        load: arguments of :func:`pyrovae.datasets.load`.
        particles: number K of particles of the evaluation.
    """

    about: str
    dataset: str
    paper: float | None
    source: str
    build: Callable[[Splits], tuple[Any, Any]]
    objective: Callable[[], pyrovae.Objective]
    fit: dict[str, Any]
    note: str
    figure: Literal["nll", "negative_elbo", "bits_per_dimension"] = "nll"
    start: str | None = None
    load: dict[str, Any] = field(default_factory=dict)
    particles: int = 5000


@dataclass(frozen=True)
class Result:
    """What a recipe measured.

    Args:
        nll: test negative log-likelihood in nats per data point (an upper bound in expectation).
        nll_error: its Monte Carlo standard error, in nats per data point.
        negative_elbo: negative evidence lower bound of the test data, in nats per data point.
        negative_elbo_error: its Monte Carlo standard error, in nats per data point.
        bits_per_dimension: the negative log-likelihood in bits per element of a data point.
        particles: number K of particles of these estimates.
        bound: validation bound at the parameters evaluated, in nats per data point.
        epoch: the epoch of these parameters.
        active_units: number of active latent dimensions on the test data; ``None`` for a guide without ``encode``.
        fit_seconds: time of all gradient steps, with those of the recipe it starts from.
        evaluation_seconds: time of the evaluation.
    """

    nll: float
    nll_error: float
    negative_elbo: float
    negative_elbo_error: float
    bits_per_dimension: float
    particles: int
    bound: float
    epoch: int
    active_units: int | None
    fit_seconds: float
    evaluation_seconds: float


def _vae_1l(data: Splits) -> tuple[Any, Any]:
    """784-200-200-50, tanh, one stochastic layer; the output starts at the mean of the training data."""
    model = VAE(data_shape=tuple(data.event_shape), latent_dim=50, hidden=(200, 200), activation="tanh")
    return model.initialize_output(data.train.x), AmortizedNormal(model)


_MNIST_FIT = {"batch_size": 100, "lr": 2e-3, "schedule": "cosine", "checkpoint_every": 20}
_BURDA = "Burda et al. 2016, appendix D, https://arxiv.org/abs/1509.00519"
_VAE_1L = "one stochastic layer of 50, two hidden layers of 200 tanh, fixed binarized MNIST (S)"


def _burda(about: str, paper: float, objective: Callable[[], pyrovae.Objective], **settings: Any) -> Recipe:
    """A row of Burda's table of one stochastic layer on fixed binarized MNIST."""
    return Recipe(
        about=f"{about}, {_VAE_1L}",
        dataset="binarized-mnist",
        paper=paper,
        source=_BURDA,
        build=_vae_1l,
        objective=objective,
        **settings,
    )


def _best_of(epochs: int, **settings: Any) -> dict[str, Any]:
    """Arguments of fit that run all epochs and keep the best one by validation bound."""
    return {**_MNIST_FIT, "epochs": epochs, "early_stopping": epochs, **settings}


def _shorter(epochs: int) -> str:
    return (
        f"{epochs} epochs of batches of 100 with a cosine schedule and the best validation bound, instead of 3280"
        " epochs of batches of 20"
    )


def _vae_2l(data: Splits) -> tuple[Any, Any]:
    """784-200-200-100-100-100-50, tanh, two stochastic layers of 100 and 50."""
    model = HierarchicalVAE(data_shape=tuple(data.event_shape))
    return model.initialize_output(data.train.x), BottomUp(model)


def _draw(data: Splits) -> tuple[Any, Any]:
    """Ten glimpses of 10 latents each, read through 2 x 2 filters and written through 5 x 5."""
    model = DRAW(data_shape=tuple(data.event_shape), read_size=2, write_size=5)
    return model.initialize_output(data.train.x), AmortizedDRAW(model)


def _residual_vae(data: Splits, likelihood: str) -> tuple[Any, Any]:
    """Convolutions of 64 and 32 channels with a residual block at each level, and 32 latents."""
    model = VAE(
        data_shape=tuple(data.event_shape),
        latent_dim=32,
        hidden=(256,),
        activation="elu",
        likelihood=likelihood,
        network="conv",
        blocks=1,
    )
    return model.initialize_output(data.train.x), AmortizedNormal(model)


def _sigmoid_belief_net(data: Splits, layers: Sequence[int] = (200,), hidden: Sequence[int] = ()) -> tuple[Any, Any]:
    """Layers of binary units, linear both ways, or with hidden layers of leaky ReLU."""
    model = SigmoidBeliefNet(tuple(data.event_shape), layers, hidden, "leaky_relu")
    return model.initialize_output(data.train.x), AmortizedBernoulli(model)


def _flow_vae(data: Splits, *, flow: str, **settings: Any) -> tuple[Any, Any]:
    """The network of :func:`_vae_1l`, with a flow of four steps after the encoder's Gaussian."""
    model, _ = _vae_1l(data)
    return model, AmortizedFlow(model, flow, depth=4, **settings)


def _posterior(about: str, paper: float, build: Callable[[Splits], tuple[Any, Any]]) -> Recipe:
    """A row of van den Berg's table of posteriors, with one network for all of them."""
    return Recipe(
        about=f"VAE with {about}, {_VAE_1L}",
        dataset="binarized-mnist",
        paper=paper,
        source="van den Berg et al. 2018, table 1, https://arxiv.org/abs/1803.05649",
        build=build,
        objective=partial(pyrovae.ELBO, gradient="pathwise"),
        fit=_best_of(200),
        note="fully connected 784-200-200-50 instead of gated convolutions and 64 latents, 4 steps of flow instead of"
        " up to 16; 200 epochs of batches of 100 with a cosine schedule and the best validation bound instead of up to"
        " 2000",
        figure="negative_elbo",
    )


_VIMCO = "VIMCO with 5 particles"


def _belief_net(
    about: str,
    paper: float,
    how: str,
    objective: Callable[[], pyrovae.Objective],
    build: Callable[[Splits], tuple[Any, Any]],
    epochs: int,
    **fit: Any,
) -> Recipe:
    """A figure of Yin and Zhou's table of models with binary latents."""
    return Recipe(
        about=f"Sigmoid belief net, {about}, {how}, fixed binarized MNIST (S)",
        dataset="binarized-mnist",
        paper=paper,
        source="Yin & Zhou 2019, table 2a, ARM, https://arxiv.org/abs/1807.11143",
        build=build,
        objective=objective,
        fit=_best_of(epochs, **fit),
        note=f"another estimator than the paper's; {epochs} epochs of batches of 100 with a cosine schedule and the"
        " best validation bound",
    )


def _residual(what: str, epochs: int, likelihood: str = "discretized-logistic-mixture", **settings: Any) -> Recipe:
    """A convolutional VAE of images."""
    return Recipe(
        about=f"VAE with residual convolutions, {what}",
        build=partial(_residual_vae, likelihood=likelihood),
        objective=partial(pyrovae.ELBO, gradient="stl"),
        fit=_best_of(epochs, batch_size=50, lr=1e-3, clip_norm=100.0),
        note=f"{epochs} epochs of batches of 50 with a cosine schedule and the best validation bound",
        particles=20,
        **settings,
    )


_GRADIENTS = {"": "pathwise", "-dreg": "dreg"}  # of a recipe's name

RECIPES: dict[str, Recipe] = {
    "vae-1l-static": _burda(
        "VAE",
        88.71,
        objective=partial(pyrovae.ELBO, gradient="stl"),
        fit=_best_of(400),
        note=f"{_shorter(400)}; sticking-the-landing gradient instead of the pathwise one",
    ),
    **{
        f"iwae-5{suffix}-static": _burda(
            f"IWAE, k = 5, {gradient} gradient",
            87.63,
            objective=partial(pyrovae.IWAE, 5, gradient),
            fit=_best_of(200),
            note=_shorter(200),
        )
        for suffix, gradient in _GRADIENTS.items()
    },
    **{
        f"iwae-50{suffix}-static": _burda(
            f"IWAE, k = 50, {gradient} gradient",
            87.10,
            objective=partial(pyrovae.IWAE, 50, gradient),
            fit=_best_of(15, lr=1e-3),
            note=f"15 epochs of k = 50 at a learning rate of 1e-3 after iwae-5{suffix}-static ({_shorter(200)})",
            start=f"iwae-5{suffix}-static",
        )
        for suffix, gradient in _GRADIENTS.items()
    },
    "posterior-diagonal-static": _posterior("a diagonal Gaussian posterior", 86.55, _vae_1l),
    "posterior-planar-static": _posterior("a planar flow", 86.06, partial(_flow_vae, flow="planar")),
    "posterior-iaf-static": _posterior(
        "an IAF with 320 units", 84.20, partial(_flow_vae, flow="iaf", options={"hidden": [320]})
    ),
    "posterior-sylvester-static": _posterior(
        "an orthogonal Sylvester flow with 32 columns", 83.32, partial(_flow_vae, flow="sylvester")
    ),
    **{
        f"iwae-{particles}-2l-dynamic": Recipe(
            about=f"IWAE, k = {particles}, dreg gradient, two stochastic layers of 100 and 50, MNIST binarized anew at"
            " every draw (D)",
            dataset="mnist",
            paper=paper,
            source="Burda et al. 2016, table 1, https://arxiv.org/abs/1509.00519",
            build=_vae_2l,
            objective=partial(pyrovae.IWAE, particles, "dreg"),
            **settings,
        )
        for particles, paper, settings in (
            (5, 83.89, {"fit": _best_of(200), "note": _shorter(200)}),
            (
                50,
                82.90,
                {
                    "fit": _best_of(15, lr=1e-3),
                    "note": f"15 epochs of k = 50 at a learning rate of 1e-3 after iwae-5-2l-dynamic ({_shorter(200)})",
                    "start": "iwae-5-2l-dynamic",
                },
            ),
        )
    },
    "draw-static": Recipe(
        about="DRAW with attention, 10 glimpses, fixed binarized MNIST (S)",
        dataset="binarized-mnist",
        paper=80.97,
        source="Gregor et al. 2015, table 2, https://arxiv.org/abs/1502.04623",
        build=_draw,
        objective=partial(pyrovae.ELBO, kl="analytic"),
        fit=_best_of(45, clip_norm=10.0),
        note="10 glimpses of 10 latents instead of 64 of 100; 45 epochs of batches of 100 with a cosine schedule",
        figure="negative_elbo",
        particles=20,
    ),
    **{
        f"sbn-{name}-static": _belief_net(
            "200 binary latents, linear", 107.2, how, objective, _sigmoid_belief_net, epochs=100
        )
        for name, how, objective in (
            ("vimco", _VIMCO, partial(pyrovae.IWAE, 5, "vimco")),
            ("rws", "reweighted wake-sleep with 5 particles", partial(pyrovae.ReweightedWakeSleep, 5)),
            ("score", "score function with 5 particles", partial(pyrovae.ELBO, 5, "score")),
        )
    },
    **{
        f"sbn-{name}-static": _belief_net(
            about,
            paper,
            _VIMCO,
            partial(pyrovae.IWAE, 5, "vimco"),
            partial(_sigmoid_belief_net, **arguments),
            epochs=60,
            lr=1e-3,
        )
        for name, about, paper, arguments in (
            ("nonlinear", "200 binary latents, two hidden layers of 200", 98.4, {"hidden": (200, 200)}),
            ("2l", "two layers of 200 binary latents, linear", 96.7, {"layers": (200, 200)}),
        )
    },
    "residual-omniglot": _residual(
        "Omniglot binarized anew at every draw (D)",
        20,
        "bernoulli",
        dataset="omniglot",
        paper=106.31,
        source="Burda et al. 2016, table 1, VAE of two fully connected layers, another split of these characters",
    ),
    **{
        f"residual-{dataset}": _residual(
            f"{dataset}, mixtures of 8-bit logistics",
            epochs,
            dataset=dataset,
            paper=None,
            source="none was published for such a network",
            figure="bits_per_dimension",
            load={"binarization": "none"},
        )
        for dataset, epochs in (("frey-faces", 100), ("olivetti", 100), ("fashion-mnist", 4), ("cifar10-subset", 30))
    },
}


def reproduce(
    name: str,
    data: Splits | None = None,
    *,
    particles: int | None = None,
    seed: int = 0,
    runs: Path | None = None,
    progress: bool = True,
    **changes: Any,
) -> Result:
    """Runs a recipe: trains, keeps the best epoch by validation bound, evaluates on the whole test split.

    Args:
        name: of the recipe.
        data: splits to use instead of the recipe's data set.
        particles: number K of particles of the evaluation; ``None`` for the recipe's.
        seed: of initialisation, training and evaluation.
        runs: folder of run folders; a run of this recipe, or of the one it starts from, is continued or reused there.
        progress: whether to show progress bars.
        **changes: arguments of :func:`pyrovae.fit` that replace the recipe's.

    Returns:
        A :class:`Result`.

    Raises:
        ArgumentError: there is no recipe of that name.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    recipe = RECIPES[name]
    data = data if data is not None else pyrovae.datasets.load(recipe.dataset, **recipe.load)
    particles = recipe.particles if particles is None else particles
    *before, run = _trained(name, data, {"seed": seed, "progress": progress, **changes}, runs)
    start = time.perf_counter()
    test = pyrovae.evaluation.log_likelihood(run.model, run.guide, data.test, particles, seed=seed, progress=progress)
    encodes = hasattr(run.guide, "encode")
    best = max(run.history, key=lambda row: row["validation_bound"])
    return Result(
        nll=-test.mean,
        nll_error=test.mean_error,
        negative_elbo=-test.mean_elbo,
        negative_elbo_error=test.mean_elbo_error,
        bits_per_dimension=-test.mean / (data.event_shape.numel() * math.log(2)),
        particles=particles,
        bound=best["validation_bound"],
        epoch=best["epoch"],
        active_units=pyrovae.evaluation.active_units(run.guide, data.test).count if encodes else None,
        fit_seconds=sum(row["seconds"] for stage in (*before, run) for row in stage.history),
        evaluation_seconds=time.perf_counter() - start,
    )


def _trained(name: str, data: Splits, changes: dict[str, Any], runs: Path | None) -> list[Run]:
    """The runs of a recipe and of those it starts from, which come first; all train the same model and guide."""
    recipe = RECIPES[name]
    if recipe.start is None:
        before = []
        torch.manual_seed(changes["seed"])
        model, guide = recipe.build(data)
    else:
        before = _trained(recipe.start, data, changes, runs)
        model, guide = before[-1].model, before[-1].guide
    folder = None if runs is None else runs / f"{name}-seed{changes['seed']}"
    run = pyrovae.fit(
        model,
        guide,
        data.train,
        validation=data.validation,
        objective=recipe.objective(),
        run_dir=folder,
        resume=folder is not None,
        **{**recipe.fit, **changes},
    )
    return [*before, run]
