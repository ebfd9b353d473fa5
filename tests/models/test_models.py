"""The VAE in all its variants, and the sigmoid belief net; test_all_models.py has what all models share."""

from __future__ import annotations

import itertools

import pyro
import pytest
import torch
from pyro import poutine

import pyrovae
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides import AmortizedBernoulli, AmortizedNormal
from pyrovae.models import VAE, SigmoidBeliefNet
from pyrovae.models.likelihoods import LIKELIHOODS
from pyrovae.registry import MODELS as REGISTRY
from pyrovae.registry import configuration
from pyrovae.training.programs import local_params, named_parameters

VARIANTS = (
    {
        f"vae-{likelihood}-{network}-{prior}": (
            VAE,
            dict(
                data_shape=shape,
                latent_dim=3,
                hidden=(16,),
                likelihood=likelihood,
                network=network,
                prior=prior,
                channels=(8, 4),
            ),
        )
        for (likelihood, prior), (network, shape) in itertools.product(
            zip(LIKELIHOODS, itertools.cycle(("standard", "learnable"))),
            (("mlp", (5, 3)), ("conv", (2, 7, 9))),
        )
    }
    | {
        f"vae-prior-{prior}": (
            VAE,
            dict(data_shape=(5, 3), latent_dim=3, hidden=(16,), prior=prior, prior_options=options),
        )
        for prior, options in (
            ("full", None),
            ("coupling", {"depth": 2}),
            ("maf", {"hidden": [8]}),
            ("radial", None),
            ("spline", {"bins": 4}),
        )
    }
    | {
        f"sigmoid-belief-net-{len(layers)}-{'deep' if hidden else 'linear'}": (
            SigmoidBeliefNet,
            dict(data_shape=(5, 3), layers=layers, hidden=hidden, activation="relu"),
        )
        for layers, hidden in itertools.product(((6,), (6, 4)), ((), (16,)))
    }
)

