"""The command line, ``pyrovae …``: train, evaluate, sample, report, list, demo.

Example:
    >>> from typer.testing import CliRunner
    >>> CliRunner().invoke(app, ["list", "guides"]).exit_code
    0
"""

from __future__ import annotations

from typing import Annotated

import typer

from pyrovae.cli import demo, evaluate, listing, report, sample, train
from pyrovae.cli.group import Commands

__all__ = ["app"]

app = typer.Typer(name="pyrovae", cls=Commands, add_completion=False, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        from pyrovae import __version__

        typer.echo(f"pyrovae {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Deep latent-variable models on Pyro: train one, and know how good the fit is.

    Start with: pyrovae demo

    Every bound and log-likelihood is in nats per data point.
    """


app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(sample.sample)
app.command()(report.report)
app.command("list")(listing.list_names)
app.command()(demo.demo)
