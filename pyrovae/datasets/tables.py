"""Small classic tables by name, as named columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyrovae.datasets import files
from pyrovae.datasets.own_files import csv_lines
from pyrovae.errors import ArgumentError, CorruptFileError, DataError, unknown_name

__all__ = ["Table", "table", "tables"]

_RDATASETS = "https://vincentarelbundock.github.io/Rdatasets"
_RAW = "https://raw.githubusercontent.com/vincentarelbundock/Rdatasets"


@dataclass(frozen=True)
class _Entry:
    file: files.PublishedFile
    source: str
    text: tuple[str, ...] = ()  # columns of text; all others are numbers


def _entry(file: str, sha256: str, source: str, raw: str = "", text: tuple[str, ...] = ()) -> _Entry:
    return _Entry(files.PublishedFile(f"stats/{file}.csv", sha256, f"{_RAW}/{raw}" if raw else ""), source, text)


_ENTRIES = {
    "sleepstudy": _entry(
        "sleepstudy",
        "20922ddc87d538bf2344f73d49000eeb2d7e14934b6191a3e071fefc329942c4",
        f"{_RDATASETS} (R package lme4, sleepstudy)",
        raw="cc03c29690889dbe83089f5206e2422db8c3f71f/csv/lme4/sleepstudy.csv",
    ),
    "radon": _entry(
        "radon",
        "ff4829f63360178130568cfddc0b01b8121c7c905384197623275d1b733a8eb3",
        f"{_RDATASETS} (R package HLMdiag, radon)",
        text=("county.name",),
    ),
    "eight_schools": _entry(
        "eight_schools",
        "a1c28881a82a652fba1d3afc6254761fa95fd7f16f2ccab1fc7a7075dc8a8a0e",
        "table 5.2 of http://www.stat.columbia.edu/~gelman/book/ (lines school,y,sigma and A,28,15 to H,12,18)",
        text=("school",),
    ),
    "nile": _entry(
        "nile",
        "d0452bea38c61e796a4eeb950bf91d20fb5c7f13d5822eadf5990fe54f9c8d07",
        f"{_RDATASETS} (R package datasets, Nile)",
        raw="1c97ab8a1df2469762e635481ba27cf4e80e3e51/csv/datasets/Nile.csv",
    ),
    "faithful": _entry(
        "faithful",
        "5043db1e2c51c8e8fd67e0868c768ae589770cc76ad0ac0c5b7afd1fca31fc57",
        f"{_RDATASETS} (R package datasets, faithful)",
        raw="cc03c29690889dbe83089f5206e2422db8c3f71f/csv/datasets/faithful.csv",
    ),
    "iris": _entry(
        "iris",
        "398fadb8f48750d386d670e0b15c65944919682373bcaba59650c33eb5474362",
        f"{_RDATASETS} (R package datasets, iris)",
        text=("Species",),
    ),
    "sp500_returns": _entry(
        "sp500_returns_MASS",
        "e41330fddbb61862dd54e243c233c3e59bf8a456acdbf578a21e44f2f3dbd609",
        f"{_RDATASETS} (R package MASS, SP500)",
        raw="1c97ab8a1df2469762e635481ba27cf4e80e3e51/csv/MASS/SP500.csv",
    ),
    "gbp_usd_returns": _entry(
        "gbp_usd_1981_85_derived",
        "12f1951afe413e1e035730fa330ad2909f7a7a3463ebb1e61fb56f96a4906231",
        f"{_RDATASETS} (R package Ecdat, Garch: its column bp of 1981-10-01 to 1985-06-28, its logarithm's differences "
        "times 100)",
    ),
    "mark_pound_returns": _entry(
        "MarkPound",
        "ee0395ddb0c2c57198ec00932b66230a203596bb49b820b60da0f31def2ac5c4",
        f"{_RDATASETS} (R package AER, MarkPound)",
    ),
}


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """Named columns of equal length.

    Args:
        name: the name it was loaded by.
        columns: each a tensor of numbers or a list of text.

    Example:
        >>> small = Table("small", {"group": ["b", "a", "b"], "y": torch.tensor([1.0, 2.0, 4.0])})
        >>> small
        Table('small', 3 rows: group, y)
        >>> small["y"].mean(), len(small), list(small)
        (tensor(2.3333), 3, ['group', 'y'])
    """

    name: str
    columns: dict[str, Tensor | list[str]]

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) != 1:
            raise ArgumentError(f"columns have lengths {lengths}; there must be at least one, and all of one length")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __getitem__(self, column: str) -> Tensor:
        """A column of numbers.

        Raises:
            ArgumentError: there is no such column, or it is of text.
        """
        values = self._column(column)
        if not isinstance(values, Tensor):
            raise ArgumentError(
                f"column {column!r} of {self.name} is text; take columns[{column!r}] or codes({column!r})"
            )
        return values

    def __repr__(self) -> str:
        return f"Table({self.name!r}, {len(self)} rows: {', '.join(self)})"

    def codes(self, column: str) -> tuple[Tensor, tuple[str, ...]]:
        """A grouping column as whole numbers, to index the groups' parameters with.

        Args:
            column: its name; it may hold numbers or text.

        Returns:
            An int64 `n` tensor of codes from 0, and the name of the level that each code stands for; levels are in
            ascending order of numbers, in alphabetical order of text.

        Raises:
            ArgumentError: there is no such column.

        Example:
            >>> Table("small", {"group": ["b", "a", "b"]}).codes("group")
            (tensor([1, 0, 1]), ('a', 'b'))
            >>> Table("small", {"subject": torch.tensor([308.0, 310.0, 308.0])}).codes("subject")
            (tensor([0, 1, 0]), ('308', '310'))
        """
        values = self._column(column)
        if isinstance(values, Tensor):
            levels, codes = values.unique(return_inverse=True)
            return codes, tuple(f"{level:.15g}" for level in levels.tolist())
        names = sorted(set(values))
        number = {name: code for code, name in enumerate(names)}
        return torch.tensor([number[value] for value in values]), tuple(names)

    def _column(self, column: str) -> Tensor | list[str]:
        if column not in self.columns:
            raise unknown_name(f"column of {self.name}", column, self.columns)
        return self.columns[column]


def tables() -> tuple[str, ...]:
    """Names that ``table`` knows.

    Example:
        >>> tables()[:3]
        ('sleepstudy', 'radon', 'eight_schools')
    """
    return tuple(_ENTRIES)


def table(name: str | Path, *, root: str | Path | None = None, dtype: torch.dtype | None = None) -> Table:
    """A small classic table, with columns named as they are where it is published.

    ==================== ===== ==========================================================================
    name                 rows  columns
    ==================== ===== ==========================================================================
    sleepstudy           180   Reaction (ms), Days (of sleep deprivation), Subject (18 of them)
    radon                919   log.radon (log of pCi/L), basement (0: basement, 1: first floor), uranium
                               (log of ppm in the county's soil), county (1 to 85), county.name (text)
    eight_schools        8     school (text), y (effect in points, rounded), sigma (its standard error)
    nile                 100   time (year), value (annual flow at Aswan in 10^8 m^3)
    faithful             272   eruptions (min), waiting (min until the next eruption)
    iris                 150   Sepal.Length, Sepal.Width, Petal.Length, Petal.Width (cm), Species (text)
    sp500_returns        2780  dat (daily returns of the S&P 500 in the 1990s, in %)
    gbp_usd_returns      945   date (yymmdd), price (dollars a pound), logret100 (daily log-returns, in %)
    mark_pound_returns   1974  time (from 1), value (daily log-returns of the rate of mark and pound, in %)
    ==================== ===== ==========================================================================

    Args:
        name: one of ``tables()``; or the path of a ``.csv`` of your own, whose first line names the columns (what
            contains a ``/`` or ends so). Columns with a cell that is no number are text.
        root: folder that holds ``stats/*.csv``, see ``pyrovae.datasets.load``.
        dtype: of the columns of numbers, a floating-point one; ``None`` for torch's default.

    Returns:
        The table, without the column of row numbers.

    Raises:
        ArgumentError: there is no such table, ``dtype`` is another one, or ``root`` or ``$PYROVAE_DATA`` is not a
            folder.
        DataUnavailableError: its file is missing and could not be downloaded.
        CorruptFileError: its file is not the published one.
        DataError: your own file has no rows, or rows of different length.

    References:
        Belenky et al. 2003, https://doi.org/10.1046/j.1365-2869.2003.00337.x (sleepstudy);
        Price, Nero & Gelman 1996, Bayesian prediction of mean indoor radon concentrations for Minnesota counties,
        Health Physics 71 (radon);
        Rubin 1981, https://doi.org/10.3102/10769986006004377 (eight_schools);
        Cobb 1978, https://doi.org/10.1093/biomet/65.2.243 (nile);
        Azzalini & Bowman 1990, https://doi.org/10.2307/2347385 (faithful);
        Fisher 1936, https://doi.org/10.1111/j.1469-1809.1936.tb02137.x (iris);
        Venables & Ripley 2002, https://doi.org/10.1007/978-0-387-21706-2 (sp500_returns);
        Harvey, Ruiz & Shephard 1994, https://doi.org/10.2307/2297980 (gbp_usd_returns: rates of the same days,
        computed from another source than theirs);
        Bollerslev & Ghysels 1996, https://doi.org/10.1080/07350015.1996.10524640 (mark_pound_returns).

    Example:
        >>> table("sleep")
        Traceback (most recent call last):
        pyrovae.errors.ArgumentError: unknown table 'sleep' (did you mean 'sleepstudy'?); there are: eight_schools, \
faithful, gbp_usd_returns, iris, mark_pound_returns, nile, radon, sleepstudy, sp500_returns
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(f"dtype is {dtype!r}; it must be a floating-point one, such as torch.float64")
    if name not in _ENTRIES and is_csv(name):
        return Table(str(name), _read_own(Path(name).expanduser(), dtype))
    if name not in _ENTRIES:
        raise unknown_name("table", str(name), _ENTRIES)
    entry = _ENTRIES[str(name)]
    folder = None if root is None else files.as_folder(root, "root")
    (path,) = files.obtain(str(name), [entry.file], folder, entry.source)
    return Table(str(name), _read(path, entry.text, dtype))


def _read(path: Path, text: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor | list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    columns: dict[str, Tensor | list[str]] = {}
    for name, values in zip(header, zip(*rows, strict=True), strict=True):
        if name in text:
            columns[name] = list(values)
        elif name != "rownames":
            try:
                columns[name] = torch.tensor([float(value) for value in values], dtype=torch.float64).to(dtype)
            except ValueError as error:
                raise CorruptFileError(f"{path} has text in column {name!r} ({error}); replace it") from error
    return columns


def is_csv(name: str | Path) -> bool:
    """Whether it is the path of a table of one's own, and no name."""
    return isinstance(name, Path) or "/" in name or name.lower().endswith(".csv")


def _read_own(path: Path, dtype: torch.dtype) -> dict[str, Tensor | list[str]]:
    try:
        lines = csv_lines(path)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error}; give the path of a table with commas between") from error
    if not lines:
        raise DataError(f"{path} is empty; its first line must name the columns")
    (_, header), *rows = lines
    if not rows:
        raise DataError(f"{path} has the line {','.join(header)!r} and no rows")
    for number, row in rows:
        if len(row) != len(header):
            raise DataError(f"line {number} of {path} has {len(row)} cells; its first line names {len(header)} columns")
    columns: dict[str, Tensor | list[str]] = {}
    for name, values in zip(header, zip(*(row for _, row in rows), strict=True), strict=True):
        try:
            columns[name] = torch.tensor([float(value) for value in values], dtype=torch.float64).to(dtype)
        except ValueError:
            columns[name] = list(values)
    return columns
