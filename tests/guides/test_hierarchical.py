"""Guides of several layers of real latents, on small models that follow the protocol of ``HierarchicalModel``."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyrovae
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides.hierarchical import BottomUp, Ladder
from pyrovae.models import SigmoidBeliefNet
from pyrovae.models.networks import mlp
from pyrovae.registry import GUIDES, configuration
from pyrovae.structure import check
from pyrovae.training.programs import local_params


class Layered(PyroModule):
    """z_L ~ N(0, I); z_l | z_{l+1} and x | z_1 are Gaussians whose moments networks compute."""

    def __init__(self, data_shape=(5,), layers=(4, 3), hidden=(8,)) -> None:
        super().__init__()
        self.data_shape, self.layers, self.hidden, self.activation = data_shape, layers, hidden, "tanh"
        self.networks = nn.ModuleList(mlp(above, hidden, 2 * below) for below, above in itertools.pairwise(layers))
        self.decoder = mlp(layers[0], hidden, math.prod(data_shape))

    def below(self, layer: int, z: Tensor) -> dist.TorchDistribution:
        loc, log_scale = self.networks[layer - 1](z).chunk(2, -1)
        return dist.Normal(loc, log_scale.clamp(-5, 5).exp()).to_event(1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{len(self.layers)}", dist.Normal(x.new_zeros(self.layers[-1]), 1.0).to_event(1))
            for layer in range(len(self.layers) - 1, 0, -1):
                z = pyro.sample(f"z{layer}", self.below(layer, z))
            mean = self.decoder(z).reshape(*z.shape[:-1], *self.data_shape)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(len(self.data_shape)), obs=x)


class Chain(PyroModule):
    """z_2 ~ N(0, 1), z_1 | z_2 ~ N(a z_2, s²), x | z_1 ~ N(z_1, t²), in each of d dimensions apart: all is known."""

    hidden, activation = (), "tanh"

    def __init__(self, dim: int = 3, s: float = 0.8, t: float = 0.5) -> None:
        super().__init__()
        self.data_shape, self.layers, self.s, self.t = (dim,), (dim, dim), s, t
        self.a = nn.Parameter(torch.linspace(0.5, 1.5, dim))

    def below(self, layer: int, z: Tensor) -> dist.TorchDistribution:
        return dist.Normal(self.a * z, self.s).to_event(1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", self.top())
            z1 = pyro.sample("z1", self.below(1, z2))
            pyro.sample("x", dist.Normal(z1, self.t).to_event(1), obs=x)

    def top(self) -> dist.TorchDistribution:
        return dist.Normal(torch.zeros_like(self.a), 1.0).to_event(1)

    def evidence(self) -> dist.TorchDistribution:
        return dist.Normal(torch.zeros_like(self.a), (self.a**2 + self.s**2 + self.t**2).sqrt()).to_event(1)


VARIANTS = {
    f"{kind.__name__}-{len(layers)}{'-own' if own else ''}": (kind, layers, own)
    for kind in (BottomUp, Ladder)
    for layers, own in (((4,), {}), ((4, 3), {}), ((4, 3, 2), {}), ((4, 3), {"hidden": (7, 6), "activation": "relu"}))
}


@pytest.fixture(params=VARIANTS)
def pair(request):
    kind, layers, own = VARIANTS[request.param]
    model = Layered(data_shape=(5, 1), layers=layers)
    return model, kind(model, **own)


def batch(model, n=6):
    return torch.randn(n, *model.data_shape)


def conditionals(model, guide, x, values):
    """The guide's distribution of each layer given those it is drawn after, written out."""
    layers = len(model.layers)
    if isinstance(guide, BottomUp):
        below, found = x.flatten(-len(model.data_shape)), {}
        for layer in range(1, layers + 1):
            loc, log_scale = guide.encoders[layer - 1](below).chunk(2, -1)
            found[f"z{layer}"] = dist.Normal(loc, log_scale.exp())
            below = values[f"z{layer}"]
        return found
    messages = [dist.Normal(message.mean, message.stddev) for message in guide.encode(x)]
    found = {f"z{layers}": messages[-1]}
    for layer in range(layers - 1, 0, -1):
        ours, prior = messages[layer - 1], model.below(layer, values[f"z{layer + 1}"])
        precision = 1 / ours.variance + 1 / prior.variance
        loc = (ours.mean / ours.variance + prior.mean / prior.variance) / precision
        found[f"z{layer}"] = dist.Normal(loc, precision.rsqrt())
    return found


