"""The enumerated ELBO against sums written out by hand, in float64, and against quadrature."""

from __future__ import annotations

import itertools
import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import standard_errors
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pyrovae
from pyrovae import ELBO, EnumeratedELBO
from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.structure import check_enumerated

X = torch.tensor([-1.3, 0.4, 2.2, 0.9], dtype=torch.float64)


def parameters(**values):
    """Leaves in float64, and a function that fetches them as Pyro parameters."""
    leaves = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in values.items()}
    for name, leaf in leaves.items():
        pyro.param(name, leaf.detach().clone())
    return leaves


def assert_equal_to(exact, leaves, model, guide, *args, objective=None):
    """Value and gradient, in any of the ways that a loss is asked for."""
    objective = objective or EnumeratedELBO()
    wanted = torch.autograd.grad(exact, list(leaves.values()))
    stored = [pyro.param(name) for name in leaves]
    loss = objective.differentiable_loss(model, guide, *args)
    torch.testing.assert_close(-loss, exact, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(-loss, stored)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(-objective.loss(model, guide, *args), exact.detach(), rtol=1e-12, atol=1e-12)
    estimate = objective.estimate(model, guide, *args)
    torch.testing.assert_close(estimate.bound, exact.detach(), rtol=1e-12, atol=1e-12)
    assert not estimate.bound.requires_grad
    assert estimate.log_likelihood is None
    assert estimate.kl == {}


def no_latents(*args):
    pass


# --- sums by hand --------------------------------------------------------------------------------------------


def mixture(x, full=None, rows=None):
    """A Gaussian mixture; with ``full`` a minibatch of that many points in all."""
    logits, locs, log_scale = pyro.param("logits"), pyro.param("locs"), pyro.param("log_scale")
    with pyro.plate("data", full or len(x), subsample=rows):
        component = pyro.sample("component", dist.Categorical(logits=logits))
        pyro.sample("x", dist.Normal(locs[component], log_scale.exp()), obs=x)


def mixture_parameters():
    return parameters(logits=[0.1, -0.4, 0.7], locs=[-1.0, 0.5, 2.0], log_scale=-0.2)


def mixture_by_hand(p, x):
    log_prob = dist.Normal(p["locs"], p["log_scale"].exp()).log_prob(x[:, None])
    return (p["logits"].log_softmax(-1) + log_prob).logsumexp(-1).sum()


def test_a_gaussian_mixture_has_its_exact_evidence():
    leaves = mixture_parameters()
    assert_equal_to(mixture_by_hand(leaves, X), leaves, mixture, no_latents, X)


def test_particles_do_not_change_an_exact_sum():
    leaves = mixture_parameters()
    exact = mixture_by_hand(leaves, X)
    assert_equal_to(exact, leaves, mixture, no_latents, X, objective=EnumeratedELBO(particles=3))


def test_minibatches_average_to_all_data():
    leaves = mixture_parameters()
    exact = mixture_by_hand(leaves, X)
    wanted = torch.autograd.grad(exact, list(leaves.values()))
    losses = []
    for rows in itertools.combinations(range(4), 2):
        index = torch.tensor(rows)
        losses.append(EnumeratedELBO().differentiable_loss(mixture, no_latents, X[index], 4, index))
    mean = torch.stack(losses).mean()
    torch.testing.assert_close(-mean, exact, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(-mean, [pyro.param(name) for name in leaves])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", ["parallel", "sequential", "unmarked"])
def test_an_amortized_discrete_guide_has_its_exact_elbo(how):
    leaves = parameters(a=0.7, b=-0.2, m=1.5)
    infer = {} if how == "unmarked" else {"enumerate": how}
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    at = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(prior))
            on = pyro.sample("on", dist.Bernoulli(torch.tensor(0.3, dtype=x.dtype)))
            pyro.sample("x", dist.Normal(pyro.param("m") * at[k] + on, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=pyro.param("a") * x[:, None] * at), infer=infer)
            pyro.sample("on", dist.Bernoulli(logits=pyro.param("b") + x), infer=infer)

    log_k = (leaves["a"] * X[:, None] * at).log_softmax(-1)
    exact = 0.0
    for k, on in itertools.product(range(3), (0.0, 1.0)):
        log_q = log_k[:, k] + nn.functional.logsigmoid((2 * on - 1) * (leaves["b"] + X))
        log_p = prior[k].log() + math.log(0.3 if on else 0.7)
        log_p = log_p + dist.Normal(leaves["m"] * at[k] + on, 1.0).log_prob(X)
        exact = exact + (log_q.exp() * (log_p - log_q)).sum()
    assert_equal_to(exact, leaves, model, guide, X)


@pytest.mark.parametrize("sampled", [(), ("top",), ("low",), ("top", "low")])
def test_two_dependent_binary_layers_whichever_the_guide_samples(sampled):
    """Σ_d q(d) [log Σ_c p(x, c, d) − log q(d)], with d the layers of the guide and c the others."""
    leaves = parameters(a=0.9, b=-0.3, m=1.2, r=0.5)
    if not sampled:
        del leaves["r"]

    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Bernoulli(logits=pyro.param("b")))
            low = pyro.sample("low", dist.Bernoulli(logits=pyro.param("a") * (2 * top - 1)))
            pyro.sample("x", dist.Normal(pyro.param("m") * low + 0.3 * top, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            shift = 0.0
            for name in sampled:
                value = pyro.sample(name, dist.Bernoulli(logits=pyro.param("r") * x + shift))
                shift = 0.4 * value

    def log_bernoulli(logits, value):
        return nn.functional.logsigmoid((2 * value - 1) * logits)

    exact = 0.0
    for d in itertools.product((0.0, 1.0), repeat=len(sampled)):
        log_q, shift, joint = torch.zeros_like(X), 0.0, []
        for value in d:
            log_q, shift = log_q + log_bernoulli(leaves["r"] * X + shift, value), 0.4 * value
        for top, low in itertools.product((0.0, 1.0), repeat=2):
            if all({"top": top, "low": low}[name] == value for name, value in zip(sampled, d, strict=True)):
                log_p = log_bernoulli(leaves["b"], top) + log_bernoulli(leaves["a"] * (2 * top - 1), low)
                joint.append(log_p + dist.Normal(leaves["m"] * low + 0.3 * top, 1.0).log_prob(X))
        exact = exact + (log_q.exp() * (torch.stack(joint).logsumexp(0) - log_q)).sum()
    assert_equal_to(exact, leaves, model, guide, X)


def test_a_hidden_markov_model_is_the_sum_over_its_paths():
    leaves = parameters(
        start=[0.3, -0.1, 0.2], step=[[1.0, 0.1, -0.5], [0.2, 0.8, 0.0], [-0.3, 0.4, 0.9]], locs=[-1, 0, 2]
    )
    sequences = torch.stack([X, X.flip(0) + 0.2])

    def model(x):
        with pyro.plate("data", len(x)):
            logits = pyro.param("start")
            for t in pyro.markov(range(4)):
                state = pyro.sample(f"state_{t}", dist.Categorical(logits=logits))
                pyro.sample(f"x_{t}", dist.Normal(pyro.param("locs")[state], 1.0), obs=x[:, t])
                logits = pyro.param("step")[state]

    start, step = leaves["start"].log_softmax(-1), leaves["step"].log_softmax(-1)
    paths = []
    for path in itertools.product(range(3), repeat=4):
        log_p = start[path[0]] + sum(step[i, j] for i, j in itertools.pairwise(path))
        paths.append(log_p + dist.Normal(leaves["locs"][list(path)], 1.0).log_prob(sequences).sum(-1))
    assert_equal_to(torch.stack(paths).logsumexp(0).sum(), leaves, model, no_latents, sequences)


# --- continuous sites beside discrete ones -------------------------------------------------------------------


def switching(x):
    """on ~ Bernoulli, z | on ~ N(2 on − 1, 1), x | z ~ N(z, 1)."""
    with pyro.plate("data", len(x)):
        on = pyro.sample("on", dist.Bernoulli(logits=pyro.param("b")))
        z = pyro.sample("z", dist.Normal(2 * on - 1, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def switching_by_hand(p, x):
    """Both guides below in closed form: E over z given on of log p is that at the mean, less half the variance."""
    q1 = (p["c"] * x).sigmoid()
    total = torch.zeros_like(x)
    for on, q in ((0.0, 1 - q1), (1.0, q1)):
        mean, var = p["a"] * x + 0.5 * on, (2 * p["s"]).exp()
        log_p = nn.functional.logsigmoid((2 * on - 1) * p["b"])
        log_p = log_p + dist.Normal(2 * on - 1, 1.0).log_prob(mean) + dist.Normal(x, 1.0).log_prob(mean) - var
        entropy = 0.5 * math.log(2 * math.pi * math.e) + p["s"]
        total = total + q * (log_p - q.log() + entropy)
    return total


@pytest.mark.parametrize("mark", [{}, {"enumerate": "sequential"}, {"enumerate": None}])
def test_a_normal_latent_beside_a_summed_one_is_unbiased(mark):
    """20 000 draws against the closed form; a discrete site that asks not to be summed is sampled, with its score."""

    def guide(x):
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(logits=pyro.param("c") * x), infer=mark)
            pyro.sample("z", dist.Normal(pyro.param("a") * x + 0.5 * on, pyro.param("s").exp()))

    leaves = parameters(a=0.6, b=0.4, c=0.8, s=-0.3)
    x = torch.tensor(1.3, dtype=torch.float64)
    exact = switching_by_hand(leaves, x)
    wanted = torch.stack(torch.autograd.grad(exact, list(leaves.values())))
    objective = EnumeratedELBO(particles=2)
    values, gradients = [], []
    for _ in range(100):
        loss = objective.differentiable_loss(switching, guide, x.expand(100)) / 100
        values.append(-loss.detach())
        gradients.append(torch.stack(torch.autograd.grad(-loss, [pyro.param(name) for name in leaves])))
    # Five numbers at 4.2 standard errors (Student's t with 99 degrees): a false alarm once in 3 000 seeds a case.
    assert abs(standard_errors(torch.stack(values), exact.detach())) < 4.2
    gradients = torch.stack(gradients)
    error = gradients.std(0) / len(gradients) ** 0.5
    # That of b has no noise at all where the site is summed.
    assert ((gradients.mean(0) - wanted).abs() < 4.2 * error + 1e-12).all()
    assert (error[1] < 1e-12) == (mark.get("enumerate", "parallel") is not None)


def test_under_an_autoguide_it_is_the_elbo_of_the_model_marginalised_by_hand():
    """One seed draws the same continuous latents for both."""

    def prior():
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3).to(X)))
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(torch.zeros(()).to(X), 3.0))
        return weights, locs

    def model(x):
        weights, locs = prior()
        with pyro.plate("data", 40, subsample=torch.arange(4)):
            component = pyro.sample("component", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[component], 1.0), obs=x)

    def marginal(x):
        weights, locs = prior()
        with pyro.plate("data", 40, subsample=torch.arange(4)):
            parts = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, torch.ones_like(locs)))
            pyro.sample("x", parts, obs=x)

    guide = AutoNormal(poutine.block(model, hide=["component"]))
    guide(X)
    found = []
    for program, objective in ((model, EnumeratedELBO()), (marginal, ELBO())):
        objective.structure(program, guide, X)
        pyro.set_rng_seed(3)
        loss = objective.differentiable_loss(program, guide, X)
        found.append((loss, torch.autograd.grad(loss, list(guide.parameters()))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def test_without_a_discrete_site_it_is_the_pathwise_elbo():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a") * x, 0.7))

    parameters(a=0.4)
    losses = []
    for objective in (EnumeratedELBO(), ELBO()):
        objective.structure(model, guide, X)
        pyro.set_rng_seed(5)
        losses.append(objective.differentiable_loss(model, guide, X))
    torch.testing.assert_close(*losses)


def test_the_checks_leave_the_random_state_as_it_was():
    parameters(a=0.6, b=0.4, c=0.8, s=-0.3)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a") * x, pyro.param("s").exp()))

    before = torch.get_rng_state()
    EnumeratedELBO(2).structure(switching, guide, X)
    assert torch.equal(before, torch.get_rng_state())


# --- where it is used ----------------------------------------------------------------------------------------


class Mixture(PyroModule):
    """Two normals with learnable weights, means and common scale; the assignment is summed out."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))
        self.locs = nn.Parameter(torch.tensor([-0.5, 0.5]))
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            component = pyro.sample("component", dist.Categorical(logits=self.logits))
            pyro.sample("x", dist.Normal(self.locs[component], self.scale), obs=x)


def two_groups():
    generator = torch.Generator().manual_seed(0)
    return torch.cat([-2.0 + torch.randn(60, generator=generator), 3.0 + torch.randn(140, generator=generator)])


def test_fit_climbs_the_evidence_of_a_mixture_and_reports_the_bound_alone(tmp_path):
    x, model = two_groups(), Mixture()
    run = pyrovae.fit(
        model,
        no_latents,
        x,
        objective=EnumeratedELBO(),
        validation=x,
        epochs=60,
        lr=0.1,
        progress=False,
        run_dir=tmp_path / "run",
    )
    assert run.history[-1]["validation_bound"] > run.history[0]["validation_bound"] + 0.3
    assert not {"log_likelihood", "kl"} & run.history[-1].keys()
    assert sorted(model.locs.detach().round().tolist()) == [-2.0, 3.0]
    assert run.config["objective"] == {"name": "EnumeratedELBO", "arguments": {"particles": 1}, "estimator": None}
    assert {"training", "validation"} <= {line.get_label() for line in run.plot().lines}
    objective = pyrovae.registry.OBJECTIVES.build({"name": "EnumeratedELBO", "arguments": {"particles": 2}})
    assert (type(objective), objective.particles) == (EnumeratedELBO, 2)


def test_svi_and_the_module_form_take_it():
    x, model = two_groups(), Mixture()
    svi = SVI(model, no_latents, pyro.optim.Adam({"lr": 0.05}), loss=EnumeratedELBO())
    before = svi.evaluate_loss(x)
    for _ in range(20):
        svi.step(x)
    assert svi.evaluate_loss(x) < before
    assert float(EnumeratedELBO()(model, no_latents)(x).detach()) == pytest.approx(svi.evaluate_loss(x), rel=1e-6)


def test_it_agrees_with_the_loss_of_pyro_that_it_wraps():
    mixture_parameters()
    theirs = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(config_enumerate(mixture), no_latents, X)
    torch.testing.assert_close(EnumeratedELBO().differentiable_loss(mixture, no_latents, X), theirs)


def test_a_coefficient_free_objective_has_nothing_to_choose(caplog):
    mixture_parameters()
    with caplog.at_level(logging.INFO, logger="pyrovae"):
        EnumeratedELBO().estimate(mixture, no_latents, X)
    assert caplog.text == ""


# --- what cannot be summed -----------------------------------------------------------------------------------


def counts(x):
    with pyro.plate("data", len(x)):
        n = pyro.sample("n", dist.Poisson(torch.tensor(2.0)))
        pyro.sample("x", dist.Normal(n, 1.0), obs=x)


def angles(x):
    with pyro.plate("data", len(x)):
        n = pyro.sample("n", dist.VonMises(torch.tensor(0.0), 2.0))
        pyro.sample("x", dist.Normal(n, 1.0), obs=x)


def joint_bits(x):
    with pyro.plate("data", len(x)):
        n = pyro.sample("n", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
        pyro.sample("x", dist.Normal(n.sum(-1), 1.0), obs=x)


@pytest.mark.parametrize("program", [counts, angles, joint_bits])
def test_a_site_of_the_guide_that_has_neither_a_path_nor_a_sum_is_named(program):
    def guide(x):
        poutine.uncondition(program)(x)

    guide = poutine.block(guide, hide=["x"])
    with pytest.raises(ArgumentError, match=r"allow neither: 'n'.*gradient='score'.*gradient='vimco'"):
        EnumeratedELBO().differentiable_loss(program, guide, torch.zeros(3))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (counts, r"lacks .* 'n'.*A Poisson has no finite list of values.*gradient='score' or 'vimco'"),
        (joint_bits, r"lacks .* 'n'.*in a pyro.plate in place of .to_event"),
        (angles, r"lacks .* 'n' \(the guide samples: nothing\)\. Add pyro.sample\('n', …\) to the guide"),
    ],
)
def test_a_site_that_the_guide_lacks_and_that_has_no_sum_is_named(program, words):
    with pytest.raises(ModelGuideError, match=words):
        EnumeratedELBO().differentiable_loss(program, no_latents, torch.zeros(3))


@pytest.mark.parametrize("how", ["sequential", None])
def test_a_site_of_the_model_alone_is_summed_in_parallel_or_not_at_all(how):
    def model(x):
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(torch.tensor(0.4)), infer={"enumerate": how})
            pyro.sample("x", dist.Normal(on, 1.0), obs=x)

    with pytest.raises(ModelGuideError, match=rf"'on'.*infer={{'enumerate': {how!r}}} must be 'parallel'"):
        EnumeratedELBO().differentiable_loss(model, no_latents, torch.zeros(3))


def test_shapes_of_sites_that_both_sample_are_still_compared():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("on", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("on", dist.Bernoulli(torch.tensor(0.4))), 1.0), obs=x)

    with pytest.raises(ModelGuideError, match="latent site 'on' has shape"):
        EnumeratedELBO().differentiable_loss(model, guide, torch.zeros(3))


def test_a_model_that_cannot_be_summed_is_told_of_the_dimension_on_the_left():
    table = torch.tensor([[0.1, 0.9], [0.8, 0.2]])

    def model(x):
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Categorical(torch.ones(2)))
            probs = table[on][:, 1]  # fine for a vector of values, wrong for one more dimension on the left
            pyro.sample("x", dist.Bernoulli(probs), obs=x)

    check_enumerated(model, no_latents, torch.zeros(3))
    with pytest.raises(ModelGuideError, match=r"not with their discrete sites summed out.*\n?.*Vindex"):
        EnumeratedELBO().differentiable_loss(model, no_latents, torch.zeros(3))


def test_particles_below_one_are_refused():
    with pytest.raises(ArgumentError, match="particles is 0"):
        EnumeratedELBO(particles=0)
