"""Data sets by name, split and binarized the same way on every machine.

Source files are checked against their sha256 before they are used. They are looked for under the ``root``
argument, or else under ``$PYROVAE_DATA`` and then the cache (``~/.cache/pyrovae``), and are downloaded when
missing. ``digits`` needs no file and no network.

Example:
    >>> digits = load("digits")
    >>> digits.train.x.shape, digits.train.binarization, digits.test.binarization
    (torch.Size([1197, 8, 8]), 'dynamic', 'static')
"""

from pyrovae.datasets.base import Split, Splits
from pyrovae.datasets.registry import describe, load, names

__all__ = ["Split", "Splits", "describe", "load", "names"]
