"""DRAW and its guide against the paper's equations in plain loops, quadrature, finite differences and each other."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyrovae
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides.draw import AmortizedDRAW
from pyrovae.models import VAE
from pyrovae.models.attention import Attention, Grid, filterbank
from pyrovae.models.draw import DRAW, LSTM
from pyrovae.registry import GUIDES, MODELS, configuration
from pyrovae.structure import check
from pyrovae.training.programs import local_params, named_parameters, state_of

SIZES = {"both": (2, 3), "read": (3, None), "write": (None, 2), "none": (None, None), "one": (1, 1)}
VARIANTS = {
    **{name: dict(data_shape=(5, 3), read_size=read, write_size=write) for name, (read, write) in SIZES.items()},
    "colours": dict(data_shape=(3, 4, 6), read_size=2, write_size=3),
    "vector": dict(data_shape=(7,)),
    "normal": dict(data_shape=(4, 4), read_size=2, write_size=2, likelihood="normal"),
    "continuous-bernoulli": dict(data_shape=(4, 4), write_size=2, likelihood="continuous-bernoulli"),
}
OBJECTIVES = [
    pyrovae.ELBO(),
    pyrovae.ELBO(kl="analytic"),
    pyrovae.ELBO(2, gradient="stl"),
    pyrovae.ELBO(2, gradient="score"),
    pyrovae.IWAE(3, gradient="pathwise"),
    pyrovae.IWAE(3, gradient="dreg"),
]


def pair(data_shape=(5, 3), steps=3, latent_dim=2, hidden=6, scale=0.5, encoder=7, **options):
    """A DRAW and its guide, with Gaussian parameters so that no step is idle."""
    model = DRAW(data_shape, steps, latent_dim, hidden, **options)
    guide = AmortizedDRAW(model, hidden=encoder)
    for parameter in (*model.parameters(), *guide.parameters()):
        torch.nn.init.normal_(parameter, std=scale)
    return model, guide


@pytest.fixture(params=VARIANTS)
def drawn(request):
    return pair(**VARIANTS[request.param])


def data(model, n=4):
    with torch.no_grad():
        return model(size=n)


def latents_of(trace):
    return {name: node["value"] for name, node in trace.nodes.items() if name.startswith("z")}


# ---------------------------------------------------------------------------------------------------------
# The filters


def plain_filterbank(center, stride, variance, size, pixels):
    """Equations 19, 20, 25 and 26 of the paper, number by number; i and a count from 1."""
    rows = []
    for i in range(1, size + 1):
        mean = center + (i - size / 2 - 0.5) * stride
        weights = [math.exp(-((a - mean) ** 2) / (2 * variance)) for a in range(1, pixels + 1)]
        rows.append([weight / sum(weights) for weight in weights])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_filters_are_those_of_plain_loops(size):
    center, stride, variance = (torch.rand(4, 3, dtype=torch.float64) for _ in range(3))
    center, stride, variance = 8 * center, 4 * stride, 0.3 + 3 * variance
    found = filterbank(center, stride, variance, size, 9)
    assert found.shape == (4, 3, size, 9)
    for place in ((0, 0), (3, 1), (2, 2)):
        wanted = plain_filterbank(*(float(each[place]) for each in (center, stride, variance)), size, 9)
        torch.testing.assert_close(found[place], wanted)


@pytest.mark.parametrize(
    ("size", "means"), [(1, [10.0]), (2, [8.5, 11.5]), (4, [5.5, 8.5, 11.5, 14.5]), (5, [4.0, 7.0, 10.0, 13.0, 16.0])]
)
def test_filters_lie_around_the_centre_by_hand(size, means):
    filters = filterbank(torch.tensor(10.0), torch.tensor(3.0), torch.tensor(0.25), size, 20)
    torch.testing.assert_close(filters @ torch.arange(1.0, 21.0), torch.tensor(means), atol=1e-3, rtol=0)


def test_the_grid_by_hand():
    attention = Attention(2, (7, 9), size=5)  # 7 rows and 9 columns
    torch.nn.init.zeros_(attention.place[0].weight)
    with torch.no_grad():  # as in the paper: the untouched grid is centred, and spans the longer side
        attention.place[0].bias.zero_()
        assert [float(each) for each in attention(torch.zeros(2))] == [5.0, 4.0, 2.0, 1.0, 1.0]
        attention.place[0].bias.copy_(torch.tensor([-0.2, 0.25, math.log(4.0), math.log(0.5), math.log(3.0)]))
        grid = attention(torch.zeros(2))
    wanted = Grid(x=4.0, y=5.0, stride=1.0, variance=4.0, intensity=3.0)
    for name, value in wanted._asdict().items():
        assert float(getattr(grid, name)) == pytest.approx(value), name


def sharp(x, y, stride=1.0, intensity=1.0):
    return Grid(*(torch.tensor(each) for each in (x, y, stride, 1e-3, intensity)))


def test_a_patch_reads_the_pixels_that_it_is_centred_at():
    image = torch.zeros(1, 7, 9)
    image[0, 4, 2] = 1.0  # row 5 and column 3, counted from 1
    attention = Attention(2, (7, 9), size=3)
    wanted = torch.zeros(1, 3, 3)
    wanted[0, 1, 1] = 2.0
    torch.testing.assert_close(attention.read(image, sharp(3.0, 5.0, intensity=2.0)), wanted)
    wanted = torch.zeros(1, 3, 3)
    wanted[0, 0, 2] = 1.0  # the pixel lies above and to the right
    torch.testing.assert_close(attention.read(image, sharp(2.0, 6.0)), wanted)
    apart = torch.rand(1, 7, 9)
    torch.testing.assert_close(attention.read(apart, sharp(5.0, 4.0, stride=3.0)), apart[:, 0::3, 1::3])


def test_writing_is_the_transpose_of_reading():
    attention = Attention(6, (5, 8), size=3)
    grid = attention(torch.randn(4, 6))
    images, patches = torch.randn(4, 2, 5, 8), torch.randn(4, 2, 3, 3)
    intensity = grid.intensity[:, None, None, None]
    one = (attention.read(images, grid) / intensity * patches).sum((1, 2, 3))
    two = (images * attention.write(patches, grid) * intensity).sum((1, 2, 3))
    torch.testing.assert_close(one, two)


def test_channels_share_the_grid():
    attention = Attention(6, (5, 8), size=2)
    grid, images = attention(torch.randn(4, 6)), torch.randn(4, 3, 5, 8)
    apart = torch.cat([attention.read(images[:, [c]], grid) for c in range(3)], 1)
    torch.testing.assert_close(attention.read(images, grid), apart)


def test_one_filter_alone_has_no_stride():
    attention = Attention(6, (5, 8), size=1)
    grid = attention(torch.randn(4, 6))
    images = torch.randn(4, 1, 5, 8)
    moved = grid._replace(stride=7.0 * grid.stride)
    assert torch.equal(attention.read(images, grid), attention.read(images, moved))
    attention.read(images, grid).sum().backward()
    assert attention.place[0].weight.grad.isfinite().all()
    assert attention.place[0].weight.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------
# The densities


def plain_lstm(lstm, inputs, output, cell):
    """The equations of a long short-term memory."""
    step = lstm.step
    gates = step.weight_ih @ inputs + step.bias_ih + step.weight_hh @ output + step.bias_hh
    enter, forget, content, leave = gates.chunk(4)
    cell = forget.sigmoid() * cell + enter.sigmoid() * content.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def plain_window(attention, output, rows, columns):
    x, y, log_variance, log_stride, log_intensity = (
        attention.place[0].weight @ output + attention.place[0].bias
    ).tolist()
    stride = math.exp(log_stride) * (max(rows, columns) - 1) / max(attention.size - 1, 1)
    centers = ((rows + 1) / 2 * (y + 1), (columns + 1) / 2 * (x + 1))
    filters = [
        plain_filterbank(center, stride, math.exp(log_variance), attention.size, pixels)
        for center, pixels in zip(centers, (rows, columns), strict=True)
    ]
    return (*filters, math.exp(log_intensity))


@torch.no_grad()
def plain_densities(model, guide, x, z):
    """log p(x, z) and log q(z | x) of one binary image by equations 3 to 8 and 21 to 29, one step after the other."""
    channels, rows, columns = (1, *model.data_shape)[-3:]
    canvas = model.first_canvas.reshape(channels, rows, columns).clone()
    image = x.reshape(channels, rows, columns)
    output, cell = model.decoder.start()
    seen, seen_cell = guide.encoder.start()
    log_p, log_q = 0.0, 0.0
    for z_t in z:
        looks = (image, image - canvas.sigmoid())
        if guide.attention is not None:
            by_row, by_column, intensity = plain_window(guide.attention, output, rows, columns)
            looks = [intensity * torch.stack([by_row @ one @ by_column.T for one in look]) for look in looks]
        inputs = torch.cat([*(look.reshape(-1) for look in looks), output])
        seen, seen_cell = plain_lstm(guide.encoder, inputs, seen, seen_cell)
        loc, log_scale = (guide.head[0].weight @ seen + guide.head[0].bias).chunk(2)
        log_q += float(dist.Normal(loc, log_scale.exp()).log_prob(z_t).sum())
        log_p += float(-0.5 * (z_t**2 + math.log(2 * math.pi)).sum())
        output, cell = plain_lstm(model.decoder, z_t, output, cell)
        stroke = model.stroke[0].weight @ output + model.stroke[0].bias
        if model.attention is None:
            canvas += stroke.reshape(canvas.shape)
        else:
            by_row, by_column, intensity = plain_window(model.attention, output, rows, columns)
            for channel, patch in enumerate(stroke.reshape(channels, model.write_size, model.write_size)):
                canvas[channel] += by_row.T @ patch @ by_column / intensity
    p = canvas.sigmoid()
    return log_p + float((image * p.log() + (1 - image) * (1 - p).log()).sum()), log_q


@pytest.mark.parametrize("name", [*SIZES, "colours"])
def test_densities_are_those_of_the_equations(name):
    model, guide = (each.double() for each in pair(**VARIANTS[name]))
    x = data(model)
    guided = poutine.trace(guide).get_trace(x)
    guided.compute_log_prob()
    trace = poutine.trace(poutine.replay(model, trace=guided)).get_trace(x)
    trace.compute_log_prob()
    z = torch.stack(list(latents_of(guided).values()), 1)
    assert list(latents_of(guided)) == ["z1", "z2", "z3"]
    joint = sum(trace.nodes[site]["log_prob"] for site in ("x", "z1", "z2", "z3"))
    posterior = sum(guided.nodes[site]["log_prob"] for site in ("z1", "z2", "z3"))
    wanted = torch.tensor([plain_densities(model, guide, *each) for each in zip(x, z, strict=True)])
    torch.testing.assert_close(torch.stack([joint, posterior], 1), wanted.double())


def test_particles_equal_a_loop(drawn):
    model, guide = drawn
    x = data(model)
    check(model, guide, x)
    with torch.no_grad():
        with pyro.plate("particles", 5, dim=-2):
            guided = poutine.trace(guide).get_trace(x)
            guided.compute_log_prob()
            trace = poutine.trace(poutine.replay(model, trace=guided)).get_trace(x)
            trace.compute_log_prob()
        for k in range(5):
            values = {name: z[k] for name, z in latents_of(guided).items()}
            for program, many in ((model, trace), (guide, guided)):
                one = poutine.trace(poutine.condition(program, data=values)).get_trace(x)
                one.compute_log_prob()
                for name in (*values, *(("x",) if program is model else ())):
                    assert many.nodes[name]["log_prob"].shape == (5, 4)
                    wanted = one.nodes[name]["log_prob"]
                    torch.testing.assert_close(many.nodes[name]["log_prob"][k], wanted, rtol=1e-4, atol=1e-4)


def test_the_likelihood_agrees_with_quadrature():
    model, guide = pair((2, 3), steps=2, latent_dim=1, read_size=2, write_size=2)
    x = data(model, 8)
    axis = torch.linspace(-7, 7, 141)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_joint = model.decode(z[:, None]).log_prob(x) + model.prior().log_prob(z)[:, None]
    exact = log_joint.double().logsumexp(0) + 2 * math.log(0.1)
    found = pyrovae.evaluation.log_likelihood(model, guide, x, particles=20_000, compile=False)
    # 8 data points at 4.2 standard errors: a false alarm once in 4 600 seeds.
    assert ((found.values - exact).abs() < 4.2 * found.standard_error).all()
    assert found.standard_error.max() < 0.1


def test_more_particles_give_a_tighter_bound():
    model, guide = pair()
    x = data(model, 200)
    with torch.no_grad():
        elbo, iwae = (o.estimate(model, guide, x).bound / 200 for o in (pyrovae.ELBO(50), pyrovae.IWAE(50)))
    assert iwae > elbo + 0.1  # about 1 nat a data point apart


# ---------------------------------------------------------------------------------------------------------
# Parameters and gradients


def gradients(model, guide, objective, x):
    """The gradient of the loss per data point, in a row, by all parameters of model and guide."""
    with local_params(model, guide):
        parameters = named_parameters(model, guide, x)
        for parameter in parameters.values():
            parameter.grad = None
        (objective.differentiable_loss(model, guide, x) / len(x)).backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__}-{o.gradient}-{o.particles}")
def test_every_parameter_gets_a_gradient(drawn, objective):
    model, guide = drawn
    found = gradients(model, guide, objective, data(model))
    assert found.keys() == {
        f"{kind}.{name}" for kind, one in (("model", model), ("guide", guide)) for name, _ in one.named_parameters()
    }
    for name, gradient in found.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name


def test_the_model_is_no_part_of_the_guide():
    model, guide = pair(read_size=2, write_size=2)
    parameters = named_parameters(model, guide, data(model))
    assert len({id(each) for each in parameters.values()}) == len(parameters)
    state = state_of(model, guide, parameters)
    assert len({each.data_ptr() for each in state.values()}) == len(state)
    assert set(state) == set(parameters)
    assert all(parameter.requires_grad for parameter in parameters.values())
    both = copy.deepcopy((model, guide))
    assert both[1]._model[0] is both[0]


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_the_pathwise_gradient_is_that_of_finite_differences(kl):
    """Along a random direction of all parameters, at the same draws: the route through the guide's decoder counts."""
    model, guide = (each.double() for each in pair(read_size=2, write_size=2))
    x, objective = data(model), pyrovae.ELBO(3, kl=kl)
    seed = 5

    def loss():
        torch.manual_seed(seed)
        with torch.no_grad(), local_params(model, guide):
            return objective.differentiable_loss(model, guide, x) / len(x)

    loss()  # looks at the structure, once
    torch.manual_seed(seed)
    slopes = gradients(model, guide, objective, x)
    parameters = named_parameters(model, guide, x)
    directions = {name: torch.randn_like(each) for name, each in parameters.items()}
    for kind in ("model.", "guide."):
        chosen = {name: direction for name, direction in directions.items() if name.startswith(kind)}

        def moved(by, chosen=chosen):
            with torch.no_grad():
                for name, direction in chosen.items():
                    parameters[name] += by * direction

        moved(1e-5)
        above = loss()
        moved(-2e-5)
        below = loss()
        moved(1e-5)
        slope = sum((slopes[name] * direction).sum() for name, direction in chosen.items())
        torch.testing.assert_close((above - below) / 2e-5, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (pyrovae.ELBO(gradient="stl"), pyrovae.ELBO()),
        (pyrovae.ELBO(kl="analytic"), pyrovae.ELBO()),
        (pyrovae.IWAE(3, gradient="dreg"), pyrovae.IWAE(3, gradient="pathwise")),
    ],
    ids=["stl", "analytic", "dreg"],
)
@pytest.mark.slow
def test_estimators_agree_with_the_pathwise_gradient(one, two):
    """Each gradient is that of 200 copies of three images, drawn 25 times."""
    model, guide = pair((2, 3), steps=2, latent_dim=1, hidden=3, encoder=3, read_size=2, write_size=2, scale=0.8)
    x = data(model, 3).repeat(200, 1, 1)
    parameters = [*model.parameters(), *guide.parameters()]

    def gradient(objective):
        with local_params(model, guide):
            loss = objective.differentiable_loss(model, guide, x) / len(x)
        return torch.cat([each.reshape(-1) for each in torch.autograd.grad(loss, parameters)]).double()

    draws = [torch.stack([gradient(objective) for _ in range(25)]) for objective in (one, two)]
    gap = draws[0].mean(0) - draws[1].mean(0)
    error = (sum(each.var(0) for each in draws) / 25).sqrt()
    known = error > 1e-9
    assert known.sum() > 150
    # About 200 parameters at 5.2 standard errors (Student's t of 48 degrees): a false alarm once in 1 200 seeds.
    assert (gap[known] / error[known]).abs().max() < 5.2


