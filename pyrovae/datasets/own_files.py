"""A user's own files as splits: arrays, tables of numbers, folders of images."""

from __future__ import annotations

import csv
import math
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pyrovae.datasets.base import BINARIZATIONS, Binarization, Splits, is_binary, make_splits, random_rows
from pyrovae.errors import ArgumentError, DataError, require_count

__all__ = ["from_name", "from_path", "is_path"]

_IMAGES = (".jpeg", ".jpg", ".png")
_ARRAYS = (".csv", ".npy", ".npz")
# What Pillow calls kinds of pixels, and what they are here: 8-bit grey or 8-bit colour. Transparency is dropped.
_MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB", "CMYK": "RGB"}
_DEFAULTS: dict[str, Any] = {"validation": 0.1, "test": 0.1, "seed": 0, "labels": None}


def from_path(
    path: str | Path,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    binarization: str | None = None,
    labels: str | None = None,
) -> Splits:
    """A data set from a user's own file or folder, split at random by a seed.

    - ``.npy``: an array `n x *event_shape`.
    - ``.npz``: such an array named ``x``, and labels of its rows, whole numbers or text, where there is one named
      ``y``.
    - ``.csv``: commas between numbers, a row each data point, the first line names where none of its cells is a
      number (or ``labels`` is one of them).
    - a folder: PNG or JPEG images of one size, all grey (`n x height x width`) or all in colour
      (`n x 3 x height x width`); its subfolders, if it has any, are classes.

    Images and other arrays of 8-bit whole numbers (``uint8``) are divided by 255, those of ``bool`` become 0 and 1,
    and other numbers stay as they are.

    Args:
        path: the file or folder.
        validation: share of the rows that validate, above 0.
        test: share of the rows that test, above 0. The rest trains.
        seed: of the random partition.
        binarization: see ``pyrovae.datasets.load``; ``None`` for ``"static"`` where all values are 0 or 1, and
            ``"none"`` elsewhere.
        labels: name of the column of a ``.csv``, or of the array of an ``.npz``, that holds labels; of an ``.npz``
            it is ``y`` if that exists.

    Returns:
        The splits. ``classes`` are the names of the labels, whole numbers in ascending order, text in alphabetical.
        The splits' name is the whole path, with what was asked of the partition where that is not the default, as in
        ``"/home/me/table.csv?seed=1&labels=species"``; ``pyrovae.datasets.load`` takes this name too, and gives the
        same splits.

    Raises:
        ArgumentError: there is no such file, it is of another kind, or an argument is out of range.
        DataError: the file cannot be read, or holds something else than its kind promises: values that are no finite
            numbers, rows of different length, images of different size, values that cannot be binarized, fewer rows
            than splits.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "flowers.csv"
        ...     _ = file.write_text("length,width,species\\n" + "5.1,3.5,setosa\\n7.0,3.2,versicolor\\n" * 10)
        ...     flowers = from_path(file, labels="species")
        >>> flowers.event_shape, flowers.classes, len(flowers.train), flowers.binarization
        (torch.Size([2]), ('setosa', 'versicolor'), 16, 'none')
    """
    shares = [_share("validation", validation), _share("test", test)]
    if sum(shares) >= 1:
        raise ArgumentError(f"validation={validation} and test={test} leave nothing to train on; their sum must be < 1")
    require_count("seed", seed, least=0)
    if binarization is not None and binarization not in BINARIZATIONS:
        raise ArgumentError(f"binarization is {binarization!r}; allowed are: {', '.join(BINARIZATIONS)}, or None")
    place = Path(path).expanduser().absolute()
    array, label = read(place, labels)
    x = _intensities(array, place)
    if binarization is None:
        binarization = "static" if is_binary(x) else "none"
    _check(x, binarization, place)

    y, classes = (None, ()) if label is None else _codes(label, len(x), place)
    sizes = [round(share * len(x)) for share in shares]
    if min(*sizes, len(x) - sum(sizes)) < 1:
        raise DataError(
            f"{place} has {len(x)} rows, of which {len(x) - sum(sizes)} train, {sizes[0]} validate and {sizes[1]} test"
            "; each must be at least 1: give more rows, or other shares"
        )
    rows = random_rows(len(x), sizes[0], sizes[1], seed)
    given = {"validation": validation, "test": test, "seed": seed, "labels": labels}
    special = urllib.parse.urlencode({key: value for key, value in given.items() if value != _DEFAULTS[key]})
    name = f"{place}?{special}" if special else str(place)
    targets = [None if y is None else y[part] for part in rows]
    return make_splits(name, [x[part] for part in rows], targets, classes, cast(Binarization, binarization))


