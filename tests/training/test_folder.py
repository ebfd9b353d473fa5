"""The run folder: it rebuilds the run, runs no code, and says what is wrong with it without changing a byte."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from fit_helpers import (
    LinearGuide,
    LocalNormal,
    assert_identical,
    assert_same_run,
    binary,
    fit,
    parameters,
    seeded,
    snapshot,
    vae,
)
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyrovae
from pyrovae.errors import ArgumentError, CorruptFileError, RunError
from pyrovae.guides import AmortizedNormal
from pyrovae.models import VAE


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pyrovae.Run]:
    """A folder of two epochs with every file a fit can write."""
    folder = tmp_path_factory.mktemp("made")
    return folder, fit(*vae(), binary(), run_dir=folder, validation=binary(16, 2), early_stopping=5)


@pytest.fixture
def folder(made: tuple[Path, pyrovae.Run], tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def resume(folder: Path, **settings: Any) -> pyrovae.Run:
    ours = {"validation": binary(16, 2), "early_stopping": 5, "epochs": 3, "run_dir": folder, "resume": True}
    return fit(*vae(), binary(), **(ours | settings))


# ---------------------------------------------------------------------------------------------------------
# Loading


def test_load_rebuilds_model_guide_and_history(made: tuple[Path, pyrovae.Run]) -> None:
    folder, run = made
    loaded = pyrovae.load(folder)
    assert type(loaded.model) is VAE
    assert type(loaded.guide) is AmortizedNormal
    assert_same_run(loaded, run)
    assert loaded.history == run.history
    assert loaded.folder == folder
    assert loaded.config == json.loads(json.dumps(run.config))
    x = binary(6, seed=8)
    assert torch.equal(loaded.guide.encode(x).mean, run.guide.encode(x).mean)


def test_load_reads_and_writes_nothing(folder: Path) -> None:
    before = snapshot(folder)
    pyrovae.load(folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"hidden": (6, 5), "activation": "relu"},
        {"likelihood": "continuous-bernoulli"},
        {"likelihood": "normal", "prior": "learnable"},
        {"data_shape": (2, 2), "network": "mlp"},
        {"data_shape": (8, 8), "network": "conv", "channels": (4, 2)},
    ],
    ids=str,
)
def test_load_rebuilds_every_kind_of_model(arguments: dict[str, Any], tmp_path: Path) -> None:
    model, guide = vae(**arguments)
    x = torch.bernoulli(torch.full((16, *model.data_shape), 0.4), generator=seeded(0))
    run = fit(model, guide, x, run_dir=tmp_path)
    assert_identical(parameters(pyrovae.load(tmp_path)), parameters(run))


def test_loaded_run_trains_on(folder: Path) -> None:
    run = pyrovae.load(folder, which="last")
    again = fit(run.model, run.guide, binary(), epochs=1)
    assert again.history[0]["bound"] > run.history[0]["bound"]


def test_unregistered_model_and_guide_are_asked_for_and_filled(tmp_path: Path) -> None:
    x = torch.randn(24, generator=seeded(0))
    run = fit(LocalNormal(), LinearGuide(), x, run_dir=tmp_path)
    with pytest.raises(RunError, match=r"run's model is not one of pyrovae.models.*pyrovae.load\(run_dir, model=…"):
        pyrovae.load(tmp_path)
    with pytest.raises(RunError, match=r"run's guide is not one of pyrovae.guides.*pyrovae.load\(run_dir, guide=…"):
        pyrovae.load(tmp_path, LocalNormal())
    loaded = pyrovae.load(tmp_path, LocalNormal(), LinearGuide())
    assert_same_run(loaded, run)
    assert float(loaded.guide.slope.detach()) != float(LinearGuide().slope.detach())


def test_autoguide_is_loaded_with_an_example(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x = 1.0 + torch.randn(24, generator=seeded(0))
    run = fit(model, AutoNormal(model), x, batch_size=24, epochs=20, run_dir=tmp_path)
    with pytest.raises(RunError, match="example="):
        pyrovae.load(tmp_path, model, AutoNormal(model))
    for example in (x, (x,)):
        loaded = pyrovae.load(tmp_path, model, AutoNormal(model), example=example)
        assert_identical(parameters(loaded), parameters(run))
        assert float(loaded.guide.median()["mu"]) == float(run.guide.median()["mu"]) != 0.0


def test_plain_functions_are_loaded_with_an_example(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale))

    x = 1.0 + torch.randn(24, generator=seeded(0))
    pyro.clear_param_store()
    fit(model, guide, x, epochs=5, run_dir=tmp_path)
    learned = {name: pyro.param(name).detach().clone() for name in ("loc", "scale")}
    pyro.clear_param_store()
    with pytest.raises(RunError, match="example="):
        pyrovae.load(tmp_path, model, guide)
    pyrovae.load(tmp_path, model, guide, example=x)
    assert_identical({name: pyro.param(name).detach() for name in learned}, learned)
    assert float(learned["loc"]) != 0.0
    pyro.clear_param_store()


def test_parameters_of_another_shape_are_refused_and_named(folder: Path) -> None:
    with pytest.raises(RunError, match=r"model\.decoder\.0\.weight \(8, 2\) instead of \(5, 2\)"):
        pyrovae.load(folder, *vae(hidden=(5,)))


def test_unknown_which_is_refused(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="which is 'first'; it must be 'best', 'last' or None"):
        pyrovae.load(folder, which="first")


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_folder_without_a_run_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run: there is no config\.json in it"):
        pyrovae.load(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------
# Safety


class Evil:
    """Unpickling it would make the file that shows it ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["torch.save", "pickle", "legacy torch.save"])
