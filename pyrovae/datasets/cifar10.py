"""CIFAR-10, all of it or the part of it that is at hand."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyrovae.datasets import files
from pyrovae.datasets.base import Binarization, Splits, make_splits
from pyrovae.errors import CorruptFileError

__all__ = ["load", "load_subset"]

_URL = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FOLDER = "cifar-10-batches-py"
_MD5 = {  # as published, of the files of the "python version"
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
_TRAIN_SIZE = 45_000  # of the 50 000 training images; the last 5 000 validate

_SUBSET = files.PublishedFile(
    "cifar10_subset/data_batch_1_first4000.bin", "0993cf8b8e43bc207603aef9787006995746513f5e3fa5a52e06d1b069926330"
)
_SUBSET_SOURCE = f"{_URL} (the first 12 292 000 bytes of data_batch_1.bin of its binary version)"
_SUBSET_SIZES = (3200, 400, 400)
_SUBSET_NOTE = "only the first 4000 of CIFAR-10's 60000 images; figures are not those of CIFAR-10"


def load(binarization: Binarization = "none", root: Path | None = None) -> Splits:
    """CIFAR-10: colour photographs, 3x32x32 with 256 levels (divided by 255), 45 000/5 000/10 000.

    The last 5 000 training images validate. Where these files are not at hand, but those of ``cifar10-subset`` are,
    that is what is loaded: the splits then have its name, and a note.

    Args:
        binarization: see ``pyrovae.datasets.load``.
        root: folder that holds ``cifar-10-batches-py`` (the "python version"), see ``pyrovae.datasets.load``.

    Returns:
        The splits.

    Raises:
        DataUnavailableError: the files are missing and could not be downloaded.
        CorruptFileError: a file is not the published one.

    Reference:
        Krizhevsky 2009, Learning multiple layers of features from tiny images,
        https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf;
        files: https://www.cs.toronto.edu/~kriz/cifar.html

    Example:
        >>> from pyrovae import datasets
        >>> datasets.describe("cifar10")
        'CIFAR-10 colour photographs, 3x32x32, 45000/5000/10000; cifar10-subset where only that is at hand'
    """
    required = [f"{_FOLDER}/{file}" for file in _MD5]
    folder = files.find_root(required, root)
    if folder is None and files.find_file([_SUBSET.path], root) is not None:
        return load_subset(binarization, root)
    if folder is None:
        folder = files.download_root(root)
        try:
            _download(folder)
        except (*files.DOWNLOAD_ERRORS, RuntimeError) as error:  # torchvision raises the latter for a bad archive
            raise files.unavailable("cifar10", required, root, _URL, error) from error
    for file, expected in _MD5.items():
        _verify(folder / _FOLDER / file, expected)

    training, testing = (_torchvision()(folder, train=train, download=False) for train in (True, False))
    pixels = (training.data[:_TRAIN_SIZE], training.data[_TRAIN_SIZE:], testing.data)
    labels = (training.targets[:_TRAIN_SIZE], training.targets[_TRAIN_SIZE:], testing.targets)
    images = [torch.from_numpy(part).permute(0, 3, 1, 2).to(torch.float32).div_(255).contiguous() for part in pixels]
    return make_splits("cifar10", images, [torch.tensor(part) for part in labels], _CLASSES, binarization)


def load_subset(binarization: Binarization = "none", root: Path | None = None) -> Splits:
    """The first 4 000 records of CIFAR-10's first training batch, 3 200/400/400 in their order, which is random.

    Args:
        binarization: see ``pyrovae.datasets.load``.
        root: folder that holds ``cifar10_subset/data_batch_1_first4000.bin``, see ``pyrovae.datasets.load``.

    Returns:
        The splits, whose ``note`` says what they are.

    Raises:
        DataUnavailableError: the file is missing; it is not downloaded.
        CorruptFileError: the file is another one.

    Reference:
        see ``load``.

    Example:
        >>> from pyrovae import datasets
        >>> datasets.describe("cifar10-subset")
        'the first 4000 images of CIFAR-10, 3x32x32, 3200/400/400; for trials, not for figures'
    """
    (path,) = files.obtain("cifar10-subset", [_SUBSET], root, _SUBSET_SOURCE)
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, 1 + 3 * 32 * 32)  # a label, then red, green and blue
    x = torch.from_numpy(records[:, 1:]).reshape(-1, 3, 32, 32).to(torch.float32).div_(255)
    y = torch.from_numpy(records[:, 0]).to(torch.int64)
    images, labels = x.split(_SUBSET_SIZES), y.split(_SUBSET_SIZES)
    return make_splits("cifar10-subset", images, labels, _CLASSES, binarization, _SUBSET_NOTE)


def _verify(path: Path, expected: str) -> None:
    # The published md5, before torchvision unpickles what is in the file.
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != expected:
        raise CorruptFileError(
            f"{path} is truncated or altered: its {path.stat().st_size} bytes have md5 {found}, expected {expected}; "
            f"delete it and load again to download it, or replace it by the file from {_URL}"
        )


def _torchvision() -> Any:
    # Imported here because it is slow to import.
    from torchvision.datasets import CIFAR10

    return CIFAR10


def _download(folder: Path) -> None:
    # torchvision writes in place, so an interrupted download would leave half of the files: let it work elsewhere.
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        _torchvision()(temporary, download=True)
        (folder / _FOLDER).mkdir(exist_ok=True)
        for file in _MD5:
            os.replace(Path(temporary) / _FOLDER / file, folder / _FOLDER / file)
