"""Every kind of data, model, guide and loss that ``fit`` takes, each against a number known otherwise."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from fit_helpers import (
    LinearGuide,
    LocalNormal,
    Regression,
    Rows,
    assert_identical,
    assert_same_run,
    binary,
    fit,
    local_evidence,
    no_latents,
    parameters,
    regression_data,
    seeded,
    untimed,
    vae,
)
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyrovae
from pyrovae.datasets import Split


@pytest.fixture(autouse=True)
def _own_param_store() -> Iterator[None]:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


# ---------------------------------------------------------------------------------------------------------
# Data

KINDS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda x: (x,),
    "list": lambda x: [x],
    "TensorDataset": TensorDataset,
    "Split": lambda x: Split(x, None, "static"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_wrapping_of_one_tensor_gives_the_same_fit(kind: str) -> None:
    assert_same_run(fit(*vae(), KINDS[kind](binary())), fit(*vae(), binary()))


def test_dataset_and_loader_see_every_data_point_once_an_epoch() -> None:
    """Without latents the bound of a full-batch step is a number that any order of the data gives."""
    x, y = regression_data()
    pairs = TensorDataset(x, y)
    expected = float(dist.Normal(0.0, 1.0).log_prob(y).mean())
    for data, size in (
        ((x, y), 24),
        (pairs, 24),
        (Pairs(pairs), 24),
        (DataLoader(pairs, 24, shuffle=True), None),
        (DataLoader(pairs, 5), None),
        ((x, y), 5),
    ):
        run = fit(Regression(), no_latents, data, batch_size=size, epochs=1, lr=1e-12)
        assert run.history[0]["bound"] == pytest.approx(expected, abs=1e-5)
        assert run.history[0]["step"] == (1 if size == 24 or (size is None and data.batch_size == 24) else 5)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, pairs: TensorDataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return self.pairs[i]


def test_unshuffled_loader_is_used_in_its_order() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor) -> None:
        seen.append(x)
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x)

    x = torch.arange(12.0)
    fit(model, no_latents, DataLoader(x, 4), batch_size=None, epochs=2)
    assert torch.equal(torch.cat(seen[-6:]), torch.cat([x, x]))


def test_map_style_dataset_fits_as_well_as_the_tensor() -> None:
    x = torch.randn(200, generator=seeded(0)) * 2**0.5
    for data in (x, Rows(x)):
        run = fit(LocalNormal(), LinearGuide(), data, batch_size=50, epochs=60, lr=0.02)
        assert run.history[-1]["bound"] == pytest.approx(local_evidence(x), abs=0.01)


def test_dynamic_split_draws_its_pixels_anew_at_every_minibatch() -> None:
    seen: list[Tensor] = []
    grey = Split(torch.full((8, 4), 0.5), None, "dynamic")
    model, guide = vae()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    fit(model, guide, grey, epochs=3)
    drawn = seen[-3:]
    assert all(set(x.unique().tolist()) == {0.0, 1.0} for x in drawn)
    assert not torch.equal(drawn[0].sort(0).values, drawn[1].sort(0).values)


# ---------------------------------------------------------------------------------------------------------
# Models and guides


def test_conditional_model_of_a_tuple_finds_least_squares() -> None:
    x, y = regression_data(200)
    run = fit(Regression(), no_latents, (x, y), batch_size=200, epochs=400, lr=0.02)
    design = torch.cat([x, torch.ones(200, 1)], 1)
    solution = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    residual = float((y - design @ solution).std(correction=0))
    torch.testing.assert_close(run.model.weight.detach(), solution[:2], atol=1e-3, rtol=0)
    assert float(run.model.bias.detach()) == pytest.approx(float(solution[2]), abs=1e-3)
    assert float(run.model.scale.detach()) == pytest.approx(residual, abs=1e-3)
    assert run.history[-1]["bound"] == pytest.approx(-0.5 * math.log(2 * math.pi * math.e * residual**2), abs=1e-4)


def test_plain_functions_with_pyro_param_reach_the_evidence() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.1))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, scale))

    x = torch.randn(200, generator=seeded(0)) * 2**0.5
    run = fit(model, guide, x, batch_size=50, epochs=60, lr=0.02)
    assert float(pyro.param("slope").detach()) == pytest.approx(0.5, abs=0.03)
    assert float(pyro.param("scale").detach()) == pytest.approx(0.5**0.5, abs=0.03)
    assert run.history[-1]["bound"] == pytest.approx(local_evidence(x), abs=0.01)


def test_plain_functions_with_pyro_module_learn_and_resume_their_networks(tmp_path: Any) -> None:
    """The idiom of Pyro's own tutorials."""

    def programs() -> tuple[Any, Any]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        decoder, encoder = nn.Linear(2, 4), nn.Linear(4, 4)

        def model(x: Tensor) -> None:
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                loc, log_scale = encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        return model, guide

    run = fit(*programs(), binary(), epochs=6)
    assert run.history[-1]["bound"] > run.history[0]["bound"]
    whole = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    assert set(whole) == {f"{net}$$${part}" for net in ("decoder", "encoder") for part in ("weight", "bias")}
    fit(*programs(), binary(), epochs=3, run_dir=tmp_path)
    again = fit(*programs(), binary(), epochs=6, run_dir=tmp_path, resume=True)
    assert untimed(again.history) == untimed(run.history)
    assert_identical({name: value.detach() for name, value in pyro.get_param_store().items()}, whole)


