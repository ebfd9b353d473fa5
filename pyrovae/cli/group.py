"""How the command line ends: one line for a user's mistake, and an exit code."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from pyrovae.errors import PyrovaeError

__all__ = ["Commands"]

MISTAKE = 2
INTERRUPTED = 130  # as a shell reports a program that SIGINT ended

# Python arguments that errors advise, as the options that they are here.
_ADVICE = re.compile(
    r"\b(binarization|gradient|kl|likelihood|network|particles|resume|which)=(?:True\b|'([\w-]+)'|(\d+))"
)


class _Interrupted(Exception):
    """Ctrl-C, on its way past Typer, which would drop what was said with it."""


class Commands(TyperGroup):
    """The group of all commands; turns errors on purpose into one line on stderr and exit code 2.

    With ``--json`` the line is on stdout as well, as ``{"error": …}``. A defect of pyrovae keeps its traceback.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Runs the command that ``args`` (by default those of the process) name, and exits."""
        given = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            code = super().main(given, prog_name or "pyrovae", complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            message = _said(error)
            if message is None:
                raise
            _report(message, "--json" in given)
            sys.exit(INTERRUPTED if isinstance(error, _Interrupted) else MISTAKE)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; Ctrl-C ends it with one line that says what was saved."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Interrupted(str(interrupt) or "interrupted") from None


def _said(error: Exception) -> str | None:
    """What to tell the user; ``None`` when the error is no mistake of theirs."""
    if isinstance(error, PyrovaeError | _Interrupted):
        return _in_options(str(error).partition("Trace Shapes:")[0])  # which Pyro adds to a model's own errors
    # Typer's own errors have one class in common, whose home differs between its versions.
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context is not None else ""
        return f"{error.format_message().rstrip('.')}{where}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename2 or error.filename}: {error.strerror}"  # the second is where a file was to be put
    return None


def _in_options(message: str) -> str:
    """Advice on arguments (``resume=True``) as advice on options (``--resume``)."""
    return _ADVICE.sub(lambda found: " ".join(filter(None, (f"--{found[1]}", found[2] or found[3]))), message)


def _report(message: str, as_json: bool) -> None:
    line = " ".join(message.split())
    typer.echo(f"pyrovae: error: {line}", err=True)
    if as_json:
        typer.echo(json.dumps({"error": line}))
