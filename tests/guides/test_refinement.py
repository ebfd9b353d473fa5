"""Gradient steps on each data point's posterior, against closed forms and finite differences."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import PPCA
from torch import nn

import pyrovae
from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.guides.amortized import AmortizedBernoulli, AmortizedFlow, AmortizedFullRank, AmortizedNormal
from pyrovae.guides.own_model import amortize
from pyrovae.guides.refinement import Refined, refine
from pyrovae.models import VAE, SigmoidBeliefNet
from pyrovae.training.programs import local_params


class Linear(PPCA):
    """PPCA with what the packaged guides read of a model."""

    hidden, channels, activation, network = (), (), "tanh", "mlp"


@pytest.fixture
def problem():
    model = Linear(seed=11).double()
    with torch.no_grad():
        return model, AmortizedNormal(model).double(), model.evidence().sample((20,))


def test_refined_posteriors_have_the_bounds_that_closed_forms_give_them(problem):
    model, guide, x = problem
    result = refine(model, guide, x, steps=300, lr=0.02, particles=8, evaluation_particles=1000)
    with torch.no_grad():
        before, after = model.elbo(x, guide.encode(x)), model.elbo(x, result.posterior)
        precision = model.posterior(x).precision_matrix
        diagonal = precision.diagonal(dim1=-1, dim2=-2)
        best = model.evidence().log_prob(x) - 0.5 * (diagonal.log().sum(-1) - precision.logdet())
    rise = result.after - result.before
    # 20 comparisons at 5 standard errors: a false alarm once in 80 000 seeds.
    assert ((rise - (after - before)).abs() < 5 * result.standard_error + 1e-9).all()
    assert (after >= before).all()
    assert float((best - after).mean()) < 0.1 * float((best - before).mean())
    assert result.raw.shape == (20, 4)
    assert "nats per data point" in repr(result)


def test_no_data_point_falls_and_the_caller_is_left_as_it_was(problem):
    model, guide, x = problem
    state, names = copy.deepcopy(guide.state_dict()), set(pyro.get_param_store().keys())
    random = torch.get_rng_state()
    result = refine(model, guide, x, steps=3, lr=5.0)  # far too large: many proposals are kept
    kept = result.standard_error == 0
    assert kept.any()
    assert (result.raw[kept] == guide.propose(x)[kept]).all()
    # 20 comparisons at 5 standard errors: a false alarm once in 160 000 seeds.
    assert (result.after - result.before >= -5 * result.standard_error).all()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in guide.state_dict().items())
    assert all(parameter.grad is None for parameter in (*model.parameters(), *guide.parameters()))
    assert set(pyro.get_param_store().keys()) == names


@pytest.mark.parametrize(
    "kind",
    [AmortizedNormal, AmortizedFullRank, lambda model: AmortizedFlow(model, depth=1, context=4)],
    ids=["normal", "full-rank", "flow"],
)
def test_every_family_is_refined(kind):
    model = VAE(data_shape=(6,), latent_dim=3, hidden=(8,))
    x = torch.bernoulli(torch.full((30, 6), 0.4))
    result = refine(model, kind(model), x)
    gain, error = (result.after - result.before).mean(), result.standard_error.square().sum().sqrt() / 30
    assert gain > 5 * error


def test_a_users_own_model_with_several_sites_is_refined():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            s = pyro.sample("s", dist.Gamma(2.0, 1.0 + z[..., 0].square()))
            pyro.sample("x", dist.Normal(z, s.unsqueeze(-1)).to_event(1), obs=x)

    x = torch.randn(12, 2)
    for joint in (False, True):
        result = refine(model, amortize(model, nn.Linear(2, 4), joint=joint, example=x), x, steps=20, particles=2)
        assert (result.after - result.before).mean() > 0.1


def loss_of(model, guide, x, objective=None, seed=3):
    pyro.set_rng_seed(seed)
    with local_params(model, guide):
        return (objective or pyrovae.ELBO(particles=2)).differentiable_loss(model, guide, x)


def prepared(problem, **arguments):
    """A refined guide that has seen the model, so that later runs draw the same numbers under one seed."""
    model, guide, x = problem
    refined = Refined(model, guide, steps=3, lr=0.02, particles=2, **arguments)
    objective = pyrovae.ELBO(particles=2)
    loss_of(model, refined, x, objective)
    return model, refined, x, objective


def test_gradients_through_the_steps_are_the_finite_differences(problem):
    model, refined, x, objective = prepared(problem)
    parameters = {**dict(refined.named_parameters()), **dict(model.named_parameters())}
    gradients = torch.autograd.grad(loss_of(model, refined, x, objective), list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        flat, index = parameter.data.view(-1), int(gradient.abs().argmax())
        values = []
        for shift in (1e-5, -2e-5):
            flat[index] += shift
            values.append(float(loss_of(model, refined, x, objective).detach()))
        flat[index] += 1e-5
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient.view(-1)[index]), rel=1e-5), name


def test_gradients_that_stop_are_those_at_the_refined_posterior(problem):
    model, refined, x, objective = prepared(problem, differentiate=False)
    loss = loss_of(model, refined, x, objective)
    weight, bias = refined.guide.encoder[0].weight, refined.guide.encoder[0].bias
    grad_weight, grad_bias = torch.autograd.grad(loss, [weight, bias])

    raw = refined._last["raw"].clone().requires_grad_()
    pyro.set_rng_seed(3)
    refined.propose(x)  # draws what the steps draw
    state = torch.get_rng_state()

    def at(_):
        return refined.sample(refined.posterior(raw))

    other = pyrovae.ELBO(particles=2)
    other.structure(model, at, x)
    torch.set_rng_state(state)
    again = other.differentiable_loss(model, at, x)
    torch.testing.assert_close(again, loss)
    (at_posterior,) = torch.autograd.grad(again, raw)
    torch.testing.assert_close(grad_bias, at_posterior.sum(0))
    torch.testing.assert_close(grad_weight, at_posterior.mT @ x)


@pytest.mark.parametrize("differentiate", [True, False])
def test_every_estimator_scores_draws_by_the_posterior_they_came_from(problem, differentiate):
    model, refined, x, _ = prepared(problem, differentiate=differentiate)
    found = []
    for through in ("both", "path"):
        pyro.set_rng_seed(5)
        with local_params(model, refined):
            weights = pyrovae.log_weights(model, refined, x, particles=3, through=through, max_plate_nesting=1)
        found.append(weights.log_w)
    torch.testing.assert_close(found[0], found[1])
    for objective in (pyrovae.ELBO(gradient="stl"), pyrovae.IWAE(3, gradient="dreg")):
        refined.zero_grad()
        loss_of(model, refined, x, objective).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in refined.parameters())


def test_a_frozen_guide_is_refined_anew_for_other_data(problem):
    model, refined, x, _ = prepared(problem)
    refined.requires_grad_(False)
    other = x + 1.0
    with local_params(model, refined):
        refined(x)
        first = refined._last["raw"]
        refined(other)
    assert not torch.equal(refined._last["raw"], first)
    assert not torch.equal(refined.encode(other).mean, refined.guide.encode(other).mean)


def test_refined_proposals_tighten_the_log_likelihood(problem):
    model, guide, x = problem
    x = x.float()
    model.float(), guide.float()
    exact = model.evidence().log_prob(x).detach()
    plain = pyrovae.evaluation.log_likelihood(model, guide, x, particles=500)
    refined = Refined(model, guide, steps=200, lr=0.03)
    tight = pyrovae.evaluation.log_likelihood(model, refined, x, particles=500)
    assert tight.effective_sample_size.mean() > 2 * plain.effective_sample_size.mean()
    # 20 comparisons at 5 standard errors, whose own estimates are good to a few per cent at this sample size.
    assert ((tight.values - exact).abs() < 5 * tight.standard_error + 1e-3).all()


def test_state_copies_and_float64(problem):
    model, refined, x, _ = prepared(problem)
    other = Refined(model, AmortizedNormal(model).double(), steps=3, lr=0.02, particles=2)
    other.load_state_dict(refined.state_dict())
    assert not any("model" in name for name in refined.state_dict())
    means = []
    for guide in (refined, other, copy.deepcopy(refined)):
        with torch.no_grad(), local_params(model, guide):
            guide.encode(x)
            pyro.set_rng_seed(2)
            means.append(guide.encode(x).mean)
    assert means[0].dtype == torch.float64
    torch.testing.assert_close(means[0], means[1])
    torch.testing.assert_close(means[0], means[2])


def svi(compile, differentiate):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = VAE(data_shape=(5,), latent_dim=2, hidden=(8,))
    guide = Refined(model, AmortizedNormal(model), steps=2, differentiate=differentiate)
    step = pyrovae.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyrovae.ELBO(), compile=compile)
    x = torch.bernoulli(torch.full((6, 5), 0.4))
    pyro.set_rng_seed(1)
    return [step.step(x) for _ in range(6)]


@pytest.mark.slow
@pytest.mark.parametrize("differentiate", [True, False])
def test_compiled_steps_are_the_eager_ones(differentiate):
    assert svi(True, differentiate) == pytest.approx(svi(False, differentiate), rel=1e-4)


@pytest.mark.slow
def test_on_digits_refinement_raises_the_bound_and_training_goes_through_it():
    digits = pyrovae.datasets.load("digits", binarization="static")
    model = VAE(data_shape=(8, 8), latent_dim=4, hidden=(64,))
    guide = AmortizedNormal(model)
    fit = dict(batch_size=100, lr=3e-3, seed=0, compile=False, progress=False)
    pyrovae.fit(model, guide, digits.train.x, epochs=20, **fit)
    result = refine(model, guide, digits.test.x)
    gain, error = (result.after - result.before).mean(), result.standard_error.square().sum().sqrt() / 300
    assert gain > 5 * error  # a false alarm once in three million seeds, were there nothing to gain
    refined = Refined(model, guide, steps=2)
    before = pyrovae.evaluation.log_likelihood(model, refined, digits.test.x, particles=50).mean
    pyrovae.fit(model, refined, digits.train.x, epochs=10, **fit)
    assert pyrovae.evaluation.log_likelihood(model, refined, digits.test.x, particles=50).mean > before


def shared(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w.expand(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_bad_input_is_told():
    model = VAE(data_shape=(5,), latent_dim=2, hidden=(8,))
    guide, x = AmortizedNormal(model), torch.zeros(3, 5)
    net = SigmoidBeliefNet(data_shape=(5,), layers=(3,))
    for call, words in (
        (lambda: refine(net, AmortizedBernoulli(net), x), "AmortizedBernoulli has no propose, posterior and sample"),
        (lambda: Refined(net, AmortizedBernoulli(net)), "AmortizedBernoulli has no propose"),
        (lambda: refine(model, guide, x, steps=0), "steps is 0"),
        (lambda: refine(model, guide, x, lr=-1.0), "lr is -1.0"),
        (lambda: refine(model, guide, x, particles=0), "particles is 0"),
        (lambda: Refined(model, guide, lr=float("inf")), "lr is inf"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()


def test_discrete_and_shared_latents_are_refused():
    def coins(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.ones(2) / 2).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(4, 2)
    with pytest.raises(ArgumentError, match="pathwise gradient, which site 'z'"):
        refine(coins, amortize(coins, nn.Linear(2, 3), "bernoulli", example=x), x)
    with pytest.raises(ModelGuideError, match="guide lacks the model's latent site 'w'"):
        refine(shared, amortize(shared, nn.Linear(2, 3), site="z", example=x), x)
