"""MNIST in the fixed binarization that most published bounds on "binarized MNIST" are computed on."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyrovae.datasets import files
from pyrovae.datasets.base import Binarization, Split, Splits
from pyrovae.errors import CorruptFileError

__all__ = ["load"]

_FOLDER = "binarized_mnist"
_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"
_SHAPE = (28, 28)


@dataclass(frozen=True)
class _Part:
    file: str
    rows: int
    text_sha256: str
    gzip_sha256: str


_PARTS = (
    _Part(
        file="binarized_mnist_train.amat",
        rows=50_000,
        text_sha256="ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
        gzip_sha256="877c7951e875c52ab7801f4ff16aeecb7816ebd697658231efeb2b640f01a3d8",
    ),
    _Part(
        file="binarized_mnist_valid.amat",
        rows=10_000,
        text_sha256="1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
        gzip_sha256="aeb77ba9e35dc39d9e5034538273523e37ff578c97d723a59f7ee4345373abad",
    ),
    _Part(
        file="binarized_mnist_test.amat",
        rows=10_000,
        text_sha256="e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
        gzip_sha256="b70dc82f02d6c858f598dbd879445709c2e5070d9a9749588b9c3800efa44af1",
    ),
)


def load(binarization: Binarization = "static", root: Path | None = None) -> Splits:
    """MNIST in Larochelle's fixed binarization: 28x28, 50 000/10 000/10 000, no labels.

    The images are not in MNIST's order, and the test images are sorted by digit: never take the first n.

    Args:
        binarization: only ``"static"`` is possible, since the files are already binary.
        root: folder that holds ``binarized_mnist/binarized_mnist_{train,valid,test}.amat`` (plain, or
            gzipped with the ending ``.amat.gz``), see ``pyrovae.datasets.load``.

    Returns:
        The splits.

    Raises:
        DataUnavailableError: a file is missing and could not be downloaded.
        CorruptFileError: a file is not the published one.

    Reference:
        Larochelle & Murray 2011, The neural autoregressive distribution estimator,
        https://proceedings.mlr.press/v15/larochelle11a.html; the binarization is after Salakhutdinov & Murray
        2008, https://doi.org/10.1145/1390156.1390266;
        files: http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/

    Example:
        >>> from pyrovae import datasets
        >>> datasets.describe("binarized-mnist")
        "MNIST in Larochelle's fixed binarization, 28x28, 50000/10000/10000, no labels"
    """
    # All three files before any is read, so that a missing one does not cost a second of parsing.
    paths = [_find(part, root) for part in _PARTS]
    train, validation, test = (
        Split(_read(path, part.rows), None, "static", "binarized-mnist")
        for path, part in zip(paths, _PARTS, strict=True)
    )
    return Splits("binarized-mnist", train, validation, test, (), "static")


def _find(part: _Part, root: Path | None) -> Path:
    path = files.find_file([f"{_FOLDER}/{part.file}", f"{_FOLDER}/{part.file}.gz"], root)
    if path is None:
        path = files.download_root(root) / _FOLDER / part.file
        try:
            files.download(f"{_URL}/{part.file}", path, part.text_sha256)
        except files.DOWNLOAD_ERRORS as error:
            required = [f"{_FOLDER}/{part.file}" for part in _PARTS]
            raise files.unavailable("binarized-mnist", required, root, _URL, error) from error
    files.verify(path, part.gzip_sha256 if path.suffix == ".gz" else part.text_sha256, _URL)
    return path


def _read(path: Path, rows: int) -> Tensor:
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorruptFileError(f"{path} is not a complete gzip file ({error}); delete it and load again") from error
    characters = np.frombuffer(text, dtype=np.uint8)
    values = characters[(characters != ord(" ")) & (characters != ord("\n"))] - ord("0")
    if values.size and values.max() > 1:  # smaller characters than "0" wrap around to large ones
        raise CorruptFileError(f"{path} has characters other than 0, 1, space and newline; delete it and load again")
    if values.size != rows * _SHAPE[0] * _SHAPE[1]:
        raise CorruptFileError(
            f"{path} has {values.size} values, expected {rows} rows of {_SHAPE[0] * _SHAPE[1]}; "
            "delete it and load again"
        )
    return torch.from_numpy(values).to(torch.float32).reshape(-1, *_SHAPE)
