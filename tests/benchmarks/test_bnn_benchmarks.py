"""The benchmarks of Bayesian networks run, and print what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

from benchmarks import bnn_mnist, bnn_speed, uci
from pyrovae import datasets
from pyrovae.errors import DataUnavailableError


def test_uci_chooses_by_validation_and_prints_published_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        datasets.uci("yacht")
    except DataUnavailableError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uci", "yacht", "--steps", "3"])
    uci.main()
    found = json.loads((tmp_path / "benchmarks/results/uci-yacht-seed0.json").read_text())
    assert sum(found["chosen"].values()) == found["splits"] == 20
    assert found["rmse"]["error"] > 0
    said = capsys.readouterr().out
    assert f"{found['rmse']['mean']:.3f}" in said
    assert said.count("1.02 ± 0.05") == 1


def test_published_rows_cover_the_data() -> None:
    for rows in uci.PUBLISHED.values():
        assert set(rows) == set(datasets.uci_names())


def test_scores_of_the_chosen_setting_are_taken_by_split() -> None:
    first, second = (uci.Scores(*(torch.full((2,), value) for _ in range(3))) for value in (1.0, 2.0))
    mixed = first.where(torch.tensor([True, False]), second)
    assert mixed.rmse.tolist() == mixed.coverage.tolist() == [1.0, 2.0]


@pytest.mark.slow
@pytest.mark.parametrize("method", bnn_mnist.METHODS)
def test_every_method_classifies(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 4000 images; that the published settings are good is what the benchmark itself says."""
    try:
        data = datasets.load("mnist", binarization="none")
    except DataUnavailableError as error:
        pytest.skip(str(error))

    def part(split: Any) -> datasets.Split:
        return datasets.Split(split.x[:4000], split.y[:4000], split.binarization, split.name)

    small = datasets.Splits(
        "mnist", part(data.train), part(data.validation), part(data.test), data.classes, data.binarization
    )
    monkeypatch.setattr(datasets, "load", lambda *args, **kwargs: small)
    found = bnn_mnist.run(method, hidden=50, epochs=15, seed=0)
    assert found["error"] < 0.3
    assert found["samples"] == {"map": 1, "ensemble": 5}.get(method, 50)


def test_the_ways_of_the_speed_table_take_steps_on_the_same_loss() -> None:
    """Of a linear network the losses fall, to values that are near each other."""
    x = torch.randn(20, 3)
    arguments = ([3, 1], 20, x, x[:, 0])
    first = {}
    for make in (bnn_speed.by_pyro, bnn_speed.by_hand, by_eager):
        pyro.clear_param_store()
        torch.manual_seed(0)
        run = make(*arguments)
        losses = [float(loss) for _ in range(6) for loss in run()]
        assert sum(losses[-40:]) < sum(losses[:40])
        first[make] = sum(losses[-40:]) / 40
    assert max(first.values()) < 2 * min(first.values())


def by_eager(*arguments: Any) -> Any:
    return bnn_speed.by_pyrovae(*arguments, compiled=False)
