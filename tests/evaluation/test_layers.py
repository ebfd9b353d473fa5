"""KL and activity of each layer against Gaussian chains whose contributions are known, and a layer cut off."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae
from pyrovae.errors import ArgumentError, DataError, ModelGuideError
from pyrovae.evaluation import active_units, kl_per_dimension
from pyrovae.evaluation.layers import kl_per_layer
from pyrovae.guides import AmortizedBernoulli, AmortizedFlow, AmortizedNormal, BottomUp, Ladder, MeanField
from pyrovae.models import VAE, SigmoidBeliefNet
from pyrovae.models.hierarchical_vae import HierarchicalVAE

A, S, T = torch.tensor([0.0, 0.5, 1.5]).double(), 0.8, 0.5
PRIOR = A**2 + S**2  # variance of z_1


class Chain(HierarchicalVAE):
    """z_2 ~ N(0, I), z_1 ~ N(a z_2, s²), x ~ N(z_1, t²) in each of three dimensions apart."""

    def __init__(self) -> None:
        super().__init__((3,), (3, 3), hidden=(4,), likelihood="normal")
        self.double()

    def below(self, layer, z):
        return dist.Normal(A * z, S).to_event(1)

    def decode(self, z):
        return dist.Normal(z, T).to_event(1)


def upwards(x):
    """q(z_1 | x) exact, and q(z_2 | z_1) exact."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z1", dist.Normal(PRIOR / (PRIOR + T**2) * x, first_scale()).to_event(1))
        pyro.sample("z2", dist.Normal(A / PRIOR * z, S / PRIOR.sqrt()).to_event(1))


def downwards(x):
    """q(z_2 | x) exact, and q(z_1 | z_2, x) exact."""
    noise = S**2 + T**2
    with pyro.plate("data", len(x)):
        z = pyro.sample("z2", dist.Normal(A * x / (A**2 + noise), (noise / (A**2 + noise)).sqrt()).to_event(1))
        mean = (A * z * T**2 + x * S**2) / noise
        pyro.sample("z1", dist.Normal(mean, S * T / noise**0.5).to_event(1))


def first_scale():
    return (PRIOR * T**2 / (PRIOR + T**2)).sqrt()


def data(n=150):
    return dist.Normal(0.0, (PRIOR + T**2).sqrt()).sample((n,))


def exact(x, upward):
    """The contributions of z_1 and z_2 for each data point, in nats; the posteriors above are exact."""
    mean, scale = PRIOR / (PRIOR + T**2) * x, first_scale()
    likelihood = dist.Normal(mean, T).log_prob(x) - scale**2 / (2 * T**2)
    total = likelihood - dist.Normal(0.0, (PRIOR + T**2).sqrt()).log_prob(x)
    if upward:
        square, variance = (A / PRIOR) ** 2 * (mean**2 + scale**2), S**2 / PRIOR
    else:
        square, variance = (A / (PRIOR + T**2) * x) ** 2, (S**2 + T**2) / (PRIOR + T**2)
    top = 0.5 * (square + variance - 1 - variance.log())
    return (total - top).sum(-1), top.sum(-1)


@pytest.mark.parametrize("upward", [True, False], ids=["upwards", "downwards"])
def test_contributions_and_activities_are_those_of_a_chain_that_is_known(upward):
    x = data()
    found = kl_per_layer(Chain(), upwards if upward else downwards, x, particles=60)
    first, second = (float(each.mean()) for each in exact(x, upward))
    assert list(found.kl) == ["z1", "z2"]
    # 2 layers of 2 guides at 4 standard errors: a false alarm once in 4 000 seeds.
    assert abs(found.kl["z1"] - first) < 4 * found.error["z1"]
    assert abs(found.kl["z2"] - second) < 4 * found.error["z2"]
    assert 0 < max(found.error.values()) < 0.03
    assert found.total == pytest.approx(found.kl["z1"] + found.kl["z2"])
    assert found.inactive == ()
    means = PRIOR / (PRIOR + T**2) * x, A / (PRIOR + T**2) * x
    for name, mean in zip(("z1", "z2"), means, strict=True):
        activity = mean.var(0, correction=0)
        # An average of 60 draws has a variance of at most 0.012, which is subtracted; what is left of it spreads by
        # at most 0.012 (2 / 150)^1/2 and 2 (activity · 0.012 / 150)^1/2: 4.5 times that, once in 10 000 seeds.
        allowed = 4.5 * (0.012 * (2 / 150) ** 0.5 + 2 * (activity * 0.012 / 150).sqrt())
        assert ((found.active[name].activity - activity).abs() < allowed).all(), name
    assert found.active["z2"].mask.tolist() == [False, True, True]  # the first dimension of z_2 moves nothing
    assert found.active["z1"].count == 3
    if upward:  # q(z_1 | x) needs no particles
        torch.testing.assert_close(found.active["z1"].activity, means[0].var(0, correction=0))


def test_standard_errors_are_the_spread_over_seeds():
    x = data(30)
    runs = [kl_per_layer(Chain(), upwards, x, particles=8, seed=seed) for seed in range(40)]
    for name in ("z1", "z2"):
        spread = torch.tensor([run.kl[name] for run in runs]).std()
        stated = torch.tensor([run.error[name] for run in runs]).mean()
        # A standard deviation of 40 values has a relative error of 11 %: 4.5 times that, once in 10 000 seeds.
        assert 0.5 < spread / stated < 1.5


