"""Where files are looked for, whether they are what they should be, and how they are fetched."""

from __future__ import annotations

import functools
import hashlib
import os
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from pyrovae.atomic import replacing
from pyrovae.errors import ArgumentError, CorruptFileError, DataUnavailableError

__all__ = [
    "DOWNLOAD_ERRORS",
    "PublishedFile",
    "VARIABLE",
    "as_folder",
    "cache",
    "download",
    "download_root",
    "find_file",
    "find_root",
    "obtain",
    "read_mat",
    "roots",
    "sha256",
    "unavailable",
    "verify",
    "verify_array",
]

VARIABLE = "PYROVAE_DATA"
# What a machine without a network, a server that hangs up and a full or read-only disk raise.
DOWNLOAD_ERRORS = (OSError, HTTPException)
_CHUNK = 1 << 20  # bytes
_TIMEOUT = 30.0  # seconds without an answer


@dataclass(frozen=True)
class PublishedFile:
    """A file that a data set is read from.

    Args:
        path: where it lies below a root.
        sha256: its hexadecimal sha256; empty where its content is checked instead, since it is published in
            several encodings.
        url: where precisely this file can be had; empty where nowhere.
    """

    path: str
    sha256: str = ""
    url: str = ""


def as_folder(path: str | Path, origin: str) -> Path:
    """The path of a folder that exists, ``~`` expanded.

    Args:
        path: what was given.
        origin: where it was given, for the message.

    Raises:
        ArgumentError: it is not a folder.

    Example:
        >>> as_folder("nowhere", "root")
        Traceback (most recent call last):
        pyrovae.errors.ArgumentError: root is 'nowhere', which is not a folder; create it or name another
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ArgumentError(f"{origin} is {str(path)!r}, which is not a folder; create it or name another")
    return folder


def cache() -> Path:
    """Folder for downloads, which may not exist yet: ``$XDG_CACHE_HOME/pyrovae`` or ``~/.cache/pyrovae``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "pyrovae"


def roots(root: Path | None) -> list[Path]:
    """Folders to look in, in order: ``root`` alone if given, else ``$PYROVAE_DATA`` and the cache.

    Raises:
        ArgumentError: ``$PYROVAE_DATA`` is set, but not to a folder.
    """
    if root is not None:
        return [root]
    given = os.environ.get(VARIABLE)
    return [as_folder(given, f"the environment variable {VARIABLE}"), cache()] if given else [cache()]


def download_root(root: Path | None) -> Path:
    """Folder to download to: the first of ``roots`` if it can be written, else the last, which is the cache."""
    candidates = roots(root)
    return candidates[0] if os.access(candidates[0], os.W_OK | os.X_OK) else candidates[-1]


def find_file(candidates: Sequence[str], root: Path | None) -> Path | None:
    """The first file that exists among ``candidates`` (paths below a root), root by root, or ``None``."""
    paths = (folder / candidate for folder in roots(root) for candidate in candidates)
    return next((path for path in paths if path.is_file()), None)


def find_root(required: Sequence[str], root: Path | None) -> Path | None:
    """The first root below which all ``required`` files exist, or ``None``."""
    return next((folder for folder in roots(root) if all((folder / file).is_file() for file in required)), None)


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, computed once in a process unless the file changes.

    Example:
        >>> import os
        >>> sha256(Path(os.devnull))[:8]
        'e3b0c442'
    """
    status = path.stat()
    return _sha256(path.resolve(), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: Path, expected: str, source: str) -> None:
    """Checks that a file is the published one.

    Args:
        path: the file.
        expected: its hexadecimal sha256.
        source: where it is published, for the message.

    Raises:
        CorruptFileError: its sha256 is another one.
    """
    found = sha256(path)
    if found != expected:
        raise CorruptFileError(
            f"{path} is truncated or altered: its {path.stat().st_size} bytes have sha256 {found}, expected "
            f"{expected}; delete it and load again to download it, or replace it by the file from {source}"
        )


def download(url: str, path: Path, expected: str) -> None:
    """Downloads a file, which appears at ``path`` complete and verified or not at all.

    Args:
        url: where it is published.
        path: where it goes; folders are made as needed.
        expected: its hexadecimal sha256; empty where its content is checked afterwards.

    Raises:
        CorruptFileError: what was sent has another sha256.
        OSError: there is no network, no such file at the server, or no room for it.
        http.client.HTTPException: the server does not speak HTTP.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, replacing(path) as file:
        found = _receive(response, file, path.name)
        if expected and found != expected:
            raise CorruptFileError(
                f"{url} sent a file with sha256 {found}, expected {expected}; nothing was kept. "
                f"Load again, or put the right file at {path}"
            )


