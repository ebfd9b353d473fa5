"""Commands on a finished run: ``evaluate``, ``sample``, ``report``."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import answer, complaint, succeed, trained
from matplotlib.image import imread

import pyrovae
from pyrovae import evaluation
from pyrovae.datasets.base import make_splits

COMMANDS = ("evaluate", "sample", "report")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("cli") / "run", "--early-stopping", "5", "--lr", "0.01")


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "copy"))


@pytest.mark.parametrize("split", ["test", "validation", "train"])
def test_evaluate_is_what_the_api_computes(run_dir: Path, split: str) -> None:
    found = answer("evaluate", run_dir, "--particles", 20, "--seed", 3, "--split", split, "--device", "cpu")
    run, data = pyrovae.load(run_dir), getattr(pyrovae.datasets.load("digits"), split)
    direct = evaluation.log_likelihood(run.model, run.guide, data, 20, seed=3)
    assert found == {
        "run_dir": str(run_dir),
        "data": "digits",
        "binarization": "dynamic",
        "split": split,
        "best_epoch": run.best_epoch,
        "points": len(data),
        "particles": 20,
        "seed": 3,
        "log_likelihood_nats": direct.mean,
        "standard_error_nats": direct.mean_error,
        "elbo_nats": direct.mean_elbo,
        "elbo_error_nats": direct.mean_elbo_error,
        "bits_per_dimension": pytest.approx(-direct.mean / 64 / math.log(2.0)),
        "median_effective_sample_size": float(direct.effective_sample_size.median()),
        "active_units": evaluation.active_units(run.guide, data).count,
        "latent_dim": 2,
        "kl_nats": float(evaluation.kl_per_dimension(run.model, run.guide, data).sum()),
        "accuracy": None,
    }


def test_evaluate_prints_numbers_with_units(run_dir: Path) -> None:
    found = answer("evaluate", run_dir, "--particles", 20)
    text = succeed("evaluate", run_dir, "--particles", 20)
    assert f"{found['log_likelihood_nats']:.3f} nats per data point ± {found['standard_error_nats']:.2g}" in text
    assert f"{found['elbo_nats']:.3f} nats per data point ± {found['elbo_error_nats']:.2g}" in text
    assert f"{found['kl_nats']:.3f} nats per data point" in text
    assert f"{found['active_units']} of 2 latent dimensions" in text
    assert "of 20 particles (median)" in text


@pytest.mark.parametrize(
    ("options", "passed"), [((), "auto"), (("--compile", "yes"), True), (("--compile", "no"), False)]
)
def test_evaluate_passes_compile_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], passed: Any
) -> None:
    log_likelihood, given = evaluation.log_likelihood, []

    def eager(*arguments: Any, compile: Any, **others: Any) -> Any:
        given.append(compile)
        return log_likelihood(*arguments, compile=False, **others)

    monkeypatch.setattr(evaluation, "log_likelihood", eager)
    succeed("evaluate", run_dir, "--particles", 5, *options)
    assert len(given) == 1
    assert given[0] is passed or given[0] == passed == "auto"


def test_evaluate_without_compiling_gives_the_same(run_dir: Path) -> None:
    command = ("evaluate", run_dir, "--particles", 5)
    assert answer(*command, "--compile", "no") == answer(*command)
    assert "'maybe' is not one of 'auto', 'yes', 'no'" in complaint(*command, "--compile", "maybe")


def test_evaluate_one_particle_has_no_standard_error(run_dir: Path) -> None:
    assert answer("evaluate", run_dir, "--particles", 1)["standard_error_nats"] is None
    assert "±" not in succeed("evaluate", run_dir, "--particles", 1)


def test_evaluate_best_or_last_parameters(copy: Path) -> None:
    best = answer("evaluate", copy, "--particles", 5)
    (copy / "best.safetensors").write_bytes(_shifted(copy / "best.safetensors"))
    assert answer("evaluate", copy, "--particles", 5)["log_likelihood_nats"] < best["log_likelihood_nats"]
    assert answer("evaluate", copy, "--particles", 5, "--which", "best")["best_epoch"] == best["best_epoch"]
    assert answer("evaluate", copy, "--particles", 5, "--which", "last")["best_epoch"] is None
    (copy / "best.safetensors").unlink()
    assert "use --which last" in complaint("evaluate", copy, "--which", "best")


def test_evaluate_on_other_data(copy: Path) -> None:
    _edit(copy, lambda config: config["data"].pop("name"))
    assert "give it with --data: digits, mnist" in complaint("evaluate", copy)
    assert answer("evaluate", copy, "--particles", 5, "--data", "digits")["data"] == "digits"
    assert "did you mean 'digits'" in complaint("evaluate", copy, "--data", "digit")
    static = answer("evaluate", copy, "--particles", 5, "--data", "digits", "--binarization", "static")
    assert static["binarization"] == "static"
    # Intensities are no data for a Bernoulli likelihood.
    assert "outside the support" in complaint("evaluate", copy, "--data", "digits", "--binarization", "none")


def test_data_of_another_shape_are_one_plain_line(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make_splits("other", [torch.ones(4, 3, 3)] * 3, [None] * 3, (), "static")
    monkeypatch.setattr(pyrovae.datasets, "load", lambda *_, **__: other)
    line = complaint("evaluate", run_dir)
    assert "x has shape (4, 3, 3)" in line
    assert "Trace Shapes" not in line


def test_evaluate_density_has_no_bits_per_dimension(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "--binarization", "none", "--epochs", "1")
    found = answer("evaluate", run, "--particles", 5)
    assert (found["binarization"], found["bits_per_dimension"]) == ("none", None)
    assert "bits" not in succeed("evaluate", run, "--particles", 5)


def test_guide_without_encode_is_evaluated_where_it_can(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyrovae.guides import AmortizedNormal
    from pyrovae.guides.amortized import Encoded

    encode = AmortizedNormal.encode
    monkeypatch.setattr(AmortizedNormal, "forward", lambda self, x: self.sample(encode(self, x)))
    monkeypatch.delattr(Encoded, "encode")
    found = answer("evaluate", run_dir, "--particles", 5)
    assert math.isfinite(found["log_likelihood_nats"])
    assert (found["active_units"], found["kl_nats"]) == (None, None)
    text = succeed("evaluate", run_dir, "--particles", 5)
    assert "active units" not in text
    assert "KL" not in text


def test_sample_picture(run_dir: Path, tmp_path: Path) -> None:
    default = answer("sample", run_dir, "--count", 9)
    assert default == {
        "run_dir": str(run_dir), "output": str(run_dir / "samples.png"), "count": 9, "kind": "means", "seed": 0,
    }  # fmt: skip
    first = imread(run_dir / "samples.png")
    assert float(np.ptp(first)) > 0.5
    text = succeed("sample", run_dir, "--count", 9, "--seed", 1, "--output", tmp_path / "new" / "other.png")
    assert text == f"9 means in {tmp_path / 'new' / 'other.png'}\n"
    other = imread(tmp_path / "new" / "other.png")
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_sample_array_of_draws_and_of_means(run_dir: Path, tmp_path: Path) -> None:
    assert answer("sample", run_dir, "--count", 500, "--output", tmp_path / "draws.npy")["kind"] == "draws"
    assert answer("sample", run_dir, "--count", 500, "--output", tmp_path / "means.npy", "--mean")["kind"] == "means"
    draws, means = (np.load(tmp_path / name, allow_pickle=False) for name in ("draws.npy", "means.npy"))
    assert draws.shape == means.shape == (500, 8, 8)
    assert draws.dtype == means.dtype == np.float32
    assert set(np.unique(draws)) == {0.0, 1.0}
    assert 0.0 < means.min() < means.max() < 1.0
    # Each draw is Bernoulli with its mean: the errors' mean square is that of the means' own variance.
    assert abs(((draws - means) ** 2).mean() - (means * (1 - means)).mean()) < 0.005
    succeed("sample", run_dir, "--count", 500, "--output", tmp_path / "again.npy")
    assert np.array_equal(np.load(tmp_path / "again.npy"), draws)
    succeed("sample", run_dir, "--count", 500, "--output", tmp_path / "other.npy", "--seed", 1)
    assert not np.array_equal(np.load(tmp_path / "other.npy"), draws)


def test_sample_refuses(run_dir: Path, tmp_path: Path) -> None:
    assert "must end in .png (a picture) or .npy" in complaint("sample", run_dir, "--output", tmp_path / "a.gif")
    assert "--count" in complaint("sample", run_dir, "--count", 0)
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in complaint("sample", run_dir, "--output", tmp_path / "file" / "a.npy")
    (tmp_path / "folder.npy").mkdir()
    assert str(tmp_path / "folder.npy") in complaint("sample", run_dir, "--output", tmp_path / "folder.npy")


@pytest.mark.slow
def test_report_has_the_numbers_and_the_pictures(run_dir: Path, tmp_path: Path) -> None:
    assert succeed("report", run_dir, "--particles", 20) == f"{run_dir / 'report.html'}\n"
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    found = answer("report", run_dir, "--particles", 20, "--output", tmp_path / "new" / "page.html")
    assert found["report"] == str(tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").exists()
    assert found["log_likelihood_nats"] == answer("evaluate", run_dir, "--particles", 20)["log_likelihood_nats"]
    assert (
        f"<dt>test log-likelihood, nats per data point (20 particles)</dt><dd>{found['log_likelihood_nats']:.2f}"
        in page
    )
    for picture in ("Learning curves", "Reconstructions", "Samples", "Latent space"):
        assert f'alt="{picture}:' in page
    assert "is the folder" in complaint("report", run_dir, "--output", tmp_path)


@pytest.mark.parametrize("layers", ["12", "12,6"])
def test_every_command_on_a_net_of_binary_codes(tmp_path: Path, layers: str) -> None:
    options = ("SigmoidBeliefNet", "--guide", "AmortizedBernoulli", "--layers", layers, "--hidden", "")
    run = trained(tmp_path / "run", *options, "--objective", "IWAE", "--particles", 5, "--gradient", "vimco")
    found = answer("evaluate", run, "--particles", 20)
    assert found["latent_dim"] == 12
    assert 0 <= found["active_units"] <= 12
    # Closed form for one layer alone: with more, p(z1) is a sum over the codes above.
    assert (found["kl_nats"] is None) == ("," in layers)

    succeed("sample", run, "--count", 500, "--output", tmp_path / "draws.npy")
    succeed("sample", run, "--count", 500, "--output", tmp_path / "means.npy", "--mean")
    draws, means = (np.load(tmp_path / name, allow_pickle=False) for name in ("draws.npy", "means.npy"))
    assert set(np.unique(draws)) == {0.0, 1.0}
    assert abs(((draws - means) ** 2).mean() - (means * (1 - means)).mean()) < 0.005

    succeed("report", run, "--particles", 20)
    page = (run / "report.html").read_text(encoding="utf-8")
    for picture in ("Learning curves", "Parts of the bound", "Reconstructions", "Samples", "Latent space"):
        assert f'alt="{picture}:' in page
    for picture, what in (("Interpolation", "posterior"), ("Latent grid", "prior")):
        assert f'<th scope="row">{picture}</th><td>the {what} is over discrete codes' in page


@pytest.mark.parametrize("command", COMMANDS)
def test_folder_without_a_run(command: str, tmp_path: Path) -> None:
    assert "does not exist" in complaint(command, tmp_path / "nowhere")
    assert "holds no run" in complaint(command, tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in complaint(command, tmp_path / "file")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "config.json is not valid JSON"),
        ("best.safetensors", b"short", "best.safetensors is truncated or corrupt"),
        ("metrics.jsonl", b'{"epoch": 1}\n{"ep', "line 2, is not valid JSON"),
    ],
)
def test_corrupt_file_is_named(command: str, copy: Path, name: str, content: bytes, said: str) -> None:
    (copy / name).write_bytes(content)
    assert said in complaint(command, copy)


def test_run_of_other_programs_is_explained(copy: Path) -> None:
    _edit(copy, lambda config: config.update(model=None))
    assert "not one of pyrovae.models" in complaint("evaluate", copy)
    _edit(copy, lambda config: config.update(model={"name": "GAN", "arguments": {}}))
    assert "unknown model 'GAN'" in complaint("evaluate", copy)


def test_bad_device_is_one_line(run_dir: Path) -> None:
    assert "use 'auto' or 'cpu'" in complaint("evaluate", run_dir, "--device", "abacus")
    if not torch.cuda.is_available():
        assert "use 'auto' or 'cpu'" in complaint("report", run_dir, "--device", "cuda")


def _edit(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def _shifted(path: Path) -> bytes:
    """The file's parameters, all larger by 0.3."""
    import safetensors.torch

    return safetensors.torch.save({key: value + 0.3 for key, value in safetensors.torch.load_file(path).items()})
