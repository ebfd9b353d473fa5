"""Seconds until pyrovae's compiled step of a workload has run for the first time, in a process of its own.

    python -m benchmarks.speed_peers.compile_time WORKLOAD [--device cpu]

Inductor's cache is where ``TORCHINDUCTOR_CACHE_DIR`` says. Importing the libraries is not counted.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.speed_peers.ours import compiled
from benchmarks.speed_peers.workloads import WORKLOADS


def main() -> None:
    """Prints the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    ours = compiled(WORKLOADS[options.workload], torch.device(options.device))
    ours.run(1)  # eager, so that the optimizer's state exists
    print(ours.run(1))


if __name__ == "__main__":
    main()
