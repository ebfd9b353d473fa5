"""The parts of an HTML page that needs nothing else: style sheet, pictures inside, tables; written atomically."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure

__all__ = ["Picture", "flatten", "format_value", "page", "picture", "table", "tiles"]

STYLE = """
:root { color-scheme: light dark; --text: #1d2126; --soft: #5b6470; --line: #dde1e6; --back: #fff; --card: #f5f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --soft: #a0a9b4; --line: #363c44; --back: #16191d; --card: #20242a }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; color: var(--text); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { margin: 0 0 .25rem; font-size: 1.6rem; line-height: 1.25 }
h2 { margin: 2.5rem 0 .75rem; padding-bottom: .25rem; font-size: 1.2rem; border-bottom: 1px solid var(--line) }
p { margin: .25rem 0; color: var(--soft) }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; margin: 1.25rem 0 0 }
dl div { display: flex; flex-direction: column; justify-content: space-between; padding: .75rem 1rem;
  background: var(--card); border-radius: .5rem }
dt { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere }
dd { margin: .25rem 0 0; font-size: 1.4rem; line-height: 1.3; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem;
  align-items: start }
figure { margin: 0; min-width: 0 }
figure.wide { grid-column: 1 / -1 }
img { display: block; width: 100%; height: auto; padding: .5rem; background: #fff; border: 1px solid var(--line);
  border-radius: .5rem }
figcaption { padding: .4rem .25rem 0; color: var(--soft); font-size: .9rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .3rem 1rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap }
tbody th { font-weight: 400 }
td { overflow-wrap: anywhere }
.numbers th, .numbers td { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
"""


class Picture:
    """A drawn figure as one element of a page.

    Args:
        png: the bytes of a PNG file.
        size: width and height in pixels.
        alt: what the picture shows, for whoever cannot see it.
        caption: what to look for in it.
        wide: whether it takes the whole width of the page.
    """

    def __init__(self, png: bytes, size: tuple[int, int], alt: str, caption: str, wide: bool) -> None:
        self.png, self.size, self.alt, self.caption, self.wide = png, size, alt, caption, wide

    def __str__(self) -> str:
        kind = ' class="wide"' if self.wide else ""
        data = base64.b64encode(self.png).decode("ascii")
        return (
            f'<figure{kind}><img width="{self.size[0]}" height="{self.size[1]}" alt="{html.escape(self.alt)}" '
            f'src="data:image/png;base64,{data}"><figcaption>{html.escape(self.caption)}</figcaption></figure>'
        )


def picture(figure: Figure, alt: str, caption: str, wide: bool, dpi: int = 144) -> Picture:
    """The figure as a PNG in a page."""
    buffer = io.BytesIO()
    # Cropped: a grid of pictures keeps its proportions and does not fill the figure.
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", bbox_inches="tight", pad_inches=0.05)
    png = buffer.getvalue()
    width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk
    return Picture(png, (width, height), alt, caption, wide)


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """The leaves of nested mappings by dotted key.

    Example:
        >>> flatten({"model": {"name": "VAE", "arguments": {"latent_dim": 2}}, "seed": 0})
        {'model.name': 'VAE', 'model.arguments.latent_dim': 2, 'seed': 0}
    """
    leaves: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def format_value(value: object) -> str:
    """A number with the digits that matter, other values as JSON writes them.

    Example:
        >>> [format_value(value) for value in (-86.12345, 0.98231, 1e-5, 60000, float("nan"), True, None)]
        ['-86.12', '0.9823', '1e-05', '60,000', 'nan', 'yes', 'none']
    """
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", None) is not None and getattr(value, "ndim", None) == 0:
        value = item()  # a tensor or NumPy number
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.2f}" if 10 <= abs(value) < 1e7 and math.isfinite(value) else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def tiles(values: Mapping[str, object]) -> str:
    """Names and values as a row of cards."""
    cards = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(format_value(value))}</dd></div>"
        for name, value in values.items()
    )
    return f"<dl>{''.join(cards)}</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """A table of texts; the first cell of each row names it."""
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    kind = ' class="numbers"' if numbers else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def page(title: str, body: Iterable[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )
