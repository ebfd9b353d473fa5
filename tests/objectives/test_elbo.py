"""The ELBO and its gradients against closed forms, enumeration and Pyro's own losses."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import PPCA, LinearGuide, standard_errors
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

import pyrovae
from pyrovae import ELBO, LinearWarmup
from pyrovae.errors import ArgumentError
from pyrovae.objectives import Objective
from pyrovae.training.programs import local_params

X = torch.tensor([[0.3, -1.2, 2.0, 0.7], [1.0, 0.2, -0.5, 0.1], [-0.4, 0.6, 0.9, -2.0]])
PAIRS = [
    ("pathwise", "sampled"),
    ("pathwise", "analytic"),
    ("stl", "sampled"),
    ("score", "sampled"),
    ("score", "analytic"),
]


def programs():
    model = PPCA()
    return model, LinearGuide(model)


def test_every_variant_is_an_objective_and_a_pyro_loss():
    for gradient, kl in PAIRS:
        objective = ELBO(gradient=gradient, kl=kl)
        assert isinstance(objective, Objective)
        assert isinstance(objective, pyro.infer.elbo.ELBO)


@pytest.mark.parametrize(("gradient", "kl"), PAIRS)
def test_value_agrees_with_the_closed_form(gradient, kl):
    model, guide = programs()
    with local_params(model, guide), torch.no_grad():
        exact = model.elbo(X, guide.encode(X)).sum()
        objective = ELBO(particles=100, gradient=gradient, kl=kl)
        draws = torch.stack([-objective.differentiable_loss(model, guide, X) for _ in range(200)])
    # Four standard errors: a false alarm once in 16 000 seeds.
    assert standard_errors(draws, exact).abs() < 4


@pytest.mark.slow
@pytest.mark.parametrize(("gradient", "kl"), PAIRS)
def test_gradient_is_unbiased_for_every_parameter(gradient, kl):
    """20 000 draws (200 means of 100 particles) against the gradient of the closed form, constraints included."""
    model, guide = programs()
    parameters = [*model.parameters(), *guide.parameters()]
    with local_params(model, guide):
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(-model.elbo(X, guide.encode(X)).sum(), parameters)])
        objective = ELBO(particles=100, gradient=gradient, kl=kl)
        draws = []
        for _ in range(200):
            loss = objective.differentiable_loss(model, guide, X)
            draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    z = standard_errors(torch.stack(draws), exact)
    # 25 parameters: mean z² is about χ²₂₅/25 (correlated, so wider); the largest |z| of 25 exceeds 4.5 once in 6 000.
    assert z.abs().max() < 4.5
    assert z.square().mean() < 2.5


def test_stl_has_no_variance_where_the_guide_is_the_posterior():
    """One latent dimension and one data dimension, so that a diagonal guide can be exact."""
    model = PPCA(dim=1, latent_dim=1)
    guide = LinearGuide(model)
    x = torch.tensor([[0.5], [-1.0]])
    with local_params(model, guide):
        with torch.no_grad():
            precision = 1 + model.W**2 / model.s**2
            guide.A.copy_(model.W.mT / model.s**2 / precision)
            guide.c.copy_((-guide.A * model.b).reshape(1))
            guide.t = (1 / precision).sqrt().reshape(1)
        gradients = {}
        for gradient in ("stl", "pathwise"):
            rows = []
            for _ in range(10):
                loss = ELBO(gradient=gradient).differentiable_loss(model, guide, x)
                rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(guide.parameters()))]))
            gradients[gradient] = torch.stack(rows)
    assert gradients["stl"].abs().max() < 1e-4
    assert gradients["pathwise"].std(0).max() > 1e-1


class TransformedGuide(torch.nn.Module):
    """q(z_n) = N(loc_n, scale²) as an affine transform, which reads its parameters only when it is scored."""

    def __init__(self, loc, scale):
        super().__init__()
        self.loc, self.scale = torch.nn.Parameter(loc), torch.nn.Parameter(scale)

    def forward(self, x):
        affine = dist.transforms.AffineTransform(self.loc, self.scale)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(len(x)), 1.0), [affine]))


@pytest.mark.parametrize("particles", [1, 3])
def test_stl_has_no_variance_where_a_transformed_guide_is_the_posterior(particles):
    """z ~ N(0, 1), x | z ~ N(z, 1): the posterior is N(x / 2, 1 / 2)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0])
    guide = TransformedGuide(x / 2, torch.tensor(0.5**0.5))
    for gradient, still in (("stl", True), ("pathwise", False)):
        rows = []
        for _ in range(10):
            loss = ELBO(particles, gradient=gradient).differentiable_loss(model, guide, x)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(guide.parameters()))]))
        if still:
            assert torch.stack(rows).abs().max() < 1e-5
        else:
            assert torch.stack(rows).std(0).min() > 1e-1