def is_path(name: object) -> bool:
    """Whether a name is one of a user's file or folder, rather than that of a packaged data set.

    Example:
        >>> [is_path(name) for name in ("digits", "digits.csv", "data/digits", Path("digits"), "digits.npz?seed=1")]
        [False, True, True, True, True]
    """
    if isinstance(name, Path):
        return True
    if not isinstance(name, str) or not name:
        return False
    bare = _apart(name)[0]
    return "/" in bare or os.sep in bare or bare.lower().endswith(_ARRAYS) or Path(bare).is_dir()


def from_name(name: str | Path, binarization: str | None) -> Splits:
    """``from_path`` of a path or of the name of such splits, see there."""
    path, query = _apart(str(name))
    said: dict[str, Any] = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(said) - set(_DEFAULTS))
    if unknown:
        raise ArgumentError(f"{str(name)!r} asks for {', '.join(unknown)}; allowed are: {', '.join(_DEFAULTS)}")
    for key, kind in (("validation", float), ("test", float), ("seed", int)):
        try:
            said |= {key: kind(said[key])} if key in said else {}
        except ValueError:
            raise ArgumentError(f"{key} is {said[key]!r} in {str(name)!r}; it must be a number") from None
    return from_path(path, binarization=binarization, **said)


def _apart(name: str) -> tuple[str, str]:
    """Path and query of a name; all of it is the path where there is such a file."""
    path, _, query = name.rpartition("?")
    return (path, query) if path and "=" in query and not Path(name).expanduser().exists() else (name, "")


