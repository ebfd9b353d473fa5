"""One contract over all registered models, each with its own guide and objective; a new one is covered by a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

import pyrovae
from pyrovae import models
from pyrovae.objectives import Objective
from pyrovae.registry import GUIDES, MODELS, OBJECTIVES, configuration
from pyrovae.training.programs import local_params

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A model and what its statements take.

    Args:
        model: builds it.
        inputs: what comes before the data among the arguments of the model, for so many data points.
        generates: whether the model can be run without data.
        whole: whether a fit takes all data at once: the latents are shared by them, or each has parameters of its own.
    """

    model: Callable[[], Any]
    inputs: Callable[[int], Batch] = lambda size: ()
    generates: bool = True
    whole: bool = False

    def data(self, model: Any, size: int = 24) -> Batch:
        """Arguments of model and guide: data that the model generates, after its inputs."""
        inputs = self.inputs(size)
        if not self.generates:
            return (torch.bernoulli(torch.full((size, *model.data_shape), 0.4)),)
        with torch.no_grad(), local_params(model):
            made = model(*inputs) if inputs else model(size=size)
        return (*inputs, made)


def labels(size: int) -> Batch:
    return (torch.arange(size) % 3,)


def mixed(size: int) -> Batch:
    design = torch.stack([torch.ones(size), torch.linspace(0.0, 3.0, size)], dim=1)
    return design, design, (torch.arange(size) % 4).unsqueeze(1)


LEVEL = dict(transition=[[1.0]], observation=[[1.0]], state_covariance=[[0.5]], observation_covariance=[[1.0]], steps=6)

