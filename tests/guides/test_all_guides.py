"""One contract over all guides; a new one is covered by a line in CASES. What each must fit exactly lies beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoGuide
from pyro.nn import PyroModule
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

import pyrovae
from pyrovae import guides
from pyrovae.flows import FLOWS
from pyrovae.models import VAE, SigmoidBeliefNet, SphericalVAE
from pyrovae.models.networks import mlp
from pyrovae.registry import GUIDES, MODELS, configuration
from pyrovae.training.programs import local_params


class Shared(PyroModule):
    """Two real latents that all data share, dependent through them, and not Gaussian."""

    def forward(self, x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            loc = z[..., 0] + z[..., 1].square()
            pyro.sample("x", dist.Normal(loc.unsqueeze(-1), 1.0).expand([*loc.shape, 4]).to_event(1), obs=x)


class Layered(PyroModule):
    """Two layers of Gaussian latents for each data point."""

    data_shape, layers, hidden, activation = (4,), (2, 2), (8,), "tanh"

    def __init__(self) -> None:
        super().__init__()
        self.network, self.decoder = mlp(2, (8,), 4), mlp(2, (8,), 4)

    def below(self, layer: int, z: Tensor) -> dist.TorchDistribution:
        loc, log_scale = self.network(z).chunk(2, -1)
        return dist.Normal(loc, log_scale.clamp(-5, 5).exp()).to_event(1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", self.below(1, z2))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z1)).to_event(1), obs=x)


@dataclass(frozen=True)
class Case:
    """A guide and what there is to know of it.

    Args:
        model: builds the model.
        guide: builds the guide for the model.
        objective: one that trains every parameter of the guide.
        point: whether the guide is a point and has no density.
    """

    model: Callable[[], Any]
    guide: Callable[[Any], Any]
    objective: Callable[[], pyrovae.Objective] = pyrovae.ELBO
    point: bool = False

    def build(self) -> tuple[Any, Any, Tensor]:
        """Model, guide with every parameter away from where it starts, and data."""
        x = torch.bernoulli(torch.full((3, 4), 0.4))
        with pyro.settings.context(module_local_params=True), torch.no_grad():
            model = self.model()
            guide = self.guide(model)
            guide(x)
            for parameter in guide.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model, guide, x


def vae() -> VAE:
    return VAE(data_shape=(4,), latent_dim=2, hidden=(8,))


def own(model: Any) -> Any:
    return guides.amortize(model, nn.Sequential(nn.Linear(4, 8), nn.Tanh()), "full-rank", example=torch.zeros(3, 4))


def stl() -> pyrovae.Objective:
    return pyrovae.ELBO(gradient="stl")


CASES: dict[str, Case] = {
    "MeanField": Case(Shared, guides.MeanField, stl),
    "FullRank": Case(Shared, guides.FullRank, stl),
    "FactorCovariance": Case(Shared, lambda model: guides.FactorCovariance(model, rank=1), stl),
    "SparsePrecision": Case(Shared, guides.SparsePrecision, stl),
    "ASVI": Case(Shared, guides.ASVI, stl),
    **{f"Flow-{name}": Case(Shared, lambda model, name=name: guides.Flow(model, name)) for name in FLOWS},
    "PointEstimate": Case(Shared, guides.PointEstimate, point=True),
    "Laplace": Case(Shared, guides.Laplace, point=True),
    "AmortizedNormal": Case(vae, guides.AmortizedNormal, stl),
    "AmortizedFullRank": Case(vae, guides.AmortizedFullRank, stl),
    "AmortizedFactorCovariance": Case(vae, lambda model: guides.AmortizedFactorCovariance(model, rank=1), stl),
    **{
        f"AmortizedFlow-{name}": Case(
            vae, lambda model, name=name: guides.AmortizedFlow(model, name, depth=2, context=4)
        )
        for name in FLOWS
    },
    "AmortizedBernoulli": Case(
        lambda: SigmoidBeliefNet(data_shape=(4,), layers=(3,)),
        guides.AmortizedBernoulli,
        lambda: pyrovae.IWAE(4, gradient="vimco"),
    ),
    "AmortizedVonMisesFisher": Case(
        lambda: SphericalVAE(data_shape=(4,), latent_dim=3, hidden=(8,)), guides.AmortizedVonMisesFisher
    ),
    "BottomUp": Case(Layered, guides.BottomUp, stl),
    "Ladder": Case(Layered, guides.Ladder, stl),
    "amortize": Case(vae, own, stl),
}
DENSITIES = [name for name, case in CASES.items() if not case.point]
ONE_SITE = [name for name in CASES if name not in ("BottomUp", "Ladder")]
COMPILED_ELSEWHERE = ("Flow", "Amortized", "amortize")
"""Those whose own files compare compiled with eager steps, with several flows, families and objectives each."""
BY_INDUCTOR = ("FullRank", "ASVI")  # a Cholesky factor, and a chain of conditionals; the steps of others are traced


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        yield


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def drawn(guide: Any, x: Tensor, particles: int = 1) -> dict[str, Any]:
    """The guide's sites, with so many particles on the left of the data, scored."""
    with local_params(guide), torch.no_grad(), pyro.plate("particles", particles, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
        trace.compute_log_prob()
    return sampled(trace)


def given(values: dict[str, Tensor]) -> Any:
    """A trace that hands these values to a replay."""
    trace = poutine.Trace()
    for name, value in values.items():
        trace.add_node(name, type="sample", is_observed=False, value=value, infer={}, cond_indep_stack=(), fn=None)
    return trace


def sampled(trace: Any) -> dict[str, Any]:
    """The latent sites of a trace."""
    nodes = {name: trace.nodes[name] for name in trace.stochastic_nodes}
    return {name: site for name, site in nodes.items() if not site_is_subsample(site)}


def latents(model: Any, sites: dict[str, Any]) -> dict[str, Any]:
    """The guide's sites that are the model's too; an autoguide has one of its own besides."""
    dtype = next(iter(sites.values()))["value"].dtype
    with torch.no_grad():
        of_model = poutine.trace(model).get_trace(torch.zeros(3, 4, dtype=dtype))
    return {name: site for name, site in sites.items() if name in of_model}


def log_q(sites: dict[str, Any], particles: int) -> Tensor:
    """The guide's log-density of each particle, with the Jacobian of an autoguide's map."""
    parts = [site["log_prob"] for site in sites.values()]
    return sum(part.expand(particles, *part.shape[1:]).reshape(particles, -1).sum(-1) for part in parts)


def test_every_registered_guide_is_under_the_contract() -> None:
    of_models = {model.default_guide for model in MODELS.values()}  # under the contract of their models, each
    covered = {name.partition("-")[0] for name in CASES} - {"amortize"}
    assert covered | of_models == set(GUIDES)


def test_sites_are_those_of_the_model_and_particles_are_a_plate_on_their_left(case: Case) -> None:
    model, guide, x = case.build()
    with torch.no_grad():
        wanted = sampled(poutine.trace(model).get_trace(x))
    found = latents(model, drawn(guide, x, particles=5))
    assert set(found) == set(wanted)
    for name, site in found.items():
        own = wanted[name]
        batch = own["fn"].batch_shape if own["cond_indep_stack"] else (1,)
        assert site["value"].shape == (5, *batch, *own["fn"].event_shape), name
        if not case.point:
            assert not torch.equal(site["value"][0], site["value"][1])


def test_every_parameter_gets_a_gradient(case: Case) -> None:
    model, guide, x = case.build()
    with local_params(model, guide):
        case.objective().differentiable_loss(model, guide, x).backward()
    assert list(guide.parameters())
    for name, parameter in guide.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", DENSITIES)
def test_density_is_normalised_and_that_of_the_draws(name: str) -> None:
    """E_q[r(z) / q(z)] = 1 for any density r inside q's support; needs the density of the guide's own draws alone."""
    model, guide, x = CASES[name].build()
    particles = 20_000
    sites = drawn(guide, x[:1], particles)
    z = torch.cat([site["value"].flatten(1) for site in latents(model, sites).values()], -1)
    if name == "AmortizedVonMisesFisher":
        log_r = torch.tensor(-math.log(4 * math.pi))  # uniform on the sphere
    elif name == "AmortizedBernoulli":
        log_r = torch.tensor(-z.shape[-1] * math.log(2.0))  # uniform over the codes
    else:
        log_r = dist.MultivariateNormal(z.mean(0), 0.2 * z.T.cov()).log_prob(z)
    ratio = (log_r - log_q(sites, particles)).exp()
    # 4.5 standard errors, 25 guides: a false alarm once in 5 000 seeds, were the ratios Gaussian.
    assert abs(float(ratio.mean()) - 1.0) < 4.5 * float(ratio.std()) / particles**0.5
    assert float(ratio.std()) < 5.0  # so that an error of a sixth would show


@pytest.mark.parametrize("name", ONE_SITE)
def test_vectorized_particles_equal_a_loop(name: str) -> None:
    """Up to 15 normals are drawn one by one, so that three particles at once take the numbers that a loop takes."""
    model, guide, x = CASES[name].build()
    x = x[:1]
    pyro.set_rng_seed(1)
    together = drawn(guide, x, 3)
    (site,) = latents(model, together)
    if name.endswith("FactorCovariance") or name == "AmortizedVonMisesFisher":  # several draws each, or rejection
        values = [{key: site["value"][k : k + 1] for key, site in together.items()} for k in range(3)]
        alone = [drawn(poutine.replay(guide, trace=given(value)), x) for value in values]
    else:
        pyro.set_rng_seed(1)
        alone = [drawn(guide, x) for _ in range(3)]
    torch.testing.assert_close(together[site]["value"], torch.cat([one[site]["value"] for one in alone]))
    torch.testing.assert_close(log_q(together, 3), torch.cat([log_q(one, 1) for one in alone]))


def test_rebuilt_from_its_configuration_with_its_state(case: Case) -> None:
    model, guide, x = case.build()
    described = configuration(guide)
    if described is None:
        pytest.skip("an encoder of one's own: no configuration can hold it")
    assert "model" not in described["arguments"]
    again = GUIDES.build(described, model)
    again.load_state_dict(guide.state_dict())  # an autoguide's state waits for its first call
    draws = []
    for each in (guide, again):
        with local_params(each), torch.no_grad():
            each(x)
        pyro.set_rng_seed(3)
        draws.append(drawn(each, x, 2))
    for name in latents(model, draws[0]):
        torch.testing.assert_close(draws[0][name]["value"], draws[1][name]["value"])
    if not case.point:
        torch.testing.assert_close(log_q(draws[0], 2), log_q(draws[1], 2))


def test_a_run_is_rebuilt_from_its_folder(case: Case, tmp_path: Any) -> None:
    model, guide, x = case.build()
    if configuration(guide) is None:
        pytest.skip("an encoder of one's own: no configuration can hold it")
    pyrovae.fit(model, guide, x, objective=case.objective(), epochs=1, compile=False, run_dir=tmp_path, progress=False)
    given = None if configuration(model) else model
    run = pyrovae.load(tmp_path, given, example=x)
    for (name, mine), (_, theirs) in zip(guide.named_parameters(), run.guide.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


def test_float64(case: Case) -> None:
    pyro.set_rng_seed(0)
    x = torch.bernoulli(torch.full((3, 4), 0.4, dtype=torch.float64))
    with pyro.settings.context(module_local_params=True):
        model = case.model().double()
        guide = case.guide(model)
        guide(x) if isinstance(guide, AutoGuide | guides.ASVI) else guide.double()  # those follow the data
    for site in latents(model, drawn(guide, x, 2)).values():
        assert site["value"].dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(COMPILED_ELSEWHERE)])
def test_compiled_steps_are_the_eager_ones(name: str, request: pytest.FixtureRequest) -> None:
    """Losses and parameters; a step that falls back to the eager one fails here, as a warning."""
    if name.startswith(BY_INDUCTOR):
        request.getfixturevalue("inductor")
    losses, ends = [], []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, x = CASES[name].build()
        objective = CASES[name].objective()
        svi = pyrovae.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective, compile=compile)
        start = [parameter.detach().clone() for parameter in guide.parameters()]
        losses.append([svi.step(x) for _ in range(12)])
        ends.append([parameter.detach().clone() for parameter in guide.parameters()])
        assert all((end != begin).any() for end, begin in zip(ends[-1], start, strict=True))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for eager, compiled in zip(*ends, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
