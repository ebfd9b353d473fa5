"""Whether a guide can score the values that an estimator asks it to score, and at what cost."""

from __future__ import annotations

import math
import warnings

from pyrovae.cost import SLOW
from pyrovae.errors import ArgumentError
from pyrovae.structure import Structure
from pyrovae.weights import Through

__all__ = ["check_scoring"]


def check_scoring(structure: Structure, asked: str, through: Through, instead: str) -> None:
    """Refuses an estimator whose log-densities a flow of the guide cannot give, or only slowly.

    ``log q`` at a draw is known from drawing it. With its parameters held fixed (``"path"``), at a held sample
    (``"parameters"``) or at a simulated latent it needs the inverse of the flow.

    Args:
        structure: of model and guide.
        asked: what needs the density, as the reader asked for it.
        through: the routes by which the guide's parameters get their gradient; ``"both"`` needs no inverse.
        instead: what to use in its place where every site of the guide can be reparameterized.

    Raises:
        ArgumentError: a site has no inverse; or, under ``"path"``, a sequential one (else a warning).

    Example:
        >>> structure = Structure(1, {"z": True}, ("x",), (), scoring={"z": 60.0})
        >>> check_scoring(structure, "gradient='stl'", "path", "gradient='pathwise'")
        Traceback (most recent call last):
        pyrovae.errors.ArgumentError: gradient='stl' needs log q at a given value, which takes about 60 times ...
    """
    if through == "both":
        return
    if not all(structure.reparameterized.values()):
        instead = "pyrovae.EnumeratedELBO"
    advice = f"Use {instead}, which needs log q at the guide's own draws alone"
    for name, cost in structure.scoring.items():
        if cost == math.inf:
            raise ArgumentError(
                f"{asked} needs log q at a given value, which site {name!r} of the guide does not have (no inverse)."
                f" {advice}."
            )
        if cost > SLOW:
            message = (
                f"{asked} needs log q at a given value, which takes about {cost:.0f} times the operations of drawing"
                f" one at site {name!r} of the guide, because its inverse is sequential. {advice}."
            )
            if through == "path":
                raise ArgumentError(message)
            warnings.warn(message, stacklevel=2)
