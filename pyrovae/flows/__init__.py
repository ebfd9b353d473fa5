"""Normalizing flows by name: one class a family, for posteriors, amortized posteriors and priors.

A layer is a module (a ``zuko.lazy.LazyTransform``); called with a context, or with none, it returns a torch
``Transform`` whose forward direction is that of drawing. What it costs to score a *given* vector differs:

===============  ==================  ======================
flow             drawing             scoring a given vector
===============  ==================  ======================
``planar``       one pass            not possible
``radial``       one pass            one pass
``householder``  one pass            one pass
``sylvester``    one pass            not possible
``iaf``          one pass            one pass a feature
``maf``          one pass a feature  one pass
``coupling``     one pass            two passes
``spline``       one pass            two passes
===============  ==================  ======================

Every flow scores its own draws in the pass that drew them, which is all that ``gradient="pathwise"`` needs;
``"stl"`` and ``"dreg"`` score given vectors.
"""

from __future__ import annotations

from pyrovae.flows.transforms import Chain, FlowTransform  # isort: skip  (imports zuko without its side effect)
from pyrovae.flows.autoregressive import IAF, MAF, Coupling, NeuralSpline
from pyrovae.flows.householder import Householder
from pyrovae.flows.planar import Planar, Radial
from pyrovae.flows.prior import FlowPrior
from pyrovae.flows.stacks import FLOWS, Stack, stack
from pyrovae.flows.sylvester import Sylvester

__all__ = [
    "FLOWS",
    "IAF",
    "MAF",
    "Chain",
    "Coupling",
    "FlowPrior",
    "FlowTransform",
    "Householder",
    "NeuralSpline",
    "Planar",
    "Radial",
    "Stack",
    "Sylvester",
    "stack",
]
