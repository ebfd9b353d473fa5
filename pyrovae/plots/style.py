"""The look that all plots share: palette, number format, and the Axes to draw in."""

from __future__ import annotations

from matplotlib.axes import Axes

__all__ = ["PALETTE", "axes_or_new", "plain", "tidy"]

PALETTE = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#832db6",
    "#94a4a2",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
"""Ten colours that stay apart under the common colour-vision deficiencies (Petroff, 2021, https://arxiv.org/abs/2107.02270)."""


def axes_or_new(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """The given Axes, or those of a new pyplot figure of ``figsize`` inches."""
    if ax is not None:
        return ax
    # Imported here: whoever draws into an Axes of their own needs no pyplot, nor a backend.
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=figsize, layout="constrained")
    return ax


def tidy(ax: Axes) -> None:
    """Takes away the frame and leaves a light grid behind the curves."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)


def plain(text: str) -> str:
    """The text as matplotlib shows it literally: ``$`` would start a formula."""
    return text.replace("$", r"\$")
