"""One recipe a published figure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pyrovae
from pyrovae.datasets import Splits
from pyrovae.errors import unknown_name
from pyrovae.guides import AmortizedNormal
from pyrovae.models import VAE

__all__ = ["RECIPES", "Recipe", "Result", "reproduce"]


@dataclass(frozen=True)
class Recipe:
    """A published figure and how to reach it.

    Args:
        about: what is trained on what, in one line.
        dataset: name of the data set, with its fixed (S) or dynamic (D) binarization.
        paper: the published test NLL in nats per data point.
        source: where it was published.
        build: makes model and guide for the training images.
        objective: makes the objective.
        fit: arguments of :func:`pyrovae.fit`.
        note: how the recipe departs from the paper's.
    """

    about: str
    dataset: str
    paper: float
    source: str
    build: Callable[[Splits], tuple[Any, Any]]
    objective: Callable[[], pyrovae.Objective]
    fit: dict[str, Any]
    note: str


@dataclass(frozen=True)
class Result:
    """What a recipe measured.

    Args:
        nll: test negative log-likelihood in nats per data point (an upper bound in expectation).
        nll_error: its Monte Carlo standard error, in nats per data point.
        bound: validation bound at the parameters evaluated, in nats per data point.
        epoch: the epoch of these parameters.
        active_units: number of active latent dimensions on the test data.
        fit_seconds: time of the fit.
        evaluation_seconds: time of the evaluation.
    """

    nll: float
    nll_error: float
    bound: float
    epoch: int
    active_units: int
    fit_seconds: float
    evaluation_seconds: float


def _vae_1l(data: Splits) -> tuple[Any, Any]:
    """784-200-200-50, tanh, one stochastic layer; the output starts at the mean of the training data."""
    model = VAE(data_shape=tuple(data.event_shape), latent_dim=50, hidden=(200, 200), activation="tanh")
    return model.initialize_output(data.train.x), AmortizedNormal(model)


RECIPES: dict[str, Recipe] = {
    "vae-1l-static": Recipe(
        about="VAE, one stochastic layer of 50, two hidden layers of 200 tanh, fixed binarized MNIST (S)",
        dataset="binarized-mnist",
        paper=88.71,
        source="Burda et al. 2016, appendix D, VAE with k = 1, https://arxiv.org/abs/1509.00519",
        build=_vae_1l,
        objective=lambda: pyrovae.ELBO(gradient="stl"),
        fit={
            "epochs": 400,
            "batch_size": 100,
            "lr": 2e-3,
            "schedule": "cosine",
            "early_stopping": 400,
            "checkpoint_every": 20,
        },
        note="400 epochs of batches of 100 with a cosine schedule and the best validation bound, instead of 3280 epochs"
        " of batches of 20; sticking-the-landing gradient instead of the pathwise one",
    ),
}


def reproduce(
    name: str,
    data: Splits | None = None,
    *,
    particles: int = 5000,
    seed: int = 0,
    run_dir: Path | None = None,
    progress: bool = True,
    **changes: Any,
) -> Result:
    """Runs a recipe: trains, keeps the best epoch by validation bound, evaluates on the whole test split.

    Args:
        name: of the recipe.
        data: splits to use instead of the recipe's data set.
        particles: number K of particles of the evaluation.
        seed: of initialisation, training and evaluation.
        run_dir: run folder; a run in it is continued.
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
    data = data if data is not None else pyrovae.datasets.load(recipe.dataset)
    torch.manual_seed(seed)
    model, guide = recipe.build(data)
    start = time.perf_counter()
    run = pyrovae.fit(
        model,
        guide,
        data.train,
        validation=data.validation,
        objective=recipe.objective(),
        seed=seed,
        run_dir=run_dir,
        resume=run_dir is not None,
        progress=progress,
        **{**recipe.fit, **changes},
    )
    trained = time.perf_counter()
    test = pyrovae.evaluation.log_likelihood(model, guide, data.test, particles, seed=seed, progress=progress)
    best = max(run.history, key=lambda row: row["validation_bound"])
    return Result(
        nll=-test.mean,
        nll_error=test.mean_error,
        bound=best["validation_bound"],
        epoch=best["epoch"],
        active_units=pyrovae.evaluation.active_units(guide, data.test).count,
        fit_seconds=trained - start,
        evaluation_seconds=time.perf_counter() - trained,
    )
