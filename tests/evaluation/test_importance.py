"""Pareto k̂, efficiency and evidence against weights whose tails and sums are known."""

from __future__ import annotations

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from exact import PPCA
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal
from pyro.infer.importance import psis_diagnostic

from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.evaluation import importance
from pyrovae.evaluation.importance import pareto_smooth, psis


def gaussian(n=1):
    """z ~ N(0, 1), n of them, without data: the posterior is the prior and the evidence is 1."""

    def model(scale):
        with pyro.plate("data", n):
            pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))

    def guide(scale):
        with pyro.plate("data", n):
            pyro.sample("z", dist.Normal(torch.zeros(()).double(), scale))

    return model, guide


def population_k(log_w, samples, shrunk=True, points=4000):
    """k̂ of a tail whose exact quantiles are given, as far out as that of ``samples`` weights.

    Args:
        log_w: from the probability of a larger weight to the log-weight.
        samples: number of weights.
        shrunk: whether towards 1/2, as k̂ is by as much as ten weights count.
        points: number of quantiles.
    """
    size = math.ceil(min(0.2 * samples, 3 * math.sqrt(samples)))
    p = (torch.arange(points).double() + 0.5) / points * size / samples
    tail = log_w(p)
    cutoff = log_w(torch.tensor([size / samples]).double()) - tail.max()
    k, _ = importance.fit_generalized_pareto((tail - tail.max()).exp() - cutoff.exp())
    k = (k * (points + 10) - 5) / points
    return (k * size + 5) / (size + 10) if shrunk else k


def scaled_normal(s):
    """The log-weight of N(0, 1) over N(0, s²) that is exceeded with probability p; the tail index is 1 − s²."""
    return lambda p: torch.as_tensor(scipy.stats.norm.isf(p / 2)) ** 2 * (1 - s**2) / 2


def student(a, b):
    """Likewise of Student-t with b degrees of freedom over one with a > b; the tail index is 1 − b / a."""

    def log_w(p):
        z = scipy.stats.t.isf(p / 2, a)
        return torch.as_tensor(scipy.stats.t.logpdf(z, b) - scipy.stats.t.logpdf(z, a))

    return log_w


@pytest.mark.parametrize("k", [0.2, 0.5, 0.7, 1.0])
def test_fit_recovers_the_shape_of_pareto_weights(k):
    torch.manual_seed(1)
    log_w = torch.log(torch.expm1(-k * torch.log(torch.rand(4000, 200).double())) / k)
    _, found = pareto_smooth(log_w)
    size = 190
    shrunk = (size * k + 5) / (size + 10)
    # Within 4 standard errors and the estimator's own bias at this size (0.02): a false alarm once in 4 000 seeds.
    assert abs(found.mean() - shrunk) < 0.02 + 4 * found.std() / 200**0.5
    assert 0.8 < found.std() / ((1 + k) / size**0.5) < 1.2  # the stated standard error of k̂; sd of a sd: 5 %


@pytest.mark.parametrize(
    ("log_w", "asymptote"),
    [(scaled_normal(0.5), 0.75), (scaled_normal(0.8), 0.36), (student(5, 2), 0.6), (student(8, 6), 0.25)],
)
def test_exact_tails_approach_their_index(log_w, asymptote):
    coarse, fine = (abs(population_k(log_w, samples, shrunk=False) - asymptote) for samples in (10**4, 10**12))
    assert fine < 0.05
    assert fine < coarse < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("s", [0.3, 0.5, 0.7, 0.9])
def test_too_narrow_gaussian_has_its_tail_index(s):
    model, guide = gaussian(200)
    found = psis(model, guide, torch.tensor(s).double(), samples=20_000)
    exact = population_k(scaled_normal(s), 20_000)
    # 4 standard errors and the bias of the fit in small samples: a false alarm once in 4 000 seeds.
    assert abs(found.k.mean() - exact) < 0.015 + 4 * found.k.std() / 200**0.5
    assert abs(found.k.mean() - (1 - s**2)) < 0.1


def test_each_data_point_has_the_tail_of_its_own_guide():
    scales = torch.tensor([0.4, 0.6, 0.8, 0.95, 1.0, 1.5]).double()
    found = psis(*gaussian(6), scales, samples=20_000)
    exact = [population_k(scaled_normal(float(s)), 20_000) for s in scales[:4]]
    # 4 comparisons at 4 standard errors: a false alarm once in 4 000 seeds.
    assert ((found.k[:4] - torch.tensor(exact)).abs() < 4 * found.k_error[:4]).all()
    assert found.k[4] == -math.inf
    assert found.k[5] < -0.5  # bounded: the fit is exact for −1/2 and up, and the index is −2
    assert found.efficiency.argmax() == 4
    efficient = scales[5] ** -2 * (2 * scales[5] ** 2 - 1) ** 0.5  # 1 / E w² where that is finite (s² > 1/2)
    assert abs(found.efficiency[5] - efficient) < 0.02


