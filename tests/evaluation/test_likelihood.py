"""Log-likelihood estimates against probabilistic PCA, where log p(x) is known."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import PPCA, LinearGuide

import pyrovae
from pyrovae.errors import ArgumentError, DataError, ModelGuideError
from pyrovae.evaluation import active_units, effective_sample_size, kl_per_dimension, likelihood, log_likelihood
from pyrovae.guides import AmortizedBernoulli, AmortizedNormal
from pyrovae.models import VAE, SigmoidBeliefNet


@pytest.fixture
def ppca():
    model = PPCA()
    guide = LinearGuide(model)
    with torch.no_grad():  # near the posterior, so that the weights have a finite variance
        mean = model.posterior(torch.zeros(1, 4)).mean
        precision = torch.eye(2) + model.W.mT @ model.W / model.s**2
        guide.A.copy_(torch.linalg.solve(precision, model.W.mT / model.s**2))
        guide.c.copy_(mean[0])
        guide.t = precision.inverse().diagonal().sqrt() * 1.3
        x = model.evidence().sample((50,))
    return model, guide, x


def test_estimates_lie_within_their_standard_errors_of_the_exact_values(ppca):
    model, guide, x = ppca
    exact = model.evidence().log_prob(x).detach()
    result = log_likelihood(model, guide, x, particles=1000)
    assert result.values.shape == result.standard_error.shape == result.effective_sample_size.shape == (50,)
    z = (result.values - exact) / result.standard_error
    # 50 points: one beyond 4 standard errors once in 300 seeds; mean z² beyond 2 practically never.
    assert z.abs().max() < 4
    assert 0.4 < z.square().mean() < 2
    assert abs(result.mean - exact.mean()) < 3 * result.mean_error  # a false alarm once in 370 seeds


def test_the_mean_log_weight_is_the_elbo_of_the_guide(ppca):
    model, guide, x = ppca
    with torch.no_grad():
        exact = model.elbo(x, guide.encode(x)).double()
    result = log_likelihood(model, guide, x, particles=1000)
    z = (result.elbo - exact) / result.elbo_error
    # 50 points: one beyond 4 standard errors once in 300 seeds; mean z² beyond 2 practically never.
    assert z.abs().max() < 4
    assert 0.4 < z.square().mean() < 2
    assert abs(result.mean_elbo - float(exact.mean())) < 3 * result.mean_elbo_error  # a false alarm once in 370 seeds
    assert result.mean_elbo < result.mean
    assert log_likelihood(model, guide, x, particles=1).elbo_error.isnan().all()


def test_standard_error_is_the_spread_over_seeds(ppca):
    model, guide, x = ppca
    results = [log_likelihood(model, guide, x[:5], particles=200, seed=seed) for seed in range(200)]
    spread = torch.stack([result.values for result in results]).std(0)
    stated = torch.stack([result.standard_error for result in results]).mean(0)
    assert ((spread / stated - 1).abs() < 0.25).all()  # the spread of 200 has a relative error of 5 %


def test_one_particle_is_biased_below_by_the_kl_to_the_posterior(ppca):
    model, guide, x = ppca
    with torch.no_grad():
        gap = model.evidence().log_prob(x) - model.elbo(x, guide.encode(x))
    draws = torch.stack([log_likelihood(model, guide, x, 1, seed=seed).values for seed in range(400)])
    deviation = (model.evidence().log_prob(x).detach() - draws).mean(1)
    z = (deviation.mean() - gap.mean()) / (deviation.std() / 20)
    assert gap.mean() > 0.05
    assert abs(z) < 4  # a false alarm once in 16 000 seeds
    assert math.isnan(log_likelihood(model, guide, x, 1).mean_error)


def test_more_particles_raise_the_expected_estimate(ppca):
    model, guide, x = ppca
    means = [log_likelihood(model, guide, x, particles).mean for particles in (1, 10, 1000)]
    assert means[0] < means[1] < means[2]


def test_memory_does_not_grow_with_particles_and_x_is_encoded_once(ppca, monkeypatch):
    model, guide, x = ppca
    seen, encoded = [], []
    original, encode = likelihood.log_weights, guide.encode
    monkeypatch.setattr(
        likelihood,
        "log_weights",
        lambda *a, particles=1, **k: seen.append(particles) or original(*a, particles=particles, **k),
    )
    monkeypatch.setattr(guide, "encode", lambda x: encoded.append(len(x)) or encode(x))
    monkeypatch.setitem(likelihood._ELEMENTS, "cpu", 4 * 50 * 16)
    result = log_likelihood(model, guide, x, particles=100)
    assert seen[1:] == [16] * 6 + [4]  # the first call is the probe
    assert encoded.count(50) == 3  # check, probe, and once for all chunks
    exact = model.evidence().log_prob(x).detach()
    assert ((result.values - exact).abs() < 5 * result.standard_error).all()


def test_a_guide_without_encode_is_run_for_every_chunk(ppca):
    model, guide, x = ppca
    result = log_likelihood(model, lambda x: guide(x), x, particles=1000)
    exact = model.evidence().log_prob(x).detach()
    assert ((result.values - exact).abs() < 5 * result.standard_error).all()


def test_the_seed_fixes_the_estimate_and_the_callers_random_state_stays(ppca):
    model, guide, x = ppca
    before = torch.get_rng_state()
    first, second, other = (log_likelihood(model, guide, x, 10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.values, second.values)
    assert not torch.equal(first.values, other.values)
    assert torch.equal(before, torch.get_rng_state())


def test_shared_latents_give_the_evidence_of_all_data_together():
    x = torch.tensor([0.3, -1.2, 2.0, 0.7])

    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(x.sum() / 5, 0.6))

    result = log_likelihood(model, guide, x, particles=5000)
    exact = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 1.0).log_prob(x)
    assert result.values.shape == (1,)
    assert abs(result.mean - exact) < 4 * result.mean_error  # a false alarm once in 16 000 seeds


def test_training_mode_and_gradients_are_as_before(ppca):
    model, guide, x = ppca
    model.train()
    guide.eval()
    result = log_likelihood(model, guide, x, 5)
    assert model.training
    assert not guide.training
    assert not result.values.requires_grad


def test_repr_says_unit_and_particles(ppca):
    model, guide, x = ppca
    assert "nats per data point, 50 data points, 10 particles" in repr(log_likelihood(model, guide, x, 10))


def test_effective_sample_size_of_known_weights():
    log_w = torch.tensor([[0.0, 5.0, 0.0], [0.0, -1000.0, math.log(3.0)]])
    torch.testing.assert_close(effective_sample_size(log_w), torch.tensor([2.0, 1.0, 16 / 10]))
    torch.testing.assert_close(effective_sample_size(log_w + 700.0), torch.tensor([2.0, 1.0, 16 / 10]))


def test_effective_sample_size_of_a_result_is_that_of_its_weights(ppca):
    model, guide, x = ppca
    result = log_likelihood(model, guide, x, 40, seed=3)
    assert (result.effective_sample_size >= 1).all()
    assert (result.effective_sample_size <= 40).all()
    first, second, *_ = likelihood._Chunks(model, guide, nesting=1, compile=False).sums((x,), 40)
    assert (2 * first - second).exp().shape == (50,)


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_a_compiled_evaluation_draws_the_same_particles(ppca, monkeypatch):
    """Full chunks by the graph, more than ten, the last one eagerly; a second, smaller minibatch has its own graph."""
    model, guide, x = ppca
    monkeypatch.setitem(likelihood._ELEMENTS, "cpu", 30 * 4 * 15)
    monkeypatch.setattr(likelihood, "_POINTS", 30)
    eager = log_likelihood(model, guide, x, 190, compile=False)
    compiled = log_likelihood(model, guide, x, 190, compile=True)
    torch.testing.assert_close(compiled.values, eager.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled.standard_error, eager.standard_error, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(compiled.elbo, eager.elbo, rtol=1e-5, atol=1e-5)


def test_an_evaluation_that_cannot_be_compiled_says_so_once_and_runs_eagerly(ppca):
    model, guide, x = ppca

    def branching(x):
        return model(x) if x.sum() > -1e9 else None

    eager = log_likelihood(branching, guide, x, 10, compile=False)
    with pytest.warns(UserWarning, match="this evaluation runs eagerly, it cannot be compiled") as caught:
        fallen = log_likelihood(branching, guide, x, 10, compile=True)
    assert len(caught) == 1
    assert torch.equal(fallen.values, eager.values)
    with pytest.raises(ArgumentError, match="compile is 'yes'; it must be 'auto', True or False"):
        log_likelihood(model, guide, x, 10, compile="yes")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"particles": 0}, ArgumentError, "particles is 0"),
        ({"data": torch.zeros(0, 4)}, DataError, "empty"),
        ({"data": torch.tensor([[1.0, 2.0, float("nan"), 0.0]])}, DataError, "NaN"),
    ],
)
def test_bad_input(ppca, change, error, words):
    model, guide, x = ppca
    arguments = {"data": x, "particles": 5, **change}
    with pytest.raises(error, match=words):
        log_likelihood(model, guide, **arguments)


def test_a_subsampled_plate_is_refused():
    def model(x):
        with pyro.plate("data", 100, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 100, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    with pytest.raises(ModelGuideError, match="a subsampled plate"):
        log_likelihood(model, guide, torch.zeros(5), 3)


def test_active_units_and_kl_per_dimension(ppca):
    model, guide, x = ppca
    with torch.no_grad():
        guide.A[1] = 0.0  # the second dimension no longer depends on x
    units = active_units(guide, x)
    assert units.count == 1
    assert units.mask.tolist() == [True, False]
    means = guide.encode(x).mean.detach()
    torch.testing.assert_close(units.activity.float(), means.var(0, correction=0))
    kl = kl_per_dimension(model, guide, x)
    expected = torch.distributions.kl_divergence(dist.Normal(means, guide.t.detach()), dist.Normal(0.0, 1.0)).mean(0)
    torch.testing.assert_close(kl.float(), expected)
    with pytest.raises(ArgumentError, match="threshold is -1"):
        active_units(guide, x, threshold=-1)
    with pytest.raises(ArgumentError, match="without encode"):
        active_units(lambda x: None, x)


def test_kl_per_dimension_of_binary_units():
    x = torch.bernoulli(torch.full((10, 4), 0.5))
    model = SigmoidBeliefNet(data_shape=(4,), layers=(3,))
    torch.nn.init.normal_(model.prior_logits)
    guide = AmortizedBernoulli(model)
    kl = kl_per_dimension(model, guide, x)
    with torch.no_grad():
        p, q = model.prior().mean, guide.encode(x).mean
        expected = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean(0)
    torch.testing.assert_close(kl, expected.double(), rtol=1e-4, atol=1e-6)
    assert not kl.requires_grad
    two = SigmoidBeliefNet(data_shape=(4,), layers=(3, 3))
    with pytest.raises(ArgumentError, match="must factorise"):
        kl_per_dimension(two, AmortizedBernoulli(two), x)


def test_kl_per_dimension_of_a_learnable_prior_is_a_plain_number():
    model = VAE(data_shape=(4,), latent_dim=2, hidden=(8,), prior="learnable")
    assert not kl_per_dimension(model, AmortizedNormal(model), torch.ones(3, 4)).requires_grad


def test_a_fitted_vae_is_estimated_above_its_bound():
    digits = pyrovae.datasets.load("digits")
    torch.manual_seed(0)
    model = VAE(data_shape=(8, 8), latent_dim=2, hidden=(32,)).initialize_output(digits.train.x)
    guide = AmortizedNormal(model)
    run = pyrovae.fit(model, guide, digits.train, validation=digits.test, epochs=20, lr=3e-3, progress=False)
    result = log_likelihood(model, guide, digits.test, particles=200)
    assert result.mean > run.history[-1]["validation_bound"]
