"""Data sets by name, split and binarized the same way on every machine.

Source files are checked against their sha256 before they are used. They are looked for under the ``root``
argument, or else under ``$PYROVAE_DATA`` and then the cache (``~/.cache/pyrovae``), and are downloaded when
missing. ``digits`` needs no file and no network. ``from_path`` reads files of your own, and ``table`` gives small
classic tables, ``uci`` the regression data that Bayesian networks are compared on.

Example:
    >>> digits = load("digits")
    >>> digits.train.x.shape, digits.train.binarization, digits.test.binarization
    (torch.Size([1197, 8, 8]), 'dynamic', 'static')
"""

from pyrovae.datasets.base import LabelledSplit, Split, Splits
from pyrovae.datasets.own_files import from_path
from pyrovae.datasets.registry import describe, load, names
from pyrovae.datasets.tables import Table, table, tables
from pyrovae.datasets.uci import Regression, uci, uci_names

__all__ = [
    "LabelledSplit",
    "Regression",
    "Split",
    "Splits",
    "Table",
    "describe",
    "from_path",
    "load",
    "names",
    "table",
    "tables",
    "uci",
    "uci_names",
]
