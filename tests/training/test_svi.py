"""``pyrovae.SVI`` is ``pyro.infer.SVI`` with a compiled step: the same losses at the same seed."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI as PyroSVI
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints

import pyrovae
from pyrovae.errors import ArgumentError, CompilationError
from pyrovae.guides import AmortizedNormal
from pyrovae.models import VAE
from pyrovae.training import compiled

pytestmark = pytest.mark.filterwarnings("ignore:.*was not registered in the param store")


def model(x: Tensor) -> None:
    """Mean and scale of normal data, with a learnable factor."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    factor = pyro.param("factor", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, scale * factor), obs=x)


def guide(x: Tensor) -> None:
    loc, width = pyro.param("loc", torch.tensor(0.0)), pyro.param("width", torch.tensor(0.5), constraints.positive)
    pyro.sample("mean", dist.Normal(loc, width))
    pyro.sample("scale", dist.LogNormal(pyro.param("log_scale", torch.tensor(0.0)), 0.3))


def subsampling(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x), subsample_size=5) as rows:
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x[rows])


def data(points: int = 20) -> Tensor:
    return 1.0 + torch.randn(points, generator=torch.Generator().manual_seed(0))


def losses(cls: Any, programs: Any, loss: Any, optim: Any, steps: int, **settings: Any) -> Tensor:
    """Losses of some steps from the same seed; the last one after a change of the learning rates' schedule, if any."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    made = optim()
    svi = cls(*programs(), made, loss(), **settings)
    found = []
    for step in range(steps):
        found.append(svi.step(data()))
        if step % 10 == 9 and hasattr(made, "step"):
            made.step()  # of a scheduler
    return torch.tensor(found)


def adam(**clip: float) -> Any:
    return pyro.optim.Adam({"lr": 0.01}, clip or None)


CASES: dict[str, tuple[Any, Any, Any]] = {
    "plain functions": (lambda: (model, guide), Trace_ELBO, adam),
    "particles": (lambda: (model, guide), lambda: Trace_ELBO(num_particles=4, vectorize_particles=True), adam),
    "mean field": (lambda: (model, guide), TraceMeanField_ELBO, lambda: adam(clip_norm=1.0)),
    "graph": (lambda: (model, guide), TraceGraph_ELBO, lambda: pyro.optim.AdamW({"lr": 0.01})),
    "AutoNormal": (lambda: (model, AutoNormal(model)), Trace_ELBO, lambda: pyro.optim.RMSprop({"lr": 0.01})),
    "AutoMultivariateNormal": (
        lambda: (model, AutoMultivariateNormal(model)),
        lambda: pyrovae.ELBO(gradient="stl"),
        lambda: pyro.optim.Adamax({"lr": 0.01}),
    ),
    "AutoLowRank": (
        lambda: (model, AutoLowRankMultivariateNormal(model)),
        lambda: pyrovae.IWAE(5, "dreg"),
        lambda: pyro.optim.SGD({"lr": 5e-4, "momentum": 0.9}),
    ),
    "AutoDelta": (lambda: (model, AutoDelta(model)), Trace_ELBO, adam),
    "subsampled plate": (lambda: (subsampling, AutoNormal(subsampling)), Trace_ELBO, adam),
    "scheduler": (
        lambda: (model, guide),
        Trace_ELBO,
        lambda: pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.5}),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_losses_are_pyros(name: str, request: pytest.FixtureRequest) -> None:
    """By Inductor, that with a Cholesky factor; two others go through it in one call of many steps."""
    if name == "AutoMultivariateNormal":
        request.getfixturevalue("inductor")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs eagerly")
        ours = losses(pyrovae.SVI, *CASES[name], steps=100)
    assert torch.allclose(ours, losses(PyroSVI, *CASES[name], steps=100), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_modules_arguments_of_several_shapes_and_evaluation() -> None:
    """A graph for each shape, and for each argument that is no tensor; the loss is evaluated as Pyro does."""

    def run(cls: Any) -> list[float]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = VAE(data_shape=(4,), latent_dim=2, hidden=(8,))
        svi = cls(vae, AmortizedNormal(vae), adam(), pyrovae.ELBO())
        batches = [(torch.rand(n, 4) < 0.5).float() for n in (8, 8, 4, 8, 4, 4)]
        found = [svi.step(batch) for batch in batches]
        assert isinstance(found[-1], float)
        return [*found, svi.evaluate_loss(batches[0])]

    assert run(pyrovae.SVI) == pytest.approx(run(PyroSVI), rel=1e-4)


def test_parameters_that_live_in_modules_are_learned() -> None:
    """Pyro's own SVI does not find an ``nn.Parameter`` under this setting."""

    def run(local: bool, **options: Any) -> list[float]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        with pyro.settings.context(module_local_params=local):
            vae = VAE(data_shape=(4,), latent_dim=2, hidden=(8,))
            svi = pyrovae.SVI(vae, AmortizedNormal(vae), adam(), pyrovae.ELBO(), **options)
            return [svi.step(torch.ones(8, 4)) for _ in range(4)]

    assert run(True, compile=False) == run(False, compile=False)