def test_no_pickle_of_the_folder_is_executed(kind: str, folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    path = folder / "training.pt"
    state = torch.load(path, weights_only=True) | {"position": Evil(mark)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(state["position"], protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch.save")
    before = snapshot(folder)
    with pytest.raises(CorruptFileError, match=r"training\.pt is truncated or corrupt"):
        resume(folder)
    pyrovae.load(folder)
    assert not mark.exists()
    assert snapshot(folder) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    with contextlib.suppress(RuntimeError):  # a bare pickle is refused, but only after it was executed
        torch.load(path, weights_only=False)
    assert mark.exists(), "the trap works"


def test_checkpoints_hold_plain_data_alone(made: tuple[Path, pyrovae.Run]) -> None:
    assert {path.name for path in made[0].iterdir()} - {"tensorboard"} == {
        "config.json", "model.safetensors", "best.safetensors", "training.pt", "metrics.jsonl",
    }  # fmt: skip
    assert torch.load(made[0] / "training.pt", weights_only=True)["position"] == (2, 0)


# ---------------------------------------------------------------------------------------------------------
# Damage

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a few bytes": lambda content: content[:7],
    "all but the last byte": lambda content: content[:-1],
    "all but the last word": lambda content: content[:-9],
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"\xff\xfe<html>no such page</html>",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_training_state_is_named_and_nothing_is_changed(damage: str, folder: Path) -> None:
    path = folder / "training.pt"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = snapshot(folder)
    with pytest.raises(CorruptFileError, match=r"training\.pt is truncated or corrupt.*pyrovae\.load"):
        resume(folder)
    assert snapshot(folder) == before
    assert len(pyrovae.load(folder).history) == 2, "as the message says"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "best.safetensors"])
def test_damaged_parameters_are_named_and_resume_repairs_them(name: str, damage: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = snapshot(folder)
    which = "best" if name.startswith("best") else "last"
    with pytest.raises(CorruptFileError, match=rf"{name} is truncated or corrupt.*resume=True"):
        pyrovae.load(folder, which=which)
    assert snapshot(folder) == before
    resume(folder)
    assert len(pyrovae.load(folder, which=which).history) == 3, "as the message says"


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "all but the last byte"])
def test_damaged_configuration_is_named_and_nothing_is_changed(damage: str, folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = snapshot(folder)
    for use in (pyrovae.load, resume):
        with pytest.raises(CorruptFileError, match=r"config\.json is not valid JSON"):
            use(folder)
        assert snapshot(folder) == before


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null"])
def test_configuration_that_is_no_object_is_corrupt(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    for use in (pyrovae.load, resume):
        with pytest.raises(CorruptFileError, match=r"config\.json"):
            use(folder)


@pytest.mark.parametrize("damage", ["all but the last word", "zeros", "text", "a few bytes"])
def test_damaged_metrics_are_named_and_nothing_is_changed(damage: str, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = snapshot(folder)
    with pytest.raises(CorruptFileError, match=r"metrics\.jsonl, line [12], is not valid JSON"):
        pyrovae.load(folder)
    assert snapshot(folder) == before
    assert [row["epoch"] for row in resume(folder).history] == [1, 2, 3]
    assert len(pyrovae.load(folder).history) == 3


@pytest.mark.parametrize("content", [{}, {"position": (1, 0)}, [1, 2], 3])
def test_training_state_of_another_kind_is_corrupt(content: Any, folder: Path) -> None:
    torch.save(content, folder / "training.pt")
    before = snapshot(folder)
    with pytest.raises(CorruptFileError, match=r"training\.pt"):
        resume(folder)
    assert snapshot(folder) == before


def test_missing_training_state_is_named(folder: Path) -> None:
    (folder / "training.pt").unlink()
    before = snapshot(folder)
    with pytest.raises(RunError, match=r"no training state to resume: there is no training\.pt"):
        resume(folder)
    assert snapshot(folder) == before
    assert len(pyrovae.load(folder).history) == 2


def test_missing_parameters_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"no saved parameters: there is no model\.safetensors"):
        pyrovae.load(folder, which="last")


# ---------------------------------------------------------------------------------------------------------
# Another run


def others() -> Iterator[tuple[str, dict[str, Any], str]]:
    yield "lr", {"lr": 0.5}, r"fit\.lr 0\.01 there, 0\.5 here"
    yield "seed", {"seed": 9}, r"fit\.seed 0 there, 9 here"
    yield "batch_size", {"batch_size": 6}, r"fit\.batch_size 8 there, 6 here"
    yield "optimizer", {"optimizer": "sgd"}, r"fit\.optimizer 'adam' there, 'sgd' here"
    yield "schedule", {"schedule": "cosine"}, r"fit\.schedule 'constant' there, 'cosine' here"
    yield "clip_norm", {"clip_norm": 1.0}, r"fit\.clip_norm None there, 1\.0 here"
    yield "precision", {"precision": "bf16"}, r"fit\.precision 'float32' there, 'bf16' here"
    yield "early_stopping", {"early_stopping": 4}, r"fit\.early_stopping 5 there, 4 here"
    yield "objective", {"objective": pyrovae.ELBO(particles=3)}, r"objective\.arguments\.particles 1 there, 3 here"
    yield "loss", {"objective": pyro.infer.Trace_ELBO()}, r".*objective\.name 'ELBO' there, 'Trace_ELBO' here"
    yield "data", {"data": binary(30)}, r"data\.size 24 there, 30 here"
    yield "model", {"model": vae(activation="relu")[0]}, r"model\.arguments\.activation 'tanh' there, 'relu' here"
    yield "shape", {"model": vae(hidden=(9,))[0]}, r"model\.arguments\.hidden \[8\] there, \[9\] here"
    yield "two", {"seed": 9, "lr": 0.5}, r"fit\.lr 0\.01 there, 0\.5 here; fit\.seed 0 there, 9 here"


@pytest.mark.parametrize(("settings", "said"), [case[1:] for case in others()], ids=[case[0] for case in others()])
def test_other_settings_are_another_run_and_nothing_is_changed(
    settings: dict[str, Any], said: str, folder: Path
) -> None:
    before = snapshot(folder)
    model, guide = vae()
    programs = {"model": model, "guide": guide, "data": binary(), "validation": binary(16, 2), "early_stopping": 5}
    with pytest.raises(RunError, match=f"holds another run: {said}\\. Use the same settings"):
        fit(**(programs | settings), run_dir=folder, resume=True)
    assert snapshot(folder) == before


def test_existing_run_without_resume_is_refused_and_nothing_is_changed(folder: Path) -> None:
    before = snapshot(folder)
    with pytest.raises(RunError, match=r"already holds a run\. Pass resume=True to continue it"):
        resume(folder, resume=False)
    assert snapshot(folder) == before


def test_run_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(RunError, match=r"run_dir .*file is a file; give a folder"):
        fit(*vae(), binary(), run_dir=path)
    assert path.read_text() == "mine"


def test_configuration_says_what_the_run_was_made_from(made: tuple[Path, pyrovae.Run]) -> None:
    config = json.loads((made[0] / "config.json").read_text())
    assert config["model"]["name"] == "VAE"
    assert config["model"]["arguments"]["hidden"] == [8]
    assert config["guide"]["name"] == "AmortizedNormal"
    assert config["objective"]["name"] == "ELBO"
    assert config["data"] == {"size": 24, "event_shapes": [[4]]}
    assert config["fit"] | {"device": None} == {
        "epochs": 2, "batch_size": 8, "lr": 0.01, "optimizer": "adam", "schedule": "constant", "clip_norm": None,
        "early_stopping": 5, "precision": "float32", "seed": 0, "device": None,
    }  # fmt: skip
    assert config["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "beta",
    [
        pytest.param(pyrovae.LinearWarmup(10), id="schedule"),
        pytest.param(
            {"z": pyrovae.LinearWarmup(10)},
            id="schedule-of-a-site",
        ),
        pytest.param({"z": 0.5}, id="number-of-a-site"),
        pytest.param(2.0, id="number"),
    ],
)
def test_every_coefficient_can_be_written_and_resumed(beta: Any, tmp_path: Path) -> None:
    fit(*vae(), binary(), objective=pyrovae.ELBO(beta=beta), run_dir=tmp_path)
    again = fit(*vae(), binary(), objective=pyrovae.ELBO(beta=beta), run_dir=tmp_path, epochs=3, resume=True)
    assert len(again.history) == 3


@pytest.mark.parametrize("entry", ["VAE", {"x": 1}, {"name": "VAEE"}, {"name": "VAE", "arguments": {"wings": 2}}])
def test_a_configuration_that_describes_no_model_is_explained(entry: Any, tmp_path: Path) -> None:
    fit(*vae(), binary(), run_dir=tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": entry}))
    with pytest.raises(ArgumentError, match="model"):
        pyrovae.load(tmp_path)