def _receive(response: HTTPResponse, file: BinaryIO, name: str) -> str:
    """Writes the body of a response to a file and returns its sha256."""
    digest = hashlib.sha256()
    # disable=None: no progress bar where nobody looks at a terminal.
    with tqdm(total=response.length, desc=name, unit="B", unit_scale=True, disable=None) as progress:
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()


def obtain(name: str, published: Sequence[PublishedFile], root: Path | None, source: str) -> list[Path]:
    """Paths of all files of a data set, each found or else downloaded, and verified.

    Args:
        name: the data set, for messages.
        published: the files.
        root: the ``root`` argument.
        source: where the files are published, and what to do with what is there, for messages.

    Raises:
        DataUnavailableError: a file is missing and could not be downloaded.
        CorruptFileError: a file is not the published one.
    """
    paths = []
    for file in published:
        path = find_file([file.path], root)
        if path is None:
            required = [other.path for other in published]
            if not file.url:
                raise unavailable(name, required, root, source)
            path = download_root(root) / file.path
            try:
                download(file.url, path, file.sha256)
            except DOWNLOAD_ERRORS as error:
                raise unavailable(name, required, root, source, error) from error
        if file.sha256:
            verify(path, file.sha256, source)
        paths.append(path)
    return paths


def read_mat(path: Path, variable: str) -> np.ndarray[Any, Any]:
    """A variable of a MATLAB file (up to version 7).

    Raises:
        CorruptFileError: it is not such a file, or has no such variable.
    """
    from scipy.io import loadmat  # here because it is slow to import

    try:
        return loadmat(path, variable_names=[variable])[variable]
    except Exception as error:  # on a damaged file scipy raises whatever it stumbles over
        raise CorruptFileError(
            f"{path} is not a MATLAB file with a variable {variable!r} ({type(error).__name__}: {error}); replace it"
        ) from error


def verify_array(path: Path, array: np.ndarray[Any, Any], shape: tuple[int, ...], expected: str, source: str) -> None:
    """Checks the 8-bit content of a file that is published in several encodings.

    Args:
        path: the file.
        array: what it holds.
        shape: the shape that this must have.
        expected: hexadecimal sha256 of its elements in row-major order.
        source: where it is published, for the message.

    Raises:
        CorruptFileError: its content is another one.
    """
    found = hashlib.sha256(array.tobytes()).hexdigest()
    if array.dtype != np.uint8 or array.shape != shape or found != expected:
        raise CorruptFileError(
            f"{path} has other content than published: {array.dtype} of shape {array.shape} with sha256 {found}, "
            f"expected uint8 of shape {shape} with {expected}; replace it by the file from {source}"
        )


def unavailable(
    name: str, required: Iterable[str], root: Path | None, source: str, cause: BaseException | None = None
) -> DataUnavailableError:
    """The error for a data set that is not here and could not be fetched.

    Args:
        name: the data set.
        required: the files that it wants, as paths below a root.
        root: the ``root`` argument.
        source: where the files are published.
        cause: why the download failed; ``None`` where there is nothing that could be downloaded.

    Returns:
        The error, for the caller to raise.

    Example:
        >>> error = unavailable("mnist", ["MNIST/raw/a"], Path("data"), "http://a.org", OSError("no route"))
        >>> print(error)
        data set 'mnist' was not found below data, and the download to data failed (OSError: no route); \
get its files from http://a.org, put them in data as MNIST/raw/a, or set PYROVAE_DATA to a folder that has them
    """
    required = list(required)
    listed = ", ".join(required[:8]) + (f" and {len(required) - 8} more" if len(required) > 8 else "")
    folders = " or ".join(str(folder) for folder in roots(root))
    target = download_root(root)
    reason = " ".join(str(cause).split())  # torchvision's has a line for each mirror
    tried = "it cannot be downloaded in this form"
    if cause is not None:
        tried = f"the download to {target} failed ({type(cause).__name__}: {reason})"
    return DataUnavailableError(
        f"data set {name!r} was not found below {folders}, and {tried}; get its files from {source}, "
        f"put them in {target} as {listed}, or set {VARIABLE} to a folder that has them"
    )
