"""Tables: their content against what is known of it, grouping columns, and missing or altered files."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import urllib.error
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pyrovae import datasets
from pyrovae.datasets import Table
from pyrovae.errors import ArgumentError, CorruptFileError, DataError, DataUnavailableError

module = importlib.import_module("pyrovae.datasets.tables")  # whose name in the package is the function's
ROWS = {
    "sleepstudy": 180,
    "radon": 919,
    "eight_schools": 8,
    "nile": 100,
    "faithful": 272,
    "iris": 150,
    "sp500_returns": 2780,
    "gbp_usd_returns": 945,
    "mark_pound_returns": 1974,
}
COLUMNS = {
    "sleepstudy": ["Reaction", "Days", "Subject"],
    "radon": ["log.radon", "basement", "uranium", "county", "county.name"],
    "eight_schools": ["school", "y", "sigma"],
    "nile": ["time", "value"],
    "faithful": ["eruptions", "waiting"],
    "iris": ["Sepal.Length", "Sepal.Width", "Petal.Length", "Petal.Width", "Species"],
    "sp500_returns": ["dat"],
    "gbp_usd_returns": ["date", "price", "logret100"],
    "mark_pound_returns": ["time", "value"],
}
TEXT = {("radon", "county.name"), ("eight_schools", "school"), ("iris", "Species")}


def table(name: str, dtype: torch.dtype | None = torch.float64) -> Table:
    given = os.environ.get("PYROVAE_DATA")
    if not given or not (Path(given) / "stats").is_dir():
        pytest.skip("stats is not below PYROVAE_DATA")
    return datasets.table(name, dtype=dtype)


def test_every_table_is_under_test() -> None:
    assert set(datasets.tables()) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_columns(name: str) -> None:
    found = table(name)
    assert found.name == name
    assert len(found) == ROWS[name]
    assert list(found) == COLUMNS[name]
    assert repr(found) == f"Table({name!r}, {ROWS[name]} rows: {', '.join(COLUMNS[name])})"
    for column, values in found.columns.items():
        assert len(values) == ROWS[name]
        if (name, column) in TEXT:
            assert all(isinstance(value, str) and value for value in values)
            with pytest.raises(ArgumentError, match=rf"column '{column}' of {name} is text"):
                found[column]
        else:
            assert found[column] is values
            assert values.dtype == torch.float64
            assert values.isfinite().all()


@pytest.mark.parametrize("name", ROWS)
def test_numbers_are_those_of_the_file(name: str) -> None:
    found = table(name)
    path = Path(os.environ["PYROVAE_DATA"]) / module._ENTRIES[name].file.path
    expected = np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8", deletechars="")
    for column, values in found.columns.items():
        if (name, column) in TEXT:
            assert values == expected[column].tolist()
        else:
            assert np.array_equal(values.numpy(), expected[column].astype(np.float64))


def test_sleepstudy_has_the_published_regression() -> None:
    """Least squares of all subjects gives the fixed effects that lme4 reports for this balanced design."""
    data = table("sleepstudy")
    design = torch.stack([torch.ones(180, dtype=torch.float64), data["Days"]], 1)
    effects = torch.linalg.lstsq(design, data["Reaction"][:, None]).solution.flatten()
    assert effects.tolist() == pytest.approx([251.4051, 10.4673], abs=1e-4)
    codes, levels = data.codes("Subject")
    assert (len(levels), levels[0], levels[-1]) == (18, "308", "372")
    assert codes.bincount().tolist() == [10] * 18


def test_eight_schools_are_those_of_rubin() -> None:
    schools = table("eight_schools")
    assert schools["y"].tolist() == [28, 8, -3, 7, -1, 1, 18, 12]
    assert schools["sigma"].tolist() == [15, 10, 16, 11, 9, 11, 10, 18]
    codes, levels = schools.codes("school")
    assert (codes.tolist(), levels) == (list(range(8)), tuple("ABCDEFGH"))


def test_radon_counties_agree_by_number_and_name() -> None:
    radon = table("radon")
    numbers, levels = radon.codes("county")
    names, _ = radon.codes("county.name")
    assert levels == tuple(str(number) for number in range(1, 86))
    assert len({(number, name) for number, name in zip(numbers.tolist(), names.tolist(), strict=True)}) == 85
    assert set(radon["basement"].tolist()) == {0.0, 1.0}
    # Uranium is measured by county.
    for number in range(85):
        assert len(radon["uranium"][numbers == number].unique()) == 1


def test_iris_is_fishers() -> None:
    iris = table("iris")
    codes, species = iris.codes("Species")
    assert species == ("setosa", "versicolor", "virginica")
    assert codes.bincount().tolist() == [50, 50, 50]
    means = [iris[column].mean().item() for column in COLUMNS["iris"][:4]]
    assert means == pytest.approx([5.843333, 3.057333, 3.758, 1.199333], abs=1e-6)


def test_pound_dollar_returns_are_those_of_their_prices() -> None:
    data = table("gbp_usd_returns")
    found = 100 * data["price"].log().diff()
    assert (found - data["logret100"][1:]).abs().max() < 1e-9
    assert (data["date"].diff() > 0).all()
    assert (data["date"][0], data["date"][-1]) == (811002, 850628)


def test_known_means() -> None:
    assert table("nile")["value"].mean().item() == pytest.approx(919.35)
    assert table("nile")["time"].tolist() == list(range(1871, 1971))
    assert table("faithful")["waiting"].mean().item() == pytest.approx(70.897, abs=1e-3)
    assert 0.8 < table("sp500_returns")["dat"].std() < 1.1
    assert 0.4 < table("mark_pound_returns")["value"].std() < 0.5


def test_type_of_the_numbers() -> None:
    assert table("nile", None)["value"].dtype == torch.get_default_dtype()
    assert table("nile", torch.float32)["value"].dtype == torch.float32
    for dtype in (torch.int64, "float64"):
        with pytest.raises(ArgumentError, match="must be a floating-point one"):
            datasets.table("nile", dtype=dtype)


# ---------------------------------------------------------------- Table


def test_codes_are_ordered_by_number_or_letter() -> None:
    small = Table("small", {"n": torch.tensor([10.0, 9.0, 0.5, 10.0]), "t": ["b", "a", "B", "b"]})
    codes, levels = small.codes("n")
    assert (codes.tolist(), levels) == ([2, 1, 0, 2], ("0.5", "9", "10"))
    codes, levels = small.codes("t")
    assert codes.dtype == torch.int64
    assert [levels[code] for code in codes] == small.columns["t"]
    assert levels == ("B", "a", "b")
    assert Counter(codes.tolist()) == {0: 1, 1: 1, 2: 2}


def test_unknown_column() -> None:
    small = Table("small", {"width": torch.zeros(2)})
    for ask in (small.__getitem__, small.codes):
        with pytest.raises(ArgumentError, match=r"unknown column of small 'widht' \(did you mean 'width'\?\)"):
            ask("widht")


def test_columns_of_different_length() -> None:
    with pytest.raises(ArgumentError, match=r"\{'a': 2, 'b': 3\}.*one length"):
        Table("small", {"a": torch.zeros(2), "b": ["x"] * 3})
    with pytest.raises(ArgumentError, match="at least one"):
        Table("small", {})


def test_table_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Table("small", {"a": torch.zeros(2)}).name = "other"


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["sleep", "", "eight-schools"])
def test_unknown_table(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"unknown table '{name}'.*there are: eight_schools"):
        datasets.table(name)


@pytest.mark.parametrize("name", ROWS)
def test_missing_and_no_network(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def urlopen(url: str, timeout: float) -> None:
        asked.append(url)
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(DataUnavailableError) as caught:
        datasets.table(name, root=tmp_path)
    entry = module._ENTRIES[name]
    for words in (f"data set {name!r} was not found", str(tmp_path), entry.file.path, entry.source, "PYROVAE_DATA"):
        assert words in str(caught.value)
    assert asked == ([entry.file.url] if entry.file.url else [])
    assert ("cannot be downloaded" in str(caught.value)) == (not asked)


def test_altered_number(tmp_path: Path) -> None:
    table("nile")
    path = tmp_path / "stats" / "nile.csv"
    path.parent.mkdir()
    shutil.copyfile(Path(os.environ["PYROVAE_DATA"]) / "stats" / "nile.csv", path)
    path.write_text(path.read_text().replace("1120", "1121", 1))
    with pytest.raises(CorruptFileError, match="nile.csv is truncated or altered"):
        datasets.table("nile", root=tmp_path)


def test_root_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="not a folder"):
        datasets.table("nile", root=tmp_path / "absent")


def test_published_text_where_numbers_belong(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("rownames,a,b\n1,2.5,x\n2,y,z\n")
    with pytest.raises(CorruptFileError, match="text in column 'a'"):
        module._read(path, ("b",), torch.float32)
    path.write_text("rownames,a,b\n1,2.5,x\n2,3,z\n")
    found = module._read(path, ("b",), torch.float32)
    assert found["b"] == ["x", "z"]
    assert torch.equal(found["a"], torch.tensor([2.5, 3.0]))
    assert list(found) == ["a", "b"]


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("who,height\nada,1.5\n\nbob,1e2\n")
    found = table(path)
    assert found.columns["who"] == ["ada", "bob"]
    assert found["height"].tolist() == [1.5, 100.0]
    assert table(str(path)).name == str(path)


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("", DataError, "is empty; its first line must name the columns"),
        ("a,b\n", DataError, "has the line 'a,b' and no rows"),
        ("a,b\n1,2\n3\n", DataError, "line 3 of .* has 1 cells; its first line names 2 columns"),
        (None, ArgumentError, "cannot be read"),
    ],
)
def test_a_bad_table_of_ones_own_is_refused(text, error, said, tmp_path):
    path = tmp_path / "mine.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=said):
        table(path)
