"""One contract over all families of flows; a new one is covered by its names in VARIANTS."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import jacrev, vmap

import pyrovae
from pyrovae.errors import ArgumentError
from pyrovae.flows import FLOWS, FlowPrior, FlowTransform, Stack, Sylvester, stack
from pyrovae.flows.layers import Parametrized
from pyrovae.guides import AmortizedNormal
from pyrovae.models import VAE
from pyrovae.training.programs import local_params

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "planar": ("planar", {}),
    "radial": ("radial", {}),
    "householder": ("householder", {}),
    "sylvester-orthogonal": ("sylvester", {}),
    "sylvester-few-columns": ("sylvester", {"columns": 1}),
    "sylvester-householder": ("sylvester", {"kind": "householder", "reflections": 3}),
    "sylvester-triangular": ("sylvester", {"kind": "triangular"}),
    "iaf": ("iaf", {"hidden": (16,)}),
    "maf": ("maf", {"hidden": (16,)}),
    "coupling": ("coupling", {"hidden": (16,)}),
    "spline": ("spline", {"hidden": (16,), "bins": 4}),
}
SPREAD = {"planar": 1.0, "radial": 1.0, "householder": 1.0, "sylvester": 1.0}  # of the parameters; networks get 0.2
CONTEXT = 4


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return VARIANTS[request.param]


@pytest.fixture(params=[0, CONTEXT], ids=["learnt", "amortized"])
def context(request: pytest.FixtureRequest) -> int:
    return request.param


def made(variant: tuple[str, dict[str, Any]], features: int, context: int = 0, depth: int = 3) -> Stack:
    """A flow in float64, far from the identity."""
    name, options = variant
    flow = stack(name, features, depth, context, **options).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(SPREAD.get(name, 0.2) * (0.3 if context else 1.0) * torch.randn_like(parameter))
    return flow


def context_of(context: int, *batch: int) -> Tensor | None:
    return torch.randn(*batch, context, dtype=torch.float64) if context else None


def normal(features: int) -> Distribution:
    return dist.Normal(torch.zeros(features, dtype=torch.float64), 1.0).to_event(1)


def grid(reach: float, points: int) -> tuple[Tensor, float]:
    """The points of a square grid over the plane, and the area of each."""
    line = torch.linspace(-reach, reach, points, dtype=torch.float64)
    return torch.cartesian_prod(line, line), float(line[1] - line[0]) ** 2


def test_every_family_is_under_contract() -> None:
    assert {name for name, _ in VARIANTS.values()} == set(FLOWS)


def test_log_determinant_is_that_of_the_jacobian(variant: Any, context: int) -> None:
    for features in (1, 5):
        if features == 1 and variant[1].get("columns"):
            continue
        flow, c = made(variant, features, context), context_of(context, 7)
        x = torch.randn(7, features, dtype=torch.float64)
        transform = flow(c)
        y = transform(x)
        found = transform.log_abs_det_jacobian(x, y)
        assert y.shape == x.shape
        assert found.shape == (7,)

        def one(x: Tensor, c: Tensor | None) -> Tensor:
            return flow(c)(x)  # noqa: B023

        jacobian = vmap(jacrev(one), in_dims=(0, None if c is None else 0))(x, c)
        torch.testing.assert_close(found, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(flow(c).log_abs_det_jacobian(x, y), found)  # by a transform that has not seen x
        assert features == 1 or (y - x).abs().max() > 0.1  # a rotation of the line is none


def test_inverse_and_its_determinant(variant: Any, context: int) -> None:
    flow, c = made(variant, 5, context), context_of(context, 7)
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    transform = flow(c)
    y = transform(x)
    assert transform.inv(y) is x  # its own draw, from memory
    known = FLOWS[variant[0]].scores
    if known == "own draws":
        with pytest.raises(NotImplementedError, match="no inverse in closed form"):
            transform.inv(y.clone())
        return
    other = flow(c)
    given = y.clone()
    back = other.inv(given)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-8)
    ladj = transform.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(other.log_abs_det_jacobian(back, given), ladj, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(other.inv.log_abs_det_jacobian(given, back), -ladj, rtol=1e-7, atol=1e-8)


def test_bijective_on_the_plane(variant: Any) -> None:
    """∫ N(f(x)) |det ∂f| dx = ∫ N(y) dy = 1 for a bijection, and needs no inverse."""
    flow = made(variant, 2)
    x, area = grid(12.0, 361)
    with torch.no_grad():
        transform = flow()
        y = transform(x)
        density = (normal(2).log_prob(y) + transform.log_abs_det_jacobian(x, y)).exp()
    assert float(density.sum() * area) == pytest.approx(1.0, abs=2e-3)


def test_density_integrates_to_one_and_has_the_moments_of_the_draws(variant: Any) -> None:
    flow = made(variant, 2)
    with torch.no_grad():
        q = dist.TransformedDistribution(normal(2), [flow()])
        z = q.sample((40_000,))
        if FLOWS[variant[0]].scores == "own draws":  # moments of the images of base points
            points, area = grid(8.0, 401)
            weights = normal(2).log_prob(points).exp() * area
            points = flow()(points)
        else:
            points, area = grid(12.0, 361)
            weights = q.log_prob(points).exp() * area
    assert float(weights.sum()) == pytest.approx(1.0, abs=2e-3)
    for statistic in (lambda z: z, lambda z: z.square(), lambda z: z.prod(-1, keepdim=True), torch.tanh):
        expected = (weights[:, None] * statistic(points)).sum(0)
        error = statistic(z).std(0) / len(z) ** 0.5
        # 77 comparisons over all variants at 5 standard errors: a false alarm once in 20 000 seeds.
        assert ((statistic(z).mean(0) - expected).abs() < 5 * error + 2e-3).all()


def test_own_draws_are_scored_by_change_of_variables(variant: Any, context: int) -> None:
    flow, c = made(variant, 4, context), context_of(context, 6)
    base = dist.Normal(torch.zeros(6, 4, dtype=torch.float64), 1.0).to_event(1)
    q = dist.TransformedDistribution(base, [flow(c)]).expand((3, 6))
    torch.manual_seed(1)
    x = base.expand((3, 6)).sample()
    torch.manual_seed(1)
    z = q.rsample()
    transform = flow(c)
    y = transform(x)
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(q.log_prob(z), base.log_prob(x) - transform.log_abs_det_jacobian(x, y))


def test_batches_and_particles_equal_a_loop(variant: Any) -> None:
    flow, c = made(variant, 4, CONTEXT), context_of(CONTEXT, 3, 2)
    x = torch.randn(5, 3, 2, 4, dtype=torch.float64)
    transform = flow(c)
    y = transform(x)
    ladj = transform.log_abs_det_jacobian(x, y)
    assert ladj.shape == (5, 3, 2)
    for k, i, j in ((0, 0, 0), (4, 2, 1), (2, 1, 0), (3, 0, 1)):
        one = flow(c[i, j])
        element = x[k, i, j]
        torch.testing.assert_close(one(element), y[k, i, j])
        torch.testing.assert_close(one.log_abs_det_jacobian(element, one(element)), ladj[k, i, j])
    assert not torch.allclose(flow(c[0, 0])(x), flow(c[0, 1])(x))
    # one x for many contexts
    torch.testing.assert_close(flow(c)(x[0, 0, 0])[2, 1], flow(c[2, 1])(x[0, 0, 0]))


@pytest.mark.parametrize("hidden", [(), (8,)])
@pytest.mark.parametrize(
    "case", [case for case, (name, _) in VARIANTS.items() if issubclass(FLOWS[name], Parametrized)]
)
def test_amortized_equals_learnt_at_the_same_parameters(case: str, hidden: tuple[int, ...]) -> None:
    """Where all parameters are outputs of a network; elsewhere the context is one more input of it."""
    name, options = VARIANTS[case]
    flow, learnt = (stack(name, 4, 3, size, hidden=hidden, **options).double() for size in (CONTEXT, 0))
    c = context_of(CONTEXT, 6)
    for layer in flow.transforms:
        torch.nn.init.normal_(layer.head[-1].weight)
    x = torch.randn(6, 4, dtype=torch.float64)
    transform = flow(c)
    y = transform(x)
    ladj = transform.log_abs_det_jacobian(x, y)
    for row in range(6):
        with torch.no_grad():
            for ours, theirs in zip(learnt.transforms, flow.transforms, strict=True):
                for key, value in theirs.parameters_at(c[row]).items():
                    ours.values[key].copy_(value)
        one = learnt()
        point = x[row]
        torch.testing.assert_close(one(point), y[row])
        torch.testing.assert_close(one.log_abs_det_jacobian(point, one(point)), ladj[row])


def test_every_parameter_gets_a_gradient(variant: Any, context: int) -> None:
    """At the initial values, for a target that is not the base."""
    name, options = variant
    flow, c = stack(name, 4, 2, context, **options), context_of(context, 6)
    base = dist.Normal(torch.zeros(6, 4), torch.tensor([1.0, 0.5, 2.0, 1.0])).to_event(1)
    q = dist.TransformedDistribution(base, [flow(None if c is None else c.float())])
    z = q.rsample()
    target = dist.MultivariateNormal(torch.arange(4.0), torch.eye(4) + 0.5)
    (q.log_prob(z) - target.log_prob(z)).mean().backward()
    for key, parameter in flow.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


def test_starts_near_the_identity(variant: Any, context: int) -> None:
    name, options = variant
    if options.get("reflections"):  # those that only rotate the inside of a Sylvester layer
        options = {"kind": options["kind"]}
    for features in (1, 2, 30):
        options = {key: value for key, value in options.items() if key != "columns"}
        flow, c = stack(name, features, 2, context, **options), context_of(context, 200)
        x = torch.randn(200, features)
        transform = flow(None if c is None else c.float())
        y = transform(x)
        moved = (y - x).norm(dim=-1) / features**0.5
        assert moved.mean() < 0.1
        assert transform.log_abs_det_jacobian(x, y).abs().mean() / features < 0.1


def test_state_is_saved_and_loaded(variant: Any, context: int) -> None:
    flow, c = made(variant, 4, context), context_of(context, 6)
    again = stack(variant[0], 4, 3, context, **variant[1]).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    assert not torch.allclose(again(c)(x), flow(c)(x))
    again.load_state_dict(flow.state_dict())
    assert torch.equal(again(c)(x), flow(c)(x))


def test_single_precision_stays_finite_far_away(variant: Any) -> None:
    flow = made(variant, 4).float()
    x = torch.cat([torch.zeros(1, 4), 1e3 * torch.randn(5, 4)])
    x.requires_grad_()
    transform = flow()
    y = transform(x)
    ladj = transform.log_abs_det_jacobian(x, y)
    assert y.dtype == ladj.dtype == torch.float32
    (y.sum() + ladj.sum()).backward()
    for tensor in (y, ladj, x.grad, *(p.grad for p in flow.parameters())):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("columns", [1, 3, 5])
def test_orthogonal_columns(columns: int) -> None:
    layer = Sylvester(5, context=CONTEXT, columns=columns).double()
    q = layer(context_of(CONTEXT, 7)).q
    eye = torch.eye(columns, dtype=torch.float64).expand(7, columns, columns)
    torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=1e-12)


def test_the_orthogonal_factor_is_continuous_in_its_parameters() -> None:
    """LAPACK's changes sign where the first entry does."""
    layer = Sylvester(3, kind="orthogonal", columns=2).double()
    factors = []
    for first in (-1e-9, 1e-9):
        with torch.no_grad():
            layer.values["columns"][0, 0] = first
        factors.append(layer().q.detach())
    torch.testing.assert_close(*factors, rtol=0, atol=1e-6)


