"""The classics' exact answers on their tables, beside the published ones.

    python -m benchmarks.classics

Old Faithful by a mixture, the Nile by a local level, sleepstudy by a mixed model, eight schools by quadrature.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from sklearn.mixture import GaussianMixture as Peer

from benchmarks import machine
from pyrovae.datasets import table
from pyrovae.models import (
    EightSchools,
    GaussianMixture,
    LinearGaussianStateSpace,
    LinearMixedModel,
    expectation_maximization,
)

RESULTS = Path(__file__).parent / "results"
Row = tuple[str, float, float | None, str]  # what, ours, published, where


def mixture() -> list[Row]:
    """The log-likelihood of two full Gaussians on Old Faithful, in nats per data point."""
    data = table("faithful", dtype=torch.float64)
    x = torch.stack([data["eruptions"], data["waiting"]], dim=1)
    found = expectation_maximization(GaussianMixture(2, 2), x, estimate="ml")
    peer = Peer(2, tol=1e-10, max_iter=1000, n_init=10, random_state=0, reg_covar=0.0).fit(x.numpy())
    ours, theirs = float(found.log_likelihood[-1]) / len(x), float(peer.score(x.numpy()))
    return [("Old Faithful, 2 components, log-likelihood, nats per data point", ours, theirs, "scikit-learn, same run")]


def level() -> list[Row]:
    """Maximum likelihood of the local level on the Nile."""
    x = table("nile", dtype=torch.float64)["value"].reshape(1, -1, 1)
    model = LinearGaussianStateSpace.local_level(1000.0, 10000.0, diffuse=True).double()
    log_likelihood = float(model.maximize_likelihood(x))
    found, source = model.learned(), "Durbin & Koopman 2012, section 2.10"
    return [
        ("Nile, variance of the level", float(found["state_covariance"]), 1469.1, source),
        ("Nile, variance of the noise", float(found["observation_covariance"]), 15099.0, source),
        ("Nile, log-likelihood, nats", log_likelihood, None, ""),
    ]


def sleep() -> list[Row]:
    """REML of random intercepts and slopes on sleepstudy."""
    data = table("sleepstudy", dtype=torch.float64)
    days, (who, _) = data["Days"], data.codes("Subject")
    X = torch.stack([torch.ones_like(days), days], dim=1)
    model = LinearMixedModel(2, {"subject": (18, 2)}).double()
    Z, index = model.stack({"subject": X}, {"subject": who})
    found, source = model.estimate(X, Z, index, data["Reaction"]), "Bates et al. 2015, section 4.1 (lme4)"
    sd = found.covariance["subject"].diagonal().sqrt()
    return [
        ("sleepstudy, REML, intercept, ms", float(found.beta[0]), 251.41, source),
        ("sleepstudy, REML, slope, ms per day", float(found.beta[1]), 10.47, source),
        ("sleepstudy, REML, sd of intercepts, ms", float(sd[0]), 24.74, source),
        ("sleepstudy, REML, sd of slopes, ms per day", float(sd[1]), 5.92, source),
        ("sleepstudy, REML, sd of residuals, ms", float(found.sigma), 25.59, source),
        ("sleepstudy, REML criterion", float(found.criterion), 1743.6, source),
    ]


def schools() -> list[Row]:
    """The evidence of eight schools by quadrature."""
    data = table("eight_schools", dtype=torch.float64)
    model = EightSchools(data["sigma"].tolist()).double()
    return [("eight schools, log evidence, nats", float(model.log_evidence(data["y"].unsqueeze(0))), None, "")]


def main() -> None:
    """Prints all and writes benchmarks/results/classics.json."""
    rows = [*mixture(), *level(), *sleep(), *schools()]
    for what, ours, published, source in rows:
        beside = "" if published is None else f"   {published:>11.5g}  ({source})"
        print(f"{what:65} {ours:>12.6g}{beside}")
    keys = ("what", "ours", "published", "source")
    figures = {"figures": [dict(zip(keys, row, strict=True)) for row in rows], "machine": machine.describe()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "classics.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
