"""NumPyro's competitors, run in another interpreter through a pipe, so that rounds stay interleaved."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["NumPyro", "Worker", "find_python"]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".bench-env"


def find_python(given: str | None) -> str:
    """The interpreter that has NumPyro: the given one, this one, or that of ``.bench-env``, created when needed."""
    if given or importlib.util.find_spec("numpyro"):
        return given or sys.executable
    python = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / "python"
    if subprocess.run([python, "-c", "import numpyro"], capture_output=True).returncode if python.exists() else True:
        print(f"Installing NumPyro into {ENVIRONMENT.name}/ (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        cuda = [f"jax[cuda{torch.version.cuda.split('.')[0]}]"] if torch.cuda.is_available() else []
        subprocess.run([python, "-m", "pip", "install", "--quiet", "numpyro >= 0.19", *cuda], check=True)
    return str(python)


class Worker:
    """The process that runs NumPyro.

    Args:
        python: interpreter that has NumPyro.
        device: ``"cpu"`` or ``"cuda"``.
        threads: number of processors that it may use, the same as torch's threads.
    """

    def __init__(self, python: str, device: str, threads: int) -> None:
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": device}
        command = [python, "-m", "benchmarks.speed_peers.numpyro_worker"]
        pipe = subprocess.PIPE
        before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        if 0 < threads < len(before):  # XLA has as many threads as it may use processors
            os.sched_setaffinity(0, sorted(before)[:threads])
        try:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, cwd=ROOT, env=environment, text=True, bufsize=1
            )
        finally:
            if before:
                os.sched_setaffinity(0, before)
        self.versions: dict[str, Any] = json.loads(self.ask("versions"))

    def ask(self, *words: object) -> str:
        """The answer to one command.

        Raises:
            RuntimeError: the worker could not do it, or is gone.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        answer = self.process.stdout.readline().strip()
        if not answer or answer.startswith("error"):
            raise RuntimeError(f"NumPyro: {answer or 'its process ended'}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


class NumPyro:
    """One of NumPyro's competitors, as its worker runs it.

    Args:
        worker: the process.
        kind: ``"jit"`` or ``"scan"``.
        name: of the workload.
    """

    def __init__(self, worker: Worker, kind: str, name: str) -> None:
        self.worker, self.kind, self.name = worker, kind, name

    def run(self, steps: int) -> float:
        """Seconds that a number of steps takes."""
        return float(self.worker.ask("run", self.kind, self.name, steps))

    def tune(self) -> None:
        """Nothing to choose."""

    def loss(self) -> float:
        """The negative bound in nats per data point."""
        return float(self.worker.ask("loss", self.kind, self.name))
