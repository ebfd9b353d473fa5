"""Data sets by name, or by path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyrovae.datasets import (
    binarized_mnist,
    cifar10,
    digits,
    faces,
    files,
    mnist,
    omniglot,
    own_files,
    silhouettes,
)
from pyrovae.datasets.base import BINARIZATIONS, Binarization, Splits
from pyrovae.errors import ArgumentError, unknown_name

__all__ = ["describe", "load", "names"]


@dataclass(frozen=True)
class _Entry:
    load: Callable[[Binarization, Path | None], Splits]
    line: str
    default: Binarization = "dynamic"
    allowed: tuple[Binarization, ...] = BINARIZATIONS
    reason: str = ""  # why not every binarization is allowed


_ENTRIES = {
    "digits": _Entry(digits.load, "scikit-learn's handwritten digits, 8x8, 1197/300/300; embedded, needs no file"),
    "mnist": _Entry(mnist.load_mnist, "MNIST handwritten digits, 28x28, 50000/10000/10000"),
    "fashion-mnist": _Entry(mnist.load_fashion_mnist, "Fashion-MNIST pictures of clothes, 28x28, 50000/10000/10000"),
    "binarized-mnist": _Entry(
        binarized_mnist.load,
        "MNIST in Larochelle's fixed binarization, 28x28, 50000/10000/10000, no labels",
        default="static",
        allowed=("static",),
        reason="its files are already binary, and hold no intensities to draw from (for those load 'mnist')",
    ),
    "omniglot": _Entry(
        omniglot.load_28, "Omniglot handwritten characters of 50 alphabets, reduced to 28x28, 17352/1928/13180"
    ),
    "omniglot-105": _Entry(
        omniglot.load_105,
        "Omniglot handwritten characters of 50 alphabets, 105x105 and binary as published, 17352/1928/13180",
        default="static",
        allowed=("static",),
        reason="its drawings are binary (for intensities load 'omniglot')",
    ),
    "caltech-silhouettes": _Entry(
        silhouettes.load,
        "Caltech 101 Silhouettes, 28x28 and binary, 4100/2264/2307 by a split of our own",
        default="static",
        allowed=("static",),
        reason="its images are binary, and there are no intensities to draw from",
    ),
    "frey-faces": _Entry(
        faces.load_frey, "Frey faces, 28x20 with 256 grey levels, 1565/200/200 at random, no labels", default="none"
    ),
    "olivetti": _Entry(
        faces.load_olivetti, "Olivetti faces, 40 people, 64x64 with 256 grey levels, 320/40/40", default="none"
    ),
    "cifar10": _Entry(
        cifar10.load,
        "CIFAR-10 colour photographs, 3x32x32, 45000/5000/10000; cifar10-subset where only that is at hand",
        default="none",
    ),
    "cifar10-subset": _Entry(
        cifar10.load_subset,
        "the first 4000 images of CIFAR-10, 3x32x32, 3200/400/400; for trials, not for figures",
        default="none",
    ),
}


def names() -> tuple[str, ...]:
    """Names that ``load`` knows, the one that needs no files first.

    Example:
        >>> names()[:4]
        ('digits', 'mnist', 'fashion-mnist', 'binarized-mnist')
    """
    return tuple(_ENTRIES)


def describe(name: str) -> str:
    """One line on a data set: what it is, image size, and sizes of train/validation/test.

    Args:
        name: one of ``names()``.

    Raises:
        ArgumentError: there is no such data set.

    Example:
        >>> describe("mnist")
        'MNIST handwritten digits, 28x28, 50000/10000/10000'
    """
    return _entry(name).line


def load(name: str | Path, *, binarization: str | None = None, root: str | Path | None = None) -> Splits:
    """Loads a data set, split and binarized.

    Args:
        name: one of ``names()``; or a path to a file or folder of your own (what contains a ``/`` or ends in ``.npy``,
            ``.npz`` or ``.csv``, and the name of a folder), which ``from_path`` reads.
        binarization: ``"none"``: intensities in [0, 1]. ``"static"``: each pixel drawn once from
            Bernoulli(intensity), with a fixed seed: the same pixels at every call. ``"dynamic"``: the training
            split is drawn anew at every draw, while its validation and test splits are drawn once with that
            seed, and so marked ``"static"``. Default: ``"dynamic"`` for digits, clothes and Omniglot, ``"none"`` for
            faces and photographs; data that are binary already are ``"static"`` and nothing else. Of a path, see
            ``from_path``.
        root: the only folder to look in (and to download to). Default: ``$PYROVAE_DATA`` if it is set, then the
            cache, ``$XDG_CACHE_HOME/pyrovae`` or ``~/.cache/pyrovae``. Downloads go to ``$PYROVAE_DATA`` if it
            is set and writable, else to the cache. Not for a path.

    Returns:
        The splits.

    Raises:
        ArgumentError: the name is unknown, the binarization is unknown or not allowed for it, or ``root`` or
            ``$PYROVAE_DATA`` is not a folder.
        DataError: a file of your own holds something else than it should, see ``from_path``.
        DataUnavailableError: a file is missing and could not be downloaded.
        CorruptFileError: a file is not what its publisher published.

    Example:
        >>> digits = load("digits", binarization="none")
        >>> digits.train.x.shape, digits.train.y.shape
        (torch.Size([1197, 8, 8]), torch.Size([1197]))
        >>> bool(digits.train.x.max() == 1)
        True
    """
    if name not in _ENTRIES and own_files.is_path(name) and not str(name).startswith("uci/"):
        if root is not None:
            raise ArgumentError(f"root is {str(root)!r}, but {str(name)!r} is a path; leave root out")
        return own_files.from_name(name, binarization)
    if str(name).startswith("uci/"):
        raise ArgumentError(f"{str(name)!r} is a regression with splits of its own: datasets.uci({str(name)!r})")
    entry = _entry(name)
    if binarization is None:
        binarization = entry.default
    if binarization not in entry.allowed:
        reason = f": {entry.reason}" if binarization in BINARIZATIONS else ""
        raise ArgumentError(
            f"binarization {binarization!r} is not allowed for data set {name!r}{reason}; "
            f"allowed: {', '.join(entry.allowed)}"
        )
    folder = None if root is None else files.as_folder(root, "root")
    return entry.load(binarization, folder)


def _entry(name: str | Path) -> _Entry:
    if name not in _ENTRIES:
        raise unknown_name("data set", name, _ENTRIES)
    return _ENTRIES[str(name)]
