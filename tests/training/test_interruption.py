"""Ctrl-C, SIGTERM and crashes while writing leave a folder that loads and resumes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_helpers import (
    after_steps,
    assert_identical,
    assert_same_run,
    binary,
    fit,
    parameters,
    signal_after,
    snapshot,
    vae,
)

import pyrovae
from pyrovae.training import checkpoint

SIGNALS = {
    "ctrl-c": (signal.SIGINT, KeyboardInterrupt, "fit interrupted; saved in .*; continue with resume=True"),
    "sigterm": (signal.SIGTERM, SystemExit, f"^{128 + signal.SIGTERM}$"),
}


def test_handlers_in_the_fit_are_not_the_callers(tmp_path: Path) -> None:
    """What the next tests take for granted: during a fit another handler is set."""
    seen: list[Any] = []
    fit(*vae(), binary(), epochs=1, callbacks=[lambda run: seen.append(signal.getsignal(signal.SIGINT))])
    assert seen[0] is not signal.getsignal(signal.SIGINT)


@contextlib.contextmanager
def own_handlers() -> Iterator[dict[int, Any]]:
    """Handlers that the caller has set before the fit."""
    ours = {number: (lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    try:
        yield ours
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("steps", [2, 7, 9])
def test_interrupted_fit_leaves_a_loadable_checkpoint_and_the_history_so_far(
    kind: str, steps: int, tmp_path: Path
) -> None:
    number, error, said = SIGNALS[kind]
    model, guide = vae()
    with own_handlers() as handlers:
        with signal_after(steps, number), pytest.raises(error, match=said):
            fit(model, guide, binary(), epochs=50, run_dir=tmp_path)
        assert {n: signal.getsignal(n) for n in handlers} == handlers
    run = pyrovae.load(tmp_path)
    assert [row["epoch"] for row in run.history] == list(range(1, (steps - 1) // 3 + 1))
    live = pyrovae.Run(model, guide, [], {})
    assert_identical(parameters(run), parameters(live))
    untouched = fit(*vae(), binary(), epochs=4)
    assert [row["bound"] for row in run.history] == [row["bound"] for row in untouched.history[: len(run.history)]]


def test_interrupted_fit_without_a_folder_keeps_what_was_learned() -> None:
    model, guide = vae()
    with signal_after(6), pytest.raises(KeyboardInterrupt, match="model and guide hold what was learned"):
        fit(model, guide, binary(), epochs=50)
    whole = fit(*vae(), binary(), epochs=2)
    assert_identical(parameters(pyrovae.Run(model, guide, [], {})), parameters(whole))


@pytest.mark.parametrize("ends", ["well", "by an error"])
def test_handlers_are_restored_when_a_fit_ends(ends: str) -> None:
    def fail(run: pyrovae.Run) -> None:
        if ends == "by an error":
            raise RuntimeError("callback")

    with own_handlers() as handlers:
        with contextlib.suppress(RuntimeError):
            fit(*vae(), binary(), callbacks=[fail])
        assert {n: signal.getsignal(n) for n in handlers} == handlers


def test_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    """Two signals before the fit had time to save: it stops in the step, with the old checkpoint."""

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    with after_steps(5, twice), pytest.raises(KeyboardInterrupt):
        fit(*vae(), binary(), epochs=50, run_dir=tmp_path)
    assert len(pyrovae.load(tmp_path).history) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_fit_in_a_thread_leaves_signals_alone_and_gives_the_same_numbers() -> None:
    runs: list[pyrovae.Run] = []
    thread = threading.Thread(target=lambda: runs.append(fit(*vae(), binary())))
    thread.start()
    thread.join()
    assert_same_run(runs[0], fit(*vae(), binary()))


SCRIPT = """
import sys, torch, pyrovae
from pyrovae.models import VAE
from pyrovae.guides import AmortizedNormal
torch.manual_seed(0)
model = VAE(data_shape=(4,), latent_dim=2, hidden=(8,))
data = torch.bernoulli(torch.full((24, 4), 0.5), generator=torch.Generator().manual_seed(1))
guide = AmortizedNormal(model)
pyrovae.fit(
    model, guide, data, epochs=1_000_000, batch_size=8, lr=1e-2, run_dir=sys.argv[1], compile=False
)
"""


@pytest.mark.slow
def test_sigterm_to_a_training_process_saves_and_exits_with_143(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, said.decode()
    run = pyrovae.load(folder)
    finished = len(run.history)
    assert finished >= 1
    assert [row["epoch"] for row in run.history] == list(range(1, finished + 1))
    data = torch.bernoulli(torch.full((24, 4), 0.5), generator=torch.Generator().manual_seed(1))
    resumed = fit(*vae(), data, epochs=finished + 2, run_dir=folder, resume=True)
    assert len(resumed.history) == finished + 2
    assert resumed.history[:finished] == run.history
    assert_same_run(resumed, fit(*vae(), data, epochs=finished + 2))


# ---------------------------------------------------------------------------------------------------------
# Crashes while writing


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("name", ["training.pt", "model.safetensors", "best.safetensors", "metrics.jsonl"])
def test_crash_while_writing_leaves_the_old_files_readable(
    call: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments() -> dict[str, Any]:
        model, guide = vae()
        return {"model": model, "guide": guide, "data": binary(), "validation": binary(16, 2), "early_stopping": 9}

    fit(**arguments(), epochs=2, run_dir=tmp_path)
    before = snapshot(tmp_path)
    real = getattr(os, call)

    def broken(first: Any, *rest: Any) -> Any:
        path = first if call == "replace" else os.readlink(f"/proc/self/fd/{first}")
        if Path(path).name.startswith(f".{name}."):
            raise OSError(28, "No space left on device")
        return real(first, *rest)

    monkeypatch.setattr(os, call, broken)
    with pytest.raises(OSError, match="No space left"):
        fit(**arguments(), epochs=4, run_dir=tmp_path, resume=True)
    monkeypatch.undo()
    after = snapshot(tmp_path)
    assert after[name] == before[name]
    assert not [path for path in after if Path(path).name.startswith(".")]  # no temporary file is left
    assert len(pyrovae.load(tmp_path).history) in (2, 3)
    resumed = fit(**arguments(), epochs=4, run_dir=tmp_path, resume=True)
    assert_same_run(resumed, fit(**arguments(), epochs=4))
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["epoch"] == 4


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_atomic_write_that_fails_keeps_the_old_content(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    checkpoint.write_atomically(path, b"old")

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, broken)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(path, b"new")
    assert snapshot(tmp_path) == {"file": b"old"}
    monkeypatch.undo()
    checkpoint.write_atomically(path, b"new")
    assert snapshot(tmp_path) == {"file": b"new"}