@pytest.mark.parametrize(("a", "b"), [(5.0, 2.0), (3.0, 2.5)])
def test_student_t_weights_have_their_tail_index(a, b):
    def model():
        with pyro.plate("data", 50):
            pyro.sample("z", dist.StudentT(torch.tensor(b).double(), 0.0, 1.0))

    def guide():
        with pyro.plate("data", 50):
            pyro.sample("z", dist.StudentT(torch.tensor(a).double(), 0.0, 1.0))

    found = psis(model, guide, samples=4000).k
    exact = population_k(student(a, b), 4000)
    assert abs(found.mean() - exact) < 0.02 + 4 * found.std() / 50**0.5  # a false alarm once in 10 000 seeds
    assert abs(found.mean() - (1 - b / a)) < 0.12


def test_posterior_as_guide_is_exact_at_each_data_point():
    model = PPCA()
    x = model.evidence().sample((7,))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    found = psis(model, guide, x)
    assert (found.k == -math.inf).all()
    torch.testing.assert_close(found.efficiency, torch.ones(7).double(), rtol=1e-6, atol=0)
    exact = model.evidence().log_prob(x).detach().double()
    torch.testing.assert_close(found.log_evidence, exact, rtol=1e-5, atol=1e-5)
    assert found.reliable.all()
    assert "k̂ median −∞" in repr(found)
    assert "0.0% of 7 data points" in repr(found)


def conjugate(scale, dtype=torch.float64):
    """A mean shared by all data, and its posterior with the standard deviation multiplied by ``scale``."""
    x = torch.tensor([0.5, 1.5, -0.2], dtype=dtype)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        pyro.sample("z", dist.Normal(x.sum() / 4, scale / 2))

    covariance = torch.eye(3, dtype=dtype) + 1
    return model, guide, dist.MultivariateNormal(torch.zeros(3, dtype=dtype), covariance).log_prob(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shared_latent_gives_one_exact_evidence(dtype):
    model, guide, evidence = conjugate(1.0, dtype)
    found = psis(model, guide)
    assert found.k.shape == ()
    assert found.k == -math.inf
    assert found.verdict == "good (threshold 0.70)"
    assert abs(found.log_evidence - evidence) < 1e-5
    assert found.standard_error < 1e-5
    assert float(found.efficiency) == pytest.approx(1.0)


def test_evidence_lies_within_its_standard_error():
    model, guide, evidence = conjugate(0.9)
    found = [psis(model, guide, samples=1000, seed=seed) for seed in range(100)]
    z = torch.stack([(one.log_evidence - evidence) / one.standard_error for one in found])
    assert z.mean().abs() < 0.5  # 5 standard errors of the mean of 100
    assert 0.7 < z.square().mean() < 1.4  # about 3 standard errors, a false alarm once in 400 seeds


def test_result_is_that_of_a_loop_over_the_data_points():
    log_w = 0.8 * torch.randn(1000, 3, 2).double().square()
    smooth, k = pareto_smooth(log_w)
    for i in range(3):
        for j in range(2):
            one, k_one = pareto_smooth(log_w[:, i, j])
            torch.testing.assert_close(smooth[:, i, j], one)
            torch.testing.assert_close(k[i, j], k_one)


def test_chunks_of_samples_change_nothing(monkeypatch):
    model, guide, evidence = conjugate(0.8)
    whole = psis(model, guide, samples=3000)
    monkeypatch.setattr(importance, "_ELEMENTS", 1000)
    chunked = psis(model, guide, samples=3000)
    assert chunked.samples == 3000
    error = (whole.standard_error**2 + chunked.standard_error**2) ** 0.5
    assert abs(whole.log_evidence - chunked.log_evidence) < 4 * error  # a false alarm once in 16 000 seeds
    assert abs(chunked.log_evidence - evidence) < 4 * chunked.standard_error


def test_smoothing_replaces_the_tail_alone_by_ordered_weights_below_the_largest():
    log_w = torch.randn(2000).double().square()
    smooth, _ = pareto_smooth(log_w)
    order = log_w.argsort()
    size = math.ceil(3 * 2000**0.5)
    torch.testing.assert_close(smooth[order[:-size]], log_w[order[:-size]])
    assert (smooth[order[-size:]].diff() >= 0).all()
    assert smooth.max() <= log_w.max()
    assert not torch.equal(smooth[order[-size:]], log_w[order[-size:]])


def test_agrees_with_pyro():
    model, guide, _ = conjugate(0.6)
    ours = psis(model, guide, samples=4000)
    pyro.set_rng_seed(3)
    theirs = psis_diagnostic(model, guide, num_particles=4000, max_plate_nesting=1)
    assert abs(ours.k - theirs) < 4 * 2**0.5 * ours.k_error  # two independent estimates


def test_weights_of_zero_and_impossible_ones():
    log_w = torch.full((1000,), -math.inf)
    log_w[:3] = torch.tensor([0.0, 1.0, 2.0])
    _, k = pareto_smooth(log_w)
    assert k == math.inf
    for bad in (math.nan, math.inf):
        log_w[5] = bad
        with pytest.raises(ModelGuideError, match="NaN or \\+∞"):
            pareto_smooth(log_w)
    with pytest.raises(ModelGuideError, match="Check the supports"):
        pareto_smooth(torch.full((1000,), -math.inf))


def test_caller_random_state_and_modes_are_as_before():
    model = PPCA()
    guide = AutoDiagonalNormal(lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)))
    guide()
    model.train()
    state = torch.get_rng_state()
    psis(lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)), guide)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("k", "words"),
    [
        (0.2, r"good \(threshold 0.58\)"),
        (0.65, "too few samples for this k̂ .*720 samples would do"),
        (0.9, "poor .* biased"),
        (1.4, "very poor"),
    ],
)
def test_verdicts_name_the_threshold(k, words):
    one = torch.tensor(0.5).double()
    found = importance.PSIS(torch.tensor(k).double(), one, one, one, 250, 2)
    assert found.threshold == pytest.approx(1 - 1 / math.log10(250))
    assert re.search(words, found.verdict)
    assert found.verdict in repr(found)


