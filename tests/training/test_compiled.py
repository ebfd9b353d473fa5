"""A compiled fit is the eager fit up to rounding; what cannot be compiled says why and runs eagerly."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from fit_helpers import (
    LinearGuide,
    LocalNormal,
    NormedGuide,
    assert_identical,
    assert_same_run,
    binary,
    fit,
    parameters,
    seeded,
    vae,
)
from pyro.infer import TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import pyrovae
from pyrovae.errors import CompilationError, NonFiniteError
from pyrovae.guides import AmortizedBernoulli
from pyrovae.models import SigmoidBeliefNet
from pyrovae.training import compiled, graph
from pyrovae.training.data import batches
from pyrovae.training.graph import compile_function

STEPS = 100
BAD = 11  # row of a data point that breaks the density


def both(**settings: Any) -> tuple[pyrovae.Run, pyrovae.Run]:
    """The same fit of the small VAE, eager and compiled; a step that falls back fails as a warning."""
    runs = []
    for compile in (False, True):
        model, guide = settings.get("programs", vae)()
        rest = {key: value() if key == "objective" else value for key, value in settings.items() if key != "programs"}
        runs.append(fit(model, guide, binary(), compile=compile, **rest))
    return runs[0], runs[1]


def assert_close(eager: pyrovae.Run, other: pyrovae.Run, rtol: float = 2e-3, free: tuple[str, ...] = ()) -> None:
    """Equal up to rounding; parameters in ``free`` have no gradient but for rounding."""
    for (name, one), two in zip(parameters(eager).items(), parameters(other).values(), strict=True):
        assert torch.allclose(one, two, rtol=rtol, atol=rtol / 10) or name in free, name
    for row, twin in zip(eager.history, other.history, strict=True):
        for key in ("bound", "kl", "log_likelihood"):
            if key in row:
                assert row[key] == pytest.approx(twin[key], rel=rtol, abs=rtol), (key, row["epoch"])


def nets() -> tuple[SigmoidBeliefNet, AmortizedBernoulli]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SigmoidBeliefNet(data_shape=(4,), layers=(3, 2))
        return model, AmortizedBernoulli(model)


def normed() -> tuple[Any, Any]:
    model, _ = vae()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model, NormedGuide()


OBJECTIVES = {
    "stl": lambda: pyrovae.ELBO(gradient="stl"),
    "analytic with warm-up": lambda: pyrovae.ELBO(kl="analytic", beta=pyrovae.LinearWarmup(steps=40)),
    "free bits": lambda: pyrovae.ELBO(free_bits=0.2),
    "score": lambda: pyrovae.ELBO(4, gradient="score"),
    "iwae": lambda: pyrovae.IWAE(5),
    "dreg": lambda: pyrovae.IWAE(5, gradient="dreg"),
    "renyi": lambda: pyrovae.Renyi(0.5, 4, gradient="dreg"),
    "jvi": lambda: pyrovae.JVI(4, 1),
    "tvo": lambda: pyrovae.TVO(4, 3),
    "wake-sleep": lambda: pyrovae.WakeSleep(),
    "rws": lambda: pyrovae.ReweightedWakeSleep(4, wake=0.5),
    "pyro": lambda: TraceMeanField_ELBO(),
}
OPTIMIZERS = {
    "adam": {"clip_norm": 0.5},
    "adamw": {"schedule": "cosine"},
    "adamax": {},
    "sgd": {"lr": 0.05},
    "rmsprop": {"schedule": "linear"},
    "nadam": {},
    "radam": {},
}


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_a_compiled_fit_is_the_eager_one_over_100_steps() -> None:
    """Random numbers, the schedule and the clipping included; 34 epochs of 3 steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eager, fast = both(objective=pyrovae.ELBO, epochs=34, schedule="cosine", clip_norm=1.0)
    assert len(eager.history) * 3 >= STEPS
    assert_close(eager, fast)


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_in_double_precision_both_agree_to_double_precision() -> None:
    """By SGD; torch computes Adam's bias correction from a step count in single precision, in a graph."""
    runs = []
    for compile in (False, True):
        model, guide = (program.double() for program in vae())
        runs.append(fit(model, guide, binary().double(), compile=compile, epochs=34, optimizer="sgd"))
    for (name, one), two in zip(parameters(runs[0]).items(), parameters(runs[1]).values(), strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-14), name


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_compiles(name: str, request: pytest.FixtureRequest) -> None:
    """By Inductor, those whose operators others do not have."""
    if name in ("dreg", "rws"):
        request.getfixturevalue("inductor")
    assert_close(*both(objective=OBJECTIVES[name], epochs=10))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_compiles(name: str, request: pytest.FixtureRequest) -> None:
    """Adam by Inductor, which compiles SGD elsewhere here."""
    if name == "adam":
        request.getfixturevalue("inductor")
    assert_close(*both(optimizer=name, epochs=10, **OPTIMIZERS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("programs", [nets, normed])
@pytest.mark.usefixtures("inductor")
def test_discrete_codes_and_batch_norm_compile(programs: Any) -> None:
    gradient = {nets: lambda: pyrovae.IWAE(5, "vimco"), normed: lambda: pyrovae.ELBO()}[programs]
    eager, fast = both(programs=programs, objective=gradient, epochs=10)
    # The normalization takes the bias before it out again.
    assert_close(eager, fast, free=("guide.net.0.bias", "guide.net.1.running_mean"))


@pytest.mark.slow
def test_the_last_partial_minibatch_has_a_graph_of_its_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = [fit(*vae(), binary(20), epochs=6, compile=compile) for compile in (False, True)]
    assert_close(*runs)


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = fit(*vae(), binary(20), epochs=6, compile=True)
    fit(*vae(), binary(20), epochs=3, compile=True, run_dir=tmp_path)
    resumed = fit(*vae(), binary(20), epochs=6, compile=True, run_dir=tmp_path, resume=True)
    assert_same_run(whole, resumed)


@pytest.mark.slow
def test_validation_is_compiled_too_with_the_same_draws_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The first minibatch's shape by a graph, the smaller last one eagerly."""
    settings: dict[str, Any] = {"validation": binary(20, seed=2), "early_stopping": 9}
    eager = fit(*vae(), binary(), epochs=4, compile=False, **settings)
    whole = fit(*vae(), binary(), epochs=4, compile=True, **settings)
    for row, twin in zip(eager.history, whole.history, strict=True):
        assert row["validation_bound"] == pytest.approx(twin["validation_bound"], rel=1e-4)
    fit(*vae(), binary(), epochs=2, compile=True, run_dir=tmp_path, **settings)
    assert_same_run(whole, fit(*vae(), binary(), epochs=4, compile=True, run_dir=tmp_path, resume=True, **settings))


@pytest.mark.slow
def test_auto_compiles_validation_once_it_has_cost_as_much(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_WORTH_SECONDS", 0.0)
    monkeypatch.setattr(compiled, "_VALIDATION_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="pyrovae"):
        fit(*vae(), binary(), validation=binary(8, seed=2), epochs=4)
    assert sum("compiled the validation of this fit for shapes (8, 4)" in said for said in caplog.messages) == 1


# ---------------------------------------------------------------------------------------------------------
# What is not finite


class Edge(PyroModule):
    """x ~ N(z, 1) with a factor that a large data point drives to NaN: the logarithm of what is below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("edge", (2.0 - self.slope * x.abs() / 10).log())


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_an_update_that_is_not_finite_is_skipped_and_its_minibatch_named() -> None:
    """The bad data point is not in the first minibatch, which is validated."""
    x = torch.randn(24, generator=seeded(0))
    x[BAD] = 1e3
    runs = []
    for compile in (False, True):
        model, guide = Edge(), LinearGuide()
        with pytest.raises(NonFiniteError, match=r"epoch 1, minibatch \d of 3") as caught:
            fit(model, guide, x, compile=compile)
        runs.append((str(caught.value).split("(")[-1], dict(model.state_dict()), dict(guide.state_dict())))
    assert runs[0][0] == runs[1][0]
    for one, two in zip(runs[0][1:], runs[1][1:], strict=True):
        for name in one:
            assert torch.allclose(one[name], two[name], rtol=1e-4), name
            assert one[name].isfinite().all()


class Measuring(Edge):
    """Keeps a running mean of the data, which a bad minibatch would spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_((2.0 - self.slope * x.abs() / 10).log().mean(), 0.1)
        super().forward(x)


@pytest.mark.slow
def test_a_skipped_update_leaves_buffers_and_the_schedule_where_they_were(tmp_path: Path) -> None:
    """So that a run goes on from the last good parameters as if it had stopped there, once the data are mended."""
    x = torch.randn(48, generator=seeded(0))
    bad = x.clone()
    bad[batches(x, 8, x.device, seed=0).order(0)[20]] = 1e3  # in the third minibatch
    with pytest.raises(NonFiniteError, match="minibatch 3 of 6"):
        fit(model := Measuring(), LinearGuide(), bad, compile=True, schedule="linear", run_dir=tmp_path)
    assert model.mean.isfinite()
    resumed = fit(Measuring(), LinearGuide(), x, compile=True, schedule="linear", run_dir=tmp_path, resume=True)
    whole = fit(Measuring(), LinearGuide(), x, compile=True, schedule="linear")
    assert [row["lr"] for row in resumed.history] == [row["lr"] for row in whole.history]


# ---------------------------------------------------------------------------------------------------------
# What cannot be compiled


class Branching(LocalNormal):
    """Takes another path where the sampled latents are negative on average."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            loc = z if z.mean() > 0 else 2 * z
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


class Counting(LocalNormal):
    """Anneals by a Python number, which tracing would freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> None:
        self.calls += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0 + 1.0 / self.calls), obs=x)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Branching, r"value is read in Python.*test_compiled.py:\d+: loc = z if z.mean\(\) > 0"),
        (Counting, "number"),
    ],
)
def test_what_tracing_would_freeze_is_named_and_runs_eagerly(model: Any, said: str) -> None:
    x = torch.randn(24, generator=seeded(0))
    eager = fit(model(), LinearGuide(), x, compile=False)
    with pytest.warns(UserWarning, match=f"(?s)runs eagerly, it cannot be compiled.*{said}") as caught:
        fallen = fit(model(), LinearGuide(), x, compile=True)
    assert len(caught) == 1
    if model is Branching:
        assert_identical(parameters(eager), parameters(fallen))


