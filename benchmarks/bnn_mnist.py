"""Classification of MNIST by networks of two hidden layers, one row a method: ``python -m benchmarks.bnn_mnist``.

Every method ends in the same predictive object; error, negative log-likelihood and calibration error are of the
10 000 test images. The epoch of the best validation bound is kept; 50 000 images train, 10 000 validate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pyrovae
from benchmarks.machine import describe
from pyrovae import datasets
from pyrovae.evaluation import classification_scores
from pyrovae.guides import MeanField, PointEstimate
from pyrovae.models import BNN

RESULTS = Path("benchmarks/results")
RATE, BATCH, SAMPLES, MEMBERS, DROPOUT = 1e-3, 128, 50, 5, 0.5
LOCAL = {"gradient": "local", "kl": "analytic"}


def network(hidden: int, dropout: float = 0.0) -> nn.Module:
    """784 - hidden - hidden - 10 with ReLU; dropout, where there is any, after each hidden layer."""
    after = [nn.ReLU(), nn.Dropout(dropout)] if dropout else [nn.ReLU()]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, hidden), *after, nn.Linear(hidden, hidden), *after, nn.Linear(hidden, 10)
    )


@dataclass(frozen=True)
class Method:
    """One row.

    Args:
        model: from the width of the hidden layers.
        guide: of the model.
        objective: arguments of ``pyrovae.ELBO``.
        samples: posterior draws of a prediction.
        dropout: whether dropout stays on in predictions.
        published: error in % at widths 400, 800 and 1200, where it was published.
    """

    model: Callable[[int], BNN]
    guide: Callable[[BNN], Any]
    objective: dict[str, Any]
    samples: int = SAMPLES
    dropout: bool = False
    published: str = ""


def classifier(net: nn.Module, prior: Any = "normal", **options: Any) -> BNN:
    return BNN(net, likelihood="categorical", prior=prior, **options)


METHODS = {
    "map": Method(
        lambda width: classifier(network(width)), PointEstimate, {}, samples=1, published="1.83, 1.84, 1.88 (SGD)"
    ),
    "mean-field": Method(
        lambda width: classifier(network(width)),
        lambda model: MeanField(model, init_scale=0.01),
        LOCAL,
        published="1.82, 1.99, 2.04 (Gaussian prior)",
    ),
    "mean-field-narrow": Method(  # it starts so narrow that it stays near a point estimate
        lambda width: classifier(network(width)),
        lambda model: MeanField(model, init_scale=0.001),
        LOCAL,
        published="1.82, 1.99, 2.04 (Gaussian prior)",
    ),
    "scale-mixture": Method(
        lambda width: classifier(network(width), "scale-mixture"),
        lambda model: MeanField(model, init_scale=0.01),
        {},
        published="1.36, 1.34, 1.32 (scale mixture)",
    ),
    "mc-dropout": Method(
        lambda width: classifier(network(width, DROPOUT)),
        PointEstimate,
        {},
        dropout=True,
        published="1.51, 1.33, 1.36 (dropout)",
    ),
    "ensemble": Method(lambda width: classifier(network(width), members=MEMBERS), PointEstimate, {}, samples=1),
}


def run(name: str, hidden: int, epochs: int, seed: int) -> dict[str, Any]:
    """Fits and scores one method."""
    method, data = METHODS[name], datasets.load("mnist", binarization="none")
    torch.manual_seed(seed)
    model = method.model(hidden)
    guide = method.guide(model)
    start = time.perf_counter()
    fitted = pyrovae.fit(
        model,
        guide,
        data.train.labelled(),
        validation=data.validation.labelled(),
        objective=pyrovae.ELBO(**method.objective),
        epochs=epochs,
        early_stopping=epochs,
        batch_size=BATCH,
        lr=RATE,
        schedule="cosine",
        seed=seed,
        progress=False,
    )
    seconds = time.perf_counter() - start
    x, y = data.test.labelled()[:]
    prediction = pyrovae.predict(model, guide, x, samples=method.samples, dropout=method.dropout, seed=seed)
    scores = classification_scores(prediction.pooled(), y)
    parts = ("error", "nll", "brier", "ece", "entropy", "mutual_information")
    return {
        "method": name,
        "hidden": hidden,
        "epochs": epochs,
        "best_epoch": fitted.best_epoch,
        "samples": prediction.pooled().samples,
        "seed": seed,
        **{part: float(getattr(scores, part)) for part in parts},
        "published_error_percent": method.published,
        "fit_seconds": round(seconds, 1),
        "machine": describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)}; default: all")
    parser.add_argument("--hidden", type=int, default=400, help="width of both hidden layers")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(
        f"MNIST, 784-{given.hidden}-{given.hidden}-10; published: Blundell et al. 2015, widths 400, 800, 1200",
        flush=True,
    )
    for name in given.methods or METHODS:
        found = run(name, given.hidden, given.epochs, given.seed)
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"bnn-mnist-{name}-{given.hidden}-seed{given.seed}.json"
        path.write_text(json.dumps(found, indent=2) + "\n")
        print(
            f"{name:14s} error {100 * found['error']:.2f} %  NLL {found['nll']:.4f} nats  ECE {found['ece']:.4f}"
            f"  ({found['samples']} samples, fit {found['fit_seconds']:.0f} s)"
            f"  published error: {found['published_error_percent'] or '-'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