def _share(argument: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
        raise ArgumentError(f"{argument} is {value!r}; it must be a share of the rows, above 0 and below 1")
    return value


def read(path: Path, labels: str | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """The rows, and what labels them."""
    if not path.exists():
        raise ArgumentError(f"there is no file or folder {str(path)!r}; give the path of one that exists")
    kind = "folder" if path.is_dir() else path.suffix.lower()
    if kind in ("folder", ".npy") and labels is not None:
        raise ArgumentError(f"labels is {labels!r}, but {path} has no named columns or arrays; leave it out")
    if kind == "folder":
        return _read_images(path)
    if kind == ".csv":
        return _read_csv(path, labels)
    if kind in _ARRAYS:
        return _read_arrays(path, labels)
    raise ArgumentError(f"{path} ends in {path.suffix!r}; it must be a folder, or end in {', '.join(_ARRAYS)}")


def _read_arrays(path: Path, labels: str | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    try:
        with path.open("rb") as file:  # np.load would leave it open where it fails
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return loaded, None
            arrays = {key: loaded[key] for key in loaded.files if key in ("x", labels or "y")}
            found = ", ".join(loaded.files) or "none"
    except Exception as error:  # a damaged archive can raise whatever zipfile, zlib and numpy stumble over
        raise DataError(
            f"{path} cannot be read ({error}); it must hold arrays of numbers or text, no objects"
        ) from error
    if "x" not in arrays:
        raise DataError(f"{path} has no array 'x'; its arrays are: {found}")
    if labels is not None and labels not in arrays:
        raise ArgumentError(f"labels is {labels!r}, which is no array of {path}; its arrays are: {found}")
    return arrays["x"], arrays.get(labels or "y")


def csv_lines(path: Path) -> list[tuple[int, list[str]]]:
    """The lines of a table that are not empty: their numbers in the file, and their cells.

    Raises:
        DataError: it is no comma-separated UTF-8 text.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            return [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as comma-separated UTF-8 text ({error})") from error


def _read_csv(path: Path, labels: str | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    lines = csv_lines(path)
    if not lines:
        raise DataError(f"{path} is empty")
    header = lines[0][1]
    named = labels in header or not any(_is_number(cell) for cell in header)
    columns = header if named else [str(number) for number in range(1, len(header) + 1)]
    rows = lines[1:] if named else lines
    if not rows:
        raise DataError(f"{path} has a line of names and no rows")
    for line, row in rows:
        if len(row) != len(columns):
            raise DataError(f"{path} has {len(row)} cells in line {line} and {len(columns)} in line {lines[0][0]}")
    label = None
    if labels is not None:
        if not named or labels not in columns:
            known = f"its columns are: {', '.join(columns)}" if named else "its first line has no names"
            raise ArgumentError(f"labels is {labels!r}, which is no column of {path}; {known}")
        label = np.array([row[columns.index(labels)].strip() for _, row in rows])
        if "" in label:
            line = rows[int(np.argmin(label != ""))][0]
            raise DataError(f"{path} has no label in line {line}, column {labels!r}; every row needs one")
    kept = [number for number, column in enumerate(columns) if column != labels]
    cells = [[row[number] for number in kept] for _, row in rows]
    try:
        values = np.array(cells, dtype=np.float64)
    except ValueError:
        values = np.array([[float(cell) if _is_number(cell) else math.nan for cell in row] for row in cells])
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise DataError(
            f"{path} has {cells[row][column]!r} in line {rows[row][0]}, column {columns[kept[column]]!r}; every cell "
            "must be a finite number (name a column of text with labels=, and remove or impute missing values)"
        )
    return values, label


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_images(folder: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    classes = [path for path in inside if path.is_dir()]
    direct = _images_of(inside)
    if classes and direct:
        raise DataError(f"{folder} has images ({direct[0].name}, …) beside subfolders ({classes[0].name}, …); use one")
    by_class = [_images_of(sorted(path.iterdir())) for path in classes] or [direct]
    for place, found in zip(classes or [folder], by_class, strict=True):
        if not found:
            raise DataError(f"{place} has no image; images end in {', '.join(_IMAGES)}")
    paths = [path for found in by_class for path in found]
    label = np.array([path.parent.name for path in paths]) if classes else None

    pixels = None
    for row, path in enumerate(paths):
        image = _read_image(path)
        if pixels is None:
            pixels = np.empty((len(paths), *image.shape), dtype=np.uint8)
        if image.shape != pixels.shape[1:]:
            raise DataError(
                f"{path} is {_size(image)}, while {paths[0]} is {_size(pixels[0])}; all images must have one size and "
                "be all grey or all in colour"
            )
        pixels[row] = image
    assert pixels is not None
    return pixels, label


def _images_of(paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if path.is_file() and path.suffix.lower() in _IMAGES and path.name[0] != "."]


def _read_image(path: Path) -> np.ndarray[Any, Any]:
    """uint8 pixels, `height x width` or `3 x height x width`."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels = np.asarray(image.convert(_MODES[mode])) if mode in _MODES else None
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError is what Pillow raises for a broken PNG
        raise DataError(f"{path} cannot be read as an image ({error})") from error
    if pixels is None:
        raise DataError(f"{path} has pixels of mode {mode!r}; they must be 8-bit grey or colour")
    return pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _size(image: np.ndarray[Any, Any]) -> str:
    kind = "grey" if image.ndim == 2 else "in colour"
    return f"{image.shape[-2]}x{image.shape[-1]} and {kind}"


def _intensities(array: np.ndarray[Any, Any], path: Path) -> Tensor:
    if array.dtype.kind not in "buif":
        raise DataError(f"{path} holds {array.dtype}; rows must be of numbers")
    if array.ndim < 2 or array.size == 0:
        raise DataError(
            f"{path} holds an array of shape {array.shape}; it must be n x *event_shape and not empty (one number a "
            "row is n x 1)"
        )
    with np.errstate(over="ignore"):  # _check finds what is too large
        x = torch.from_numpy(array.astype(np.float32))
    return x.div_(255) if array.dtype == np.uint8 else x


def _check(x: Tensor, binarization: str, path: Path) -> None:
    bad = (~x.isfinite()).nonzero()
    if len(bad):
        raise DataError(f"{path} holds a NaN, or a number too large for float32, at {tuple(bad[0].tolist())}")
    low, high = (bound.item() for bound in torch.aminmax(x))
    if binarization != "none" and not (low >= 0 and high <= 1):
        raise DataError(
            f"{path} holds values in [{low:g}, {high:g}]; for binarization={binarization!r} they must be in [0, 1] ("
            "save 8-bit images as uint8 to have them divided by 255, or load with binarization='none')"
        )


def _codes(label: np.ndarray[Any, Any], rows: int, path: Path) -> tuple[Tensor, tuple[str, ...]]:
    if label.dtype.kind not in "biuU" or label.shape != (rows,):
        raise DataError(
            f"{path} has labels {label.dtype} of shape {label.shape}; they must be whole numbers or text, "
            f"of shape ({rows},)"
        )
    names = label.tolist()
    levels = sorted(set(names))
    if label.dtype.kind == "U" and all(re.fullmatch(r"-?[0-9]+", name) for name in levels):
        levels.sort(key=int)  # so that "10" comes after "9"
    number = {name: code for code, name in enumerate(levels)}
    return torch.tensor([number[name] for name in names]), tuple(str(name) for name in levels)