def test_neighbouring_layers_reverse_the_order() -> None:
    """With two layers every output depends on every input; with one, on those before it."""
    x = torch.randn(5, dtype=torch.float64)
    for name in ("iaf", "maf"):
        one, two = (jacrev(made((name, {}), 5, depth=depth)())(x) for depth in (1, 2))
        assert one.triu(1).abs().max() == 0
        assert (two.abs() > 1e-12).all()


@pytest.mark.slow
def test_importing_flows_leaves_validation_on() -> None:
    """Importing zuko turns the validation of all distributions off, in a process that had it on."""
    import subprocess
    import sys

    code = (
        "import pyro, torch; from torch.distributions import Distribution as D; pyro.enable_validation(True);"
        " before = D._validate_args; import pyrovae.flows; assert before and D._validate_args"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: stack("planer", 2, 1), r"unknown flow 'planer' \(did you mean 'planar'\?\); there are: coupling, hou"),
        (lambda: stack("planar", 2, 1, bins=3), "unknown option of flow 'planar' 'bins'.*there are: hidden"),
        (lambda: stack("iaf", 2, 1, reverse=True), "unknown option of flow 'iaf' 'reverse'"),
        (lambda: stack("planar", 2, 0), "depth is 0; it must be a whole number, at least 1"),
        (lambda: stack("planar", 0, 1), "features is 0"),
        (lambda: stack("planar", 2, 1, context=-1), "context is -1"),
        (lambda: stack("planar", 2, 1, context=3, hidden=(0,)), "hidden is 0"),
        (lambda: stack("iaf", 2, 1, hidden=(0,)), "hidden is 0"),
        (lambda: stack("householder", 2, 1, reflections=0), "reflections is 0"),
        (lambda: stack("sylvester", 2, 1, kind="orthogonall"), "unknown kind of Sylvester flow 'orthogonall'.*mean"),
        (lambda: stack("sylvester", 2, 1, columns=3), "columns is 3; it must be at most features, 2"),
        (lambda: stack("sylvester", 2, 1, reflections=3), "reflections is 3; it is for kind='householder'"),
        (lambda: stack("sylvester", 2, 1, kind="triangular", columns=2), "columns is 2; it is for kind='orthogonal'"),
        (lambda: stack("spline", 2, 1, bins=1), "bins is 1"),
        (lambda: stack("spline", 2, 1, bound=0.0), "bound is 0.0"),
        (lambda: stack("planar", 2, 1)(torch.zeros(3, 4)), "context=0 and is called with a context of shape"),
        (lambda: stack("iaf", 2, 1, context=4)(), "context=4 and is called with none"),
        (lambda: stack("sylvester", 2, 1, context=4)(torch.zeros(3, 5)), r"a context of shape \(3, 5\)"),
        (lambda: FlowPrior(2, "iaf"), "flow is 'iaf', which cannot be a prior: its inverse takes one pass a feature"),
        (lambda: FlowPrior(2, "sylvester"), "it has no inverse. Use one of coupling, maf, radial, spline"),
        (lambda: FlowPrior(2, "householder"), "it leaves a standard normal as it is"),
    ],
)
def test_bad_arguments_are_named(call: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        call()


def test_under_autocast_the_flow_stays_in_single_precision() -> None:
    flow, c, x = stack("sylvester", 4, 2, CONTEXT), torch.randn(6, CONTEXT), torch.randn(6, 4)
    expected = flow(c)(x)
    with torch.autocast("cpu", torch.bfloat16):
        transform = flow(c)
        y = transform(x)
    assert y.dtype == transform.log_abs_det_jacobian(x, y).dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0, atol=0.02)  # the network's outputs are rounded, not the map