# Each model's guide, and objectives that train the two; the first serves where any will do.
GUIDES = {
    VAE: (AmortizedNormal, [pyrovae.ELBO(particles=2)]),
    SigmoidBeliefNet: (
        AmortizedBernoulli,
        [
            pyrovae.IWAE(5, gradient="vimco"),
            pyrovae.ReweightedWakeSleep(5),
            pyrovae.ELBO(particles=5, gradient="score"),
        ],
    ),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


@pytest.fixture
def model(variant):
    kind, arguments = variant
    return kind(**arguments)


def guide_of(model):
    return GUIDES[type(model)][0](model)


def objectives_of(model):
    return GUIDES[type(model)][1]


def decoder_of(model):
    return model.decoders[0] if isinstance(model, SigmoidBeliefNet) else model.decoder


def latents_of(trace):
    return {name: node["value"] for name, node in trace.nodes.items() if name.startswith("z")}


def data(model, n=4):
    """Draws from the model itself, so that they lie in the likelihood's support."""
    with torch.no_grad():
        return model(size=n)


def test_generates_and_conditions_on_the_same_shape(model):
    x = data(model)
    assert x.shape == (4, *model.data_shape)
    assert model.likelihood.support.check(x).all()
    assert model(x) is x


def test_decode_is_batch_polymorphic(model):
    z = model.prior().sample((5, 4))
    assert z.shape == (5, 4, model.latent_dim)
    many = model.decode(z)
    assert many.batch_shape == (5, 4)
    assert many.event_shape == model.data_shape
    x = data(model)
    one = torch.stack([model.decode(row).log_prob(x) for row in z])
    torch.testing.assert_close(many.log_prob(x), one, rtol=1e-4, atol=1e-4)
    assert many.mean.shape == (5, 4, *model.data_shape)


def test_particles_are_one_more_plate_on_the_left(model):
    with torch.no_grad():
        with pyro.plate("particles", 5, dim=-2):
            trace = poutine.trace(model).get_trace(size=4)
        x, latents = trace.nodes["x"]["value"], latents_of(trace)
        assert x.shape == (5, 4, *model.data_shape)
        assert all(z.shape[:2] == (5, 4) for z in latents.values())
        trace.compute_log_prob()
        many = sum(trace.nodes[name]["log_prob"] for name in ("x", *latents))
        for k in range(5):
            one = poutine.condition(model, data={name: z[k] for name, z in latents.items()})
            log_prob = poutine.trace(one).get_trace(x[k]).log_prob_sum()
            torch.testing.assert_close(many[k].sum(), log_prob, rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient(model):
    guide = guide_of(model)
    x = data(model)
    for objective in objectives_of(model):
        with local_params(model, guide):
            parameters = named_parameters(model, guide, x)
            for parameter in parameters.values():
                parameter.grad = None
            objective.differentiable_loss(model, guide, x).backward()
        assert parameters.keys() >= {f"model.{name}" for name, _ in model.named_parameters()}
        for name, parameter in parameters.items():
            assert parameter.grad is not None, (objective, name)
            assert parameter.grad.abs().sum() > 0, (objective, name)


def test_rebuilt_from_its_configuration_with_its_state(model):
    again = REGISTRY.build(configuration(model))
    again.load_state_dict(model.state_dict())
    x = data(model, 2)
    trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    same = poutine.trace(poutine.replay(again, trace=trace)).get_trace(x)
    same.compute_log_prob()
    latents = latents_of(trace)
    assert latents
    for name in ("x", *latents):
        torch.testing.assert_close(same.nodes[name]["log_prob"], trace.nodes[name]["log_prob"])
    z = model.prior().sample((2,))
    torch.testing.assert_close(again.decode(z).log_prob(x), model.decode(z).log_prob(x))
    draws = []  # of the prior, which need not be a site of its own
    for one in (model, again):
        torch.manual_seed(1)
        draws.append(one.prior().sample((3,)))
    assert torch.equal(*draws)


def test_fitted_saved_and_loaded_it_gives_the_same_numbers(model, tmp_path):
    x, guide = data(model, 8), guide_of(model)
    settings = {"objective": objectives_of(model)[0], "epochs": 1, "batch_size": 4, "progress": False}
    run = pyrovae.fit(model, guide, x, run_dir=tmp_path / "run", **settings)
    again = pyrovae.load(tmp_path / "run")
    first, second = (pyrovae.evaluation.log_likelihood(r.model, r.guide, x, 3) for r in (run, again))
    assert torch.equal(first.values, second.values)


def test_float64(model):
    model = model.double()
    guide = guide_of(model).double()
    x = data(model)
    assert x.dtype == torch.float64
    assert objectives_of(model)[0].estimate(model, guide, x).bound.dtype == torch.float64


def test_the_joint_density_is_prior_times_likelihood(model):
    x = data(model)
    trace = poutine.trace(model).get_trace(x)
    if isinstance(model, SigmoidBeliefNet):
        z, *above = (z for _, z in sorted(latents_of(trace).items()))
        layers = [z, *above]
        prior = model.top().log_prob(layers[-1]).sum()
        for layer, (lower, upper) in enumerate(itertools.pairwise(layers), 1):
            prior = prior + model.below(layer, upper).log_prob(lower).sum()
    else:
        z = trace.nodes["z"]["value"]
        prior = model.prior().log_prob(z).sum()
    torch.testing.assert_close(trace.log_prob_sum(), prior + model.decode(z).log_prob(x).sum())


def test_output_starts_at_the_mean_of_the_data(model):
    torch.manual_seed(1)
    x = 0.1 + 0.3 * torch.rand(500, *model.data_shape)  # intensities, not around the middle
    model.initialize_output(x)
    with torch.no_grad():
        layers = [m for m in decoder_of(model).modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        layers[-1].weight.zero_()
        mean = model.decode(torch.zeros(model.latent_dim)).mean
    dims = tuple(range(1, len(model.data_shape))) if getattr(model, "network", "mlp") == "conv" else ()
    wanted = x.mean(0)
    if dims:
        wanted = wanted.mean(dims, keepdim=True).expand(model.data_shape)
    torch.testing.assert_close(mean, wanted, atol=1e-3, rtol=0)


def test_learnable_prior_is_used_and_constrained():
    model = VAE(data_shape=(4,), latent_dim=2, hidden=(8,), prior="learnable")
    with torch.no_grad():
        model.prior_loc.fill_(3.0)
    assert model.prior().mean.tolist() == [3.0, 3.0]
    assert {"prior_loc", "prior_scale_unconstrained"} <= {name for name, _ in model.named_parameters()}


SMALL = [
    (VAE, {"data_shape": (4,), "latent_dim": 2, "hidden": (8,)}),
    (SigmoidBeliefNet, {"data_shape": (4,), "layers": (2, 2)}),
]


@pytest.mark.parametrize(("kind", "arguments"), SMALL)
def test_half_precision_networks_keep_full_precision_densities(kind, arguments):
    model = kind(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.decode(torch.zeros(3, 2)).base_dist.logits.dtype == torch.float32
        if kind is SigmoidBeliefNet:
            assert model.below(1, torch.zeros(3, 2)).base_dist.logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        *(
            (kind, change, words)
            for kind in (VAE, SigmoidBeliefNet)
            for change, words in (
                ({"data_shape": ()}, r"data_shape is \(\)"),
                ({"data_shape": (4, -1)}, r"data_shape is \(4, -1\)"),
                ({"hidden": (0,)}, r"hidden is \(0,\)"),
                ({"activation": "tanhh"}, "unknown activation 'tanhh'.*did you mean 'tanh'"),
            )
        ),
        (VAE, {"latent_dim": 0}, r"latent_dim is \(0,\)"),
        (VAE, {"likelihood": "gaussian"}, "unknown likelihood 'gaussian'.*normal"),
        (VAE, {"prior": "flat"}, "unknown prior 'flat'"),
        (VAE, {"network": "resnet"}, "unknown network 'resnet'"),
        (VAE, {"network": "conv"}, r"data_shape is \(4,\); network='conv' needs images"),
        (VAE, {"network": "conv", "data_shape": (4, 4), "channels": ()}, "channels is"),
        (SigmoidBeliefNet, {"layers": ()}, r"layers is \(\)"),
        (SigmoidBeliefNet, {"layers": (3, 0)}, r"layers is \(3, 0\)"),
        (SigmoidBeliefNet, {"layers": (2.5,)}, r"layers is \(2.5,\)"),
    ],
)
def test_bad_arguments_are_named(kind, change, words):
    with pytest.raises(ArgumentError, match=words):
        kind(**dict(SMALL)[kind] | change)


@pytest.mark.parametrize(("kind", "arguments"), SMALL)
def test_data_of_another_shape_are_refused(kind, arguments):
    with pytest.raises(DataError, match=r"x has shape \(5, 3\); this model takes batches of shape \(n, \*\(4,\)\)"):
        kind(**arguments)(torch.zeros(5, 3))


@pytest.mark.parametrize(("kind", "arguments"), SMALL)
def test_works_with_pyros_predictive(kind, arguments):
    drawn = pyro.infer.Predictive(kind(**arguments), num_samples=7)(size=3)
    assert drawn["x"].shape == (7, 3, 4)