# ---------------------------------------------------------------------------------------------------------
# What a model and a guide must do


def test_generates_and_conditions_on_the_same_shape(drawn):
    model, guide = drawn
    x = data(model)
    assert x.shape == (4, *model.data_shape)
    assert model.likelihood.support.check(x).all()
    assert model(x) is x
    assert guide(x).shape == (4, 6)


def test_decode_is_batch_polymorphic(drawn):
    model, _ = drawn
    z = model.prior().sample((5, 4))
    many = model.decode(z)
    assert (many.batch_shape, many.event_shape) == ((5, 4), model.data_shape)
    x = data(model)
    one = torch.stack([model.decode(row).log_prob(x) for row in z])
    torch.testing.assert_close(many.log_prob(x), one, rtol=1e-4, atol=1e-4)


def test_canvases_end_at_what_is_decoded(drawn):
    model, _ = drawn
    z = model.prior().sample((4,))
    drawing = model.canvases(z)
    assert drawing.shape == (3, 4, *model.data_shape)
    torch.testing.assert_close(drawing[-1], model.decode(z).mean)
    torch.manual_seed(3)
    assert model.generate(4).shape == drawing.shape
    assert not model.generate(4).requires_grad


def test_a_step_adds_its_stroke_to_the_canvas():
    model, _ = pair(write_size=2)
    start, first, *_ = model.drawings(model.prior().sample((4,)))
    torch.testing.assert_close(first.canvas, start.canvas + model.write(first.memory.output))