class TestFlowPrior:
    @pytest.fixture(params=["coupling", "maf", "radial", "spline"])
    def prior(self, request: pytest.FixtureRequest) -> FlowPrior:
        prior = FlowPrior(2, request.param, depth=2).double()
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return prior

    def test_integrates_to_one(self, prior: FlowPrior) -> None:
        points, area = grid(12.0, 241)
        with torch.no_grad():
            p = prior()
            assert p.batch_shape == ()
            assert p.event_shape == (2,)
            assert float(p.log_prob(points).exp().sum() * area) == pytest.approx(1.0, abs=2e-3)

    def test_expands_to_a_batch(self, prior: FlowPrior) -> None:
        p = prior()
        z = p.expand((3, 5)).sample()
        assert z.shape == (3, 5, 2)
        torch.testing.assert_close(p.expand((3, 5)).log_prob(z.clone()), p.log_prob(z.clone()))

    def test_scores_quickly(self, prior: FlowPrior) -> None:
        """The cost by which pyrovae accepts a log-density at given values."""
        structure = pyrovae.structure.check(lambda: pyrovae_sample(prior), lambda: pyrovae_sample(prior))
        assert structure.quick

    def test_is_learnt_as_the_prior_of_a_vae(self, prior: FlowPrior) -> None:
        class Model(VAE):
            def __init__(self) -> None:
                super().__init__(data_shape=(5,), latent_dim=2, hidden=(8,))
                self.flow_prior = prior.float()

            def prior(self) -> dist.TorchDistribution:
                return self.flow_prior()

        model = Model()
        guide = AmortizedNormal(model)
        x = torch.bernoulli(torch.full((6, 5), 0.4))
        for objective in (pyrovae.ELBO(3, gradient="stl"), pyrovae.IWAE(3, gradient="dreg")):
            model.zero_grad()
            with local_params(model, guide):
                objective.differentiable_loss(model, guide, x).backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.abs().sum() > 0, name
        assert model(size=4).shape == (4, 5)


