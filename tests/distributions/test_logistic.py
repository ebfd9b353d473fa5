"""Discretized logistics: normalised over the 256 levels, stable, and in agreement with scipy and their own draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import logistic

from pyrovae.distributions import DiscretizedLogistic, DiscretizedLogisticMixture

LEVELS = torch.arange(256) / 255


def exact(loc, log_scale):
    """Probabilities of the levels from scipy's logistic, in float64; the upper half by the survival function."""
    edges, scale = (np.arange(255) + 0.5) / 255, np.exp(log_scale)
    below = np.concatenate([[0.0], logistic.cdf(edges, loc, scale), [1.0]])
    above = np.concatenate([[1.0], logistic.sf(edges, loc, scale), [0.0]])
    return np.where(below[1:] < 0.5, np.diff(below), -np.diff(above))


def mixture(components=5, batch=(), dtype=torch.float32):
    shape = (*batch, components)
    return DiscretizedLogisticMixture(
        torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype), -1.0 - 4.0 * torch.rand(shape, dtype=dtype)
    )


@pytest.mark.parametrize(
    ("loc", "log_scale"), [(0.5, -2.0), (0.31, -5.0), (0.502, -8.0), (-0.4, -1.5), (1.7, -3.0), (0.9, 2.0), (0.1, 8.0)]
)
def test_probabilities_are_differences_of_the_logistic_cdf(loc, log_scale):
    double = DiscretizedLogistic(*torch.tensor([loc, log_scale], dtype=torch.float64)).log_prob(LEVELS.double())
    wanted = torch.as_tensor(exact(loc, log_scale))
    torch.testing.assert_close(double.exp(), wanted, rtol=1e-7, atol=1e-15)
    single = DiscretizedLogistic(torch.tensor(loc), torch.tensor(log_scale)).log_prob(LEVELS)
    assert single.dtype == torch.float32
    kept = wanted > 1e-12
    torch.testing.assert_close(single[kept], wanted.log().float()[kept], rtol=1e-3, atol=1e-3)


def test_the_levels_sum_to_one():
    loc = torch.linspace(-3.0, 4.0, 29).unsqueeze(-1)
    log_scale = torch.linspace(-12.0, 9.0, 22)
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.float64, 1e-9)):
        ours = DiscretizedLogistic(loc.to(dtype), log_scale.to(dtype))
        total = ours.log_prob(LEVELS.to(dtype).reshape(-1, 1, 1)).logsumexp(0)
        torch.testing.assert_close(total, torch.zeros_like(total), atol=tolerance, rtol=0)
        many = mixture(batch=(40,), dtype=dtype)
        total = many.log_prob(LEVELS.to(dtype).unsqueeze(-1)).logsumexp(0)
        torch.testing.assert_close(total, torch.zeros_like(total), atol=tolerance, rtol=0)


