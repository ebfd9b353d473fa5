"""Approximation and amortization gaps against probabilistic PCA, where both are known."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import PPCA, LinearGuide
from pyro.nn import PyroModule
from torch import nn

import pyrovae
from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.evaluation.gaps import gaps, local_parameters
from pyrovae.guides import AmortizedBernoulli, AmortizedFlow
from pyrovae.guides.own_model import amortize
from pyrovae.models import VAE, SigmoidBeliefNet
from pyrovae.training.programs import local_params


@pytest.fixture
def ppca():
    """A model whose posterior is correlated, and its encoder of the best diagonal Gaussian."""
    model = PPCA()
    guide = LinearGuide(model)
    with torch.no_grad():
        model.W.copy_(torch.tensor([[1.0, 0.2], [0.5, 0.9], [-0.7, 0.0], [0.3, 0.6]]))
        model.b.zero_()
        precision = torch.eye(2) + model.W.mT @ model.W / model.s**2
        guide.A.copy_(torch.linalg.solve(precision, model.W.mT / model.s**2))
        guide.c.zero_()
        guide.t = precision.diagonal().rsqrt()  # reverse KL: the conditional, not the marginal, variance
        x = model.evidence().sample((40,))
    return model, guide, x


def exact_gaps(model, guide, x):
    with torch.no_grad():
        posterior = model.posterior(x)
        scale = posterior.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt().expand_as(posterior.mean)
        optimal = model.elbo(x, dist.Normal(posterior.mean, scale).to_event(1))
        return model.evidence().log_prob(x) - optimal, optimal - model.elbo(x, guide.encode(x))


def assert_within(found, exact, error, bias):
    """40 points, one beyond 4.5 standard errors once in 3 700 seeds; their mean beyond 4 once in 16 000."""
    assert ((found - exact).abs() < 4.5 * error + bias).all()
    assert (found - exact).mean().abs() < 4 * error.square().sum().sqrt() / len(error) + bias


@pytest.mark.slow
def test_both_gaps_are_the_exact_ones(ppca):
    model, guide, x = ppca
    with torch.no_grad():  # the mean is off, and the scale twice the best
        guide.A.mul_(0.8)
        guide.t = 2 * guide.t
    found = gaps(model, guide, x, batch_size=25)
    approximation, amortization = exact_gaps(model, guide, x)
    assert approximation.mean() > 0.08
    assert amortization.mean() > 0.5
    # What is left of the optimization is below 2e-4 nats.
    assert_within(found.approximation, approximation, found.approximation_error, 2e-4)
    assert_within(found.amortization, amortization, found.amortization_error, 2e-4)
    torch.testing.assert_close(found.inference, found.log_likelihood - found.elbo_amortized)
    torch.testing.assert_close(found.amortization, found.elbo_optimal - found.elbo_amortized)
    exact = model.evidence().log_prob(x).detach()
    assert (found.log_likelihood - exact).abs().max() < 0.2
    assert f"amortization gap {float(found.amortization.mean()):.3f}" in repr(found)
    assert found.notes == ()


def test_optimal_encoder_has_no_amortization_gap(ppca):
    model, guide, x = ppca
    found = gaps(model, guide, x)
    approximation, amortization = exact_gaps(model, guide, x)
    assert amortization.abs().max() < 1e-4
    assert found.amortization.abs().max() < 5e-3  # what 500 steps on 10 draws leave of it
    assert found.amortization.abs().mean() < 1e-3
    assert_within(found.approximation, approximation, found.approximation_error, 2e-4)


class FullGuide(PyroModule):
    """An encoder to a Gaussian with a full covariance, at first a poor one."""

    def __init__(self, dim=2, data=4):
        super().__init__()
        self.encoder = nn.Linear(data, dim)
        self.dim = dim

    def encode(self, x):
        return dist.MultivariateNormal(self.encoder(x), scale_tril=torch.eye(self.dim).expand(len(x), -1, -1))

    def sample(self, q):
        with pyro.plate("data", q.batch_shape[-1]):
            return pyro.sample("z", q)

    def forward(self, x):
        return self.sample(self.encode(x))


class LowRankGuide(FullGuide):
    def encode(self, x):
        factor = torch.full((len(x), self.dim, 1), 0.1)
        return dist.LowRankMultivariateNormal(self.encoder(x), factor, torch.ones(len(x), self.dim))


@pytest.mark.parametrize("family", [FullGuide, LowRankGuide])
@pytest.mark.slow
def test_family_that_holds_the_posterior_has_no_approximation_gap(ppca, family):
    model, _, x = ppca
    guide = family()
    found = gaps(model, guide, x)
    assert found.approximation.abs().max() < 1e-3
    exact = model.evidence().log_prob(x).detach().double()
    torch.testing.assert_close(found.elbo_optimal, exact, atol=0.02, rtol=0)
    assert found.amortization.mean() > 0.3


@pytest.mark.parametrize(
    ("flow", "options"),
    [
        ("iaf", {"depth": 1, "options": {"hidden": [16]}}),
        pytest.param("planar", {"depth": 4}, marks=pytest.mark.slow),  # it has no inverse, and so a pathwise gradient
        pytest.param("householder", {"depth": 2}, marks=pytest.mark.slow),
    ],
)
def test_flow_has_a_smaller_approximation_gap_than_the_best_diagonal_gaussian(ppca, flow, options):
    """Its base and its context are optimized for each data point; its networks are those that were fitted."""
    model, diagonal, x = ppca
    model.requires_grad_(False)
    torch.manual_seed(0)
    guide = amortize(model, nn.Linear(4, 8), "flow", flow=flow, context=4, example=x, **options)
    objective, train = pyrovae.ELBO(8, gradient="pathwise"), model.evidence().sample((1000,))
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)
    with local_params(model, guide):
        for start in range(0, 10_000, 50):
            optimizer.zero_grad()
            objective.differentiable_loss(model, guide, train[start % 1000 :][:50]).backward()
            optimizer.step()
    before = [parameter.detach().clone() for parameter in guide.parameters()]
    found = gaps(model, guide, x, steps=300, particles=1000)
    assert found.approximation.mean() < 0.3 * exact_gaps(model, diagonal, x)[0].mean()
    # Each of 40 points above −4.5 standard errors: a false alarm once in 7 000 seeds.
    assert (found.amortization > -4.5 * found.amortization_error - 1e-3).all()
    assert found.amortization.mean() > 0.002
    exact = model.evidence().log_prob(x).detach()
    assert_within(found.approximation, exact - found.elbo_optimal, found.approximation_error + 0.05, 1e-3)
    for old, new in zip(before, guide.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


def test_amortized_flow_of_a_network_has_gaps():
    torch.manual_seed(0)
    model = VAE(data_shape=(8, 8), latent_dim=2, hidden=(16,))
    guide = AmortizedFlow(model, "planar", depth=1, context=3, hidden=(16,))
    found = gaps(model, guide, torch.rand(5, 8, 8).round(), steps=100, particles=500)
    assert (found.amortization > 0).all()  # the encoder is untrained
    assert found.approximation.isfinite().all()


def test_guides_of_several_sites_have_gaps():
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, torch.ones(())))
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, rate), obs=x[:, 0])

    x = torch.randn(6, 1)
    for joint in (False, True):
        found = gaps(model, amortize(model, nn.Linear(1, 4), joint=joint, example=x), x, steps=200, particles=1000)
        assert (found.amortization > 0).all()
        assert (found.approximation > -0.05).all()
    coin = amortize(coins, nn.Linear(1, 4), "bernoulli", example=x)
    with pytest.raises(ArgumentError, match="posterior is a Independent"):
        gaps(coins, coin, x)


def coins(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((1,), 0.5)).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_model_and_guide_stay_as_they_are(ppca):
    model, guide, x = ppca
    with torch.no_grad():
        guide.t = 1.3 * guide.t
    before = [p.clone() for p in (*model.parameters(), *guide.parameters())]
    state = torch.get_rng_state()
    first = gaps(model, guide, x, steps=100, particles=1000)
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))
    for old, new in zip(before, (*model.parameters(), *guide.parameters()), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())
    again = gaps(model, guide, x, steps=100, particles=1000)
    torch.testing.assert_close(first.approximation, again.approximation, rtol=0, atol=0)


@pytest.mark.parametrize(
    "q",
    [
        dist.Normal(torch.randn(3, 2), torch.rand(3, 2) + 0.1).to_event(1),
        torch.distributions.Independent(torch.distributions.Gamma(torch.rand(3, 2) + 1, torch.ones(3, 2)), 1),
        dist.MultivariateNormal(torch.randn(3, 2), torch.tensor([[2.0, 0.5], [0.5, 1.0]]).expand(3, 2, 2)),
        dist.LogNormal(torch.randn(3), torch.ones(3)),
        dist.Beta(torch.rand(3) + 1, torch.rand(3) + 2),
    ],
    ids=lambda q: type(getattr(q, "base_dist", q)).__name__,
)
def test_families_are_rebuilt_from_their_free_parameters(q):
    free, rebuild = local_parameters(q)
    again = rebuild(free)
    z = q.sample()
    assert again.batch_shape == q.batch_shape == (3,)
    torch.testing.assert_close(again.log_prob(z), q.log_prob(z), rtol=1e-4, atol=1e-4)
    moved = rebuild([tensor + 3.0 for tensor in free])  # whatever their values
    assert moved.log_prob(moved.sample()).isfinite().all()


def test_another_family_joins_by_registration(ppca):
    model, _, x = ppca

    class Shifted:
        """A Gaussian of given scale, of which the mean alone is free."""

        def __init__(self, mean):
            self.mean, self.batch_shape = mean, mean.shape[:1]

    class ShiftedGuide(FullGuide):
        def encode(self, x):
            return Shifted(self.encoder(x))

        def sample(self, q):
            with pyro.plate("data", q.batch_shape[-1]):
                return pyro.sample("z", dist.Normal(q.mean, 0.5).to_event(1))

    guide = ShiftedGuide()
    with pytest.raises(ArgumentError, match=r"posterior is a Shifted.*local_parameters\.register"):
        gaps(model, guide, x)
    local_parameters.register(Shifted)(lambda q: ([q.mean.detach().clone()], lambda free: Shifted(free[0])))
    found = gaps(model, guide, x)
    q = dist.Normal(model.posterior(x).mean, 0.5).to_event(1)
    exact = (model.evidence().log_prob(x) - model.elbo(x, q)).detach()
    assert_within(found.approximation, exact, found.approximation_error, 5e-4)


def test_poor_optimization_and_poor_proposals_are_warned_of(ppca):
    model, guide, x = ppca
    with torch.no_grad():
        guide.c.add_(5.0)
        guide.t = guide.t * 0.2
    with pytest.warns(UserWarning, match="still rose|k̂ of q") as caught:
        found = gaps(model, guide, x, steps=10, lr=0.02)
    assert any("still rose" in str(one.message) for one in caught)
    assert any("k̂ of q* is above 0.7" in str(one.message) for one in caught)
    assert len(found.notes) == 2


@pytest.mark.parametrize(
    "given", [{"steps": 0}, {"particles": 24}, {"optimization_particles": 0}, {"batch_size": 1.5}, {"lr": 0.0}]
)
def test_bad_arguments_are_named(ppca, given):
    model, guide, x = ppca
    (name, value), *_ = given.items()
    with pytest.raises(ArgumentError, match=f"{name} is {value}"):
        gaps(model, guide, x, **given)


def test_guides_without_the_interface_are_refused(ppca):
    model, guide, x = ppca
    with pytest.raises(ArgumentError, match="without encode"):
        gaps(model, lambda x: None, x)
    with pytest.raises(ArgumentError, match="minibatches of 2 tensors"):
        gaps(model, guide, (x, x))
    belief = SigmoidBeliefNet(data_shape=(4,), layers=(3,))
    with pytest.raises(ArgumentError, match="posterior is a Bernoulli"):
        gaps(belief, AmortizedBernoulli(belief), torch.ones(5, 4))


def test_latents_shared_by_all_data_are_refused(ppca):
    *_, x = ppca

    def model(x):
        shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = (z.sum(-1) + shared).unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, torch.ones(4)).to_event(1), obs=x)

    class Shared(LinearGuide):
        def sample(self, q):
            pyro.sample("shared", dist.Normal(0.0, 1.0))
            return super().sample(q)

    with pytest.raises(ModelGuideError, match="one weight for each of the 40 data points"):
        gaps(model, Shared(PPCA()), x)
