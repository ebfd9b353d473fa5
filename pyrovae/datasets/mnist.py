"""MNIST and Fashion-MNIST, read and downloaded by torchvision; the checks are ours."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyrovae.datasets import files
from pyrovae.datasets.base import Binarization, Splits, make_splits

__all__ = ["load_fashion_mnist", "load_mnist"]

_TRAIN_SIZE = 50_000  # of the 60 000 training images; the last 10 000 validate


@dataclass(frozen=True)
class _Source:
    name: str
    folder: str  # also the name of torchvision's class
    url: str
    classes: tuple[str, ...]
    sha256: dict[str, str]  # of the uncompressed files


_MNIST = _Source(
    name="mnist",
    folder="MNIST",
    url="http://yann.lecun.com/exdb/mnist/ (mirror: https://ossci-datasets.s3.amazonaws.com/mnist/)",
    classes=tuple("0123456789"),
    sha256={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
)
_FASHION_MNIST = _Source(
    name="fashion-mnist",
    folder="FashionMNIST",
    url="https://github.com/zalandoresearch/fashion-mnist",
    classes=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    sha256={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
)


def load_mnist(binarization: Binarization = "dynamic", root: Path | None = None) -> Splits:
    """MNIST: 28x28 handwritten digits, 50 000/10 000/10 000 (the last 10 000 training images validate).

    Args:
        binarization: see ``pyrovae.datasets.load``.
        root: folder that holds ``MNIST/raw/*-ubyte``, see ``pyrovae.datasets.load``.

    Returns:
        The splits.

    Raises:
        DataUnavailableError: a file is missing and could not be downloaded.
        CorruptFileError: a file is not the published one.

    Reference:
        LeCun, Bottou, Bengio & Haffner 1998, Gradient-based learning applied to document recognition,
        https://doi.org/10.1109/5.726791; files: http://yann.lecun.com/exdb/mnist/

    Example:
        >>> from pyrovae import datasets
        >>> datasets.describe("mnist")
        'MNIST handwritten digits, 28x28, 50000/10000/10000'
    """
    return _load(_MNIST, binarization, root)


def load_fashion_mnist(binarization: Binarization = "dynamic", root: Path | None = None) -> Splits:
    """Fashion-MNIST: 28x28 pictures of clothes, 50 000/10 000/10 000, split as MNIST is.

    Args:
        binarization: see ``pyrovae.datasets.load``.
        root: folder that holds ``FashionMNIST/raw/*-ubyte``, see ``pyrovae.datasets.load``.

    Returns:
        The splits.

    Raises:
        DataUnavailableError: a file is missing and could not be downloaded.
        CorruptFileError: a file is not the published one.

    Reference:
        Xiao, Rasul & Vollgraf 2017, Fashion-MNIST: a novel image dataset for benchmarking machine learning
        algorithms, https://arxiv.org/abs/1708.07747; files: https://github.com/zalandoresearch/fashion-mnist

    Example:
        >>> from pyrovae import datasets
        >>> datasets.describe("fashion-mnist")
        'Fashion-MNIST pictures of clothes, 28x28, 50000/10000/10000'
    """
    return _load(_FASHION_MNIST, binarization, root)


def _load(source: _Source, binarization: Binarization, root: Path | None) -> Splits:
    required = [f"{source.folder}/raw/{file}" for file in source.sha256]
    folder = files.find_root(required, root)
    if folder is None:
        folder = files.download_root(root)
        try:
            _download(source, folder)
        except (*files.DOWNLOAD_ERRORS, RuntimeError) as error:  # torchvision wraps most in RuntimeError
            raise files.unavailable(source.name, required, root, source.url, error) from error
    for file, expected in source.sha256.items():
        files.verify(folder / source.folder / "raw" / file, expected, source.url)

    training = _torchvision(source)(folder, train=True, download=False)
    testing = _torchvision(source)(folder, train=False, download=False)
    pixels = (training.data[:_TRAIN_SIZE], training.data[_TRAIN_SIZE:], testing.data)
    labels = (training.targets[:_TRAIN_SIZE], training.targets[_TRAIN_SIZE:], testing.targets)
    images = [part.to(torch.float32).div_(255) for part in pixels]
    return make_splits(source.name, images, labels, source.classes, binarization)


def _torchvision(source: _Source) -> Any:
    # Imported here because it is slow to import, and only these data sets need it.
    from torchvision import datasets

    return getattr(datasets, source.folder)


def _download(source: _Source, folder: Path) -> None:
    # torchvision writes in place, so an interrupted download would leave a truncated file: let it work elsewhere.
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        _torchvision(source)(temporary, download=True)
        raw = folder / source.folder / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for file in source.sha256:
            os.replace(Path(temporary) / source.folder / "raw" / file, raw / file)
