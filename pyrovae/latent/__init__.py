"""Walking through a latent space: paths, grids, directions of attributes, analogies and neighbours.

Tensors in and out, with any batch dimensions on the left; ``model.decode`` makes data of latents, and
:mod:`pyrovae.plots` the figures. Latents on a sphere (``SphericalVAE``) are interpolated along great circles; what
arithmetic makes of them is off the sphere, and ``torch.nn.functional.normalize`` puts it back.
"""

from __future__ import annotations

from pyrovae.latent.paths import Path, analogy, interpolate, manifold_grid, move, traverse
from pyrovae.latent.posteriors import (
    Metric,
    Neighbours,
    attribute_vector,
    attribute_vectors,
    nearest_neighbours,
    posterior_means,
)

__all__ = [
    "Metric",
    "Neighbours",
    "Path",
    "analogy",
    "attribute_vector",
    "attribute_vectors",
    "interpolate",
    "manifold_grid",
    "move",
    "nearest_neighbours",
    "posterior_means",
    "traverse",
]