@pytest.mark.slow
def test_leave_one_out_baseline_lowers_the_variance_of_the_score_function():
    model, guide = programs()

    def variance(particles, draws):
        with local_params(model, guide):
            objective = ELBO(particles=particles, gradient="score")
            rows = [
                torch.autograd.grad(objective.differentiable_loss(model, guide, X), guide.A)[0] for _ in range(draws)
            ]
        return torch.stack(rows).var(0).sum() * particles  # variance times cost

    assert variance(10, 200) < 0.5 * variance(1, 2000)


def test_score_function_of_a_discrete_guide_is_unbiased():
    """A Bernoulli latent, enumerated by hand."""
    x = torch.tensor([0.2, 1.4])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)

    def guide(x):
        logit = pyro.param("logit", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logit.expand(len(x))))

    logit = torch.tensor(0.4, requires_grad=True)
    q1 = logit.sigmoid()
    elbo = torch.zeros(())
    for z, q in ((0.0, 1 - q1), (1.0, q1)):
        joint = dist.Bernoulli(0.3).log_prob(torch.tensor(z)) + dist.Normal(2.0 * z, 1.0).log_prob(x)
        elbo = elbo + (q * (joint - q.log())).sum()
    (exact,) = torch.autograd.grad(elbo, logit)
    for kl in ("sampled", "analytic"):
        objective = ELBO(particles=20, gradient="score", kl=kl)
        draws, values = [], []
        for _ in range(500):
            loss = objective.differentiable_loss(model, guide, x)
            draws.append(-torch.autograd.grad(loss, pyro.param("logit").unconstrained())[0])
            values.append(-loss.detach())
        assert standard_errors(torch.stack(draws), exact).abs() < 4  # a false alarm once in 16 000 seeds
        assert standard_errors(torch.stack(values), elbo.detach()).abs() < 4


def test_pathwise_gradients_refuse_a_guide_that_cannot_be_reparameterized():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Bernoulli(0.5)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.full((len(x),), 0.5)))

    for gradient in ("pathwise", "stl"):
        with pytest.raises(ArgumentError, match=r"these sites cannot: 'z'.*gradient='score'.*pyrovae.EnumeratedELBO"):
            ELBO(gradient=gradient).differentiable_loss(model, guide, torch.zeros(3))


# --- agreement with Pyro -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(ELBO(), Trace_ELBO()), (ELBO(kl="analytic"), TraceMeanField_ELBO())],
    ids=["trace", "mean-field"],
)
def test_loss_and_gradient_equal_pyros_at_the_same_draw(ours, theirs):
    model, guide = programs()
    found = []
    with local_params(model, guide):
        ours.structure(model, guide, X)
        for objective in (ours, theirs):
            torch.manual_seed(3)
            loss = objective.differentiable_loss(model, guide, X)
            found.append([loss.detach(), *torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_works_in_pyros_svi_and_reaches_the_evidence():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    guide = AutoNormal(model)
    x = torch.tensor([0.3, -1.2, 2.0, 0.7])
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), loss=ELBO(particles=10, gradient="stl"))
    for _ in range(500):
        svi.step(x)
    evidence = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 1.0).log_prob(x)
    assert isinstance(svi.step(x), float)
    assert abs(-svi.evaluate_loss(x) - evidence) < 0.05


