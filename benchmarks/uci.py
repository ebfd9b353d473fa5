"""Mean-field Bayesian networks on the UCI regressions, beside published figures: ``python -m benchmarks.uci``.

All splits of a data set train at once, as members of one network. Each split's setting is chosen by its own validation
data, a fifth of its training part; the test parts are looked at once.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyrovae
from benchmarks.machine import describe
from pyrovae import datasets
from pyrovae.guides import MeanField
from pyrovae.models import BNN

RESULTS = Path("benchmarks/results")
HIDDEN, RATE, STEPS, BATCH, SAMPLES = 50, 1e-2, 3000, 1000, 200
SETTINGS: tuple[dict[str, Any], ...] = (
    {"init_scale": 0.003, "scale": 1.0},
    {"init_scale": 0.003, "scale": "fan-in"},
)

# Test RMSE and log-likelihood, mean over the same splits, ± standard error unless it says so.
PUBLISHED = {
    "PBP, Hernández-Lobato & Adams 2015 (Gaussian log-likelihood)": {
        "boston": ("3.01 ± 0.18", "-2.57 ± 0.09"),
        "concrete": ("5.67 ± 0.09", "-3.16 ± 0.02"),
        "energy": ("1.80 ± 0.05", "-2.04 ± 0.02"),
        "kin8nm": ("0.10 ± 0.00", "0.90 ± 0.01"),
        "naval": ("0.01 ± 0.00", "3.73 ± 0.01"),
        "power": ("4.12 ± 0.03", "-2.84 ± 0.01"),
        "protein": ("4.73 ± 0.01", "-2.97 ± 0.00"),
        "wine": ("0.64 ± 0.01", "-0.97 ± 0.01"),
        "yacht": ("1.02 ± 0.05", "-1.63 ± 0.02"),
    },
    "MC dropout, Gal & Ghahramani's code 2018, grid search (mixture)": {
        "boston": ("2.90 ± 0.18", "-2.40 ± 0.04"),
        "concrete": ("4.82 ± 0.16", "-2.93 ± 0.02"),
        "energy": ("0.54 ± 0.06", "-1.21 ± 0.01"),
        "kin8nm": ("0.08 ± 0.00", "1.14 ± 0.01"),
        "naval": ("0.00 ± 0.00", "4.45 ± 0.00"),
        "power": ("4.01 ± 0.04", "-2.80 ± 0.01"),
        "protein": ("4.27 ± 0.02", "-2.87 ± 0.00"),
        "wine": ("0.62 ± 0.01", "-0.93 ± 0.01"),
        "yacht": ("0.67 ± 0.05", "-1.25 ± 0.01"),
    },
    "deep ensembles, Lakshminarayanan et al. 2017 (± standard deviation; heteroscedastic, Gaussian)": {
        "boston": ("3.28 ± 1.00", "-2.41 ± 0.25"),
        "concrete": ("6.03 ± 0.58", "-3.06 ± 0.18"),
        "energy": ("2.09 ± 0.29", "-1.38 ± 0.22"),
        "kin8nm": ("0.09 ± 0.00", "1.20 ± 0.02"),
        "naval": ("0.00 ± 0.00", "5.63 ± 0.05"),
        "power": ("4.11 ± 0.17", "-2.79 ± 0.04"),
        "protein": ("4.71 ± 0.06", "-2.83 ± 0.02"),
        "wine": ("0.64 ± 0.04", "-0.94 ± 0.12"),
        "yacht": ("1.58 ± 0.48", "-1.18 ± 0.21"),
    },
}


@dataclass(frozen=True)
class Scores:
    """Test figures of each split: RMSE, and log-likelihood of the mixture, in the units of y and in nats per point."""

    rmse: Tensor
    log_likelihood: Tensor
    coverage: Tensor

    def where(self, chosen: Tensor, other: Scores) -> Scores:
        """These for the splits that are chosen, the other's for the rest."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Scores(*(torch.where(chosen, mine, theirs) for mine, theirs in pairs))


def fitted(data: datasets.Regression, validation: float, setting: dict[str, Any], steps: int, seed: int) -> Scores:
    """All splits trained at once under one setting, and judged on what was held out."""
    (x, y), (held_x, held_y) = data.together(validation=validation)
    prior = {"name": "normal", "scale": setting["scale"]}
    torch.manual_seed(seed)
    model = BNN([x.shape[-1], HIDDEN, 1], prior=prior, members=data.splits, own_data=True)
    model.standardize(x, y)
    guide = MeanField(model, init_scale=setting["init_scale"])
    batch = min(BATCH, len(x))
    epochs = max(1, round(steps * batch / len(x)))
    objective = pyrovae.ELBO(gradient="local", kl="analytic")
    options = {"lr": RATE, "schedule": "cosine", "compile": "auto", "seed": seed, "progress": False}
    pyrovae.fit(model, guide, (x, y), objective=objective, epochs=epochs, batch_size=batch, **options)
    prediction = pyrovae.predict(model, guide, held_x, samples=SAMPLES, seed=seed)
    target = held_y.mT
    low, high = prediction.interval(0.9)
    return Scores(
        (prediction.mean - target).square().mean(-1).sqrt(),
        prediction.log_prob(target).mean(-1),
        ((low <= target) & (target <= high)).float().mean(-1),
    )


def run(name: str, steps: int, seed: int) -> dict[str, Any]:
    """One data set: choose, fit, test."""
    data = datasets.uci(name)
    start = time.perf_counter()
    best: tuple[Tensor, Scores, Tensor] | None = None
    for number, setting in enumerate(SETTINGS):
        judged = fitted(data, 0.2, setting, steps, seed).log_likelihood
        tested = fitted(data, 0.0, setting, steps, seed)
        index = torch.full_like(judged, number)
        if best is None:
            best = judged, tested, index
        else:
            better = judged > best[0]
            best = judged.maximum(best[0]), tested.where(better, best[1]), torch.where(better, index, best[2])
    assert best is not None
    scores, chosen = best[1], best[2].long()
    return {
        "data": f"uci/{name}",
        "splits": data.splits,
        "seed": seed,
        "steps": steps,
        "chosen": {json.dumps(setting): int((chosen == i).sum()) for i, setting in enumerate(SETTINGS)},
        **{key: _summary(value) for key, value in vars(scores).items()},
        "seconds": round(time.perf_counter() - start, 1),
        "machine": describe(),
    }


def _summary(values: Tensor) -> dict[str, float]:
    """Mean over the splits and its standard error."""
    return {"mean": float(values.mean()), "error": float(values.std() / len(values) ** 0.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"data sets, of {', '.join(datasets.uci_names())}; default: all")
    parser.add_argument("--steps", type=int, default=STEPS, help="gradient steps of each fit")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(f"1 x {HIDDEN} ReLU, mean-field, local reparameterization, one noise scale, mixture log-likelihood; ± s.e.")
    for name in given.names or datasets.uci_names():
        result = run(name.removeprefix("uci/"), given.steps, given.seed)
        name = result["data"].removeprefix("uci/")
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"uci-{name}-seed{given.seed}.json").write_text(json.dumps(result, indent=2) + "\n")
        figures = [result[key] for key in ("rmse", "log_likelihood", "coverage")]
        said = "  ".join(f"{figure['mean']:.3f} ± {figure['error']:.3f}" for figure in figures)
        print(f"{name:9s} RMSE, log-likelihood, coverage of 90 %: {said}   ({result['seconds']:.0f} s)", flush=True)
        for source, rows in PUBLISHED.items():
            print(f"          {'  '.join(rows[name])}  {source}", flush=True)


if __name__ == "__main__":
    main()
