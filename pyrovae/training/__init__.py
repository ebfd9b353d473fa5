"""From an objective to a fitted run: steps, the loop, checkpoints."""

from __future__ import annotations

from pyrovae.training.fit import fit
from pyrovae.training.run import Run, load
from pyrovae.training.svi import SVI

__all__ = ["SVI", "Run", "fit", "load"]
