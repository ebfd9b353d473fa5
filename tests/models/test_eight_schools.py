"""Eight schools: quadrature against brute force, and guides against the exact evidence and posterior."""

from __future__ import annotations

import csv
import functools
import math
import os
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import integrate, stats

import pyrovae
from pyrovae.errors import ArgumentError, DataError
from pyrovae.evaluation import posterior_samples
from pyrovae.guides import FullRank, MeanField
from pyrovae.models.eight_schools import EightSchools
from pyrovae.registry import MODELS, configuration

X = torch.tensor([[28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]])
ERRORS = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])


def test_evidence_and_moments_against_a_grid():
    model, x = EightSchools().double(), X.double()
    mu = np.linspace(-40, 40, 161)[:, None, None]
    tau = np.linspace(0, 400, 8001)[:, None]
    joint = np.zeros(len(tau))
    first = np.zeros(len(tau))
    for centre in mu:
        density = stats.norm.pdf(X[0].numpy(), centre, np.sqrt(ERRORS**2 + tau**2)).prod(-1)
        density = density * stats.norm.pdf(centre.item(), 0, 5) * (mu[1] - mu[0]).item()
        joint, first = joint + density, first + density * centre.item()
    prior = stats.halfcauchy.pdf(tau[:, 0], scale=5)
    evidence, mean, deviation = (integrate.simpson(f * prior, x=tau[:, 0]) for f in (joint, first, joint * tau[:, 0]))
    exact = model.posterior(x)
    assert float(model.log_evidence(x)) == pytest.approx(math.log(evidence), abs=1e-6)
    assert float(exact["mu"].mean) == pytest.approx(mean / evidence, abs=1e-5)
    assert float(exact["tau"].mean) == pytest.approx(deviation / evidence, abs=1e-4)
    torch.testing.assert_close(model.log_evidence(x, nodes=800), model.log_evidence(x), rtol=0, atol=1e-9)


def test_effects_against_importance_sampling_from_the_prior():
    torch.manual_seed(0)
    model = EightSchools(parametrization="centred").double()
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(size=400_000)
    theta = trace.nodes["theta"]["value"]
    log_w = trace.nodes["x"]["fn"].log_prob(X.double().expand(len(theta), 8))
    weight = log_w.softmax(0).unsqueeze(-1)
    exact = model.posterior(X.double())["theta"]
    mean = (weight * theta).sum(0)
    error = (weight.square() * (theta - mean).square()).sum(0).sqrt()
    # Eight means, within 4.5 standard errors each: a false alarm in 18 000 runs.
    assert ((mean - exact.mean[0]) / error).abs().max() < 4.5
    sd = (weight * (theta - mean).square()).sum(0).sqrt()
    torch.testing.assert_close(sd, exact.sd[0], rtol=0.02, atol=0)
    # The evidence too, within 4.5 standard errors.
    w = (log_w - log_w.max()).exp()
    estimate = w.mean().log() + log_w.max()
    assert abs(estimate - model.log_evidence(X.double())[0]) < 4.5 * w.std() / w.mean() / len(w) ** 0.5


@pytest.mark.parametrize("parametrization", ["centred", "non-centred"])
def test_both_parametrizations_generate_the_same_law(parametrization):
    torch.manual_seed(1)
    model = EightSchools(parametrization=parametrization)
    with torch.no_grad():
        x = model(size=20_000)
        with pyro.plate("particles", 3, dim=-2):
            assert model(size=4).shape == (3, 4, 8)
    assert x.shape == (20_000, 8)
    # By the exact law of one school, at tau integrated by quadrature: its median is 0 and its quartiles ± q.
    tau = 5 * np.tan(np.pi * (np.arange(2000) + 0.5) / 4000)
    for j in (0, 4):
        share = stats.norm.cdf(10.0, 0, np.sqrt(25 + tau**2 + ERRORS[j] ** 2)).mean()
        found = float((x[:, j] < 10).float().mean())
        # 4.5 standard errors: with four such checks a false alarm in 37 000 runs.
        assert abs(found - share) < 4.5 * (share * (1 - share) / 20_000) ** 0.5


@functools.cache
def fitted(parametrization, kind, steps=600):
    pyro.clear_param_store()
    model = EightSchools(parametrization=parametrization)
    guide = kind(model)
    objective = pyrovae.ELBO(particles=8)
    pyrovae.fit(
        model, guide, X, objective=objective, epochs=steps, lr=0.05, schedule="cosine", compile=False, progress=False
    )
    with torch.no_grad():
        bounds = pyrovae.log_weights(model, guide, X, particles=20_000).log_w
    return guide, float(bounds.mean()), float(bounds.std() / len(bounds) ** 0.5)


@pytest.mark.slow
def test_mean_field_fits_the_non_centred_model_better():
    evidence = float(EightSchools().log_evidence(X))
    _, centred, centred_error = fitted("centred", MeanField)
    guide, non_centred, error = fitted("non-centred", MeanField)
    # Bounds lie below the evidence; the non-centred is the closer one, by far more than the errors of both.
    assert centred < non_centred - 5 * (error + centred_error)
    assert non_centred < evidence + 4 * error
    assert non_centred > evidence - 0.5
    exact = EightSchools().posterior(X)
    drawn = posterior_samples(guide, X, draws=20_000)
    assert abs(float(drawn["mu"].mean()) - float(exact["mu"].mean)) < 0.5
    effects = (drawn["mu"].unsqueeze(-1) + drawn["tau"].unsqueeze(-1) * drawn["unit"]).mean(0)
    assert (effects - exact["theta"].mean).abs().max() < 1.5


@pytest.mark.slow
def test_full_rank_is_at_least_as_good_as_mean_field():
    for parametrization in ("centred", "non-centred"):
        _, diagonal, error = fitted(parametrization, MeanField)
        _, full, full_error = fitted(parametrization, FullRank)
        assert full > diagonal - 4 * (error + full_error) - 0.02  # 0.02 nats: what the optimizer leaves


def test_run_is_saved_and_loaded(tmp_path):
    model = EightSchools()
    run = pyrovae.fit(model, MeanField(model), X, epochs=3, compile=False, run_dir=tmp_path / "run", progress=False)
    again = pyrovae.load(tmp_path / "run", example=X)
    torch.testing.assert_close(again.model.standard_errors, model.standard_errors)
    assert again.history == run.history


def test_data_file_holds_the_studies_estimates():
    folder = os.environ.get("PYROVAE_DATA")
    if not folder:
        pytest.skip("needs PYROVAE_DATA")
    rows = list(csv.DictReader((Path(folder) / "stats" / "eight_schools.csv").read_text().splitlines()))
    assert [float(row["y"]) for row in rows] == X[0].tolist()
    assert [float(row["sigma"]) for row in rows] == EightSchools().standard_errors.tolist()


def test_refuses_bad_input():
    for arguments in ({"parametrization": "center"}, {"standard_errors": []}, {"standard_errors": [1.0, 0.0]}):
        with pytest.raises(ArgumentError):
            EightSchools(**arguments)
    with pytest.raises(ArgumentError, match="mean_scale"):
        EightSchools(mean_scale=0)
    with pytest.raises(DataError):
        EightSchools()(torch.zeros(1, 7))
    assert MODELS.build(configuration(EightSchools(parametrization="centred"))).parametrization == "centred"
