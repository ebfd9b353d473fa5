"""Time of a gradient step: pyrovae against Pyro, PyTorch and NumPyro, in one run.

    python -m benchmarks.speed [--workload NAME …] [--competitor NAME …] [--rounds 7] [--threads N] [--quick]

Every competitor fits the same model to the same data from the same initial parameters; a step is the forward pass, the
gradient and Adam's update on the next minibatch, in float32, with the data on the device. Each runs until it is done,
in turn, round after round, and the table has the median of the rounds in milliseconds a step, with its ratio to
pyrovae's compiled step (above 1: pyrovae is that many times faster).

Before the clock starts, all take the same number of steps, and the losses must then agree within 5 %; a "!" marks one
that does not, whose time means nothing.

Competitors:
    pyro             pyro.infer.SVI with Trace_ELBO (RenyiELBO(alpha=0) for IWAE), validation on, as Pyro has it
    pyro-unchecked   the same with validation off
    torch            hand-written PyTorch with fused Adam
    torch-compile    the same under torch.compile, with the quicker of a fused and a compiled Adam
    numpyro          numpyro.infer.SVI, jax.jit of its update
    numpyro-scan     the same in a jax.lax.scan, many updates a call
    pyrovae-eager    pyrovae.fit(compile=False)
    pyrovae          pyrovae.fit(compile=True); pyrovae.SVI(...).steps where there is one minibatch, the whole data

Pyro and NumPyro have no doubly reparameterized gradient: on the workload "dreg" Pyro takes IWAE's plain gradient (~),
and NumPyro nothing (-); the cost of its plain one is in the row "iwae".

On a CPU, XLA is slow at convolutions inside a loop (https://github.com/jax-ml/jax/issues/12868): there
"numpyro" is NumPyro's better column on the workload "conv".

A second table has the seconds until the compiled step has run for the first time: cold, with an empty cache, and warm,
when another process compiled the same before.

NumPyro runs in a process of its own, in this environment where it is there (`pip install pyrovae[peers]`), else in
.bench-env/, into which it is installed once.

Examples:
    python -m benchmarks.speed --quick --workload tiny                        # a first look
    python -m benchmarks.speed                                                # everything
    python -m benchmarks.speed --competitor torch-compile pyrovae --device cuda
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyro
import torch

import pyrovae
from benchmarks import machine
from benchmarks.speed_peers.hand_written import HandWritten
from benchmarks.speed_peers.numpyro_client import NumPyro, Worker, find_python
from benchmarks.speed_peers.ours import Ours, compiled
from benchmarks.speed_peers.pyro_svi import PyroSVI
from benchmarks.speed_peers.workloads import WORKLOADS, Workload

ROOT = Path(__file__).parents[1]
REFERENCE = "pyrovae"
COMPETITORS = (
    "pyro",
    "pyro-unchecked",
    "torch",
    "torch-compile",
    "numpyro",
    "numpyro-scan",
    "pyrovae-eager",
    REFERENCE,
)
BAND = 0.05  # largest relative difference of two losses after the same steps
GOALS = {"cold": 15.0, "warm": 3.0}  # seconds of compilation


class Competitor(Protocol):
    """What is timed."""

    def run(self, steps: int) -> float:
        """Takes a number of steps and waits for the device; returns the seconds."""

    def tune(self) -> None:
        """Makes the choices that depend on the machine, before the clock starts."""

    def loss(self) -> float:
        """The negative bound in nats per data point, at the present parameters."""


@dataclass
class Result:
    """One row of the table, by competitor.

    Args:
        milliseconds: median time of a step.
        loss: negative bound in nats per data point after the same number of steps.
        disagree: competitors whose loss is not that of the others.
        missing: why a competitor has no time.
    """

    milliseconds: dict[str, float] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    disagree: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def ratios(self) -> dict[str, float]:
        """Times over that of pyrovae's compiled step; empty where that was not measured."""
        reference = self.milliseconds.get(REFERENCE)
        return {name: value / reference for name, value in self.milliseconds.items()} if reference else {}


def build(name: str, competitor: str, device: torch.device, worker: Worker | None) -> Competitor | str:
    """A competitor of a workload, or why there is none."""
    workload = WORKLOADS[name]
    if competitor.startswith("numpyro"):
        if workload.dreg:
            return "NumPyro has no doubly reparameterized gradient"
        return "NumPyro is not there" if worker is None else NumPyro(worker, _KINDS[competitor], name)
    return _BUILDERS[competitor](workload, device)


