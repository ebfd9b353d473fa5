"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyrovae.datasets import binarized_mnist, digits, files, mnist
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
}


def names() -> tuple[str, ...]:
    """Names that ``load`` knows, the one that needs no files first.

    Example:
        >>> names()
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


def load(name: str, *, binarization: str | None = None, root: str | Path | None = None) -> Splits:
    """Loads a data set, split and binarized.

    Args:
        name: one of ``names()``.
        binarization: ``"none"``: intensities in [0, 1]. ``"static"``: each pixel drawn once from
            Bernoulli(intensity), with a fixed seed: the same pixels at every call. ``"dynamic"``: the training
            split is drawn anew at every draw, while its validation and test splits are drawn once with that
            seed, and so marked ``"static"``. Default: ``"dynamic"``, but for ``binarized-mnist``, which is
            ``"static"`` and nothing else.
        root: the only folder to look in (and to download to). Default: ``$PYROVAE_DATA`` if it is set, then the
            cache, ``$XDG_CACHE_HOME/pyrovae`` or ``~/.cache/pyrovae``. Downloads go to ``$PYROVAE_DATA`` if it
            is set and writable, else to the cache.

    Returns:
        The splits.

    Raises:
        ArgumentError: the name is unknown, the binarization is unknown or not allowed for it, or ``root`` or
            ``$PYROVAE_DATA`` is not a folder.
        DataUnavailableError: a file is missing and could not be downloaded.
        CorruptFileError: a file is not what its publisher published.

    Example:
        >>> digits = load("digits", binarization="none")
        >>> digits.train.x.shape, digits.train.y.shape
        (torch.Size([1197, 8, 8]), torch.Size([1197]))
        >>> bool(digits.train.x.max() == 1)
        True
    """
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


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise unknown_name("data set", name, _ENTRIES)
    return _ENTRIES[name]