@pytest.mark.slow
def test_a_cleared_parameter_store_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph holds the old parameters; running it on would train tensors that nobody sees."""

    def run(cls: Any) -> tuple[list[float], float]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = cls(model, guide, adam(), Trace_ELBO())
        found = [svi.step(data()) for _ in range(4)]
        pyro.clear_param_store()
        found += [svi.step(data()) for _ in range(4)]
        return found, float(pyro.param("loc").detach())

    (ours, loc), (theirs, expected) = run(pyrovae.SVI), run(PyroSVI)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert loc == pytest.approx(expected, rel=1e-3)
    assert loc != 0.0


@pytest.mark.parametrize(
    ("loss", "optim", "said"),
    [
        (lambda: RenyiELBO(num_particles=2), adam, r"renyi_elbo.py:\d+: elbo = .*item\(\)"),
        (Trace_ELBO, lambda: pyro.optim.ClippedAdam({"lr": 0.01}), "ClippedAdam keeps step as a Python number"),
    ],
)
def test_what_cannot_be_compiled_says_why_and_is_pyros_step(loss: Any, optim: Any, said: str) -> None:
    programs = lambda: (model, guide)  # noqa: E731
    with pytest.warns(UserWarning, match=f"this SVI runs eagerly, it cannot be compiled.*{said}") as caught:
        ours = losses(pyrovae.SVI, programs, loss, optim, steps=5)
    assert len(caught) == 1
    assert torch.equal(ours, losses(PyroSVI, programs, loss, optim, steps=5))


class Annealed(PyroModule):
    """Its prior's scale is set from outside: directly, or where the step cannot see it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.hidden = {"scale": 1.0}

    def forward(self, x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), self.scale * self.hidden["scale"]))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def normal_guide(x: Tensor) -> None:
    pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.5))


@pytest.mark.slow
def test_a_number_that_the_model_holds_gets_a_graph_for_each_value() -> None:
    def run(cls: Any) -> list[float]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        annealed = Annealed()
        svi = cls(annealed, normal_guide, adam(), Trace_ELBO())
        found = []
        for scale in (1.0, 1.0, 3.0, 3.0, 1.0, 3.0):
            annealed.scale = scale
            found.append(svi.step(data()))
        return found

    assert run(pyrovae.SVI) == pytest.approx(run(PyroSVI), rel=1e-4)


@pytest.mark.slow
def test_a_number_that_changes_all_the_time_ends_the_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_MOST_GRAPHS", 2)
    annealed = Annealed()
    svi = pyrovae.SVI(annealed, normal_guide, adam(), Trace_ELBO())

    def step(scale: float) -> None:
        annealed.scale = scale
        svi.step(data())

    for scale in (1.0, 2.0, 3.0):
        step(scale)
    with pytest.warns(UserWarning, match="came in more than 2 variants. Hold Python numbers that change"):
        step(4.0)
    step(5.0)  # without another warning