_KINDS = {"numpyro": "jit", "numpyro-scan": "scan"}
_BUILDERS: dict[str, Callable[[Workload, torch.device], Competitor]] = {
    "pyro": lambda workload, device: PyroSVI(workload, device, validate=True),
    "pyro-unchecked": lambda workload, device: PyroSVI(workload, device, validate=False),
    "torch": lambda workload, device: HandWritten(workload, device, compile=False),
    "torch-compile": lambda workload, device: HandWritten(workload, device, compile=True),
    "pyrovae-eager": lambda workload, device: Ours(workload, device, compile=False),
    "pyrovae": compiled,
}


def measure(
    name: str,
    competitors: Iterable[str],
    device: torch.device,
    worker: Worker | None = None,
    rounds: int = 7,
    seconds: float = 0.5,
    steps: int = 100,
) -> Result:
    """Times the competitors of one workload, interleaved.

    Args:
        name: of the workload.
        competitors: their names.
        device: where.
        worker: the process that runs NumPyro, if there is one.
        rounds: timings of each.
        seconds: that one timing takes, about.
        steps: that each takes before its loss is compared with the others'.
    """
    torch._dynamo.reset()
    result, running = Result(), dict[str, Competitor]()
    for competitor in competitors:
        try:
            made = build(name, competitor, device, worker)
            if isinstance(made, str):
                result.missing[competitor] = made
                continue
            made.run(steps)
            result.loss[competitor] = made.loss()
            made.tune()
            running[competitor] = made
        except Exception as error:  # one that does not run here leaves the others their row
            result.missing[competitor] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    result.disagree = disagreeing(result.loss)
    counts = {competitor: _steps_for(made, seconds) for competitor, made in running.items()}
    times: dict[str, list[float]] = {competitor: [] for competitor in running}
    for turn in range(1 + rounds):
        for competitor, made in running.items():
            milliseconds = 1000 * made.run(counts[competitor]) / counts[competitor]
            if turn:  # the first round warms up
                times[competitor].append(milliseconds)
    result.milliseconds = {competitor: statistics.median(values) for competitor, values in times.items()}
    return result


def _steps_for(competitor: Competitor, seconds: float) -> int:
    """The number of steps that takes about that long."""
    steps = 1
    while True:
        took = competitor.run(steps)
        if took > seconds / 10:
            return max(1, round(steps * seconds / took))
        steps = max(2 * steps, min(100 * steps, int(steps * seconds / 5 / max(took, 1e-6))))


def disagreeing(losses: dict[str, float]) -> list[str]:
    """Names of those whose loss is not within 5 % of the median, or not finite."""
    finite = [value for value in losses.values() if math.isfinite(value)]
    middle = statistics.median(finite) if finite else math.nan
    return [name for name, value in losses.items() if not abs(value - middle) <= BAND * abs(middle)]


def compile_seconds(name: str, device: torch.device, threads: int) -> dict[str, float]:
    """Seconds of the first compiled step, in processes of their own: with an empty cache, then with a full one."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        places = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        environment = {**os.environ, **places, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "benchmarks.speed_peers.compile_time", name, "--device", str(device)]
        for state in ("cold", "warm"):
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            try:
                found[state] = float(done.stdout.split()[-1])
            except (IndexError, ValueError):
                raise RuntimeError(f"compiling {name} failed: {done.stderr.strip()[-500:]}") from None
    return found


# ---------------------------------------------------------------------------------------------------------
# Tables


_WIDTH = 15


def head(competitors: Iterable[str]) -> str:
    """The first line of the table."""
    return f"{'':8s}" + "".join(f"{name:>{_WIDTH}s}" for name in competitors)


def row(name: str, result: Result, competitors: Iterable[str]) -> str:
    """One workload: times, and ratios to pyrovae's compiled step."""
    ratios = result.ratios()

    def cell(competitor: str) -> str:
        if competitor not in result.milliseconds:
            return "-"
        mark = "~" if WORKLOADS[name].dreg and competitor in ("pyro", "pyro-unchecked") else ""
        ratio = f" ({_short(ratios[competitor])})" if competitor in ratios and competitor != REFERENCE else ""
        return f"{'!' if competitor in result.disagree else mark}{_short(result.milliseconds[competitor])}{ratio}"

    return f"{name:8s}" + "".join(f"{cell(competitor):>{_WIDTH}s}" for competitor in competitors)