CASES: dict[str, Case] = {
    "VAE": Case(lambda: models.VAE(data_shape=(5,), latent_dim=2, hidden=(8,))),
    "SphericalVAE": Case(lambda: models.SphericalVAE(data_shape=(5,), latent_dim=3, hidden=(8,))),
    "HierarchicalVAE": Case(lambda: models.HierarchicalVAE(data_shape=(5,), layers=(3, 2))),
    "DRAW": Case(lambda: models.DRAW(data_shape=(4, 4), steps=2, latent_dim=2, hidden=8, read_size=2, write_size=2)),
    "SigmoidBeliefNet": Case(lambda: models.SigmoidBeliefNet(data_shape=(5,), layers=(3, 2))),
    "Autoencoder": Case(lambda: models.Autoencoder(data_shape=(5,), latent_dim=2, hidden=(8,)), generates=False),
    "TwoBernoulli": Case(models.TwoBernoulli),
    "GaussianMixture": Case(lambda: models.GaussianMixture(components=2, features=2), whole=True),
    "EightSchools": Case(models.EightSchools, whole=True),
    "LinearGaussianStateSpace": Case(lambda: models.LinearGaussianStateSpace(**LEVEL), whole=True),
    "StochasticVolatility": Case(lambda: models.StochasticVolatility(steps=6), whole=True),
    "GrowthModel": Case(lambda: models.GrowthModel(steps=5)),
    "DeepKalmanFilter": Case(lambda: models.DeepKalmanFilter(features=2, latent_dim=2, hidden=(8,), steps=5)),
    "BayesianLinearRegression": Case(
        lambda: models.BayesianLinearRegression(features=2), lambda size: (torch.randn(size, 2),), whole=True
    ),
    "GaussianProcess": Case(models.GaussianProcess, lambda size: (torch.linspace(0, 3, size)[:, None],), whole=True),
    "HierarchicalNormal": Case(
        lambda: models.HierarchicalNormal(groups=3), lambda size: (torch.arange(size) % 3,), whole=True
    ),
    "BNN": Case(lambda: models.BNN([2, 8, 1]), lambda size: (torch.randn(size, 2),), whole=True),
    "LinearMixedModel": Case(lambda: models.LinearMixedModel(fixed=2, groups={"g": (4, 2)}), mixed, whole=True),
}
COMPILED_ELSEWHERE = ("VAE", "SphericalVAE", "SigmoidBeliefNet", "GrowthModel")
"""Those of tests/training and test_spherical_vae.py; GrowthModel's guide and loop are those of DeepKalmanFilter."""
BY_INDUCTOR = ("StochasticVolatility", "SemiSupervisedVAE")
"""By a custom operator, run under each class; the steps of others are traced (those of a BNN and of an Autoencoder go
through Inductor in test_function_space.py and test_autoencoder.py). Recurrent ones take a minute each there."""
LABELLED = ("ConditionalVAE", "SemiSupervisedVAE")  # whose label comes after the data
CASES |= {
    name: Case(lambda name=name: getattr(models, name)(data_shape=(5,), latent_dim=2, classes=3, hidden=(8,)))
    for name in LABELLED
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
        pyro.set_rng_seed(0)
        yield


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def built(name: str) -> tuple[Any, Any, Objective, Batch]:
    """Model, its own guide and objective, and data."""
    case = CASES[name]
    model = case.model()
    guide = GUIDES.build({"name": model.default_guide, "arguments": {}}, model)
    objective = OBJECTIVES.build(model.default_objective)
    data = case.data(model)
    return model, guide, objective, (*data, *labels(len(data[0]))) if name in LABELLED else data


def test_every_registered_model_is_under_the_contract() -> None:
    assert set(CASES) == set(MODELS)


def test_what_it_generates_it_takes_and_the_log_joint_is_finite(name: str) -> None:
    model, _, _, data = built(name)
    trace = poutine.trace(model).get_trace(*data)
    trace.compute_log_prob()
    assert trace.log_prob_sum().isfinite()
    assert [site for site in trace.observation_nodes if site != "data"]
    assert all(torch.isfinite(part.double()).all() for part in data)


def test_every_parameter_gets_a_gradient(name: str) -> None:
    model, guide, objective, data = built(name)
    with local_params(model, guide):
        objective.differentiable_loss(model, guide, *data).backward()
    for prefix, program in (("model", model), ("guide", guide)):
        for parameter, value in program.named_parameters():
            assert value.grad is not None, f"{prefix}.{parameter}"
            assert value.grad.isfinite().all(), f"{prefix}.{parameter}"
            assert value.grad.abs().sum() > 0, f"{prefix}.{parameter}"


def test_particles_vectorize(name: str) -> None:
    model, guide, _, data = built(name)
    if name == "SemiSupervisedVAE":  # its objective sums the labels out
        pytest.skip("the label that is missing is a site of the guide alone; test_semi_supervised_vae.py has particles")
    with local_params(model, guide), torch.no_grad():
        weights = pyrovae.log_weights(model, guide, *data, particles=4)
    assert weights.log_w.shape[0] == 4
    assert weights.log_w.isfinite().all()
    if name not in ("Autoencoder", "GaussianProcess"):  # which draw nothing
        assert not torch.equal(weights.log_w[0], weights.log_w[1])


def test_the_predictive_of_the_prior_vectorizes(name: str) -> None:
    if not CASES[name].generates or name == "LinearGaussianStateSpace":
        pytest.skip("generates nothing without data, or has its states summed out when it does")
    model = CASES[name].model()
    inputs = CASES[name].inputs(6)
    with torch.no_grad(), local_params(model):
        drawn = Predictive(model, num_samples=3)(*inputs)
    assert drawn
    assert all(value.shape[0] == 3 and value.double().isfinite().all() for value in drawn.values())


def test_epochs_raise_the_bound_and_the_run_is_rebuilt(name: str, tmp_path: Any) -> None:
    model, guide, objective, data = built(name)
    size = len(data[0]) if CASES[name].whole else 8
    if hasattr(model, "start_values"):  # a guide that starts at the mode has little to learn
        model.start_values = lambda *args: {}
    run = pyrovae.fit(
        model, guide, data, objective=objective, epochs=30, batch_size=size, lr=0.01, compile=False, run_dir=tmp_path,
        progress=False,
    )  # fmt: skip
    bounds = [row["bound"] for row in run.history]
    assert sum(bounds[-5:]) > sum(bounds[:5])
    assert configuration(model) is not None
    again = pyrovae.load(tmp_path, example=data)
    for (parameter, mine), (_, theirs) in zip(guide.named_parameters(), again.guide.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=parameter)


def test_float64(name: str) -> None:
    model, _, _, data = built(name)
    wide = tuple(part.double() if part.is_floating_point() else part for part in data)
    with torch.no_grad():
        trace = poutine.trace(model.double()).get_trace(*wide)
        trace.compute_log_prob()
    assert trace.log_prob_sum().dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in COMPILED_ELSEWHERE])
def test_compiled_steps_are_the_eager_ones(name: str, request: pytest.FixtureRequest) -> None:
    """Losses; a step that falls back to the eager one fails here, as a warning."""
    if name in BY_INDUCTOR:
        request.getfixturevalue("inductor")
    losses = []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, objective, data = built(name)
        pyro.set_rng_seed(1)
        run = pyrovae.fit(
            model, guide, data, objective=objective, epochs=4, batch_size=len(data[0]), compile=compile, progress=False
        )
        losses.append([row["bound"] for row in run.history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