def test_log_probabilities_and_gradients_stay_finite_at_the_extremes():
    grid = [torch.tensor([-1e4, -5.0, 0.0, 0.5, 1.0, 5.0, 1e4]), torch.tensor([-30.0, -12.0, -7.0, 0.0, 9.0, 30.0])]
    loc, log_scale = (part.requires_grad_() for part in torch.meshgrid(*grid, indexing="ij"))
    log_prob = DiscretizedLogistic(loc, log_scale).log_prob(LEVELS.reshape(-1, 1, 1))
    assert log_prob.isfinite().all()
    assert (log_prob <= 0).all()
    for gradient in torch.autograd.grad(log_prob.sum(), [loc, log_scale]):
        assert gradient.isfinite().all()
    # An outlier is pulled back: the gradient of the location is 1/s, where a floor on the probability leaves none.
    far = torch.tensor(40.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(DiscretizedLogistic(far, torch.tensor(-7.0)).log_prob(LEVELS[3]), far)
    torch.testing.assert_close(gradient, -torch.tensor(7.0).exp())


def test_gradients_equal_those_of_finite_differences():
    value = LEVELS.double()[[0, 1, 77, 254, 255]]
    loc, log_scale = (torch.tensor(5 * [number], dtype=torch.float64) for number in (0.4, -3.0))

    def log_prob(loc, log_scale):
        return DiscretizedLogistic(loc, log_scale).log_prob(value)

    assert torch.autograd.gradcheck(log_prob, (loc.requires_grad_(), log_scale.requires_grad_()))


@pytest.mark.parametrize("log_scale", [-9.0, -4.0, 0.0])
def test_moments_and_mode_are_those_of_the_levels(log_scale):
    loc = torch.tensor([-0.5, 0.0, 0.103, 0.501, 0.903, 3.0], dtype=torch.float64)
    for ours in (
        DiscretizedLogistic(loc, torch.tensor(log_scale, dtype=torch.float64)),
        mixture(4, (6,), torch.double),
    ):
        probability = ours.log_prob(LEVELS.double().unsqueeze(-1)).exp()
        levels = torch.arange(256, dtype=torch.float64).unsqueeze(-1) / 255
        mean = (probability * levels).sum(0)
        torch.testing.assert_close(ours.mean, mean)
        torch.testing.assert_close(ours.variance, (probability * (levels - mean) ** 2).sum(0), atol=1e-9, rtol=1e-7)
        if isinstance(ours, DiscretizedLogistic):
            assert torch.equal((ours.mode * 255).round().long(), probability.argmax(0))


@pytest.mark.parametrize(
    "ours",
    [
        DiscretizedLogistic(torch.tensor(0.1), torch.tensor(-2.5)),
        DiscretizedLogisticMixture(
            torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.0, 0.5, 1.1]), torch.tensor([-6.0, -3.0, -2.0])
        ),
    ],
)
def test_draws_have_the_probabilities_of_their_levels(ours):
    n = 40_000
    x = ours.sample((n,))
    assert x.shape == (n,)
    assert ours.support.check(x).all()
    counts = (x * 255).round().long().bincount(minlength=256).double()
    expected = n * ours.log_prob(LEVELS).double().exp()
    often = expected > 10
    pooled = [torch.cat([part[often], part[~often].sum().reshape(1)]) for part in (counts, expected)]
    chi_square = ((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum()
    freedom = len(pooled[0]) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # a false alarm in less than 1 of 10 000 seeds


def test_one_component_is_the_distribution_itself():
    loc, log_scale = torch.rand(3, 4, 1), -3.0 * torch.rand(3, 4, 1)
    one = DiscretizedLogistic(loc[..., 0], log_scale[..., 0])
    many = DiscretizedLogisticMixture(torch.randn(3, 4, 1), loc, log_scale)
    x = one.sample()
    torch.testing.assert_close(many.log_prob(x), one.log_prob(x))
    torch.testing.assert_close(many.mean, one.mean)


@pytest.mark.parametrize("components", [None, 5])
def test_particles_broadcast_and_batches_expand(components):
    def build(*batch):
        if components:
            return mixture(components, batch)
        return DiscretizedLogistic(torch.rand(batch), -torch.rand(batch))

    ours = build(5, 1, 4).to_event(1)
    x = torch.randint(0, 256, (3, 4)) / 255
    assert ours.log_prob(x).shape == (5, 3)
    wide = ours.expand([5, 3])
    assert (wide.batch_shape, wide.event_shape) == ((5, 3), (4,))
    torch.testing.assert_close(wide.log_prob(x), ours.log_prob(x))
    assert wide.sample((2,)).shape == (2, 5, 3, 4)
    assert wide.mean.shape == (5, 3, 4)


@pytest.mark.parametrize("kind", ["one", "mixture"])
def test_half_precision_parameters_give_full_precision_probabilities(kind):
    raw = torch.randn(3, 4, 5, dtype=torch.bfloat16)
    x = torch.randint(0, 256, (3, 4)) / 255
    with torch.autocast("cpu", torch.bfloat16):
        if kind == "one":
            ours = DiscretizedLogistic(raw[..., 0], raw[..., 1])
            same = DiscretizedLogistic(raw[..., 0].float(), raw[..., 1].float())
        else:
            ours = DiscretizedLogisticMixture(raw, raw, raw)
            same = DiscretizedLogisticMixture(raw.float(), raw.float(), raw.float())
        assert ours.log_prob(x).dtype == torch.float32
        assert torch.equal(ours.log_prob(x), same.log_prob(x))
        assert ours.mean.dtype == ours.sample().dtype == torch.float32


def test_values_between_the_levels_are_refused():
    for ours in (
        DiscretizedLogistic(torch.tensor(0.5), torch.tensor(-2.0), validate_args=True),
        DiscretizedLogisticMixture(torch.zeros(2), torch.zeros(2), torch.zeros(2), validate_args=True),
    ):
        ours.log_prob(LEVELS)
        for bad in (0.5, -1 / 255, 256 / 255):
            with pytest.raises(ValueError, match="support"):
                ours.log_prob(torch.tensor(bad))
