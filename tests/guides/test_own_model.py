"""``amortize``: what its guide keeps between calls, and the plate of the data."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyrovae
from pyrovae.guides.own_model import AmortizedModel, amortize

SIZE = 60


def counts(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, torch.ones(())))
        pyro.sample("x", dist.Poisson(rate), obs=x[:, 0])


def of_fixed_size(x: Tensor) -> None:
    """A batch stands for SIZE data points."""
    with pyro.plate("data", SIZE, subsample=x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def of_the_batch(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def made(model: object, rows: int) -> AmortizedModel:
    torch.manual_seed(0)
    return amortize(model, nn.Linear(2, 4), example=torch.randn(SIZE, 2)[:rows])


@pytest.mark.parametrize("joint", [False, True])
def test_a_guide_is_copied_after_a_call(joint: bool) -> None:
    """No transform of a constrained latent holds on to the values of the last call."""
    x = torch.ones(5, 1)
    guide = amortize(counts, nn.Linear(1, 4), joint=joint, example=x)
    guide(x)
    again = copy.deepcopy(guide)
    torch.testing.assert_close(again.propose(x), guide.propose(x))


@pytest.mark.parametrize("joint", [False, True])
def test_a_flow_without_an_inverse_scores_its_draw_through_the_transform_of_the_site(joint: bool) -> None:
    x = torch.ones(5, 1)
    guide = amortize(counts, nn.Linear(1, 4), "flow", flow="planar", depth=1, context=2, joint=joint, example=x)
    bound = pyrovae.ELBO(4, gradient="pathwise").differentiable_loss(counts, guide, x)
    bound.backward()
    assert all(parameter.grad.isfinite().all() for parameter in guide.parameters() if parameter.grad is not None)


def test_looking_at_the_model_leaves_the_encoder_as_it_was() -> None:
    encoder = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(encoder.state_dict())
    guide = amortize(counts, encoder, example=torch.ones(1, 1))  # one row is too few for batch norm to train on
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert guide.encoder.training
    assert encoder[1].training


@pytest.mark.parametrize("model", [of_fixed_size, of_the_batch])
def test_a_guide_built_on_all_data_scales_minibatches_as_the_model_does(model: object) -> None:
    """The same estimate, draw by draw, as from a guide built on a minibatch."""
    x = torch.randn(10, 2)
    bounds = []
    for rows in (SIZE, 10):
        guide = made(model, rows)
        torch.manual_seed(1)
        bounds.append(pyrovae.ELBO(50).estimate(model, guide, x).bound)
    torch.testing.assert_close(*bounds)


def test_the_first_call_may_be_under_particles() -> None:
    guide = amortize(of_the_batch, nn.Linear(2, 4))
    with pyro.plate("particles", 3, dim=-2):
        values = guide(torch.zeros(5, 2))
    assert values["z"].shape == (3, 5, 2)
