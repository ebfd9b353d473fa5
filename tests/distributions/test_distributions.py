"""Our distributions: normalised, and in agreement with torch's."""

from __future__ import annotations

import pytest
import torch

from pyrovae.distributions import Categorical256

LEVELS = torch.arange(256) / 255


def test_categorical256_is_normalised_and_equals_torchs_categorical():
    logits = torch.randn(3, 256)
    ours = Categorical256(logits)
    theirs = torch.distributions.Categorical(logits=logits)
    log_prob = torch.stack([ours.log_prob(level.expand(3)) for level in LEVELS])
    torch.testing.assert_close(log_prob.logsumexp(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(log_prob[77], theirs.log_prob(torch.tensor(77)))
    torch.testing.assert_close(ours.mean, (theirs.probs * LEVELS).sum(-1))
    torch.testing.assert_close(ours.variance, (theirs.probs * (LEVELS - ours.mean.unsqueeze(-1)) ** 2).sum(-1))


def test_categorical256_samples_levels_with_their_frequencies():
    ours = Categorical256(torch.randn(256))
    x = ours.sample((20_000,))
    assert ours.support.check(x).all()
    error = (ours.variance / 20_000) ** 0.5
    assert (x.mean() - ours.mean).abs() < 4 * error  # a false alarm once in 16 000 seeds


def test_categorical256_broadcasts_particles_and_checks_its_support():
    ours = Categorical256(torch.randn(5, 1, 4, 256)).to_event(1)
    assert ours.log_prob(torch.zeros(3, 4)).shape == (5, 3)
    assert ours.expand([5, 3]).log_prob(torch.zeros(3, 4)).shape == (5, 3)
    assert Categorical256.support.check(torch.tensor([0.0, 1 / 255, 0.5, 1.0, 1.1])).tolist() == [
        True,
        True,
        False,
        True,
        False,
    ]
    with pytest.raises(ValueError, match="support"):
        Categorical256(torch.zeros(256), validate_args=True).log_prob(torch.tensor(0.5))