def test_an_lstm_starts_from_what_it_has_learned():
    lstm = LSTM(4, 3)
    with torch.no_grad():
        lstm.first_output.fill_(0.3)
        lstm.first_cell.fill_(-0.5)
    inputs = torch.randn(2, 5, 4)
    found = lstm(inputs, lstm.start())
    wanted = plain_lstm(lstm, inputs[1, 2], *lstm.start())
    torch.testing.assert_close((found.output[1, 2], found.cell[1, 2]), wanted)


def test_output_starts_at_the_mean_of_the_data():
    model = DRAW((5, 3), steps=2, latent_dim=2, hidden=6)
    x = 0.1 + 0.3 * torch.rand(500, 5, 3)
    assert model.initialize_output(x) is model
    torch.testing.assert_close(model.on(model.start().canvas).mean, x.mean(0), atol=1e-3, rtol=0)


def test_fitted_saved_and_loaded_it_gives_the_same_numbers(drawn, tmp_path):
    model, guide = drawn
    x = data(model, 8)
    settings = {"objective": pyrovae.ELBO(4, kl="analytic"), "epochs": 2, "batch_size": 4, "progress": False}
    before = {name: each.detach().clone() for name, each in named_parameters(model, guide, x).items()}
    run = pyrovae.fit(model, guide, x, run_dir=tmp_path / "run", compile=False, **settings)
    assert all(not torch.equal(each, before[name]) for name, each in named_parameters(model, guide, x).items())
    again = pyrovae.load(tmp_path / "run")
    assert again.guide._model[0] is again.model
    first, second = (pyrovae.evaluation.log_likelihood(r.model, r.guide, x, 3) for r in (run, again))
    assert torch.equal(first.values, second.values)


