"""The UCI regression data: what was published, split as it was published."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pyrovae import datasets
from pyrovae.datasets import files
from pyrovae.errors import ArgumentError, CorruptFileError, DataUnavailableError

SIZES = {
    "boston": (506, 13, 51, 20),
    "concrete": (1030, 8, 103, 20),
    "energy": (768, 8, 77, 20),
    "kin8nm": (8192, 8, 819, 20),
    "naval": (11934, 16, 1193, 20),
    "power": (9568, 4, 957, 20),
    "protein": (45730, 9, 4573, 5),
    "wine": (1599, 11, 160, 20),
    "yacht": (308, 6, 31, 20),
}


def loaded(name: str) -> datasets.Regression:
    try:
        return datasets.uci(name)
    except DataUnavailableError as error:
        pytest.skip(str(error))


def test_all_nine_are_listed() -> None:
    assert list(datasets.uci_names()) == list(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_splits(name: str) -> None:
    data = loaded(name)
    rows, features, test, splits = SIZES[name]
    assert data.x.shape == (rows, features)
    assert data.x.dtype == data.y.dtype == torch.float32
    assert data.splits == splits
    for train, held in zip(data.train_rows, data.test_rows, strict=True):
        assert len(held) == test
        assert torch.equal(torch.cat([train, held]).sort().values, torch.arange(rows))  # each row once


def test_known_rows() -> None:
    boston = loaded("uci/boston")
    assert boston.x[0, :3].tolist() == pytest.approx([0.00632, 18.0, 2.31])
    assert boston.y[:2].tolist() == pytest.approx([24.0, 21.6])
    assert boston.train_rows[0][:2].tolist() == [307, 343]


def test_validation_lies_inside_the_training_part() -> None:
    data = loaded("yacht")
    (x, y), (xv, yv) = data.validation(3, share=0.25)
    (whole, _), (test, _) = data.split(3)
    assert (len(x), len(xv)) == (208, 69)
    assert torch.equal(torch.cat([x, xv]).sort(0).values, whole.sort(0).values)
    assert torch.equal(data.validation(3, 0.25)[0][0], x)
    assert not torch.equal(data.validation(3, 0.25, seed=1)[0][0], x)
    assert (len(y), len(yv), len(test)) == (208, 69, 31)


def test_splits_side_by_side() -> None:
    data = loaded("yacht")
    (x, y), (xt, yt) = data.together()
    assert x.shape == (277, 20, 6)
    assert (y.shape, xt.shape, yt.shape) == ((277, 20), (31, 20, 6), (31, 20))
    assert torch.equal(x[:, 7], data.split(7)[0][0])
    assert torch.equal(yt[:, 7], data.split(7)[1][1])
    (x, _), (xv, _) = data.together([2, 5], validation=0.2)
    assert torch.equal(xv[:, 1], data.validation(5)[1][0])
    assert x.shape[1] == 2


def test_bad_input_is_named() -> None:
    data = loaded("yacht")
    with pytest.raises(ArgumentError, match="no split 20; its splits are 0 to 19"):
        data.split(20)
    with pytest.raises(ArgumentError, match="share that validates is 1.0"):
        data.validation(0, share=1.0)
    with pytest.raises(ArgumentError, match="did you mean 'yacht'"):
        datasets.uci("uci/yact")
    with pytest.raises(ArgumentError, match="datasets.uci\\('uci/yacht'\\)"):
        datasets.load("uci/yacht")


def test_altered_files_are_refused(tmp_path: Path) -> None:
    loaded("yacht")
    source = files.find_file(["UCI_Datasets/yacht/data/data.txt"], None)
    assert source is not None
    shutil.copytree(source.parent, tmp_path / "UCI_Datasets/yacht/data")
    rows = tmp_path / "UCI_Datasets/yacht/data/index_test_4.txt"
    rows.chmod(0o644)
    rows.write_text(rows.read_text().replace("1", "2"))
    with pytest.raises(CorruptFileError, match="are not the published splits"):
        datasets.uci("yacht", root=tmp_path)
    rows.write_text("not a number\n")
    with pytest.raises(CorruptFileError, match="does not hold row numbers"):
        datasets.uci("yacht", root=tmp_path)
    data = tmp_path / "UCI_Datasets/yacht/data/data.txt"
    data.chmod(0o644)
    data.write_text("1 2 3\n")
    with pytest.raises(CorruptFileError, match="truncated or altered"):
        datasets.uci("yacht", root=tmp_path)


@pytest.mark.usefixtures("network")
def test_a_missing_file_says_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailableError, match="UCI_Datasets/yacht/data/data.txt"):
        datasets.uci("yacht", root=tmp_path)
