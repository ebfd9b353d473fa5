"""Caltech 101 Silhouettes: outlines of objects, filled."""

from __future__ import annotations

from pathlib import Path

import torch

from pyrovae.datasets import files
from pyrovae.datasets.base import Binarization, Splits, make_splits, random_rows

__all__ = ["load"]

_URL = "https://people.cs.umass.edu/~marlin/data.shtml"
_FILE = files.PublishedFile(
    "caltech101_silhouettes/caltech101_silhouettes_28.mat",
    "862d0a4b828256d54ad5de7c5066c18c72f355cac5b7cde4c1c3be7c000d180b",
    "https://people.cs.umass.edu/~marlin/data/caltech101_silhouettes_28.mat",
)
_SIZES = (4100, 2264, 2307)
_SPLIT_SEED = 0
_NOTE = "split by seed 0 into parts of the usual sizes, not the split that published figures are on"


def load(binarization: Binarization = "static", root: Path | None = None) -> Splits:
    """Caltech 101 Silhouettes: 28x28 and binary, 4100/2264/2307, 101 classes in proportion.

    An object is 0 and its background 1, as published. The sizes are those of the publisher's split, which is in
    another file; the images are not, but drawn with a fixed seed. Figures are therefore near those that are published
    for that split, but not of the same test images.

    Args:
        binarization: only ``"static"`` is possible, since the images are binary.
        root: folder that holds ``caltech101_silhouettes/caltech101_silhouettes_28.mat``, see
            ``pyrovae.datasets.load``.

    Returns:
        The splits, the same at every call.

    Raises:
        DataUnavailableError: the file is missing and could not be downloaded.
        CorruptFileError: the file is not the published one.

    Reference:
        Marlin, Swersky, Chen & de Freitas 2010, Inductive principles for restricted Boltzmann machine learning,
        https://proceedings.mlr.press/v9/marlin10a.html; file: https://people.cs.umass.edu/~marlin/data.shtml

    Example:
        >>> from pyrovae import datasets
        >>> datasets.describe("caltech-silhouettes")
        'Caltech 101 Silhouettes, 28x28 and binary, 4100/2264/2307 by a split of our own'
    """
    (path,) = files.obtain("caltech-silhouettes", [_FILE], root, _URL)
    # MATLAB's images are column by column, and its labels count from 1.
    x = torch.from_numpy(files.read_mat(path, "X").reshape(-1, 28, 28)).mT.to(torch.float32)
    y = torch.from_numpy(files.read_mat(path, "Y")[0]).to(torch.int64) - 1
    classes = tuple(str(cell[0]) for cell in files.read_mat(path, "classnames")[0])
    rows = random_rows(len(y), _SIZES[1], _SIZES[2], _SPLIT_SEED, stratify=y)
    images, labels = [x[part] for part in rows], [y[part] for part in rows]
    return make_splits("caltech-silhouettes", images, labels, classes, binarization, _NOTE)
