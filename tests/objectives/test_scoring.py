"""Guides whose flow has no inverse, or a sequential one: found by measurement, chosen around, or refused by name."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as flows
import pytest
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoIAFNormal, AutoLowRankMultivariateNormal, AutoNormal
from torch import nn

import pyrovae
from pyrovae import ELBO, IWAE, JVI, TVO, EnumeratedELBO, ForwardKL, Renyi, ReweightedWakeSleep, WakeSleep
from pyrovae.cost import SLOW
from pyrovae.errors import ArgumentError
from pyrovae.structure import check


class Latent(nn.Module):
    """z ~ N(0, I) for each data point, x | z ~ N(z₁, 1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


class Flow(nn.Module):
    """A guide with one flow for all data points, Pyro's or zuko's."""

    def __init__(self, make, dim: int) -> None:
        super().__init__()
        self.dim, self.flow = dim, make(dim)

    def density(self):
        if isinstance(self.flow, zuko.lazy.LazyDistribution):
            return ZukoToPyro(self.flow())
        if isinstance(self.flow, zuko.lazy.LazyTransform):  # against its direction: drawn in one pass, scored in many
            base = zuko.distributions.DiagNormal(torch.zeros(self.dim), torch.ones(self.dim))
            return ZukoToPyro(zuko.distributions.NormalizingFlow(self.flow().inv, base))
        return dist.TransformedDistribution(dist.Normal(torch.zeros(self.dim), 1.0).to_event(1), [self.flow])

    def forward(self, x):
        pyro.module("flow", self.flow)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.density())


def zuko_maf(dim):
    return zuko.flows.MAF(dim, transforms=2, hidden_features=(16,))


def zuko_maf_inverted(dim):
    return zuko.flows.MaskedAutoregressiveTransform(dim, hidden_features=(16,))


ONE_WAY = {"planar": flows.planar, "radial": flows.radial}
SEQUENTIAL = {"affine autoregressive": flows.affine_autoregressive, "inverted MAF of zuko": zuko_maf_inverted}
QUICK = {"affine coupling": flows.affine_coupling, "MAF of zuko": zuko_maf, "Householder": flows.householder}
X = torch.tensor([0.3, -1.2, 0.8])

PATHS = {
    "ELBO": lambda gradient: ELBO(particles=2, gradient=gradient),
    "IWAE": lambda gradient: IWAE(2, gradient),
    "Renyi": lambda gradient: Renyi(0.5, 2, gradient),
    "JVI": lambda gradient: JVI(2, 1, gradient),
}


def programs(make, dim=50):
    return Latent(dim), Flow(make, dim)


def cost(make, dim):
    return check(*programs(make, dim), X).scoring["z"]


# --- the measurement -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_WAY)
def test_a_flow_without_an_inverse_cannot_score(name):
    assert cost(ONE_WAY[name], 3) == math.inf


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequential_inverse_costs_in_proportion_to_the_dimension(name):
    two, fifty = cost(SEQUENTIAL[name], 2), cost(SEQUENTIAL[name], 50)
    assert two < SLOW / 2
    assert fifty > 2 * SLOW


@pytest.mark.parametrize("dim", [2, 50])
@pytest.mark.parametrize("name", QUICK)
def test_an_inverse_of_one_pass_is_far_from_the_threshold(name, dim):
    assert cost(QUICK[name], dim) < SLOW / 3


