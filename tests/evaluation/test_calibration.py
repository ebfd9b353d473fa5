"""Simulation-based calibration: uniform ranks for exact posteriors, and none for wrong ones."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import PPCA
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value

import pyrovae
from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.evaluation.calibration import SBC, posterior_samples, sbc


def model(x):
    """z ~ N(0, I₂), x | z ~ N(z, I₂): the posterior is N(x / 2, I / 2)."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def posterior(shift=0.0, scale=1.0):
    return lambda x: {"z": dist.Normal(x / 2 + shift, 0.5**0.5 * scale).sample((99,))}


def rank_histograms(simulations, sets, seed=0):
    """Uniform ranks, each set in a column."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randint(100, (simulations, sets), generator=generator)
    return SBC(ranks, tuple(map(str, range(sets))), 99, 20)


@pytest.mark.parametrize("level", [0.05, 0.2])
def test_tests_of_uniform_ranks_hold_their_level(level):
    found = rank_histograms(200, 2000)
    error = (level * (1 - level) / 2000) ** 0.5
    # 4 standard errors: a false alarm once in 16 000 seeds. The envelope's own 2 000 simulations err as much, and both
    # statistics are discrete; chi-square with 10 a bin is approximate.
    assert abs((found.chi_square < level).double().mean() - level) < 4 * error + 0.005
    assert abs((found.ecdf_p < level).double().mean() - level) < 4 * 2**0.5 * error


def test_envelope_holds_whole_curves_with_its_coverage():
    found = rank_histograms(150, 2000, seed=1)
    for coverage in (0.5, 0.95):
        low, high = found.envelope(coverage)
        inside = ((found.ecdf >= low[:, None]) & (found.ecdf <= high[:, None])).all(0).double().mean()
        error = (coverage * (1 - coverage) / 2000) ** 0.5
        assert abs(inside - coverage) < 4 * 2**0.5 * error + 0.01  # 0.01 for what is discrete


def test_exact_posterior_is_uniform():
    found = sbc(model, posterior(), torch.zeros(2), simulations=400)
    assert found.ranks.shape == (400, 2)
    assert found.names == ("z[0]", "z[1]")
    assert found.counts.sum(0).tolist() == [400, 400]
    # Four p-values: a false alarm once in 250 seeds.
    assert (found.chi_square > 0.001).all()
    assert (found.ecdf_p > 0.001).all()
    assert "SBC(uniform" in repr(found)


@pytest.mark.parametrize(
    ("wrong", "shape"),
    [({"scale": 0.7}, "narrow"), ({"scale": 1.4}, "wide"), ({"shift": 0.2}, "biased")],
)
def test_wrong_posteriors_are_rejected(wrong, shape):
    found = sbc(model, posterior(**wrong), torch.zeros(2), simulations=400)
    assert (torch.minimum(found.chi_square, found.ecdf_p) < 0.01).all()
    assert "not uniform" in repr(found)
    counts = found.counts.sum(1)
    ends, middle = counts[[0, -1]].sum(), counts[[9, 10]].sum()
    assert {"narrow": ends > 1.5 * middle, "wide": middle > 1.5 * ends, "biased": counts[0] > 1.5 * counts[-1]}[shape]


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "least"), [(0.85, 0.45), (0.7, 0.98)])
def test_power_against_narrow_posteriors(scale, least):
    """Of 100 calibrations with 300 simulations each, the share that is rejected at level 0.05."""

    def many(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(100), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    found = sbc(many, posterior(scale=scale), torch.zeros(100), simulations=300)
    assert (found.chi_square < 0.05).double().mean() > least
    exact = sbc(many, posterior(), torch.zeros(100), simulations=300, seed=1)
    for p in (exact.chi_square, exact.ecdf_p):  # binomial(100, 0.05) is above 14 once in 5 000 seeds
        assert (p < 0.05).sum() <= 14


def test_amortized_guide_gives_a_simulation_for_each_data_point():
    ppca = PPCA()

    class Exact(torch.nn.Module):
        scale = 1.0

        def forward(self, x):
            with pyro.plate("data", len(x)):
                q = ppca.posterior(x)
                pyro.sample("z", dist.MultivariateNormal(q.mean, self.scale**2 * q.covariance_matrix))

    exact = Exact()
    found = sbc(ppca, exact, torch.zeros(150, 4), simulations=400)
    assert found.ranks.shape == (400, 2)  # three runs of 150, the last one cut
    assert (found.chi_square > 0.001).all()  # a false alarm once in 500 seeds
    assert (found.ecdf_p > 0.001).all()
    exact.scale = 0.7
    assert (sbc(ppca, exact, torch.zeros(150, 4), simulations=400).ecdf_p < 0.01).all()


def correlated(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 8):
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


@pytest.mark.parametrize("exact", [True, False])
def test_a_function_that_returns_a_guide_for_each_simulation(exact):
    precision = torch.eye(2) + 8
    covariance = precision.inverse() if exact else precision.diagonal().reciprocal().diag()  # of the best mean field

    def found(x):
        mean = precision.inverse() @ x.sum().expand(2)
        return lambda x: pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    result = sbc(correlated, found, torch.zeros(8), simulations=200)
    if exact:
        assert (result.ecdf_p > 0.001).all()  # a false alarm once in 500 seeds
    else:
        assert (result.ecdf_p < 0.001).all()  # its scales are half the marginal ones


def test_a_function_that_fits_a_guide_finds_an_empty_store_each_time():
    first, last = [], []

    def fitted(x):
        guide = AutoMultivariateNormal(correlated)
        svi = pyrovae.SVI(correlated, guide, pyro.optim.Adam({"lr": 0.1}), loss=pyrovae.ELBO(8), compile=False)
        assert len(pyro.get_param_store()) == 0
        losses = [svi.step(x) for _ in range(100)]
        first.append(losses[0])
        last.append(sum(losses[-10:]) / 10)
        return guide

    pyro.param("kept", torch.ones(()))
    result = sbc(correlated, fitted, torch.zeros(8), simulations=4)
    assert result.ranks.shape == (4, 2)
    assert all(late < early for early, late in zip(first, last, strict=True))
    assert ((result.ranks > 0) & (result.ranks < 99)).any(0).all()
    assert list(pyro.get_param_store().keys()) == ["kept"]


def test_ties_of_discrete_latents_are_broken_at_random():
    def coin(x):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(4 * z, 1.0), obs=x)

    def exact(x):
        return {"z": dist.Bernoulli(logits=4 * x - 8).sample((99,))}

    found = sbc(coin, exact, torch.zeros(()), simulations=400)
    assert found.names == ("z",)
    assert found.chi_square > 0.001  # a false alarm once in 500 seeds
    assert found.ecdf_p > 0.001


def test_arguments_place_observations_that_are_transformed_first():
    def logged(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=y.log())

    def exact(y):
        return {"z": dist.Normal(y.log() / 2, 0.5**0.5).sample((99,))}

    with pytest.raises(ArgumentError, match="pass arguments="):
        sbc(logged, exact, torch.ones(()))
    found = sbc(logged, exact, torch.ones(()), arguments=lambda observed: (observed["x"].exp(),))
    assert found.chi_square > 0.001


def test_posterior_samples_have_the_shapes_of_the_sites():
    def guide():
        scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0), 1.0))
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            pyro.sample("w", dist.Normal(torch.zeros(5), 1.0).to_event(1))
            pyro.sample("point", dist.Delta(torch.ones(())))
        return scale

    drawn = posterior_samples(guide, draws=7)
    shapes = {name: tuple(value.shape) for name, value in drawn.items()}
    assert shapes == {"scale": (7,), "w": (7, 3, 4, 5), "point": (7, 3, 4)}
    assert drawn["scale"].unique().numel() == 7
    auto = AutoNormal(correlated)
    auto(torch.zeros(8))
    assert posterior_samples(auto, torch.zeros(8), draws=7)["z"].shape == (7, 2)


def test_seed_fixes_the_ranks_and_leaves_the_random_state():
    state = torch.get_rng_state()
    first = sbc(model, posterior(), torch.zeros(2), simulations=20)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.ranks, sbc(model, posterior(), torch.zeros(2), simulations=20).ranks)
    assert not torch.equal(first.ranks, sbc(model, posterior(), torch.zeros(2), simulations=20, seed=1).ranks)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"simulations": 0}, "simulations is 0"),
        ({"draws": 100}, "bins is 20; draws \\+ 1 = 101"),
        ({"bins": 1}, "bins is 1"),
    ],
)
def test_bad_arguments_are_named(given, words):
    with pytest.raises(ArgumentError, match=words):
        sbc(model, posterior(), torch.zeros(2), **given)


def tilted(x):
    """Run forward, it draws z from another prior than the one it scores."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("tilt", -z.square().sum(-1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_posteriors_of_another_kind_are_refused():
    x = torch.zeros(2)
    with pytest.raises(ModelGuideError, match="lacks the model's latent site 'z'"):
        sbc(model, lambda x: {"w": x}, x)
    with pytest.raises(ArgumentError, match=r"shape \(50, 2\); with draws=99"):
        sbc(model, lambda x: {"z": torch.zeros(50, 2)}, x)
    with pytest.raises(ArgumentError, match="returned a float"):
        sbc(model, lambda x: math.pi, x)
    with pytest.raises(ModelGuideError, match="calibration needs some of both"):
        sbc(lambda x: pyro.sample("z", dist.Normal(x, 1.0)), posterior(), x)
    with pytest.raises(ModelGuideError, match=r"site 'tilt' is a pyro\.factor"):
        sbc(tilted, posterior(), x)
    with pytest.raises(ArgumentError, match="coverage is 1.5"):
        rank_histograms(50, 1).envelope(1.5)


def test_posterior_samples_are_of_the_guide_that_is_given() -> None:
    """Two guides of one class have parameters of the same names, and a joint one an auxiliary site."""

    def model() -> None:
        pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))

    guides = [AutoMultivariateNormal(model, init_loc_fn=init_to_value(values=dict.fromkeys("ab", torch.tensor(value))))
              for value in (-5.0, 5.0)]  # fmt: skip
    drawn = [posterior_samples(guide, draws=20) for guide in guides]
    assert [set(each) for each in drawn] == [{"a", "b"}] * 2
    assert float(drawn[0]["a"].max()) < 0 < float(drawn[1]["a"].min())
