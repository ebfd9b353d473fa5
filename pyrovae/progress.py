"""The one progress bar: in a notebook, on a terminal, and nowhere else."""

from __future__ import annotations

import warnings
from typing import Any

__all__ = ["progress_bar"]


def progress_bar(total: int, unit: str, shown: bool, initial: int = 0) -> Any:
    """A tqdm bar, as a widget in a notebook that has widgets.

    Args:
        total: of what is counted.
        unit: what is counted, with a leading space.
        shown: ``False`` for no bar; ``True`` shows one in a notebook or on a terminal.
        initial: what is already done.
    """
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # a notebook without ipywidgets: a bar of text will do
        from tqdm.auto import tqdm
        from tqdm.notebook import tqdm_notebook
    widget = issubclass(tqdm, tqdm_notebook)
    hidden: bool | None = not shown if widget or not shown else None  # None: hidden without a terminal
    return tqdm(total=total, initial=initial, unit=unit, disable=hidden, dynamic_ncols=True)