@pytest.mark.parametrize("kind", [BottomUp, Ladder])
def test_a_layer_that_is_cut_off_is_named(kind):
    """z_1 does not depend on z_2, and q(z_2) is its prior."""
    model = HierarchicalVAE(data_shape=(5,), layers=(4, 3), hidden=(6,))
    guide = kind(model)
    top = guide.encoders[1][-1] if kind is BottomUp else guide.messages[1][-1]
    with torch.no_grad():
        for layer in (model.decoders[1][-1], top):
            layer.weight.zero_()
            layer.bias.zero_()
    found = kl_per_layer(model, guide, model(size=20), particles=5, active_threshold=0.0)
    assert found.inactive == ("z2",)
    assert found.kl["z2"] == pytest.approx(0.0, abs=1e-6)
    assert found.kl["z1"] > 0.1
    assert found.active["z2"].count == 0
    assert found.active["z1"].count == 4
    assert "z2 0.000 ± 0.000 (0 of 3 units active)" in repr(found).replace("-0.000", "0.000")
    assert "inactive layers: z2; 20 data points, 5 particles" in repr(found)
    assert "inactive layers: z1, z2;" in repr(kl_per_layer(model, guide, torch.zeros(20, 5), 5, threshold=1e3))
    assert "inactive layers: none;" in repr(kl_per_layer(model, guide, torch.zeros(20, 5), 5, threshold=0))


def test_a_negative_contribution_is_no_inactive_layer():
    """Where x says nothing of z_1, the upward guide's q(z_1) is wider than p(z_1 | z_2), and z_2 follows z_1."""

    def ignorant(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z1", dist.Normal(0.0 * x, PRIOR.sqrt()).to_event(1))
            pyro.sample("z2", dist.Normal(A / PRIOR * z, S / PRIOR.sqrt()).to_event(1))

    found = kl_per_layer(Chain(), ignorant, data(50), particles=50)
    information = 0.5 * float((PRIOR / S**2).log().sum())  # between z_1 and z_2
    assert abs(found.kl["z2"] - information) < 4 * found.error["z2"]
    assert abs(found.kl["z1"] + information) < 4 * found.error["z1"]  # 2 comparisons: once in 8 000 seeds
    assert found.inactive == ()
    assert found.active["z1"].count == 0


def test_one_layer_agrees_with_the_closed_form_of_each_dimension():
    model = VAE(data_shape=(5,), latent_dim=3, hidden=(6,))
    guide = AmortizedNormal(model)
    x = torch.ones(150, 5).bernoulli(p=0.5)
    found = kl_per_layer(model, guide, x, particles=50)
    assert abs(found.total - float(kl_per_dimension(model, guide, x).sum())) < 4 * found.error["z"]  # once in 15 000
    torch.testing.assert_close(found.active["z"].activity, active_units(guide, x).activity)


def test_other_guides_of_layers():
    binary = SigmoidBeliefNet(data_shape=(5,), layers=(4, 3))
    x = torch.ones(20, 5).bernoulli(p=0.5)
    found = kl_per_layer(binary, AmortizedBernoulli(binary), x, particles=5)
    assert list(found.active) == ["z1", "z2"]
    assert [units.activity.shape[0] for units in found.active.values()] == [4, 3]
    model = VAE(data_shape=(5,), latent_dim=3, hidden=(6,))
    assert kl_per_layer(model, AmortizedFlow(model, "planar", 1), x, particles=5).active["z"].activity.shape == (3,)


def test_the_same_seed_gives_the_same_numbers_and_leaves_no_trace():
    model = HierarchicalVAE(data_shape=(5,), layers=(4, 3), hidden=(6,))
    guide, x = BottomUp(model), torch.ones(120, 5).bernoulli(p=0.5)
    state = torch.get_rng_state()
    found = [kl_per_layer(model, guide, x, particles=4, seed=seed).kl for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1] != found[2]
    assert model.training
    assert all(parameter.grad is None for parameter in guide.parameters())


def test_bad_input_is_told():
    model = HierarchicalVAE(data_shape=(5,), layers=(4, 3), hidden=(6,))
    guide, x = BottomUp(model), torch.zeros(4, 5)
    with pytest.raises(ArgumentError, match="particles is 1; it must be a whole number, at least 2"):
        kl_per_layer(model, guide, x, particles=1)
    for name in ("threshold", "active_threshold"):
        with pytest.raises(ArgumentError, match=f"{name} is -0.1; it must be a number, at least 0"):
            kl_per_layer(model, guide, x, **{name: -0.1})
    with pytest.raises(DataError, match="NaN"):
        kl_per_layer(model, guide, x.log() * 0)


def test_models_without_layers_are_refused():
    def shared(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def alone(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def without_mean(x):
        base = dist.Normal(torch.zeros(len(x)), 1.0)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.TanhTransform()]))

    x = torch.zeros(4)
    with pytest.raises(ModelGuideError, match="latents of each of the 4 data points"):
        kl_per_layer(shared, MeanField(shared), x, particles=3)
    with pytest.raises(ModelGuideError, match="draws 'z' from a TransformedDistribution, which has no mean"):
        kl_per_layer(alone, without_mean, x, particles=3)
    guide = pyro.infer.autoguide.AutoNormal(alone)
    with pytest.raises(ModelGuideError, match="a guide without auxiliary sites"):
        kl_per_layer(alone, guide, x, particles=3)
    assert pyrovae.log_weights(alone, guide, x, particles=3).log_w.shape[0] == 3