@pytest.mark.slow
def test_a_hidden_number_that_changed_is_an_error_and_no_silent_difference() -> None:
    annealed = Annealed()
    svi = pyrovae.SVI(annealed, normal_guide, adam(), Trace_ELBO())
    for _ in range(4):
        svi.step(data())
    annealed.hidden["scale"] = 3.0

    def go_on() -> None:
        for _ in range(10):
            svi.step(data())

    with pytest.raises(CompilationError, match="changed after it was compiled.*Python numbers that change"):
        go_on()


def test_without_compile_it_is_pyros_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compile_function", lambda *_: pytest.fail("compiled"))
    programs = lambda: (model, guide)  # noqa: E731
    ours = losses(pyrovae.SVI, programs, Trace_ELBO, adam, steps=3, compile=False)
    assert torch.equal(ours, losses(PyroSVI, programs, Trace_ELBO, adam, steps=3))
    with pytest.raises(ArgumentError, match="compile is 'auto'; it must be True or False"):
        pyrovae.SVI(model, guide, adam(), Trace_ELBO(), compile="auto")


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_is_warned_of_as_pyro_does() -> None:
    def broken(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        pyro.factor("x", (x.sum() + mean).sqrt())

    svi = pyrovae.SVI(broken, AutoNormal(broken), adam(), pyrovae.ELBO())
    torch.manual_seed(0)
    for _ in range(3):
        assert svi.step(torch.full((2,), 50.0)) < 0
    with pytest.warns(UserWarning, match="NaN"):
        assert svi.step(torch.full((2,), -50.0)) != 0


# ---------------------------------------------------------------------------------------------------------
# Many steps in one call


@pytest.mark.parametrize(
    "name", ["plain functions", pytest.param("AutoLowRank", marks=pytest.mark.slow), "subsampled plate"]
)
@pytest.mark.usefixtures("inductor")
def test_many_steps_are_as_many_single_ones(name: str) -> None:
    """Of Pyro, at the same random numbers; other data and another learning rate between the calls."""
    programs, loss, optim = CASES[name]

    def run(many: bool) -> Tensor:
        pyro.clear_param_store()
        torch.manual_seed(0)
        made = optim()
        svi = (pyrovae.SVI if many else PyroSVI)(*programs(), made, loss())
        found = []
        for x in (data(), data(), 1.0 + data()):
            found.append(svi.steps(15, x) if many else torch.tensor([svi.step(x) for _ in range(15)]))
            for optimizer in made.optim_objs.values():
                optimizer.param_groups[0]["lr"] *= 0.7
        return torch.cat(found).double()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs eagerly")
        assert torch.allclose(run(many=True), run(many=False), rtol=1e-3, atol=1e-3)


def test_many_steps_run_eagerly_where_they_must() -> None:
    def branching(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean if mean > 0 else 2 * mean, 1.0), obs=x)

    found = []
    for compile in (True, False):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = pyrovae.SVI(branching, AutoNormal(branching), adam(), Trace_ELBO(), compile=compile)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(svi.steps(5, data()))
        assert sum("runs eagerly" in str(each.message) for each in caught) == compile
    assert torch.equal(*found)


def test_many_steps_of_a_loss_of_two_parts_have_a_row_each() -> None:
    pyro.clear_param_store()
    loss = pyro.infer.ReweightedWakeSleep(num_particles=3, vectorize_particles=False)
    svi = pyrovae.SVI(model, guide, adam(), loss, compile=False)
    assert svi.steps(3, data()).shape == (3, 2)


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_a_bad_number_of_steps_is_refused(number: Any) -> None:
    with pytest.raises(ArgumentError, match="number is .* at least 1"):
        pyrovae.SVI(model, guide, adam(), Trace_ELBO()).steps(number, data())