def test_rebuilt_from_its_configuration(drawn):
    model, guide = drawn
    again = MODELS.build(configuration(model))
    assert configuration(again) == configuration(model)
    assert {name: each.shape for name, each in again.state_dict().items()} == {
        name: each.shape for name, each in model.state_dict().items()
    }
    assert configuration(GUIDES.build(configuration(guide), again)) == configuration(guide)
    assert model.default_guide in GUIDES
    pyrovae.registry.OBJECTIVES.build(model.default_objective)


@pytest.mark.parametrize("objective", OBJECTIVES[:3], ids=["pathwise", "analytic", "stl"])
def test_float64(drawn, objective):
    model, guide = (each.double() for each in drawn)
    assert objective.estimate(model, guide, data(model)).bound.dtype == torch.float64


def test_half_precision_networks_keep_full_precision_densities():
    model, guide = pair(read_size=2, write_size=2)
    x = data(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.decode(torch.zeros(3, 6)).base_dist.logits.dtype == torch.float32
        assert poutine.trace(guide).get_trace(x).nodes["z2"]["fn"].base_dist.loc.dtype == torch.float32
    run = pyrovae.fit(model, guide, x, epochs=1, precision="bf16", compile=False, progress=False)
    assert math.isfinite(run.history[-1]["bound"])


def test_works_with_pyros_predictive():
    drawn = pyro.infer.Predictive(DRAW((4,), steps=2, latent_dim=2, hidden=6), num_samples=7)(size=3)
    assert drawn["x"].shape == (7, 3, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_shape": ()}, r"data_shape is \(\)"),
        ({"data_shape": (4, -1)}, r"data_shape is \(4, -1\)"),
        ({"steps": 0}, "steps is 0; it must be a whole number, at least 1"),
        ({"latent_dim": 2.5}, "latent_dim is 2.5"),
        ({"hidden": (8,)}, r"hidden is \(8,\)"),
        ({"read_size": 0}, "read_size is 0; it must be a whole number, at least 1, or None for no attention"),
        ({"write_size": "5"}, "write_size is '5'"),
        ({"data_shape": (4,), "read_size": 2}, r"data_shape is \(4,\); attention needs images.*read_size=None"),
        ({"data_shape": (1, 1, 4, 4), "write_size": 2}, "attention needs images"),
        ({"likelihood": "bernouli"}, "did you mean 'bernoulli'"),
        ({"likelihood": "categorical-256"}, "unknown likelihood of DRAW 'categorical-256'; there are: bernoulli,"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ArgumentError, match=words):
        DRAW(**{"data_shape": (4, 4), "steps": 2, "latent_dim": 2, "hidden": 6} | change)


def test_bad_calls_are_refused():
    model, guide = pair((4, 4))
    with pytest.raises(DataError, match=r"x has shape \(5, 3\); this model takes batches of shape \(n, \*\(4, 4\)\)"):
        model(torch.zeros(5, 3))
    with pytest.raises(DataError, match=r"x has shape \(5, 3\); this guide encodes data of shape"):
        guide(torch.zeros(5, 3))
    with pytest.raises(ArgumentError, match="size is 0"):
        model.generate(0)
    with pytest.raises(ArgumentError, match="hidden is 0"):
        AmortizedDRAW(model, hidden=0)
    with pytest.raises(ArgumentError, match="guide AmortizedDRAW does not fit model VAE.*AmortizedNormal"):
        AmortizedDRAW(VAE((4, 4), latent_dim=2, hidden=(8,)))


# ---------------------------------------------------------------------------------------------------------
# Fits


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(None, None), (2, 3)], ids=["all", "attention"])
def test_a_fit_of_digits_climbs(sizes):
    digits = pyrovae.datasets.load("digits").train
    torch.manual_seed(0)
    read, write = sizes
    model = DRAW((8, 8), steps=3, latent_dim=4, hidden=32, read_size=read, write_size=write)
    objective = pyrovae.ELBO(kl="analytic")
    run = pyrovae.fit(
        model, AmortizedDRAW(model), digits, objective=objective, epochs=8, batch_size=50, lr=1e-2, compile=False,
        progress=False,
    )  # fmt: skip
    bounds = [row["bound"] for row in run.history]
    p = digits.x.mean(0).clamp(1e-6, 1 - 1e-6)
    independent = float((p * p.log() + (1 - p) * (1 - p).log()).sum())  # the best without latents, −27.1 nats
    # An attentive decoder first learns where to write: in so few steps little more than the mean.
    assert bounds[-1] > independent + (0.5 if sizes == (None, None) else -0.6)
    assert bounds[0] < independent - 1.5


@pytest.mark.parametrize(("shape", "size"), [((28, 28), 2), ((28, 28), 5), ((8, 12), 3), ((6, 6), 1)])
def test_the_window_starts_over_the_whole_image(shape, size):
    """Every pixel weighs at least a tenth of what it would in a mean: no part of the image is out of sight."""
    attention = Attention(16, shape, size)
    with torch.no_grad():
        by_row, by_column = attention._filters(attention(torch.zeros(16)))
    for filters, pixels in ((by_row, shape[0]), (by_column, shape[1])):
        assert (filters.mean(-2) > 0.1 / pixels).all()
