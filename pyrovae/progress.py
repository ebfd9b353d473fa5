"""The one progress bar: in a notebook, on a terminal, and nowhere else; and the pace at which it is looked at."""

from __future__ import annotations

import warnings
from typing import Any

__all__ = ["Pace", "progress_bar"]

_CALL_SECONDS = 0.1


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


class Pace:
    """How many steps to take in one call, so that Python comes back, to Ctrl-C and the bar, after a tenth of a second.

    Example:
        >>> pace = Pace()
        >>> pace.took(steps=1, seconds=0.001)
        >>> pace.steps
        2
    """

    def __init__(self) -> None:
        self.steps = 1

    def took(self, steps: int, seconds: float) -> None:
        """Takes note of the time of some steps."""
        self.steps = max(1, min(2 * self.steps, int(steps * _CALL_SECONDS / max(seconds, 1e-9))))
