"""The sigmoid belief net against the sum over all its codes, written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import pyrovae
from pyrovae.guides import AmortizedBernoulli
from pyrovae.models import SigmoidBeliefNet

DATA = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)))
LAYERS = [(3,), (3, 2)]


def net(layers, scale, seed=0):
    """A linear net of four pixels with Gaussian parameters, and a guide of the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SigmoidBeliefNet(data_shape=(4,), layers=layers)
        guide = AmortizedBernoulli(model)
        for parameter in (*model.parameters(), *guide.parameters()):
            torch.nn.init.normal_(parameter, std=scale)
    return model, guide


def codes(units):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)))


def log_bernoulli(values, logits):
    """`a x units` values under `b x units` logits: `a x b`."""
    pairs = torch.broadcast_tensors(logits, values.unsqueeze(1))
    return -binary_cross_entropy_with_logits(*pairs, reduction="none").sum(-1)


@torch.no_grad()
def exact(model, x):
    """log p(x) in nats, by summing out layer after layer from the top."""
    z = codes(model.layers[-1])
    log_p = log_bernoulli(z, model.prior_logits[None])[:, 0]
    for layer in reversed(range(len(model.layers))):
        (linear,) = model.decoders[layer]
        below = x if layer == 0 else codes(model.layers[layer - 1])
        log_p = (log_bernoulli(below, linear(2 * z - 1)) + log_p).logsumexp(1)
        z = below
    return log_p


@pytest.mark.parametrize("layers", LAYERS)
def test_log_likelihood_agrees_with_the_sum_over_all_codes(layers):
    model, guide = net(layers, scale=0.7)
    truth = exact(model, DATA)
    torch.testing.assert_close(truth.exp().sum(), torch.tensor(1.0))
    found = pyrovae.evaluation.log_likelihood(model, guide, DATA, particles=20_000)
    # 16 data points at 4.2 standard errors: a false alarm once in 2 300 seeds.
    assert ((found.values - truth).abs() < 4.2 * found.standard_error).all()
    assert found.standard_error.max() < 0.1


@pytest.mark.parametrize("layers", LAYERS)
def test_generated_data_have_the_exact_frequencies(layers):
    model, _ = net(layers, scale=1.0)
    p = exact(model, DATA).exp()
    with torch.no_grad():
        for x in (model(size=50_000), model.decode(model.prior().sample((50_000,))).sample()):
            seen = (x @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long().bincount(minlength=16) / 50_000
            # 16 frequencies at 4.2 standard errors: a false alarm once in 2 300 seeds.
            assert ((seen - p).abs() < 4.2 * (p * (1 - p) / 50_000).sqrt()).all()


def test_the_prior_of_the_units_next_to_the_data_has_no_density_below_other_layers():
    one, two = (net(layers, scale=1.0)[0].prior() for layers in LAYERS)
    assert one.log_prob(torch.ones(3)).shape == ()
    with pytest.raises(NotImplementedError):
        two.log_prob(torch.ones(3))
    assert one.support.is_discrete
    assert two.support.is_discrete


@pytest.mark.parametrize("layers", LAYERS)
def test_a_fit_comes_near_the_net_that_drew_the_data(layers):
    true, _ = net(layers, scale=2.0, seed=5)
    with torch.no_grad():
        x = true(size=1000)
    model, guide = net(layers, scale=0.1, seed=1)
    start, best = exact(model, x).mean(), exact(true, x).mean()
    assert best > start + 0.5
    pyrovae.fit(
        model, guide, x, objective=pyrovae.IWAE(8, gradient="vimco"), epochs=20, batch_size=50, lr=0.03, progress=False
    )
    assert exact(model, x).mean() > start + 0.9 * (best - start)
