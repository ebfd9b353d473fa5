"""Sylvester flows, the amortized kind included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Transform

from pyrovae.errors import ArgumentError, require_count, unknown_name
from pyrovae.flows.householder import paired_normals, reflect
from pyrovae.flows.layers import SMALL, Parametrized
from pyrovae.flows.transforms import FlowTransform

__all__ = ["Sylvester"]

_BELOW_ONE = 0.999  # so that no determinant rounds to zero

Kind = Literal["orthogonal", "householder", "triangular"]


class _SylvesterTransform(FlowTransform):
    def __init__(self, square: Tensor, diagonal: Tensor, bias: Tensor) -> None:
        super().__init__()
        r, self.bias = _BELOW_ONE * square.diagonal(dim1=-2, dim2=-1).tanh(), bias
        r_tilde = _BELOW_ONE * diagonal.tanh()
        self.upper = square.triu(1) + torch.diag_embed(r)
        self.upper_tilde = square.mT.triu(1) + torch.diag_embed(r_tilde)
        self.diagonal = r * r_tilde

    def rotate(self, h: Tensor) -> Tensor:
        """``Q h``, from `*batch x M` to `*batch x features`."""
        raise NotImplementedError

    def unrotate(self, x: Tensor) -> Tensor:
        """``Qᵀ x``, from `*batch x features` to `*batch x M`."""
        raise NotImplementedError

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = (_times(self.upper_tilde, self.unrotate(x)) + self.bias).tanh()
        y = x + self.rotate(_times(self.upper, h))
        return y, ((1.0 - h.square()) * self.diagonal).log1p().sum(-1)


class _Orthogonal(_SylvesterTransform):
    def __init__(self, columns: Tensor, **triangles: Tensor) -> None:
        super().__init__(**triangles)
        q, r = torch.linalg.qr(columns)
        self.q = q * r.diagonal(dim1=-2, dim2=-1).detach().sign().unsqueeze(-2)  # the factor that is continuous

    def rotate(self, h: Tensor) -> Tensor:
        return _times(self.q, h)

    def unrotate(self, x: Tensor) -> Tensor:
        return _times(self.q.mT, x)


class _Householder(_SylvesterTransform):
    def __init__(self, normals: Tensor, **triangles: Tensor) -> None:
        super().__init__(**triangles)
        self.normals = normals

    def rotate(self, h: Tensor) -> Tensor:
        return reflect(h, self.normals)

    def unrotate(self, x: Tensor) -> Tensor:
        return reflect(x, self.normals, transpose=True)


class _Triangular(_SylvesterTransform):
    def rotate(self, h: Tensor) -> Tensor:
        return h

    def unrotate(self, x: Tensor) -> Tensor:
        return x


class _Flipped(_Triangular):
    def rotate(self, h: Tensor) -> Tensor:
        return h.flip(-1)

    def unrotate(self, x: Tensor) -> Tensor:
        return x.flip(-1)


class Sylvester(Parametrized):
    r"""Sylvester flow: a planar flow with M hidden units in place of one.

    .. math:: f(x) = x + Q R \tanh(\tilde R Q^\top x + b), \qquad
        \log|\det| = \sum_{m=1}^{M} \log\left(1 + (1 - h_m^2)\, R_{mm} \tilde R_{mm}\right)

    with h the tanh, Q of M orthonormal columns, R and R̃ upper triangular with diagonals in (−1, 1), so that f is
    invertible. R = 0 is the identity, near which it starts. Drawing takes one pass. There is no inverse in closed form:
    only its own draws can be scored, which is all that a pathwise gradient needs.

    Args:
        features: size D of the vectors.
        context: size of the context from which a network computes Q, R, R̃ and b for each batch element; 0 to learn
            them.
        hidden: widths of that network; empty for a linear map.
        kind: ``"orthogonal"``: Q is the orthogonal factor of a D × M matrix; ``"householder"``: Q is a product of
            reflections and M = D; ``"triangular"``: Q is the identity, or reverses the features, and M = D.
        columns: number M, at most D, for the orthogonal kind; ``None`` for the smaller of D and 32.
        reflections: number of reflections for the Householder kind; ``None`` for 4.
        reverse: whether the triangular kind reverses the features; a stack alternates.

    Raises:
        ArgumentError: an argument is out of range, or of another kind.

    References:
        van den Berg et al. 2018, https://arxiv.org/abs/1803.05649. The orthogonal factor is that of a QR
        decomposition, exact in one step, where the paper iterates towards an orthogonal matrix.

    Example:
        >>> layer = Sylvester(6, context=5, columns=4)
        >>> transform = layer(torch.randn(7, 5))   # a flow for each of 7 data points
        >>> x = torch.randn(2, 7, 6)               # two particles of each
        >>> transform(x).shape
        torch.Size([2, 7, 6])
    """

    scores = "own draws"
    reverses = True

    def __init__(
        self,
        features: int,
        context: int = 0,
        hidden: Sequence[int] = (),
        kind: Kind = "orthogonal",
        columns: int | None = None,
        reflections: int | None = None,
        reverse: bool = False,
    ) -> None:
        if kind not in ("orthogonal", "householder", "triangular"):
            raise unknown_name("kind of Sylvester flow", kind, ("orthogonal", "householder", "triangular"))
        for argument, given, owner in (("columns", columns, "orthogonal"), ("reflections", reflections, "householder")):
            if given is not None and kind != owner:
                raise ArgumentError(f"{argument} is {given!r}; it is for kind={owner!r}, not {kind!r}. Leave it out.")
        require_count("features", features)
        units, rotation = features, {}
        if kind == "orthogonal":
            units = require_count("columns", min(features, 32) if columns is None else columns)
            if units > features:
                raise ArgumentError(f"columns is {columns}; it must be at most features, {features}")
            rotation = {"columns": torch.randn(features, units)}
        elif kind == "householder":
            count = require_count("reflections", 4 if reflections is None else reflections)
            rotation = {"normals": paired_normals(count, features)}
        square = SMALL * torch.randn(units, units)
        triangles = {"square": square, "diagonal": torch.ones(units), "bias": torch.zeros(units)}
        super().__init__(features, context, hidden, **triangles, **rotation)
        self.variant = kind
        self.reverse = reverse

    def transform(self, c: Tensor | None) -> Transform:
        """The transform with the parameters that belong to the context."""
        triangular = _Flipped if self.reverse else _Triangular
        kind = {"orthogonal": _Orthogonal, "householder": _Householder, "triangular": triangular}[self.variant]
        return kind(**self.parameters_at(c))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix `*batch x i x j` times vector `*particles x *batch x j`; no matrix is copied for each particle."""
    return torch.einsum("...ij,...j->...i", matrix, vector)
