"""``pyrovae train``: what it fits, what it refuses, how it continues."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import SMALL, answer, call, complaint, rows, succeed, trained
from torch.optim.optimizer import register_optimizer_step_post_hook

import pyrovae
from pyrovae.guides import AmortizedNormal
from pyrovae.models import VAE

DIGITS = ("train", "--data", "digits", "--hidden", "16", "--quiet")
NET = (
    "SigmoidBeliefNet", "--guide", "AmortizedBernoulli", "--objective", "IWAE", "--particles", "5",
    "--gradient", "vimco",
)  # fmt: skip


def test_default_folder_and_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = succeed("train", "--data", "digits", "--seed", "3", *SMALL)
    folder = tmp_path / "runs" / "digits-VAE-seed3"
    assert str(folder.relative_to(tmp_path)) in text
    last = rows(folder)[-1]
    assert f"{last['bound']:.3f} nats per data point" in text
    assert f"{last['validation_bound']:.3f} nats per data point" in text


def test_every_other_argument_of_a_model_and_a_guide_is_an_option(tmp_path: Path) -> None:
    succeed(
        "train", "DRAW", "--data", "digits", "--run-dir", tmp_path / "draw", "--epochs", 1, "--quiet",
        "--compile", "no", "--option", "steps=3", "--option", "hidden=8", "--option", "write_size=3",
        "--guide-option", "hidden=9",
    )  # fmt: skip
    run = pyrovae.load(tmp_path / "draw")
    assert (type(run.model).__name__, type(run.guide).__name__) == ("DRAW", "AmortizedDRAW")
    assert (run.model.steps, run.model.hidden, run.model.write_size) == (3, 8, 3)
    assert run.config["objective"] == {**run.config["objective"], "name": "ELBO"}
    assert run.config["guide"]["arguments"]["hidden"] == 9


@pytest.mark.parametrize("model", ["Autoencoder", "HierarchicalVAE", "SphericalVAE", "SigmoidBeliefNet"])
def test_a_model_brings_its_own_guide_and_objective(tmp_path: Path, model: str) -> None:
    small = ("--latent-dim", "2") if model in ("Autoencoder", "SphericalVAE") else ("--layers", "4,2")
    said = answer("train", model, *DIGITS[1:], *small, "--epochs", 1, "--compile", "no", "--run-dir", tmp_path / "run")
    assert said["epochs"] == 1
    run = pyrovae.load(tmp_path / "run")
    assert type(run.guide).__name__ == type(run.model).default_guide
    assert run.config["objective"]["name"] == type(run.model).default_objective["name"]


def test_same_run_as_through_the_api(tmp_path: Path) -> None:
    said = answer(
        *DIGITS, "--run-dir", tmp_path / "cli", "--latent-dim", 3, "--activation", "relu", "--prior", "learnable",
        "--gradient", "stl", "--particles", 2, "--beta", 0.5, "--warmup", 7, "--free-bits", 0.1, "--epochs", 2,
        "--batch-size", 200, "--lr", 0.01, "--optimizer", "adamw", "--schedule", "linear", "--clip-norm", 5,
        "--seed", 4, "--device", "cpu", "--guide", "AmortizedNormal", "--objective", "ELBO",
    )  # fmt: skip
    digits = pyrovae.datasets.load("digits")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = VAE((8, 8), 3, (16,), activation="relu", prior="learnable").initialize_output(digits.train.x)
        warmup = pyrovae.LinearWarmup(7, end=0.5)
        run = pyrovae.fit(
            model, AmortizedNormal(model), digits.train, validation=digits.validation, epochs=2, batch_size=200,
            lr=0.01, objective=pyrovae.ELBO(particles=2, gradient="stl", beta=warmup, free_bits=0.1),
            optimizer="adamw", schedule="linear", clip_norm=5.0, seed=4, device="cpu",
            run_dir=tmp_path / "api", progress=False,
        )  # fmt: skip
    assert rows(tmp_path / "cli") == rows(tmp_path / "api")
    assert json.loads((tmp_path / "cli/config.json").read_text()) == json.loads(
        (tmp_path / "api/config.json").read_text()
    )
    assert said == {
        "run_dir": str(tmp_path / "cli"),
        "epochs": 2,
        "best_epoch": None,
        "bound_nats": run.history[-1]["bound"],
        "validation_bound_nats": run.history[-1]["validation_bound"],
        "kl_nats": run.history[-1]["kl"],
    }


@pytest.mark.parametrize(
    ("binarization", "likelihood"),
    [("none", "continuous-bernoulli"), ("static", "bernoulli"), ("dynamic", "bernoulli")],
)
def test_likelihood_follows_binarization(tmp_path: Path, binarization: str, likelihood: str) -> None:
    folder = trained(tmp_path / "run", "--binarization", binarization, "--epochs", "1")
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["binarization"] == binarization
    assert config["model"]["arguments"]["likelihood"] == likelihood


def test_likelihood_that_is_asked_for(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "--binarization", "none", "--likelihood", "normal", "--network", "conv")
    arguments = json.loads((folder / "config.json").read_text())["model"]["arguments"]
    assert (arguments["likelihood"], arguments["network"]) == ("normal", "conv")


@pytest.mark.parametrize(
    ("layers", "built"), [((), [200]), (("--layers", "12"), [12]), (("--layers", "12,6"), [12, 6])]
)
def test_layers_of_a_sigmoid_belief_net(tmp_path: Path, layers: tuple[str, ...], built: list[int]) -> None:
    folder = trained(tmp_path / "run", *NET, *layers, "--epochs", "1")
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] == {
        "name": "SigmoidBeliefNet",
        "arguments": {"data_shape": [8, 8], "layers": built, "hidden": [16], "activation": "tanh"},
    }
    assert config["data"]["binarization"] == "dynamic"


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (("IWAE", "--particles", 3, "--gradient", "dreg"), {"particles": 3, "gradient": "dreg"}),
        (("Renyi", "--alpha", 0.5, "--particles", 3), {"alpha": 0.5, "particles": 3}),
        (("JVI", "--order", 2, "--particles", 4), {"order": 2, "particles": 4}),
        (("TVO", "--partitions", 3, "--particles", 4), {"partitions": 3, "particles": 4}),
        (("ReweightedWakeSleep", "--wake", 0.5, "--particles", 3), {"wake": 0.5, "particles": 3}),
        (("WakeSleep",), {}),
        (("ELBO", "--gradient", "auto"), {"gradient": "auto"}),
    ],
)
def test_every_objective_with_its_own_options(
    tmp_path: Path, options: tuple[Any, ...], arguments: dict[str, Any]
) -> None:
    answer(*DIGITS, "--run-dir", tmp_path, "--epochs", 1, "--objective", *options)
    config = json.loads((tmp_path / "config.json").read_text())["objective"]
    assert config["name"] == options[0]
    assert arguments.items() <= config["arguments"].items()


@pytest.mark.parametrize(
    ("options", "passed"), [((), "auto"), (("--compile", "yes"), True), (("--compile", "no"), False)]
)
def test_compile_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], passed: Any
) -> None:
    fit, given = pyrovae.fit, []

    def eager(*arguments: Any, compile: Any, **others: Any) -> Any:
        given.append(compile)
        return fit(*arguments, compile=False, **others)

    monkeypatch.setattr(pyrovae, "fit", eager)
    trained(tmp_path / "run", "--epochs", "1", *options)
    assert len(given) == 1
    assert given[0] is passed or given[0] == passed == "auto"


def test_without_compiling_the_same_run(tmp_path: Path) -> None:
    """Nor is it part of what a run is: it may change when the run goes on."""
    default = trained(tmp_path / "default")
    eager = trained(tmp_path / "eager", "--compile", "no", "--epochs", "1")
    answer(*DIGITS, "--run-dir", eager, "--epochs", 2, "--resume")
    assert rows(eager) == rows(default)


def test_early_stopping_reports_the_best_epoch(tmp_path: Path) -> None:
    said = answer(*DIGITS, "--run-dir", tmp_path / "run", "--epochs", 30, "--early-stopping", 1, "--lr", 0.3)
    history = rows(tmp_path / "run")
    best = max(history, key=lambda row: row["validation_bound"])
    assert len(history) < 30
    assert (said["best_epoch"], said["epochs"]) == (best["epoch"], len(history))
    assert said["validation_bound_nats"] == best["validation_bound"]


def test_resume_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    straight = trained(tmp_path / "straight", "--epochs", "3")
    stopped = trained(tmp_path / "stopped", "--epochs", "1")
    assert len(rows(stopped)) == 1
    said = answer(*DIGITS, "--run-dir", stopped, "--epochs", 3, "--resume")
    assert said["epochs"] == 3
    assert rows(stopped) == rows(straight)


def test_folder_that_holds_a_run_is_left_alone(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    before = (folder / "metrics.jsonl").read_bytes()
    assert "Pass --resume to continue it" in complaint(*DIGITS, "--run-dir", folder)
    assert "fit.lr 0.001 there, 0.5 here" in complaint(*DIGITS, "--run-dir", folder, "--resume", "--lr", 0.5)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_corrupt_checkpoint_is_named(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    (folder / "training.pt").write_bytes(b"not a checkpoint")
    assert "training.pt is truncated or corrupt" in complaint(*DIGITS, "--run-dir", folder, "--resume", "--epochs", 3)


@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_ctrl_c_says_where_the_checkpoint_is(tmp_path: Path, extra: tuple[str, ...]) -> None:
    folder, steps = tmp_path / "run", 0

    def interrupt(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            os.kill(os.getpid(), signal.SIGINT)

    hook = register_optimizer_step_post_hook(interrupt)
    try:
        result = call(*DIGITS, "--run-dir", folder, "--epochs", 2, *extra)
    finally:
        hook.remove()
    line = f"fit interrupted; saved in {folder}; continue with --resume"
    assert (result.exit_code, result.stderr) == (130, f"pyrovae: error: {line}\n")
    assert result.stdout == "" if not extra else json.loads(result.stdout) == {"error": line}
    assert answer(*DIGITS, "--run-dir", folder, "--epochs", 2, "--resume")["epochs"] == 2
    assert rows(folder) == rows(trained(tmp_path / "straight"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "digist"), "did you mean 'digits'?"),
        (("VEA",), "did you mean 'VAE'?"),
        (("--guide", "Amortised"), "unknown guide 'Amortised'"),
        (("--objective", "ELBOW"), "did you mean 'ELBO'?"),
        (("--gradient", "pathwize"), "did you mean 'pathwise'?"),
        (("--gradient", "stl", "--kl", "analytic"), "Use --gradient pathwise with --kl analytic"),
        (("--kl", "exact"), "unknown kl 'exact'"),
        (("--likelihood", "poisson"), "unknown likelihood 'poisson'"),
        (("--likelihood", "bernoulli", "--binarization", "none"), "use --likelihood continuous-bernoulli"),
        (("--binarization", "often"), "allowed: none, static, dynamic"),
        (("--option", "wings=2"), "model VAE has no --option wings=…; its options are --latent-dim, --hidden"),
        (("--option", "blocks"), "--option is 'blocks'; give NAME=VALUE"),
        (("--guide-option", "wings=2"), "guide AmortizedNormal: got an unexpected keyword argument 'wings'"),
        (("--activation", "rleu"), "unknown activation 'rleu'"),
        (("--prior", "flat"), "unknown prior 'flat'"),
        (("--network", "cnn"), "unknown network 'cnn'"),
        (("--layers", "20"), "model VAE has no --layers; its options are --latent-dim, --hidden"),
        ((*NET, "--latent-dim", "3"), "model SigmoidBeliefNet has no --latent-dim; its options are --layers, --hidden"),
        ((*NET, "--prior", "learnable"), "model SigmoidBeliefNet has no --prior"),
        ((*NET, "--network", "conv"), "model SigmoidBeliefNet has no --network"),
        ((*NET, "--likelihood", "bernoulli"), "model SigmoidBeliefNet has no --likelihood"),
        ((*NET, "--layers", "20,few"), "--layers is '20,few'"),
        ((*NET, "--layers", "20,0"), "layers is (20, 0)"),
        ((*NET, "--binarization", "none"), "outside the support of the model's likelihood. Binarize the data, as"),
        ((*NET, "--binarization", "none"), "does with --binarization dynamic."),
        ((*NET, "--objective", "ELBO", "--gradient", "pathwise"), "these sites cannot: 'z1'"),
        ((*NET, "--guide", "AmortizedNormal"), "AmortizedBernoulli takes models with layers of binary units"),
        (("--guide", "AmortizedBernoulli"), "guide AmortizedBernoulli does not fit model VAE"),
        (("--hidden", "16,wide"), "--hidden is '16,wide'"),
        (("--hidden", "16,0"), "hidden is (16, 0)"),
        (("--latent-dim", "0"), "--latent-dim"),
        (("--epochs", "0"), "--epochs"),
        (("--epochs", "1.5"), "--epochs"),
        (("--batch-size", "-3"), "--batch-size"),
        (("--lr", "0"), "lr is 0.0"),
        (("--lr", "nan"), "lr is nan"),
        (("--optimizer", "adm"), "unknown optimizer 'adm'"),
        (("--schedule", "step"), "unknown schedule 'step'"),
        (("--clip-norm", "0"), "clip_norm is 0.0"),
        (("--early-stopping", "0"), "--early-stopping"),
        (("--particles", "0"), "--particles"),
        (("--beta", "-1"), "beta is -1.0"),
        (("--beta", "-1", "--warmup", "5"), "end is -1.0"),
        (("--warmup", "0"), "--warmup"),
        (("--free-bits", "-0.5"), "free_bits is -0.5"),
        (("--precision", "float16"), "precision is 'float16'"),
        (("--device", "abacus"), "device is 'abacus'"),
        (("--compile", "maybe"), "'maybe' is not one of 'auto', 'yes', 'no'"),
        (("--seed", "-1"), "--seed"),
    ],
)
def test_bad_argument_is_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    assert said in complaint(*DIGITS, "--run-dir", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_run_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file; give a folder" in complaint(*DIGITS, "--run-dir", tmp_path / "file")
    assert str(tmp_path / "file") in complaint(*DIGITS, "--run-dir", tmp_path / "file" / "below")


def test_missing_data_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path / "nowhere"))
    assert "PYROVAE_DATA" in complaint("train", "--data", "mnist", "--run-dir", tmp_path / "run")