def test_bound_methods_and_partials_are_programs() -> None:
    guide = LinearGuide()
    x = torch.randn(24, generator=seeded(0))
    runs = [
        fit(LocalNormal(), LinearGuide(), x),
        fit(functools.partial(LocalNormal().forward), functools.partial(guide), x),
    ]
    assert untimed(runs[1].history)[0]["bound"] == untimed(runs[0].history)[0]["bound"]
    assert_identical(parameters(runs[0])["guide.slope"], guide.slope.detach())


GLOBAL = 40  # data points of the global-latent model


class GlobalNormal(PyroModule):
    """mu ~ N(0, 1), x_n ~ N(mu, 1): given a minibatch, or all data with a plate that draws its own."""

    def __init__(self, subsample_size: int | None = None) -> None:
        super().__init__()
        self.subsample_size = subsample_size

    def forward(self, x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        size = self.subsample_size or len(x)
        with pyro.plate("data", GLOBAL, subsample_size=size) as rows:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[rows] if self.subsample_size else x)


def global_data() -> tuple[Tensor, float]:
    """Data points and their exact log evidence, per data point."""
    x = 0.7 + torch.randn(GLOBAL, generator=seeded(2))
    evidence = dist.MultivariateNormal(torch.zeros(GLOBAL), torch.eye(GLOBAL) + 1.0).log_prob(x)
    return x, float(evidence) / GLOBAL


def exact_global_bound(x: Tensor, loc: float, scale: float) -> float:
    """E_q log p(x, mu) - log q(mu) in closed form for q = N(loc, scale), per data point."""
    likelihood = dist.Normal(loc, 1.0).log_prob(x).sum() - 0.5 * GLOBAL * scale**2
    prior_kl = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 1.0))
    return float(likelihood - prior_kl) / GLOBAL


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoDiagonalNormal])
@pytest.mark.parametrize(
    ("batch_size", "subsample_size"), [(10, None), (GLOBAL, None), (GLOBAL, 10)], ids=["minibatch", "full", "own-plate"]
)
@pytest.mark.slow
def test_autoguide_on_a_subsampled_plate_reaches_the_evidence_per_data_point(
    autoguide: type, batch_size: int, subsample_size: int | None
) -> None:
    x, evidence = global_data()
    model = GlobalNormal(subsample_size)
    guide = autoguide(model)
    run = fit(
        model, guide, x, batch_size=batch_size, epochs=250 * batch_size // 10, lr=0.03, schedule="linear",
        objective=pyrovae.ELBO(particles=10),
    )  # fmt: skip
    values = guide.quantiles([0.5, 0.8413447])["mu"]
    loc, scale = float(values[0]), float(values[1] - values[0])
    assert loc == pytest.approx(float(x.sum()) / (GLOBAL + 1), abs=0.05)  # a third of the posterior's deviation
    assert scale == pytest.approx((GLOBAL + 1) ** -0.5, rel=0.1)
    bound = exact_global_bound(x, loc, scale)
    assert bound <= evidence + 1e-6
    assert bound == pytest.approx(evidence, abs=2e-3)
    # The reported bound is its estimate: the mean over the last epochs, which differ by the rows that were drawn.
    last = torch.tensor([row["bound"] for row in run.history[-50:]])
    assert float(last.mean()) == pytest.approx(bound, abs=max(5.0 * float(last.std()) / 50**0.5, 0.005))


def test_module_built_with_and_without_local_parameters_fits_alike() -> None:
    """Pyro's setting at construction makes no difference."""
    x = torch.randn(24, generator=seeded(0))
    runs = []
    for local in (False, True):
        with pyro.settings.context(module_local_params=local):
            model, guide = LocalNormal(), LinearGuide()
        runs.append(fit(model, guide, x, epochs=5))
    assert_same_run(*runs)
    assert float(runs[0].guide.scale.detach()) != 1.0
    assert not list(pyro.get_param_store().keys())


