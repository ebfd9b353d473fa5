"""Bayesian networks: one flat site, any network, and agreement with what is known exactly."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor, nn
from torch.func import functional_call

import pyrovae
from pyrovae.errors import ArgumentError, DataError, ModelGuideError
from pyrovae.guides import ASVI, FactorCovariance, Flow, FullRank, Laplace, MeanField, PointEstimate, SparsePrecision
from pyrovae.models import BNN, BayesianLinearRegression, treat
from pyrovae.models.flat import FlatNetwork
from pyrovae.training.programs import local_params

LOCAL = {"gradient": "local", "kl": "analytic"}


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        yield


def regression(n: int = 40, features: int = 2) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, features)
    return x, x.sum(-1) + 0.3 * torch.randn(n)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).sum(-1, keepdim=True)


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), (3,)),
    "convolutional": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 1)), (1, 5, 5)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)), (3,)),
    "frozen batch norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval(), (3,)),
    "recurrent": (Recurrent, (6, 3)),
    "tied": (Tied, (3,)),
}


@pytest.mark.parametrize("name", NETS)
def test_many_networks_at_once_give_what_each_gives_alone(name: str) -> None:
    make, event = NETS[name]
    net = make()
    before = copy.deepcopy(net.state_dict())
    flat = FlatNetwork(net)
    x, weights = torch.randn(7, *event), torch.randn(2, 3, flat.size)
    out = flat(weights, x)
    assert out.shape == (2, 3, 7, 1)
    for i, j in ((0, 0), (1, 2)):
        alone = functional_call(net, flat.unflatten(weights[i, j]), (x,))
        torch.testing.assert_close(out[i, j], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flat(flat.start(), x), net(x))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not list(flat.parameters())


def test_own_inputs_go_to_their_network() -> None:
    flat = FlatNetwork(nn.Linear(3, 1))
    weights, x = torch.randn(4, 2, flat.size), torch.randn(2, 7, 3)
    out = flat(weights, x, own_inputs=True)
    for k in range(4):
        for m in range(2):
            torch.testing.assert_close(out[k, m], flat(weights[k, m], x[m]))


def test_tied_weights_count_once() -> None:
    assert FlatNetwork(Tied()).size == 9
    assert [block.name for block in FlatNetwork(Tied()).blocks] == ["first.weight"]


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ("all", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("last", ["2.weight", "2.bias"]),
        (["0.*"], ["0.weight", "0.bias"]),
        (lambda name, parameter: parameter.dim() == 2, ["0.weight", "2.weight"]),
    ],
)
def test_which_parameters_are_latent_is_a_choice(chosen: Any, names: list[str]) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))
    model = BNN(net, bayesian=chosen)
    assert [block.name for block in model.network.blocks] == names
    learned = {name.removeprefix("network.net.") for name, _ in model.network.named_parameters(prefix="network")}
    assert learned == {name for name, _ in net.named_parameters()} - set(names)


def test_batch_norm_in_training_mode_is_refused_with_advice() -> None:
    with pytest.raises(ArgumentError, match=r"batch norm in training mode \(1\).*LayerNorm or GroupNorm"):
        BNN(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    frozen = BNN(NETS["frozen batch norm"][0]())
    frozen.train()
    assert not frozen.network.net[1].training


def test_the_net_is_copied_and_dropout_follows_the_mode() -> None:
    net = nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5), nn.Linear(50, 1))
    flat = FlatNetwork(net)
    x, weights = torch.randn(3, 2), flat.start().expand(4, -1)
    out = flat(weights, x)
    assert not torch.equal(out[0], out[1])  # another mask for each
    out = flat.eval()(weights, x)
    assert torch.equal(out[0], out[1])
    assert net.training


def test_what_the_network_gives_is_what_the_likelihood_takes() -> None:
    x, y = regression()
    with pytest.raises(ArgumentError, match=r"shape \(40, 2\); the likelihood needs 1 for each"):
        BNN([2, 5, 2])(x, y)
    with pytest.raises(ArgumentError, match="two or more logits"):
        BNN([2, 5, 1], likelihood="categorical")(x, y.long())


@pytest.mark.parametrize(
    ("likelihood", "outputs", "y"),
    [
        ("normal", 1, torch.randn(6)),
        ({"name": "normal", "scale": 0.1}, 1, torch.randn(6)),
        ("heteroscedastic", 2, torch.randn(6)),
        ("student-t", 1, torch.randn(6)),
        ({"name": "student-t", "df": 4.0}, 1, torch.randn(6)),
        ("bernoulli", 1, torch.tensor([0.0, 1, 1, 0, 1, 1])),
        ("categorical", 3, torch.tensor([0, 2, 1, 0, 1, 1])),
        ("poisson", 1, torch.tensor([0.0, 2, 1, 7, 1, 1])),
    ],
)
@pytest.mark.parametrize("members", [None, 2])
def test_every_likelihood_fits_and_predicts(likelihood: Any, outputs: int, y: Tensor, members: int | None) -> None:
    model = BNN([2, 4, outputs], likelihood=likelihood, members=members)
    x = torch.randn(6, 2)
    model.standardize(x, y)
    guide = MeanField(model)
    objective = pyrovae.ELBO(particles=2, **LOCAL)
    pyrovae.fit(model, guide, (x, y), objective=objective, epochs=2, compile=False, progress=False)
    prediction = pyrovae.predict(model, guide, x, samples=5)
    assert prediction.log_prob(y).shape == ((6,) if members is None else (2, 6))
    assert prediction.log_prob(y).isfinite().all()
    assert prediction.samples == 5


def test_densities_are_in_the_units_of_y() -> None:
    """Standardising changes nothing but the place where the network's outputs are read: log p(y | w) by hand."""
    x, y = regression()
    x, y = x * 3 + 1, y * 50 - 20
    model = BNN([2, 1])
    model.standardize(x, y)
    weights = torch.tensor([0.5, -0.2, 0.1])
    with local_params(model), torch.no_grad():
        trace = poutine.trace(poutine.condition(model, {"weights": weights})).get_trace(x, y)
        trace.compute_log_prob()
        noise = model.response.scale * y.std(correction=0)
    inputs = (x - x.mean(0)) / x.std(0, correction=0)
    mean = y.mean() + y.std(correction=0) * (inputs @ weights[:2] + weights[2])
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], dist.Normal(mean, noise).log_prob(y))