ONE = torch.ones(7)
ORDINARY = {
    "Normal": dist.Normal(ONE, ONE).to_event(1),
    "LogNormal": dist.LogNormal(ONE, ONE).to_event(1),
    "Beta": dist.Beta(ONE, ONE).to_event(1),
    "Gamma": dist.Gamma(ONE, ONE).to_event(1),
    "Dirichlet": dist.Dirichlet(ONE),
    "StudentT": dist.StudentT(5 * ONE).to_event(1),
    "Gumbel": dist.Gumbel(ONE, ONE).to_event(1),
    "Kumaraswamy": dist.Kumaraswamy(ONE, ONE).to_event(1),
    "MultivariateNormal": dist.MultivariateNormal(ONE, torch.eye(7)),
    "LowRankMultivariateNormal": dist.LowRankMultivariateNormal(ONE, torch.ones(7, 2), ONE),
    "Delta": dist.Delta(ONE, event_dim=1),
    "RelaxedOneHotCategorical": dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=ONE),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_distribution_is_far_from_the_threshold(name):
    def program():
        with pyro.plate("data", 5):
            pyro.sample("z", ORDINARY[name])

    assert check(program, program).scoring["z"] < SLOW / 2


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal])
def test_the_usual_autoguides_are_far_from_the_threshold(autoguide):
    model = Latent(50)
    structure = check(model, autoguide(model), X)
    assert structure.quick
    assert max(structure.scoring.values()) < SLOW / 2


def test_discrete_sites_are_not_measured():
    def program():
        pyro.sample("k", dist.Categorical(torch.ones(3)))

    assert check(program, program).scoring == {}


def test_the_measurement_leaves_the_random_state_as_it_was():
    for make in (flows.planar, flows.affine_autoregressive, flows.affine_coupling, zuko_maf):
        model, guide = programs(make, 5)
        before = torch.get_rng_state()
        check(model, guide, X)
        assert torch.equal(before, torch.get_rng_state())


def test_it_is_measured_once_for_a_model_and_a_guide():
    model, guide = programs(flows.affine_coupling, 4)
    objective, counted = ELBO(gradient="stl"), []
    objective.differentiable_loss(model, guide, X)
    log_prob = dist.TransformedDistribution.log_prob
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.TransformedDistribution, "log_prob", lambda *a: counted.append(a) or log_prob(*a))
        objective.differentiable_loss(model, guide, X)
    assert len(counted) == 1  # the step's own


# --- what objectives make of it ------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", PATHS)
@pytest.mark.parametrize("make", [flows.planar, flows.affine_autoregressive])
def test_auto_goes_around_what_cannot_be_scored_quickly(objective, make):
    chosen = PATHS[objective]("auto")
    assert chosen.differentiable_loss(*programs(make), X).isfinite()
    assert chosen.estimator == "pathwise"


@pytest.mark.parametrize("objective", PATHS)
@pytest.mark.parametrize("make", [flows.affine_coupling, zuko_maf])
def test_auto_holds_phi_fixed_where_that_is_quick(objective, make):
    chosen = PATHS[objective]("auto")
    assert chosen.differentiable_loss(*programs(make), X).isfinite()
    assert chosen.estimator == ("stl" if objective == "ELBO" else "dreg")


@pytest.mark.parametrize("objective", [*PATHS, "ReweightedWakeSleep"])
def test_a_gradient_that_needs_an_inverse_says_that_there_is_none(objective):
    gradient = "stl" if objective == "ELBO" else "dreg"
    make = PATHS.get(objective, lambda gradient: ReweightedWakeSleep(2, gradient=gradient))
    words = rf"gradient='{gradient}'.*site 'z' .*\(no inverse\)\. Use .*gradient='pathwise'"
    with pytest.raises(ArgumentError, match=words):
        make(gradient).differentiable_loss(*programs(flows.radial, 3), X)


@pytest.mark.parametrize("objective", [*PATHS, "ReweightedWakeSleep"])
def test_a_gradient_that_needs_a_sequential_inverse_says_what_it_costs(objective):
    gradient = "stl" if objective == "ELBO" else "dreg"
    make = PATHS.get(objective, lambda gradient: ReweightedWakeSleep(2, gradient=gradient))
    words = rf"gradient='{gradient}'.*about 6\d times .*site 'z' .*inverse is sequential\. Use .*gradient='pathwise'"
    with pytest.raises(ArgumentError, match=words):
        make(gradient).differentiable_loss(*programs(flows.affine_autoregressive), X)


