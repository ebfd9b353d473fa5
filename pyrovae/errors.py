"""The errors that pyrovae raises on purpose: each names what was given, what is allowed, and what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "CompilationError",
    "CorruptFileError",
    "DataError",
    "DataUnavailableError",
    "ModelGuideError",
    "NonFiniteError",
    "PyrovaeError",
    "RunError",
    "require_count",
    "require_positive",
    "unknown_name",
]


class PyrovaeError(Exception):
    """Base of all errors below; the command line prints them as one line and exits with 2."""


class ArgumentError(PyrovaeError, ValueError):
    """An argument has a value that is not allowed."""


class DataError(PyrovaeError, ValueError):
    """The data are empty, not finite, of the wrong shape, or outside the support of the likelihood."""


class DataUnavailableError(PyrovaeError, FileNotFoundError):
    """A data set is not on this machine and could not be fetched."""


class CorruptFileError(PyrovaeError, RuntimeError):
    """A file is truncated, altered, or not what its name says."""


class RunError(PyrovaeError, RuntimeError):
    """A run folder is missing, holds another run, or cannot be continued as asked."""


class ModelGuideError(PyrovaeError, ValueError):
    """Model and guide do not fit each other, or their batch dimensions do not fit their plates."""


class CompilationError(PyrovaeError, RuntimeError):
    """A step cannot be compiled (it then runs eagerly), or gives other numbers compiled than eagerly.

    Args:
        said: the cause.
        wrong: whether the compiled step ran and its numbers differ; such an error is never passed over.
    """

    def __init__(self, said: str, wrong: bool = False) -> None:
        super().__init__(said)
        self.wrong = wrong


class NonFiniteError(PyrovaeError, ArithmeticError):
    """The loss or a gradient became NaN or infinite during a fit."""


def require_count(argument: str, value: object, least: int = 1, why: str = "") -> int:
    """The given whole number.

    Args:
        argument: the name of the argument, for the message.
        value: what was given.
        least: the smallest number that is allowed.
        why: the end of the message, where the limit needs a reason.

    Raises:
        ArgumentError: it is something else.

    Example:
        >>> require_count("particles", 0)
        Traceback (most recent call last):
        pyrovae.errors.ArgumentError: particles is 0; it must be a whole number, at least 1
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{argument} is {value!r}; it must be a whole number, at least {least}{why}")
    return value


def require_positive(argument: str, value: object, why: str = "") -> float:
    """The given finite number above 0.

    Args:
        argument: the name of the argument, for the message.
        value: what was given.
        why: the end of the message: a unit, or what else is allowed.

    Raises:
        ArgumentError: it is something else.

    Example:
        >>> require_positive("lr", -1e-3)
        Traceback (most recent call last):
        pyrovae.errors.ArgumentError: lr is -0.001; it must be a finite number above 0
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 < value < math.inf:
        raise ArgumentError(f"{argument} is {value!r}; it must be a finite number above 0{why}")
    return value


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> ArgumentError:
    """The error for a name that is not in a list of names, with the nearest ones that are.

    Args:
        kind: what the name should have named, as a reader would say it.
        name: what was given.
        allowed: every name that is allowed.

    Returns:
        The error, for the caller to raise.

    Example:
        >>> print(unknown_name("data set", "mnits", ["digits", "mnist"]))
        unknown data set 'mnits' (did you mean 'mnist'?); there are: digits, mnist
    """
    allowed = sorted(allowed)
    near = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ArgumentError(f"unknown {kind} {name!r}{hint}; there are: {', '.join(allowed)}")