def test_every_gradient_trains_networks_in_pyros_svi_without_a_warning():
    """``pyro.module`` warns of parameters that hold still, which those of the guide do inside STL's second pass."""
    model = pyrovae.models.VAE(data_shape=(4,), latent_dim=2, hidden=(8,))
    guide = pyrovae.guides.AmortizedNormal(model)
    x = torch.bernoulli(torch.full((6, 4), 0.5))
    for gradient, kl in PAIRS:
        before = [parameter.detach().clone() for parameter in guide.parameters()]
        SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=ELBO(gradient=gradient, kl=kl)).step(x)
        assert all(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def test_is_a_module_of_model_and_guide():
    model, guide = programs()
    with local_params(model, guide):
        module = ELBO(particles=3)(model, guide)
        loss = module(X)
    assert isinstance(module, torch.nn.Module)
    assert loss.shape == ()
    loss.backward()
    assert all(parameter.grad is not None for parameter in guide.parameters())


# --- invariance ----------------------------------------------------------------------------------------------


def test_mean_over_all_subsamples_is_the_bound_of_the_whole_data():
    x = torch.tensor([0.3, -1.2, 2.0, 0.7])

    def model(rows):
        with pyro.plate("data", 4, subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(rows):
        with pyro.plate("data", 4, subsample=rows):
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    subsets = [torch.tensor(pair) for pair in itertools.combinations(range(4), 2)]
    for kl in ("sampled", "analytic"):
        losses = [ELBO(particles=5, kl=kl).differentiable_loss(model, guide, rows) for rows in subsets]
        whole = ELBO(particles=5, kl=kl).differentiable_loss(model, guide, torch.arange(4))
        if kl == "sampled":  # at the exact posterior the sampled bound is the evidence, without noise
            torch.testing.assert_close(torch.stack(losses).mean(), whole)
            torch.testing.assert_close(-whole, dist.Normal(0.0, 2.0**0.5).log_prob(x).sum())
        else:
            kls = [ELBO(kl=kl).estimate(model, guide, rows).kl["z"] for rows in subsets]
            torch.testing.assert_close(
                torch.stack(kls).mean(), ELBO(kl=kl).estimate(model, guide, torch.arange(4)).kl["z"]
            )


# --- reweighted KL -------------------------------------------------------------------------------------------


def two_layers(x):
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
        z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
        pyro.sample("x", dist.Normal(z1, 1.0), obs=x)


def two_layer_guide(x):
    loc = pyro.param("loc", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(loc * x, 0.8))
        pyro.sample("z1", dist.Normal(z2 / 2 + x / 2, 0.7))


def at_seed(objective, *args):
    torch.manual_seed(5)
    return objective.estimate(two_layers, two_layer_guide, *args)


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_beta_weights_each_site_and_leaves_the_reported_bound_plain(kl):
    x = torch.tensor([0.3, -1.2, 2.0])
    plain = at_seed(ELBO(particles=4, kl=kl), x)
    for beta, weight in (
        (0.3, {"z1": 0.3, "z2": 0.3}),
        ({"z2": 0.3}, {"z1": 1.0, "z2": 0.3}),
        (0.0, {"z1": 0.0, "z2": 0.0}),
    ):
        weighted = at_seed(ELBO(particles=4, kl=kl, beta=beta), x)
        expected = -plain.log_likelihood + sum(weight[name] * value for name, value in plain.kl.items())
        torch.testing.assert_close(weighted.loss, expected)
        torch.testing.assert_close(weighted.bound, plain.bound)
    torch.testing.assert_close(plain.bound, -plain.loss)
    torch.testing.assert_close(plain.bound, plain.log_likelihood - sum(plain.kl.values()))


def test_free_bits_floor_the_mean_kl_of_a_site_and_stop_its_gradient():
    x = torch.tensor([0.3, -1.2, 2.0])
    plain = at_seed(ELBO(kl="analytic"), x)
    kl = {name: value / len(x) for name, value in plain.kl.items()}
    low, high = 0.5 * min(kl.values()), 2.0 * max(kl.values())
    torch.testing.assert_close(at_seed(ELBO(kl="analytic", free_bits=float(low)), x).loss, plain.loss)
    floored = at_seed(ELBO(kl="analytic", free_bits=float(high), beta=0.5), x)
    torch.testing.assert_close(floored.loss, -plain.log_likelihood + 0.5 * 2 * high * len(x))
    (gradient,) = torch.autograd.grad(floored.loss, pyro.param("loc").unconstrained())
    reconstruction = at_seed(ELBO(kl="analytic", beta=0.0), x)
    (only_likelihood,) = torch.autograd.grad(reconstruction.loss, pyro.param("loc").unconstrained())
    torch.testing.assert_close(gradient, only_likelihood)
    one = at_seed(ELBO(kl="analytic", free_bits={"z2": float(high)}), x)
    torch.testing.assert_close(one.loss, -plain.log_likelihood + plain.kl["z1"] + high * len(x))


def test_warm_up_follows_the_gradient_steps_of_svi_and_not_its_evaluations():
    objective = ELBO(beta=LinearWarmup(4))
    x = torch.tensor([0.3, -1.2, 2.0])
    svi = SVI(two_layers, two_layer_guide, pyro.optim.SGD({"lr": 0.0}), loss=objective)
    found = []
    for _ in range(6):
        svi.evaluate_loss(x)
        estimate = at_seed(objective, x)
        found.append(float((estimate.loss.detach() + estimate.log_likelihood) / sum(estimate.kl.values())))
        svi.step(x)
    torch.testing.assert_close(torch.tensor(found), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.0]))
    assert isinstance(objective.beta[""](objective.step), torch.Tensor)
    again = ELBO(beta=LinearWarmup(4))
    again.load_state_dict(objective.state_dict())
    assert int(again.step) == 6


# --- bad arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"particles": 0}, "particles is 0"),
        ({"particles": True}, "particles is True"),
        ({"gradient": "pathwize"}, "unknown gradient 'pathwize'.*did you mean 'pathwise'.*score"),
        ({"kl": "exact"}, "unknown kl 'exact'.*analytic, sampled"),
        ({"gradient": "stl", "kl": "analytic"}, "stl.*kl='sampled' only"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"beta": {"z": "big"}}, "beta at site 'z' is 'big'"),
        ({"free_bits": -0.1}, "free_bits is -0.1"),
        ({"free_bits": LinearWarmup(3)}, "free_bits is"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        ELBO(**arguments)


def test_a_site_that_does_not_exist_is_named():
    with pytest.raises(ArgumentError, match=r"site in beta 'z3'.*there are: z1, z2"):
        ELBO(beta={"z3": 0.1}).estimate(two_layers, two_layer_guide, torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "words"), [((0,), "steps is 0"), ((2.5,), "steps is 2.5"), ((3, -1.0), "start is -1.0")]
)
def test_bad_warm_up(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        LinearWarmup(*arguments)


def test_the_public_face_names_them():
    assert pyrovae.ELBO is ELBO
    assert pyrovae.LinearWarmup is LinearWarmup