def pyrovae_sample(prior: FlowPrior) -> Tensor:
    import pyro

    return pyro.sample("z", prior())


def test_a_transform_without_push_says_so() -> None:
    with pytest.raises(NotImplementedError):
        FlowTransform()(torch.zeros(2))


@pytest.mark.slow
def test_a_prior_learns_a_ring_better_than_any_gaussian() -> None:
    """Maximum likelihood on 4 000 points of a ring of radius 2 and width 0.2; the best Gaussian is known exactly."""
    angle, radius = 2 * math.pi * torch.rand(8_000), 2.0 + 0.2 * torch.randn(8_000)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    train, test = x[:4_000], x[4_000:]
    prior = FlowPrior(2, "spline", depth=4)
    optimizer = torch.optim.Adam(prior.parameters(), 5e-3)
    with pyro.validation_enabled(False):
        for _ in range(300):
            optimizer.zero_grad()
            (-prior().log_prob(train[torch.randint(len(train), (500,))]).mean()).backward()
            optimizer.step()
    with torch.no_grad():
        flow = float(prior().log_prob(test).mean())
    gaussian = float(dist.MultivariateNormal(train.mean(0), train.T.cov()).log_prob(test).mean())
    entropy = -(math.log(2 * math.pi * 2.0) + 0.5 * math.log(2 * math.pi * math.e * 0.2**2))  # the truth, nearly
    assert flow > gaussian + 0.5
    assert flow < entropy + 0.05
