"""Omniglot, handwritten characters of 50 alphabets, at its own size and reduced to that of MNIST."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyrovae.datasets import files
from pyrovae.datasets.base import Binarization, Splits, make_splits
from pyrovae.errors import CorruptFileError

__all__ = ["load_28", "load_105", "reduce"]

_SOURCE = (
    "https://github.com/brendenlake/omniglot (as PNG; packed into these two files at "
    "https://github.com/bitsandscraps/omniglot)"
)
_PACKED = "https://raw.githubusercontent.com/bitsandscraps/omniglot/9514cfd6780ed78e96a4d88bae8c85f3ee31359e"
_BACKGROUND = files.PublishedFile(
    "omniglot/images_background.npz",
    "8bf84167413cd00beacdce3fe582f780ab538d8dbef043a6d688f2527bbce199",
    f"{_PACKED}/images_background.npz",
)
_EVALUATION = files.PublishedFile(
    "omniglot/images_evaluation.npz",
    "0b84c7ffd94c4841c0040e529c86a82eaaccb986d8eadad5673f7991b7475276",
    f"{_PACKED}/images_evaluation.npz",
)
_CHARACTERS = (964, 659)
_DRAWERS = 20
_TRAIN_DRAWERS = 18
_SIZE, _REDUCED = 105, 28
_CHUNK = 500  # images that are reduced at once, so that they stay in the processor's cache


def load_28(binarization: Binarization = "dynamic", root: Path | None = None) -> Splits:
    """Omniglot reduced to 28x28: 17 352/1 928/13 180 drawings of 1 623 characters.

    A pixel's intensity is the share of its area that is ink, so a multiple of 1/225, see ``reduce``. Figures are
    not comparable with those on the 28x28 files of Burda et al. 2016, which were reduced and split otherwise.

    The background set, 964 characters of 30 alphabets by 20 drawers each, trains and validates: the drawings of the
    last two drawers of each character validate. The evaluation set, the 659 characters of 20 other alphabets, tests.
    So no class of the test split occurs in the other two.

    Args:
        binarization: see ``pyrovae.datasets.load``.
        root: folder that holds ``omniglot/images_{background,evaluation}.npz``, see ``pyrovae.datasets.load``.

    Returns:
        The splits. A label is a character; the class's name is its number in the names of the published files,
        ``"0001"`` to ``"1623"``.

    Raises:
        DataUnavailableError: a file is missing and could not be downloaded.
        CorruptFileError: a file is not the published one.

    Reference:
        Lake, Salakhutdinov & Tenenbaum 2015, Human-level concept learning through probabilistic program induction,
        https://doi.org/10.1126/science.aab3050; images: https://github.com/brendenlake/omniglot

    Example:
        >>> from pyrovae import datasets
        >>> datasets.describe("omniglot")
        'Omniglot handwritten characters of 50 alphabets, reduced to 28x28, 17352/1928/13180'
    """
    return _load("omniglot", binarization, root)


def load_105(binarization: Binarization = "static", root: Path | None = None) -> Splits:
    """Omniglot as it was published, 105x105 and binary (1 is ink), split and labelled as ``load_28`` does.

    Args:
        binarization: only ``"static"`` is possible, since the drawings are binary.
        root: see ``load_28``.

    Returns:
        The splits, which take 1.5 GB.

    Raises:
        DataUnavailableError: a file is missing and could not be downloaded.
        CorruptFileError: a file is not the published one.

    Reference:
        see ``load_28``.

    Example:
        >>> from pyrovae import datasets
        >>> datasets.describe("omniglot-105")
        'Omniglot handwritten characters of 50 alphabets, 105x105 and binary as published, 17352/1928/13180'
    """
    return _load("omniglot-105", binarization, root)


def reduce(ink: Tensor) -> Tensor:
    r"""Drawings of 105x105 pixels reduced to 28x28 by averaging over areas.

    A reduced pixel covers 15/4 pixels in each direction: with the overlaps
    :math:`a_{ij} = \tfrac{4}{15} \, |[\tfrac{15}{4} i, \tfrac{15}{4} (i + 1)) \cap [j, j + 1)|`, a drawing :math:`x`
    becomes :math:`a x a^\top`. For binary drawings this is a multiple of 1/225, exact but for its rounding to float32.

    Args:
        ink: A bool `n x 105 x 105` tensor, true where there is ink.

    Returns:
        A float32 `n x 28 x 28` tensor in [0, 1].

    Example:
        >>> ink = torch.zeros(1, 105, 105, dtype=torch.bool)
        >>> ink[0, :4, :3] = True
        >>> (reduce(ink)[0, :2, :2] * 225).round().tolist()
        [[180.0, 0.0], [12.0, 0.0]]
    """
    # In quarters of a pixel all is whole numbers, which float32 sums exactly.
    edges = torch.arange(_REDUCED + 1) * 15
    pixels = torch.arange(_SIZE) * 4
    overlap = torch.minimum(edges[1:, None], pixels + 4) - torch.maximum(edges[:-1, None], pixels)
    weights = overlap.clamp(min=0).to(torch.float32)
    parts = [weights @ (part.to(torch.float32) @ weights.mT) for part in ink.split(_CHUNK)]
    return torch.cat(parts).div_(15 * 15)


def _load(name: str, binarization: Binarization, root: Path | None) -> Splits:
    paths = files.obtain(name, [_BACKGROUND, _EVALUATION], root, _SOURCE)
    background, evaluation = (_read(path, count) for path, count in zip(paths, _CHARACTERS, strict=True))
    x = [part.flatten(0, 1) for part in (background[:, :_TRAIN_DRAWERS], background[:, _TRAIN_DRAWERS:], evaluation)]
    images = [reduce(part) if name == "omniglot" else part.to(torch.float32) for part in x]
    first, last = _CHARACTERS[0], sum(_CHARACTERS)
    labels = [
        torch.arange(first).repeat_interleave(_TRAIN_DRAWERS),
        torch.arange(first).repeat_interleave(_DRAWERS - _TRAIN_DRAWERS),
        torch.arange(first, last).repeat_interleave(_DRAWERS),
    ]
    classes = tuple(f"{number:04}" for number in range(1, last + 1))
    return make_splits(name, images, labels, classes, binarization)


def _read(path: Path, characters: int) -> Tensor:
    """Drawings by character and drawer: a bool `characters x 20 x 105 x 105` tensor, true where there is ink."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            paper = archive["images"]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CorruptFileError(f"{path} is no archive with images ({error}); delete it and load again") from error
    if paper.dtype != np.bool_ or paper.shape != (characters, _DRAWERS, _SIZE, _SIZE):
        raise CorruptFileError(f"{path} has images {paper.dtype} {paper.shape}; delete it and load again")
    return torch.from_numpy(np.logical_not(paper, out=paper))
