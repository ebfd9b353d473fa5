"""Reproduce a published figure.

    python -m benchmarks.reproduce vae-1l-static [--seed 0] [--particles K] [--runs runs/reproduce]

Trains, evaluates on all test images, prints ours beside the paper's and writes benchmarks/results/<recipe>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from benchmarks import machine
from benchmarks.reproduce.recipes import RECIPES, reproduce
from pyrovae.errors import PyrovaeError

RESULTS = Path(__file__).parents[1] / "results"
_FIGURES = {
    "nll": "NLL, nats per data point",
    "negative_elbo": "negative ELBO, nats per data point",
    "bits_per_dimension": "NLL, bits per dimension",
}


def main() -> None:
    """Runs the recipe that the command line names."""
    listed = "\n".join(f"  {name:22s} {recipe.about}" for name, recipe in RECIPES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce",
        description=__doc__,
        epilog=f"recipes:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="name of the recipe")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, training and evaluation (default 0)")
    parser.add_argument("--particles", type=int, help="of the evaluation (default: the recipe's, mostly 5000)")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/reproduce"),
        help="folder of run folders; a run of the recipe there is continued or reused (default runs/reproduce)",
    )
    options = parser.parse_args()
    try:
        result = reproduce(options.recipe, particles=options.particles, seed=options.seed, runs=options.runs)
    except PyrovaeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    recipe = RECIPES[options.recipe]
    published = "none" if recipe.paper is None else f"{recipe.paper:.2f}"
    print(f"{recipe.about}\n  {recipe.note}\n  paper ({recipe.source}): {_FIGURES[recipe.figure]}: {published}")
    print(
        f"  ours (K = {result.particles}, seed {options.seed}): NLL {result.nll:.2f} ± {result.nll_error:.2f},"
        f" negative ELBO {result.negative_elbo:.2f} ± {result.negative_elbo_error:.2f} nats per data point;"
        f" {result.bits_per_dimension:.3f} bits per dimension;"
        f" {result.active_units} active units, epoch {result.epoch}; fit {result.fit_seconds / 60:.1f} min,"
        f" evaluation {result.evaluation_seconds / 60:.1f} min"
    )
    RESULTS.mkdir(exist_ok=True)
    figures = {
        "recipe": options.recipe,
        f"paper_{recipe.figure}{'' if 'bits' in recipe.figure else '_nats'}": recipe.paper,
        "seed": options.seed,
        **dataclasses.asdict(result),
        "machine": machine.describe(),
    }
    path = RESULTS / f"{options.recipe}-seed{options.seed}.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"  written to {path}")


if __name__ == "__main__":
    main()