class Decaying(torch.optim.SGD):
    """Counts its steps in Python, as older optimizers do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["steps"] = state.get("steps", 0) + 1
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=group["lr"] / state["steps"])


def test_an_optimizer_that_counts_in_python_is_named_and_runs_eagerly() -> None:
    eager = fit(*vae(), binary(), compile=False, optimizer=Decaying)
    with pytest.warns(UserWarning, match="(?s)runs eagerly, it cannot be compiled.*Decaying keeps steps") as caught:
        fallen = fit(*vae(), binary(), compile=True, optimizer=Decaying)
    assert len(caught) == 1
    assert_identical(parameters(eager), parameters(fallen))


def test_without_a_compiler_the_fit_runs_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(graph, "_inductor", missing)
    with pytest.warns(UserWarning, match=r"Inductor cannot compile it: RuntimeError: No working C\+\+ compiler found"):
        fallen = fit(*vae(), binary(), compile=True)
    assert_identical(parameters(fit(*vae(), binary(), compile=False)), parameters(fallen))


def test_numbers_that_differ_are_an_error_and_not_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(graph.Compiled):
        def __call__(self, *args: Tensor) -> Any:
            results, gradients = super().__call__(*args)
            return [1.01 * out for out in results], gradients

    monkeypatch.setattr(graph, "Compiled", Wrong)
    with pytest.raises(CompilationError, match="differs from the eager one at the same draws: result 0 is"):
        fit(*vae(), binary(), compile=True)


def test_a_wrong_update_is_found_as_well() -> None:
    total = torch.zeros(3)

    calls = []

    def add(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        calls.append(len(calls))
        total.add_(x if len(calls) <= 2 else 2 * x)  # the two runs that are traced, and the eager one
        return [x.sum()], []

    with pytest.raises(CompilationError, match="3 of 3 numbers of parameters and optimizer change otherwise"):
        compile_function(add, [torch.ones(3)], [total])
    assert (total == 0).all()


def test_a_wrong_gradient_is_found_as_well() -> None:
    calls = []

    def slope(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        calls.append(len(calls))
        return [x.sum()], [x if len(calls) <= 2 else 1.02 * x]

    with pytest.raises(CompilationError, match=r"the gradient is off by 0.0\d+ of its norm"):
        compile_function(slope, [torch.ones(3)], [torch.zeros(3)])


def test_a_trace_describes_all_its_values_by_one_fake_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each value, as torch makes them by itself, would take most of the time of tracing."""
    made = []
    start = FakeTensorMode.__init__
    monkeypatch.setattr(FakeTensorMode, "__init__", lambda self, **options: (made.append(1), start(self, **options))[1])
    compile_function(lambda x: ([x.sin().cos().exp().sum()], []), [torch.ones(3)], [])
    assert len(made) == 2  # one for each of the two traces


# ---------------------------------------------------------------------------------------------------------
# When "auto" compiles


def test_auto_leaves_a_short_fit_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compile_function", lambda *_: pytest.fail("compiled"))
    assert_identical(
        parameters(fit(*vae(), binary(), epochs=4)), parameters(fit(*vae(), binary(), epochs=4, compile=False))
    )


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_auto_compiles_a_long_fit_says_so_and_resumes_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_WORTH_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="pyrovae"):
        whole = fit(*vae(), binary(), epochs=8)
        fit(*vae(), binary(), epochs=4, run_dir=tmp_path)
        resumed = fit(*vae(), binary(), epochs=8, run_dir=tmp_path, resume=True)
    assert sum("compiled the step of this fit for shapes (8, 4)" in said for said in caplog.messages) == 3
    assert_same_run(whole, resumed)
