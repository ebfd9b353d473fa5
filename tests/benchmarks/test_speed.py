"""The speed table: competitors fit the same thing, disagreement shows, and the figures are written."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import speed
from benchmarks.speed_peers import numpyro_client, workloads
from benchmarks.speed_peers.workloads import WORKLOADS, minibatches

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
EAGER = ("pyro", "pyro-unchecked", "torch", "pyrovae-eager")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The workloads at sizes that take no time."""
    monkeypatch.setattr(workloads, "LAYERS", 2)
    reduced = {"iwae": {}, "dreg": {}, "conv": {"hidden": (8,), "channels": (4, 2)}}
    for name, changes in reduced.items():
        shape = {"hidden": (8, 8), "latent": 4, "batch": 4, **changes}
        particles = 5 if WORKLOADS[name].iwae else 1
        monkeypatch.setitem(WORKLOADS, name, dataclasses.replace(WORKLOADS[name], particles=particles, **shape))
    return WORKLOADS


@pytest.mark.parametrize("name", ["tiny", "iwae", "dreg", "conv", "bnn", "schools"])
def test_eager_competitors_fit_the_same(name):
    result = speed.measure(name, EAGER, CPU, rounds=1, seconds=0.01, steps=3)
    assert set(result.milliseconds) == set(EAGER), result.missing
    assert not result.disagree, result.loss
    assert all(value > 0 for value in result.milliseconds.values())
    assert result.ratios() == {}
    assert len(speed.row(name, result, EAGER).split()) == 1 + len(EAGER)


def test_particles_of_pyro_and_of_the_hand_written_step_see_one_seed_alike():
    losses = []
    for competitor in ("pyro-unchecked", "torch", "pyrovae-eager"):
        made = speed.build("tiny", competitor, CPU, None)
        made.run(4)
        torch.manual_seed(3)
        losses.append(made.loss())
    assert losses == pytest.approx(losses[:1] * 3, rel=0.01)


@pytest.mark.slow
def test_compiled_competitors_and_the_written_figures(tmp_path, capsys):
    file = tmp_path / "speed.json"
    names = ["torch", "torch-compile", "pyrovae"]
    common = ["--quick", "--seconds", "0.02", "--rounds", "1", "--device", "cpu", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        speed.main([*common, "--workload", "tiny", "--competitor", *names, "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    figures = json.loads(file.read_text())
    assert {"device", "cores", "threads", "python", "torch", "pyro", "pyrovae"} <= figures["machine"].keys()
    tiny = figures["workloads"]["tiny"]
    assert set(tiny["milliseconds"]) == set(tiny["ratio"]) == set(tiny["loss"]) == set(names)
    assert tiny["ratio"]["pyrovae"] == 1.0
    assert tiny["disagree"] == []
    assert "tiny VAE" in capsys.readouterr().out


@pytest.mark.slow
def test_compile_times_are_of_the_first_compiled_step():
    seconds = speed.compile_seconds("schools", CPU, threads=1)
    assert seconds["cold"] > seconds["warm"] > 0


def test_a_competitor_that_fits_something_else_is_named_and_marked():
    assert speed.disagreeing({"a": 100.0, "b": 101.0, "c": 120.0, "d": float("nan")}) == ["c", "d"]
    assert speed.disagreeing({"a": -100.0, "b": -101.0}) == []
    result = speed.Result({"torch": 2.0, "pyrovae": 1.0}, {"torch": 9.0, "pyrovae": 5.0}, ["torch"])
    assert "!2 (2)" in speed.row("tiny", result, ["torch", "pyrovae"])
    assert "tiny: torch fitted something else" in speed.remarks("tiny", result)[0]


def test_what_a_peer_lacks_is_a_dash_with_a_reason():
    result = speed.measure("dreg", ["numpyro", "numpyro-scan"], CPU)
    assert result.milliseconds == {}
    assert speed.row("dreg", result, ["numpyro"]).split()[-1] == "-"
    assert "no doubly reparameterized gradient" in speed.remarks("dreg", result)[0]


def test_a_competitor_that_fails_leaves_the_others_their_times(monkeypatch):
    def fail(workload, device):
        raise RuntimeError("no compiler here")

    monkeypatch.setitem(speed._BUILDERS, "torch-compile", fail)
    result = speed.measure("tiny", ["torch", "torch-compile"], CPU, rounds=1, seconds=0.01, steps=1)
    assert list(result.milliseconds) == ["torch"]
    assert result.missing["torch-compile"] == "RuntimeError: no compiler here"


@pytest.mark.parametrize("name", WORKLOADS)
def test_data_are_float32_and_the_same_every_time(name):
    first, again = minibatches(WORKLOADS[name]), minibatches(WORKLOADS[name])
    assert len(first) == WORKLOADS[name].minibatches
    for one, other in zip(first, again, strict=True):
        assert all(part.dtype == "float32" and len(part) == WORKLOADS[name].batch for part in one)
        assert all((a == b).all() for a, b in zip(one, other, strict=True))


def test_the_worker_answers_commands_and_says_what_failed(tmp_path, monkeypatch):
    package = tmp_path / "benchmarks" / "speed_peers"  # a stand-in for NumPyro's worker
    package.mkdir(parents=True)
    (package / "numpyro_worker.py").write_text(
        "import sys\n"
        "for line in sys.stdin:\n"
        "    word = line.split()[0]\n"
        "    print({'versions': '{\"numpyro\": \"1\"}', 'run': '0.25'}.get(word, 'error no such thing'), flush=True)\n"
    )
    monkeypatch.setattr(numpyro_client, "ROOT", tmp_path)
    worker = numpyro_client.Worker(sys.executable, "cpu", threads=1)
    competitor = numpyro_client.NumPyro(worker, "jit", "tiny")
    assert worker.versions == {"numpyro": "1"}
    assert competitor.run(10) == 0.25
    with pytest.raises(RuntimeError, match="no such thing"):
        competitor.loss()
    worker.close()
    assert worker.process.returncode == 0


@pytest.mark.slow
def test_help_teaches(capsys):
    command = [sys.executable, "-m", "benchmarks.speed", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert all(name in shown for name in (*WORKLOADS, *speed.COMPETITORS, "Examples", "--quick"))
    with pytest.raises(SystemExit, match="2"):
        speed.main(["--workload", "nope"])
    assert "invalid choice: 'nope'" in capsys.readouterr().err


def test_compile_times_alone_leave_the_other_figures(tmp_path, monkeypatch, capsys):
    file = tmp_path / "speed.json"
    file.write_text(json.dumps({"workloads": {"tiny": {"ratio": {"pyro": 3.0}}}, "compile_seconds": {"old": {}}}))
    monkeypatch.setattr(speed, "compile_seconds", lambda name, device, threads: {"cold": 16.0, "warm": 2.0})
    speed.main(["--compile-times", "--workload", "tiny", "schools", "--json", str(file), "--device", "cpu"])
    written = json.loads(file.read_text())
    assert written["workloads"] == {"tiny": {"ratio": {"pyro": 3.0}}}
    assert written["compile_seconds"] == {name: {"cold": 16.0, "warm": 2.0} for name in ("tiny", "schools")}
    assert "16.0!" in capsys.readouterr().out