def _short(value: float) -> str:
    """Three digits; two of a small number, all of a large one."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 0.1 else f"{value:.3g}"


def remarks(name: str, result: Result) -> list[str]:
    """What must be said of a row."""
    said = [f"  {name}, {competitor}: {why}" for competitor, why in result.missing.items()]
    if result.disagree:
        losses = ", ".join(f"{competitor} {value:.4g}" for competitor, value in result.loss.items())
        who = ", ".join(result.disagree)
        said.append(f"  {name}: {who} fitted something else; losses after the same steps: {losses}")
    return said


def compile_row(name: str, seconds: dict[str, float]) -> str:
    """Cold and warm seconds of one workload."""
    cells = [f"{seconds[state]:10.1f}{' ' if seconds[state] <= goal else '!'}" for state, goal in GOALS.items()]
    return f"{name:8s}" + "".join(cells)


# ---------------------------------------------------------------------------------------------------------
# Command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME",
        help=f"rows of the table: {', '.join(WORKLOADS)} (default: all)")  # fmt: skip
    add("--competitor", nargs="+", choices=COMPETITORS, default=list(COMPETITORS), metavar="NAME",
        help="columns of the table (default: all)")  # fmt: skip
    add("--rounds", type=int, help="timings of each competitor (default 7; 3 with --quick)")
    add("--seconds", type=float, help="length of one timing (default 0.5; 0.1 with --quick)")
    add("--threads", type=int, default=torch.get_num_threads(), help="processor threads of all (default: torch's)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="where (default: the GPU where there is one)")  # fmt: skip
    add("--quick", action="store_true", help="shorter timings, and no table of compile times")
    add("--compile-times", action="store_true", help="the table of compile times alone; other figures stay in the file")
    add("--peers-python", metavar="PATH", help="interpreter that has numpyro (default: found or created)")
    add("--json", type=Path, metavar="FILE", help="result file (default benchmarks/results/speed-DEVICE.json)")
    options = parser.parse_args(arguments)
    options.competitor = [name for name in COMPETITORS if name in options.competitor]
    options.rounds = options.rounds or (3 if options.quick else 7)
    options.seconds = options.seconds or (0.1 if options.quick else 0.5)
    options.json = options.json or ROOT / "benchmarks" / "results" / f"speed-{options.device}.json"
    return options


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables and writes the JSON."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    for chatty in ("torch.utils.cpp_extension", "torch._dynamo.variables.ctx_manager"):  # no GPU; no profiler
        logging.getLogger(chatty).setLevel(logging.ERROR)
    device = torch.device(options.device)
    if options.compile_times:
        figures = json.loads(options.json.read_text())
        figures["compile_seconds"] = _compile_times(options)
        _write(figures, options)
        return
    worker = _worker(options)
    versions = {"pyrovae": pyrovae.__version__, "pyro": pyro.__version__, **(worker.versions if worker else {})}
    described = {**machine.describe(), **versions}
    if options.device == "cpu" and torch.cuda.is_available():
        described["device"] = machine._processor()
    if hasattr(os, "getloadavg"):
        described["load"] = round(os.getloadavg()[0], 2)
        if described["load"] > 0.5:
            print(f"load {described['load']}: other programs are running, which spoils the figures", file=sys.stderr)
    figures: dict[str, Any] = {"machine": described, "workloads": {}, "compile_seconds": {}}
    figures["options"] = {"rounds": options.rounds, "seconds": options.seconds, "quick": options.quick}
    print(described, *(f"{name:8s}{WORKLOADS[name].title}" for name in options.workload), sep="\n")
    print(f"\nms a step, medians of {options.rounds} interleaved rounds (in brackets: over pyrovae's compiled step)")
    print(head(options.competitor))
    said: list[str] = []
    for name in options.workload:
        steps = 50 if options.quick else 100
        result = measure(name, options.competitor, device, worker, options.rounds, options.seconds, steps)
        print(row(name, result, options.competitor), flush=True)
        said += remarks(name, result)
        figures["workloads"][name] = {**vars(result), "ratio": result.ratios()}
    print(*said, sep="\n")
    if worker:
        worker.close()
    if REFERENCE in options.competitor and not options.quick:
        figures["compile_seconds"] = _compile_times(options)
    _write(figures, options)


def _compile_times(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Prints and gives the seconds of compiling, cold and warm, by workload."""
    print(f"\nseconds to compile (! over the goals of {GOALS['cold']:g} and {GOALS['warm']:g})")
    print(f"{'':8s}{'cold':>10s} {'warm':>10s}")
    found = {}
    for name in options.workload:
        found[name] = compile_seconds(name, torch.device(options.device), options.threads)
        print(compile_row(name, found[name]), flush=True)
    return found


def _write(figures: dict[str, Any], options: argparse.Namespace) -> None:
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nwritten to {options.json}")


def _worker(options: argparse.Namespace) -> Worker | None:
    """The process that runs NumPyro, if it takes part and can be had."""
    if not any(name.startswith("numpyro") for name in options.competitor):
        return None
    try:
        return Worker(find_python(options.peers_python), options.device, options.threads)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"no NumPyro in this run ({error}); --peers-python gives an interpreter that has it", file=sys.stderr)
        return None


if __name__ == "__main__":
    main()