OTHERS = {
    "ELBO score": lambda: ELBO(2, gradient="score"),
    "IWAE vimco": lambda: IWAE(2, "vimco"),
    "TVO": lambda: TVO(2),
    "ForwardKL": ForwardKL,
    "WakeSleep": WakeSleep,
    "ReweightedWakeSleep": lambda: ReweightedWakeSleep(2),
    "ReweightedWakeSleep asleep": lambda: ReweightedWakeSleep(2, wake=0.5, gradient="auto"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_held_or_simulated_latent_needs_an_inverse(name):
    """The score ∂ log q(z) at a held z is through the inverse too: a cached log-density has another gradient."""
    with pytest.raises(ArgumentError, match=r"site 'z' .*\(no inverse\)\. Use .*gradient='pathwise'"):
        OTHERS[name]().differentiable_loss(*programs(flows.planar, 3), X)


@pytest.mark.parametrize("name", OTHERS)
def test_a_held_or_simulated_latent_warns_once_of_a_sequential_inverse(name):
    model, guide = programs(flows.affine_autoregressive)
    objective = OTHERS[name]()
    with pytest.warns(UserWarning, match=r"about 6\d times .*site 'z' .*inverse is sequential") as caught:
        assert objective.differentiable_loss(model, guide, X).isfinite()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.differentiable_loss(model, guide, X)


def test_beside_a_discrete_site_the_way_out_is_to_sum_it_out():
    model, flow = programs(flows.planar, 3)

    def with_switch(program):
        def wrapped(x):
            program(x)
            with pyro.plate("switches", 2):
                pyro.sample("on", dist.Bernoulli(torch.tensor(0.5)))

        return wrapped

    both = with_switch(model), with_switch(flow)
    for objective in (ELBO(2, "auto"), IWAE(2, "auto")):
        with pytest.raises(ArgumentError, match=r"gradient='(score|vimco)'.*no inverse.*Use pyrovae\.EnumeratedELBO"):
            objective.differentiable_loss(*both, X)
    assert EnumeratedELBO().differentiable_loss(*both, X).isfinite()


def test_an_autoguide_with_an_inverse_autoregressive_flow_is_measured_at_its_auxiliary_site():
    model = Latent(50)

    def shared(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(50), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z[..., :1], 1.0), obs=x)

    guide = AutoIAFNormal(shared, hidden_dim=[60])
    guide(X)
    objective = ELBO(gradient="auto")
    assert objective.differentiable_loss(shared, guide, X).isfinite()
    assert objective.estimator == "pathwise"
    with pytest.raises(ArgumentError, match=r"gradient='stl'.*site '_AutoIAFNormal_latent'.*sequential"):
        ELBO(gradient="stl").differentiable_loss(shared, guide, X)
    assert check(model, AutoNormal(model), X).quick


def test_the_pathwise_gradient_of_a_sequential_flow_never_inverts_it(monkeypatch):
    model, guide = programs(flows.affine_autoregressive)
    objective = ELBO(particles=2, gradient="auto")
    objective.structure(model, guide, X)
    monkeypatch.setattr(flows.AffineAutoregressive, "_inverse", lambda *a: pytest.fail("inverted"))
    objective.differentiable_loss(model, guide, X).backward()
    assert all(parameter.grad is not None for parameter in guide.parameters())


def test_fit_and_svi_train_a_flow_without_an_inverse_and_say_how():
    x = 1.0 + torch.randn(40)
    run = pyrovae.fit(*programs(flows.planar, 2), x, objective=IWAE(3, "auto"), epochs=2, progress=False)
    assert run.config["objective"]["estimator"] == "pathwise"
    svi = SVI(*programs(flows.planar, 2), pyro.optim.Adam({"lr": 0.01}), loss=ELBO(gradient="auto"))
    assert math.isfinite(svi.step(x))
