"""scikit-learn's handwritten digits, which are installed with it."""

from __future__ import annotations

from pathlib import Path

import torch

from pyrovae.datasets.base import Binarization, Splits, make_splits

__all__ = ["load"]

_SIZES = (1197, 300, 300)
_SPLIT_SEED = 0


def load(binarization: Binarization = "dynamic", root: Path | None = None) -> Splits:
    """8x8 digits with 17 grey levels, divided by 16; 1197/300/300, every class in proportion.

    Args:
        binarization: see ``pyrovae.datasets.load``.
        root: not needed, since the data need no file.

    Returns:
        The splits, the same at every call.

    Reference:
        Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits, https://doi.org/10.24432/C50P49
        (its test set, as ``sklearn.datasets.load_digits`` gives it).

    Example:
        >>> digits = load("none")
        >>> [len(split) for split in (digits.train, digits.validation, digits.test)]
        [1197, 300, 300]
        >>> digits.train.y.bincount().tolist()
        [119, 121, 118, 122, 120, 121, 121, 119, 116, 120]
    """
    # Imported here because it is slow to import, and only this data set needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    x = (torch.from_numpy(pixels) / 16).to(torch.float32).reshape(-1, 8, 8)
    y = torch.from_numpy(labels).to(torch.int64)
    train, rest = train_test_split(range(len(y)), train_size=_SIZES[0], stratify=labels, random_state=_SPLIT_SEED)
    validation, test = train_test_split(rest, train_size=_SIZES[1], stratify=labels[rest], random_state=_SPLIT_SEED)
    rows = (train, validation, test)
    return make_splits("digits", [x[i] for i in rows], [y[i] for i in rows], tuple("0123456789"), binarization)
