"""Comparing contenders in one process: interleaved, as medians and ratios."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import machine


def medians(contenders: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each contender.

    Args:
        contenders: what to time, by name; called in turn.
        repeats: timings of each.
        warmup: untimed turns before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats, help=f"timings of each contender (default {repeats})")
    made.add_argument("--json", type=Path, help="also write the figures to this file")
    return made


def show(title: str, found: Mapping[str, float], options: argparse.Namespace) -> None:
    """Prints the medians with their ratios to the first, and writes them where ``--json`` says."""
    first = next(iter(found))
    print(f"{machine.describe()}\n{title}, medians of {options.repeats}, interleaved")
    for name, seconds in found.items():
        print(f"  {name:22s} {1000 * seconds:9.2f} ms   {seconds / found[first]:6.2f} x {first}")
    if options.json:
        given = {key: value for key, value in vars(options).items() if key != "json"}
        figures = {"machine": machine.describe(), "options": given, "median_seconds": dict(found)}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
