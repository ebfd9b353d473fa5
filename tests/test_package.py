"""The package as a whole: what the wheel holds, what the docstrings promise, what the public face names."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pyrovae

ROOT = Path(__file__).parents[1]


def modules() -> list[str]:
    """All modules; an editable install does not show the mapped packages among those of ``pyrovae``."""
    found = {"pyrovae", "pyrovae.models", "pyrovae.guides"}
    for package in (pyrovae, pyrovae.models, pyrovae.guides):
        found |= {module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")}
    return sorted(found)


def public_names() -> list[tuple[str, str]]:
    """Every function and class that a public ``__init__`` names, where it is defined in this project."""
    found = []
    for name in modules():
        module = importlib.import_module(name)
        if not hasattr(module, "__path__"):
            continue
        for public in getattr(module, "__all__", []):
            thing = getattr(module, public)
            if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__.startswith("pyrovae"):
                found.append((thing.__module__, thing.__qualname__))
    return sorted(set(found))


def test_walk_sees_the_mapped_packages():
    assert {"pyrovae.models.vae", "pyrovae.guides.amortized", "pyrovae.plots.report", "pyrovae.cli"} <= set(modules())


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.failed == 0


@pytest.mark.parametrize("name", modules())
def test_every_module_says_what_it_is(name):
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip()


@pytest.mark.parametrize(("module", "name"), public_names())
def test_public_names_are_documented(module, name):
    thing = getattr(importlib.import_module(module), name)
    assert thing.__doc__
    documented = list(inspect.signature(thing).parameters) if inspect.isfunction(thing) else []
    missing = [argument for argument in documented if f"{argument}" not in thing.__doc__]
    assert not missing, f"arguments without a word: {missing}"


# Records that users read rather than build; each is shown by the example of the function that returns it.
RECORDS = {
    *("Estimate", "LogLikelihood", "ActiveUnits", "LogWeights", "Run", "Objective", "Structure"),
    *("PSIS", "SBC", "Gaps", "GuideComparison", "GuideRow", "Refinement"),
    *("GaussianMixturePosterior", "LinearRegressionPosterior", "MixtureEstimate", "EvidenceMaximum", "MixedModelFit"),
    *("FeatureAccuracies", "FeatureAccuracy", "LayerKL", "Neighbours"),
    *("Marginal", "PosteriorSummary", "Regression", "RegressionScores", "ClassificationScores", "Reliability"),
    *("OutOfDistribution", "RiskCoverage"),
}


@pytest.mark.parametrize(("module", "name"), public_names())
def test_public_names_have_a_runnable_example(module, name):
    if name in RECORDS:
        pytest.skip("a record, shown by the example of the function that returns it")
    assert ">>> " in getattr(importlib.import_module(module), name).__doc__


def test_the_public_face_is_what_it_lists():
    for name in pyrovae.__all__:
        assert hasattr(pyrovae, name)
    assert pyrovae.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {pyrovae.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_nothing_that_a_public_package_lists_is_missing():
    for name in modules():
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", []):
            assert hasattr(module, public), f"{name}.{public}"


@pytest.mark.slow
def test_the_wheel_holds_every_package_of_the_tree(tmp_path):
    tree = tmp_path / "tree"  # a copy, so that no build folder of this one is picked up
    for part in ("pyrovae", "models", "guides"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, tree / part)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        tree,
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("pyrovae/")}
        entry_points = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    expected = set()
    for top, prefix in (("pyrovae", "pyrovae"), ("models", "pyrovae/models"), ("guides", "pyrovae/guides")):
        for path in (ROOT / top).rglob("*.py"):
            expected.add(f"{prefix}/{path.relative_to(ROOT / top).as_posix()}")
    assert held == expected | {"pyrovae/py.typed", "pyrovae/training/native.cpp"}
    assert "pyrovae = pyrovae.cli:app" in entry_points