@pytest.mark.slow
def test_linear_network_has_the_exact_posterior() -> None:
    """A network of one layer is Bayesian linear regression: full-rank VI finds the closed form."""
    x, y = regression(60)
    sigma = 0.3
    model = BNN([2, 1], likelihood={"name": "normal", "scale": sigma})
    guide = FullRank(model)
    pyrovae.fit(
        model, guide, (x, y), objective=pyrovae.ELBO(gradient="stl", particles=8), epochs=2000, batch_size=60, lr=0.03,
        schedule="cosine", compile=False, progress=False,
    )  # fmt: skip
    X = torch.cat([x, torch.ones(60, 1)], 1)
    precision = X.mT @ X / sigma**2 + torch.eye(3)
    exact = dist.MultivariateNormal(torch.linalg.solve(precision, X.mT @ y / sigma**2), precision_matrix=precision)
    with torch.no_grad():
        posterior = guide.get_posterior()
        # Sticking the landing has no noise at the optimum, so that the distance is that of the optimizer alone.
        torch.testing.assert_close(posterior.mean, exact.mean, atol=2e-3, rtol=0)
        torch.testing.assert_close(posterior.covariance_matrix, exact.covariance_matrix, atol=1e-4, rtol=0.02)
        bound = -pyrovae.ELBO(particles=100).loss(model, guide, x, y)
    evidence = dist.MultivariateNormal(torch.zeros(60), X @ X.mT + sigma**2 * torch.eye(60)).log_prob(y)
    assert float(bound) == pytest.approx(float(evidence), abs=0.02)
    prediction = pyrovae.predict(model, guide, x, samples=4000)
    spread = (X @ exact.covariance_matrix * X).sum(-1)
    # 4000 draws: the relative error of a variance is √(2/4000) = 2.2 %; 60 correlated ones within 5 of these.
    torch.testing.assert_close(prediction.epistemic, spread, rtol=0.11, atol=0)
    torch.testing.assert_close(prediction.aleatoric, torch.full((60,), sigma**2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("gradient", ["pathwise", "local", "flipout"])
def test_minibatches_count_for_all_data(gradient: str) -> None:
    """The expected log-likelihood of a minibatch is scaled by N/B, the KL is not: against a computation by hand."""
    x, y = regression(100)
    model = BNN([2, 1], likelihood={"name": "normal", "scale": 0.5}, num_data=100)
    guide = MeanField(model, init_scale=1e-4)  # so narrow that log p(y | w) is that at the mean
    objective = pyrovae.ELBO(gradient=gradient, kl="analytic")
    with local_params(model, guide), torch.no_grad():
        estimate = objective.estimate(model, guide, x[:20], y[:20])
        mean = guide.median()["weights"]
    fitted = x[:20] @ mean[:2] + mean[2]
    by_hand = 5 * dist.Normal(fitted, 0.5).log_prob(y[:20]).sum()
    kl = torch.distributions.kl_divergence(dist.Normal(mean, 1e-4), dist.Normal(0.0, 1.0)).sum()
    assert float(estimate.log_likelihood) == pytest.approx(float(by_hand), rel=1e-3)
    assert float(sum(estimate.kl.values())) == pytest.approx(float(kl), rel=1e-4)


def test_a_fit_takes_the_number_of_data_points_and_refuses_a_plate_that_lacks_it() -> None:
    x, y = regression(30)
    model = BNN([2, 3, 1])
    run = pyrovae.fit(model, MeanField(model), (x, y), epochs=1, batch_size=10, compile=False, progress=False)
    assert model.num_data == 30
    row = run.history[-1]
    assert row["bound"] == pytest.approx(row["log_likelihood"] - row["kl"], rel=1e-4)
    plain = BayesianLinearRegression(features=2)
    with pytest.raises(
        ModelGuideError, match="shared by the data.*has 10 data points where there are 30.*count 3 times"
    ):
        pyrovae.fit(plain, MeanField(plain), (x, y), epochs=1, batch_size=10, progress=False)


def test_importance_weights_of_minibatches_are_refused() -> None:
    x, y = regression(30)
    model = BNN([2, 3, 1])
    with pytest.raises(ModelGuideError, match="the weight of a particle is then a product over all data"):
        pyrovae.fit(
            model,
            MeanField(model),
            (x, y),
            objective=pyrovae.IWAE(particles=3),
            epochs=1,
            batch_size=10,
            progress=False,
        )
    model = BNN([2, 3, 1])
    iwae = pyrovae.IWAE(particles=3)
    pyrovae.fit(model, MeanField(model), (x, y), objective=iwae, epochs=1, batch_size=30, compile=False, progress=False)


def test_members_have_weights_and_noise_of_their_own() -> None:
    """Members that are trained together equal each alone: their losses add, and Adam's steps are element-wise."""
    x = torch.randn(20, 2, 2)
    y = torch.stack([x[:, 0].sum(-1) + 1, 2 * x[:, 1, 0] - 3], dim=1)
    both = BNN([2, 1], members=2, own_data=True)
    settings: dict[str, Any] = {"epochs": 30, "batch_size": 20, "lr": 0.05, "compile": False, "progress": False}
    guide = PointEstimate(both)
    start = both.start_values(x, y)["weights"]
    both.start_values = lambda *args: {"weights": start}  # type: ignore[method-assign]
    pyrovae.fit(both, guide, (x, y), **settings)
    for member in (0, 1):
        alone = BNN([2, 1])
        alone.start_values = lambda *args, m=member: {"weights": start[m, 0]}  # type: ignore[method-assign]
        one = PointEstimate(alone)
        pyrovae.fit(alone, one, (x[:, member], y[:, member]), **settings)
        (mine,), (theirs,) = guide.parameters(), one.parameters()
        torch.testing.assert_close(mine[member, 0], theirs, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(both.response.scale[member, 0], alone.response.scale, atol=1e-4, rtol=1e-3)


def test_members_are_independent() -> None:
    x, y = regression()
    model = BNN([2, 5, 1], members=3)
    start = model.start_values(x, y)["weights"]
    assert start.shape == (3, 1, model.network.size)
    assert all(not torch.equal(start[i], start[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    guide = MeanField(model)
    with local_params(model, guide):
        objective = pyrovae.ELBO(**LOCAL)
        objective.differentiable_loss(model, guide, x, y).backward()
    prediction = pyrovae.predict(model, guide, x, samples=20)
    assert prediction.mean.shape == (3, 40)
    assert prediction.pooled().samples == 60
    torch.testing.assert_close(prediction.pooled().mean, prediction.mean.mean(0))


def test_latent_prior_scale_under_every_treatment() -> None:
    """``treat`` maximises the scale of the prior, or integrates it out, as of any hierarchical model."""
    x, y = regression()
    for treatment in ("map", "ml-ii", "map-ii", "bayes"):
        model = BNN([2, 3, 1], prior={"name": "normal", "latent": "layer"})
        fixed = {"prior_scale": torch.ones(2)} if treatment == "map" else None
        treated, guide = treat(model, treatment, hyperparameters=["prior_scale"], fixed=fixed)
        objective = pyrovae.ELBO()
        run = pyrovae.fit(
            treated,
            guide,
            (x, y),
            objective=objective,
            epochs=30,
            batch_size=40,
            lr=0.03,
            compile=False,
            progress=False,
        )
        assert run.history[-1]["bound"] > run.history[0]["bound"]


def test_pyros_own_tools_take_the_model() -> None:
    model = BNN([2, 4, 1])
    x = torch.randn(5, 2)
    with torch.no_grad(), local_params(model):
        drawn = Predictive(model, num_samples=6, parallel=True)(x)
    assert drawn["y"].shape == (6, 5)
    assert drawn["weights"].shape == (6, 1, model.network.size)


def test_a_run_is_rebuilt_with_its_scales(tmp_path: Any) -> None:
    x, y = regression()
    model = BNN([2, 5, 1])
    model.standardize(5 * x, 7 * y)
    guide = MeanField(model)
    pyrovae.fit(model, guide, (5 * x, 7 * y), epochs=3, compile=False, progress=False, run_dir=tmp_path)
    again = pyrovae.load(tmp_path, example=(x, y))
    torch.testing.assert_close(again.model.x_scale, 5 * x.std(0, correction=0))
    mine, theirs = (pyrovae.predict(m, g, x, samples=10).mean for m, g in ((model, guide), (again.model, again.guide)))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"net": "mlp"}, "must be a torch.nn.Module, or the widths"),
        ({"net": [3]}, "must be a torch.nn.Module, or the widths"),
        ({"net": [3, 0, 1]}, "widths"),
        ({"likelihood": "normla"}, "unknown likelihood 'normla'.*'normal'"),
        ({"likelihood": {"name": "normal", "sd": 1.0}}, "likelihood 'normal' was given.*sd"),
        ({"likelihood": {"name": "student-t", "df": 1.0}}, "above 2"),
        ({"prior": "cauchy"}, "unknown prior 'cauchy'"),
        ({"prior": {"name": "normal", "scale": -1.0}}, "scale of a prior"),
        ({"prior": {"name": "normal", "latent": "weight"}}, "unknown latent scale"),
        ({"bayesian": ["9.*"]}, "'9.\\*', which fits no parameter"),
        ({"bayesian": lambda name, parameter: False}, "chooses no parameter"),
        ({"members": 0}, "members"),
        ({"own_data": True}, "give members as well"),
        ({"num_data": 0}, "num_data"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        BNN(**({"net": [2, 3, 1]} | arguments))


def test_bad_data_are_named() -> None:
    model, (x, y) = BNN([2, 3, 1]), regression()
    with pytest.raises(DataError, match=r"y has shape \(40, 1\); for these x it must be \(40,\)"):
        model(x, y[:, None])
    with pytest.raises(DataError, match="y holds torch.int64; this likelihood takes floating-point"):
        model.standardize(x, y.long())
    with pytest.raises(DataError, match="takes whole numbers"):
        BNN([2, 3], likelihood="categorical")(x, y)
    with pytest.raises(DataError, match=r"it must be \(n, 3, …\)"):
        BNN([2, 1], members=3, own_data=True)(x)


GUIDES = {
    "MeanField": MeanField,
    "FullRank": FullRank,
    "FactorCovariance": lambda model: FactorCovariance(model, rank=2),
    "Flow": Flow,
    "ASVI": ASVI,
    "SparsePrecision": SparsePrecision,
    "PointEstimate": PointEstimate,
    "Laplace": Laplace,
}


@pytest.mark.parametrize("name", GUIDES)
def test_every_guide_of_shared_latents_fits_and_predicts(name: str) -> None:
    x, y = regression(30)
    model = BNN([2, 4, 1])
    model.standardize(x, y)
    guide = GUIDES[name](model)
    run = pyrovae.fit(model, guide, (x, y), epochs=40, batch_size=30, lr=0.02, compile=False, progress=False)
    assert run.history[-1]["bound"] > run.history[0]["bound"]
    prediction = pyrovae.predict(model, guide, x, samples=10, data=(x, y))
    assert prediction.mean.shape == (30,)
    assert (float(prediction.epistemic.min()) > 0) == (name not in ("PointEstimate", "Laplace"))


@pytest.mark.parametrize(
    "objective",
    [pyrovae.Renyi(alpha=0.5, particles=10), pyrovae.IWAE(particles=10), pyrovae.ReweightedWakeSleep(particles=10)],
    ids=lambda objective: type(objective).__name__,
)
def test_other_objectives_of_all_data(objective: Any) -> None:
    """Rényi and importance-weighted bounds, and the forward KL to the posterior (reweighted wake-sleep)."""
    x, y = regression(30)
    model = BNN([2, 4, 1])
    guide = MeanField(model, init_scale=0.01)
    run = pyrovae.fit(
        model, guide, (x, y), objective=objective, epochs=60, batch_size=30, lr=0.02, compile=False, progress=False
    )
    assert run.history[-1]["bound"] > run.history[0]["bound"]


@pytest.mark.slow
def test_intervals_cover_simulated_data() -> None:
    """Sixteen networks with weights from the prior, each with data of its own, fitted together: 90 % intervals.

    16 x 200 test points, correlated within a network: the standard deviation of a network's coverage, 3 %, makes that
    of their mean 0.8 %; the band of two points either side is 2.5 of these (false alarm 1 %, with another seed). The
    noise is known; where it is learned, mean-field posteriors find more of it than there is, and cover too much.
    """
    members, n, new = 16, 500, 200
    noise = {"name": "normal", "scale": 0.3}
    truth = BNN([1, 20, 1], activation="tanh", members=members, likelihood=noise)
    x = 4 * torch.rand(n + new, 1) - 2
    with torch.no_grad():
        drawn = poutine.trace(truth).get_trace(x).nodes["y"]["value"].mT
    x = x[:, None].expand(-1, members, 1)
    model = BNN([1, 20, 1], activation="tanh", members=members, own_data=True, likelihood=noise)
    guide = MeanField(model, init_scale=0.01)
    pyrovae.fit(
        model, guide, (x[:n], drawn[:n]), objective=pyrovae.ELBO(**LOCAL), epochs=1500, batch_size=n, lr=0.01,
        schedule="cosine", compile=False, progress=False,
    )  # fmt: skip
    low, high = pyrovae.predict(model, guide, x[n:], samples=200).interval(0.9)
    target = drawn[n:].mT
    assert 0.88 <= float(((low <= target) & (target <= high)).float().mean()) <= 0.92