# ---------------------------------------------------------------------------------------------------------
# Losses

LOSSES: dict[str, Callable[[], Any]] = {
    "pyrovae.ELBO": pyrovae.ELBO,
    "pyrovae.ELBO-stl": lambda: pyrovae.ELBO(gradient="stl", particles=2),
    "pyrovae.ELBO-analytic": lambda: pyrovae.ELBO(kl="analytic"),
    "Trace_ELBO": Trace_ELBO,
    "Trace_ELBO-vectorized": lambda: Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "RenyiELBO": lambda: RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True, max_plate_nesting=1),
    "RenyiELBO-guessed": lambda: RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_fits_the_posterior_and_reports_the_evidence(loss: str) -> None:
    x = torch.randn(200, generator=seeded(0)) * 2**0.5
    run = fit(
        LocalNormal(), LinearGuide(), x, objective=LOSSES[loss](), validation=x, batch_size=50, epochs=60, lr=0.02
    )
    assert float(run.guide.slope.detach()) == pytest.approx(0.5, abs=0.04)
    assert float(run.guide.scale.detach()) == pytest.approx(0.5**0.5, abs=0.04)
    # With a closed-form KL the bound keeps the noise of its 200 draws even at the exact posterior: 0.06 each.
    noise = 0.2 if loss in ("pyrovae.ELBO-analytic", "TraceMeanField_ELBO") else 0.02
    assert run.history[-1]["bound"] == pytest.approx(local_evidence(x), abs=noise)
    assert run.history[-1]["validation_bound"] == pytest.approx(local_evidence(x), abs=noise)
    assert {"log_likelihood", "kl", "kl/z"} <= run.history[-1].keys() or not loss.startswith("pyrovae")


class Mixture(PyroModule):
    """Two unit normals with learnable weights and means; the assignment is summed out."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))
        self.locs = nn.Parameter(torch.tensor([-0.5, 0.5]))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            component = pyro.sample("component", dist.Categorical(logits=self.logits))
            pyro.sample("x", dist.Normal(self.locs[component], 1.0), obs=x)

    def log_marginal(self, x: Tensor) -> Tensor:
        log_prob = dist.Normal(self.locs, 1.0).log_prob(x[:, None])
        return (self.logits.log_softmax(0) + log_prob).logsumexp(-1).mean()


def test_enumerated_mixture_reports_and_maximises_its_exact_likelihood() -> None:
    x = torch.cat([-2.0 + torch.randn(60, generator=seeded(0)), 3.0 + torch.randn(140, generator=seeded(1))])
    mixture = Mixture()
    start = float(mixture.log_marginal(x).detach())
    model = config_enumerate(mixture)
    run = fit(model, no_latents, x, objective=TraceEnum_ELBO(max_plate_nesting=1), batch_size=200,
              epochs=1, lr=1e-12)  # fmt: skip
    assert run.history[0]["bound"] == pytest.approx(start, abs=1e-5)
    fit(model, no_latents, x, objective=TraceEnum_ELBO(max_plate_nesting=1), batch_size=200,
        epochs=300, lr=0.05)  # fmt: skip
    assert float(mixture.logits.detach().softmax(0)[0]) == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(mixture.locs.detach(), torch.tensor([-2.0, 3.0]), atol=0.25, rtol=0)
    mixture.zero_grad()
    mixture.log_marginal(x).backward()
    assert float(mixture.locs.grad.abs().max()) < 1e-3  # a stationary point of the exact likelihood


def test_svi_with_our_loss_and_fit_find_the_same_optimum() -> None:
    x = torch.randn(200, generator=seeded(0)) * 2**0.5
    fitted = fit(LocalNormal(), LinearGuide(), x, batch_size=50, epochs=60, lr=0.02)
    torch.manual_seed(0)
    guide = LinearGuide()
    svi = pyro.infer.SVI(LocalNormal(), guide, pyro.optim.Adam({"lr": 0.02}), loss=pyrovae.ELBO())
    for _ in range(60):
        for rows in x.split(50):
            svi.step(rows)
    for ours in (guide, fitted.guide):
        assert float(ours.slope.detach()) == pytest.approx(0.5, abs=0.04)
        assert float(ours.scale.detach()) == pytest.approx(0.5**0.5, abs=0.04)
    assert svi.evaluate_loss(x) / 200 == pytest.approx(-local_evidence(x), abs=0.02)