def wide_pair(dim, scale):
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(dim).double(), 1.0).to_event(1))

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(dim).double(), scale).to_event(1))

    return model, guide


def test_many_dimensions_are_warned_of_since_joint_k_measures_their_number():
    few = psis(*wide_pair(1, 0.9))
    with pytest.warns(UserWarning, match="over 400 latent dimensions"):
        many = psis(*wide_pair(400, 0.9))
    assert few.k < 0.4 < 0.7 < many.k  # the same small error in each dimension
    assert many.latent_dim == 400
    assert "note: Each weight is over 400" in repr(many)


def test_few_samples_are_warned_of():
    with pytest.warns(UserWarning, match="100 samples leave 20 weights"):
        psis(*wide_pair(1, 0.9), samples=100)


def test_discrete_latents_are_warned_of():
    def model():
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))

    def guide():
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.7)))

    with pytest.warns(UserWarning, match="'z' are discrete"):
        found = psis(model, guide)
    assert found.k == -math.inf  # two weights: the tail is flat
    assert abs(found.efficiency - 1 / (0.25 / 0.7 + 0.25 / 0.3)) < 0.05


def test_heavy_tail_of_little_weight_is_warned_of():
    def guide():
        return pyro.sample("z", dist.Uniform(torch.zeros(()).double(), 1.0))

    def model():  # one weight in 400 is above 1, and those are Pareto of shape 0.95
        pyro.factor("tail", -0.95 * torch.log(400 * guide()).clamp(max=0.0))

    with pytest.warns(UserWarning, match="k̂ is above the threshold although the efficiency is above 0.9:"):
        found = psis(model, guide, seed=1)
    assert found.k > 0.7
    assert found.efficiency > 0.9


def test_point_masses_and_scaled_models_are_refused():
    model, guide, _ = conjugate(1.0)
    with pytest.raises(ModelGuideError, match="point mass at 'z'"):
        psis(model, AutoDelta(model))
    with pytest.raises(ModelGuideError, match="scales its log-densities"):
        psis(pyro.poutine.scale(model, 2.0), pyro.poutine.scale(guide, 2.0))


@pytest.mark.parametrize("samples", [24, 0, 1e4, True])
def test_bad_numbers_of_samples_are_named(samples):
    with pytest.raises(ArgumentError, match=f"samples is {samples!r}"):
        psis(*wide_pair(1, 0.9), samples=samples)


def test_guide_of_another_model_is_refused():
    with pytest.raises(ModelGuideError, match="lacks the model's latent site 'z'"):
        psis(wide_pair(1, 0.9)[0], lambda: None)
