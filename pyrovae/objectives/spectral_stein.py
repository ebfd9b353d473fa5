"""The spectral Stein gradient estimator: the score of a distribution that is known by its samples alone."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrovae.errors import ArgumentError, require_count

__all__ = ["require_eigenfunctions", "spectral_stein"]


@torch.no_grad()
def spectral_stein(
    samples: Tensor,
    at: Tensor | None = None,
    *,
    eigenfunctions: int | float = 0.99,
    ridge: float = 0.0,
    width: float | Tensor | None = None,
) -> Tensor:
    r"""Estimates the score ``∇ log q`` of an implicit distribution from S samples of it.

    The score is expanded in the eigenfunctions of a kernel under q, which the Nyström method takes from the
    eigenvectors ``u_j`` and eigenvalues ``λ_j`` of the Gram matrix K of the samples; its coefficients follow from
    Stein's identity, without the score itself:

    .. math::
        \nabla_i \log q(x) \approx \sum_{j=1}^J \beta_{ij} \psi_j(x), \qquad
        \psi_j(x) = \frac{\sqrt S}{\lambda_j} \sum_m u_{jm} k(x, x_m), \qquad
        \beta_{ij} = -\frac{1}{S} \sum_m \nabla_i \psi_j(x_m)

    The kernel is ``k(x, x') = exp(−|x − x'|² / 2σ²)``. Where samples are few for their dimension, or the distribution
    is much narrower in some directions than in others, the estimate is too small in those that the J leading
    eigenfunctions do not resolve. No gradient flows through it. The eigenvalues are the one step for which the host
    waits for a GPU; how many eigenfunctions count is a mask, never a size.

    Args:
        samples: `*batch x S x d`, at least 2 of them.
        at: where the score is wanted, `*batch x m x d`; ``None`` for the samples.
        eigenfunctions: their number J; or, as a number between 0 and 1, the share of the sum of all eigenvalues that
            the J leading ones reach.
        ridge: η, added to the diagonal of the Gram matrix, at least 0.
        width: σ, in units of the samples; ``None`` for the median distance between them (and the points ``at``).

    Returns:
        The estimated score, `*batch x m x d`; zero where all samples are equal.

    Raises:
        ArgumentError: an argument is out of range.

    References:
        Shi, Sun & Zhu 2018, https://arxiv.org/abs/1806.02925.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> points = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> spectral_stein(torch.randn(500, 1), points, eigenfunctions=6).squeeze().round(decimals=1).abs()   # −x
        tensor([1., 0., 1.])
    """
    require_eigenfunctions(eigenfunctions)
    if samples.dim() < 2 or samples.shape[-2] < 2:
        raise ArgumentError(f"samples has shape {tuple(samples.shape)}; it must be (…, S, d), with at least 2 samples")
    if not ridge >= 0.0:
        raise ArgumentError(f"ridge is {ridge!r}; it must be a number, at least 0")
    size = samples.shape[-2]
    centre = samples.mean(-2, keepdim=True)  # which keeps rounding small
    samples, at = samples - centre, samples - centre if at is None else at - centre
    if width is None:
        width = _median_distance(torch.cat([samples, at], -2))
    gram = _rbf(samples, samples, width)
    values, vectors = torch.linalg.eigh(gram + ridge * torch.eye(size, dtype=gram.dtype, device=gram.device))
    inverse = torch.where(_leading(values, eigenfunctions), 1.0 / values, 0.0).unsqueeze(-2)
    features = size**0.5 * _rbf(at, samples, width) @ (vectors * inverse)  # ψ_j(x), m x S
    slope = (gram @ samples - gram.sum(-1, keepdim=True) * samples) / width**2  # −Σ_m ∇ k(x_m, x_n), S x d
    return features @ (vectors * inverse).mT @ slope / size**0.5


def require_eigenfunctions(eigenfunctions: int | float) -> None:
    """Raises an error unless it is a number of eigenfunctions, or a share between 0 and 1."""
    if isinstance(eigenfunctions, float):
        if not 0.0 < eigenfunctions < 1.0:
            raise ArgumentError(
                f"eigenfunctions is {eigenfunctions!r}; it must be a whole number, or a share between 0 and 1"
            )
    else:
        require_count("eigenfunctions", eigenfunctions, 1, ", or a share between 0 and 1")


def _rbf(x: Tensor, y: Tensor, width: float | Tensor) -> Tensor:
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return (-0.5 * (distance / width).square()).exp()


def _median_distance(points: Tensor) -> Tensor:
    """The median over pairs, `*batch x 1 x 1`; 1 where it is 0."""
    above = torch.triu_indices(points.shape[-2], points.shape[-2], 1, device=points.device)
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")[..., above[0], above[1]]
    median = distance.median(-1).values[..., None, None]
    return torch.where(median > 0, median, torch.ones_like(median))


def _leading(values: Tensor, eigenfunctions: int | float) -> Tensor:
    """Which of the eigenvalues, in ascending order, count: the fewest that reach the share, or the largest J.

    Those within rounding of zero never do.
    """
    positive = values > values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:]
    if isinstance(eigenfunctions, int):
        order = torch.arange(values.shape[-1], device=values.device)
        return positive & (order >= values.shape[-1] - eigenfunctions)
    above = values.flip(-1).cumsum(-1).flip(-1) - values  # the sum of those that are larger
    return positive & (above < eigenfunctions * values.sum(-1, keepdim=True))