def test_shapes_and_densities_are_those_of_the_formula(pair):
    model, guide = pair
    x = batch(model)
    check(model, guide, x)
    trace = poutine.trace(guide).get_trace(x)
    values = {f"z{layer}": trace.nodes[f"z{layer}"]["value"] for layer in range(1, len(model.layers) + 1)}
    for width, value in zip(model.layers, values.values(), strict=True):
        assert value.shape == (6, width)
    expected = conditionals(model, guide, x, values)
    total = sum(q.log_prob(values[name]).sum() for name, q in expected.items())
    torch.testing.assert_close(trace.log_prob_sum(), total)


def test_samples_have_the_moments_of_the_density(pair):
    model, guide = pair
    x = batch(model, 1)
    with torch.no_grad(), pyro.plate("particles", 20_000, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
        values = {name: node["value"] for name, node in trace.nodes.items() if name.startswith("z")}
        expected = conditionals(model, guide, x, values)
    for name, q in expected.items():
        noise = (values[name] - q.mean) / q.stddev
        # At most 2 x 9 comparisons in 8 variants at 4.5 standard errors: a false alarm once in 1 000 seeds.
        assert (noise.mean(0).abs() < 4.5 / 20_000**0.5).all(), name
        assert ((noise.var(0) - 1).abs() < 4.5 * (2 / 20_000) ** 0.5).all(), name


@torch.no_grad()
@pytest.mark.parametrize("kind", [BottomUp, Ladder])
def test_the_joint_density_integrates_to_one(kind):
    """Two layers of one dimension each, by quadrature over both."""
    model = Layered(layers=(1, 1)).double()
    guide = kind(model).double()
    x = batch(model, 1).double()
    grid = torch.linspace(-12, 12, 801).double()
    upper, lower = torch.meshgrid(grid, grid, indexing="ij")
    values = {"z1": lower.reshape(-1, 1, 1), "z2": upper.reshape(-1, 1, 1)}
    with pyro.plate("particles", lower.numel(), dim=-2):
        given = poutine.condition(guide, data=values)
        trace = poutine.trace(given).get_trace(x)
        trace.compute_log_prob()
    density = (trace.nodes["z1"]["log_prob"] + trace.nodes["z2"]["log_prob"]).exp()
    assert abs(float(density.sum() * (grid[1] - grid[0]) ** 2) - 1) < 1e-4


def test_every_parameter_gets_a_gradient(pair):
    model, guide = pair
    x = batch(model)
    objectives = (
        pyrovae.ELBO(gradient="pathwise"), pyrovae.ELBO(gradient="stl"), pyrovae.ELBO(kl="analytic"),
        pyrovae.IWAE(4, gradient="dreg"),
    )  # fmt: skip
    for objective in objectives:
        guide.zero_grad()
        model.zero_grad()
        with local_params(model, guide):
            objective.differentiable_loss(model, guide, x).backward()
        for name, parameter in (*guide.named_parameters(), *model.named_parameters()):
            assert parameter.grad is not None, (objective, name)
            assert parameter.grad.abs().sum() > 0, (objective, name)


def test_particles_are_independent_draws_of_the_same_posterior(pair):
    model, guide = pair
    x = batch(model)
    with pyro.plate("particles", 5, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    values = {f"z{layer}": trace.nodes[f"z{layer}"]["value"] for layer in range(1, len(model.layers) + 1)}
    assert not torch.equal(values["z1"][0], values["z1"][1])
    for k in range(5):
        one = conditionals(model, guide, x, {name: value[k] for name, value in values.items()})
        for name, q in one.items():
            torch.testing.assert_close(trace.nodes[name]["fn"].expand((5, 6)).mean[k], q.mean)


def test_rebuilt_from_its_configuration_with_its_state(pair):
    model, guide = pair
    again = GUIDES.build(configuration(guide), model)
    again.load_state_dict(guide.state_dict())
    x = batch(model)
    trace = poutine.trace(guide).get_trace(x)
    same = poutine.trace(poutine.replay(again, trace=trace)).get_trace(x)
    torch.testing.assert_close(same.log_prob_sum(), trace.log_prob_sum())
    assert "model" not in configuration(guide)["arguments"]
    assert not {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}


def test_float64_and_extreme_data(pair):
    model, guide = pair
    x = 1e6 * batch(model)
    trace = poutine.trace(guide).get_trace(x)
    assert trace.log_prob_sum().isfinite()
    model.double()
    nodes = poutine.trace(guide.double()).get_trace(x.double()).nodes
    assert all(node["value"].dtype == torch.float64 for name, node in nodes.items() if name.startswith("z"))


def exact_bottom_up(model):
    """q(z_1 | x) and q(z_2 | z_1) of the chain, as weights of linear encoders."""
    guide = BottomUp(model).double()
    a, s, t = model.a.detach(), model.s, model.t
    prior = a**2 + s**2
    first = (prior / (prior + t**2), (prior * t**2 / (prior + t**2)).sqrt())
    second = (a / prior, (s**2 / prior).sqrt())
    with torch.no_grad():
        for network, (slope, scale) in zip(guide.encoders, (first, second), strict=True):
            network[0].weight.copy_(torch.cat([torch.diag(slope), torch.zeros_like(torch.diag(slope))]))
            network[0].bias.copy_(torch.cat([torch.zeros_like(scale), scale.log()]))
    return guide


def exact_ladder_messages(model, x):
    """The likelihood of z_1 as its message, the posterior of z_2 as the top one."""
    a, noise = model.a.detach(), model.s**2 + model.t**2
    top = dist.Normal(a * x / (a**2 + noise), (noise / (a**2 + noise)).sqrt().expand_as(x)).to_event(1)
    return dist.Normal(x, model.t).to_event(1), top


def test_both_hold_the_exact_posterior_of_a_gaussian_chain():
    """At the exact posterior every log-weight is the log-evidence."""
    model = Chain().double()
    x = model.evidence().sample((7,))
    bottom_up = exact_bottom_up(model)
    ladder = Ladder(model, hidden=(4,)).double()
    messages = exact_ladder_messages(model, x)
    for guide in (bottom_up, lambda x: ladder.sample(messages)):
        log_w = pyrovae.log_weights(model, guide, x, particles=5).log_w
        torch.testing.assert_close(log_w, model.evidence().log_prob(x).expand(5, 7))


def test_sticking_the_landing_holds_the_model_inside_the_ladder_fixed():
    """At the exact posterior the gradient of the model's parameter is that of the evidence, without any variance."""
    model = Chain().double()
    x = model.evidence().sample((7,))
    ladder = Ladder(model, hidden=(4,)).double()
    messages = exact_ladder_messages(model, x)
    guide = Fixed(ladder, messages)
    (exact,) = torch.autograd.grad(-model.evidence().log_prob(x).sum(), model.a)
    gradients = []
    for seed in range(3):
        pyro.set_rng_seed(seed)
        with local_params(model, guide):
            loss = pyrovae.ELBO(gradient="stl").differentiable_loss(model, guide, x)
        gradients.append(torch.autograd.grad(loss, model.a)[0])
        assert all(parameter.requires_grad for parameter in model.parameters())
    noise = [float((gradient - gradients[0]).abs().max()) for gradient in gradients[1:]]
    assert max(noise) > 1e-3  # log p(x, z) has a gradient of its own at each draw
    with local_params(model, guide):
        loss = pyrovae.ELBO(particles=40_000, gradient="stl").differentiable_loss(model, guide, x)
    (mean,) = torch.autograd.grad(loss, model.a)
    # The standard deviation of one draw's gradient is below 12: at 40 000 draws a tolerance of 5 standard errors.
    assert ((mean - exact).abs() < 5 * 12 / 40_000**0.5).all()


class Fixed(PyroModule):
    """The ladder with given messages."""

    def __init__(self, ladder, messages) -> None:
        super().__init__()
        self.ladder, self.messages = ladder, messages

    def forward(self, x):
        return self.ladder.sample(self.messages)


class Wrong(Layered):
    def below(self, layer, z):
        return dist.Laplace(torch.zeros(*z.shape[:-1], self.layers[layer - 1]), 1.0).to_event(1)


@pytest.mark.parametrize("kind", [BottomUp, Ladder])
@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (pyrovae.models.VAE(data_shape=(5,), latent_dim=2, hidden=(8,)), {}, "does not fit model VAE.*no 'layers'"),
        (SigmoidBeliefNet(data_shape=(5,), layers=(3, 2)), {}, r"below\(1, z\) is a .*Binary layers take Amortized"),
        (SigmoidBeliefNet(data_shape=(5,), layers=(3,)), {}, "its layers are binary. Use AmortizedBernoulli"),
        (Wrong(), {}, r"below\(1, z\) is a .* it must be Normal"),
        (Layered(), {"hidden": (0,)}, r"hidden is \(0,\)"),
        (Layered(), {"activation": "tanhh"}, "unknown activation 'tanhh'"),
    ],
)
def test_bad_input_is_told(kind, model, arguments, words):
    with pytest.raises(ArgumentError, match=words):
        kind(model, **arguments)


def test_a_ladder_needs_hidden_units_and_data_of_the_right_shape():
    with pytest.raises(ArgumentError, match=r"hidden is \(\); a ladder passes hidden units"):
        Ladder(Layered(), hidden=())
    for kind in (BottomUp, Ladder):
        with pytest.raises(DataError, match=r"x has shape \(2, 11\)"):
            kind(Layered())(torch.zeros(2, 11))
