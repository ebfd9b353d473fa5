"""Guides start where the model says, unless they are told otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch
from pyro.infer.autoguide import init_to_value

import pyrovae
from pyrovae.guides import FullRank, MeanField, PointEstimate
from pyrovae.models import BayesianLinearRegression, GaussianMixture, LinearMixedModel


@pytest.fixture(autouse=True)
def parameters_in_modules() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        yield


def clusters() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    middle = torch.tensor([[-4.0, 1.0], [3.0, 0.0], [3.0, 8.0]]).repeat_interleave(40, 0)
    return middle + 0.7 * torch.randn(120, 2, generator=generator)


@pytest.mark.parametrize("covariance", ["full", "diagonal", "tied"])
def test_a_mixture_starts_at_its_mode(covariance: str) -> None:
    """The values are those of expectation-maximization, in the coordinates of the model's sites."""
    x = clusters()
    model = GaussianMixture(components=3, features=2, covariance=covariance)
    values = model.start_values(x)
    found = pyrovae.models.expectation_maximization(model, x, restarts=3, iterations=100)
    with pyro.condition(data=values), pyro.poutine.trace() as seen:
        precisions = model.precisions()
    assert set(seen.trace.nodes) <= set(values)
    exact = 1 / found.covariances if covariance == "diagonal" else torch.linalg.inv(found.covariances)
    torch.testing.assert_close(precisions, exact.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(values["means"], found.means.float())
    guide = MeanField(model)
    guide(x)
    torch.testing.assert_close(guide.median(x)["means"], values["means"], atol=1e-4, rtol=1e-4)


def test_without_data_or_mode_the_prior_gives_the_start() -> None:
    assert GaussianMixture(components=3, features=2).start_values() == {}
    assert GaussianMixture(components=3, features=2, concentration=0.5).start_values(clusters()) == {}


def test_a_value_that_is_given_comes_first() -> None:
    x, y = torch.linspace(0, 1, 9)[:, None], torch.linspace(0, 3, 9)
    model = BayesianLinearRegression(features=1)
    for init, expected in (
        (None, model.posterior(x, y).loc),
        (
            init_to_value(values={"weights": torch.tensor([7.0]), "noise_precision": torch.ones(())}),
            torch.tensor([7.0]),
        ),
    ):
        guide = FullRank(model, init_loc_fn=init)
        guide(x, y)
        torch.testing.assert_close(guide.median(x, y)["weights"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parametrization", ["centred", "non-centred"])
def test_a_mixed_model_starts_at_its_estimates(parametrization: str) -> None:
    """The values, put into the model, give the estimated coefficients of every level."""
    generator = torch.Generator().manual_seed(1)
    days = torch.arange(6.0).repeat(8)
    X = torch.stack([torch.ones(48), days], dim=1)
    who = torch.arange(8).repeat_interleave(6)
    model = LinearMixedModel(2, {"who": (8, 2)}, parametrization=parametrization)
    Z, index = model.stack({"who": X}, {"who": who})
    effects = torch.randn(8, 2, generator=generator) * torch.tensor([3.0, 0.5])
    y = (X * (torch.tensor([10.0, 2.0]) + effects[who])).sum(1) + 0.3 * torch.randn(48, generator=generator)
    found = model.estimate(X, Z, index, y)
    guide = PointEstimate(model)
    start = guide(X, Z, index, y)
    with pyro.condition(data=start):
        made = model._effects("who")
    torch.testing.assert_close(made, found.effects["who"].float(), atol=0.02, rtol=0.01)
    torch.testing.assert_close(start["beta"], found.beta.float(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert set(model.start_values(X, Z, index, y)) == set(start)
    assert model.start_values(X, Z, index) == {}
