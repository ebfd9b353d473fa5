"""Paths, grids and arithmetic of latent vectors."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyrovae.errors import ArgumentError, require_count, unknown_name

__all__ = ["Path", "analogy", "interpolate", "manifold_grid", "move", "traverse"]

Path = Literal["straight", "great-circle"]


def interpolate(z0: Tensor, z1: Tensor, steps: int = 10, path: Path = "straight") -> Tensor:
    r"""Points at equal steps from one latent vector to another, both ends included.

    Along a great circle the direction turns at a constant rate by the angle ω between the two, and the norm changes
    linearly:

    .. math:: z(t) = \big((1 - t) \lVert z_0 \rVert + t \lVert z_1 \rVert\big)
        \big(\cos(t\omega)\, u_0 + \sin(t\omega)\, u_\perp\big), \qquad t = 0, \dots, 1

    with the directions u₀ of z₀ and u_⊥ of the part of z₁ that is perpendicular to it. In many dimensions a standard
    normal prior has its mass near a sphere, which such a path does not leave. Opposite vectors leave the plane of the
    turn open: it then goes through the axis that is most nearly perpendicular to z₀. A path from or to zero, which has
    no direction, is straight.

    Args:
        z0: A `*batch x d` tensor.
        z1: A `*batch x d` tensor; the batch dimensions of the two broadcast.
        steps: number of points, at least 2.
        path: ``"straight"`` or ``"great-circle"``.

    Returns:
        A `*batch x steps x d` tensor.

    Raises:
        ArgumentError: ``steps`` is below 2, the path is unknown, or the vectors differ in length.

    References:
        Shoemake 1985, https://doi.org/10.1145/325165.325242; White 2016, "Sampling generative networks",
        https://arxiv.org/abs/1609.04468.

    Example:
        >>> interpolate(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0]), steps=3)
        tensor([[2., 0.],
                [1., 2.],
                [0., 4.]])
        >>> interpolate(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0]), steps=3, path="great-circle")[1]
        tensor([2.1213, 2.1213])
    """
    require_count("steps", steps, 2)
    if path not in get_args(Path):
        raise unknown_name("path", path, get_args(Path))
    if z0.shape[-1:] != z1.shape[-1:]:
        raise ArgumentError(
            f"z0 has shape {tuple(z0.shape)} and z1 {tuple(z1.shape)}; their last dimensions must agree"
        )
    z0, z1 = torch.broadcast_tensors(z0, z1)
    z0, z1 = z0.unsqueeze(-2), z1.unsqueeze(-2)
    t = torch.linspace(0.0, 1.0, steps, dtype=z0.dtype, device=z0.device).unsqueeze(-1)
    if path == "straight":
        return torch.lerp(z0, z1, t)
    radius0, radius1 = z0.norm(dim=-1, keepdim=True), z1.norm(dim=-1, keepdim=True)
    start, end = torch.where(radius0 == 0, z1, z0), torch.where(radius1 == 0, z0, z1)
    first, last = _direction(start), _direction(end)
    cosine = (first * last).sum(-1, keepdim=True)
    across = last - cosine * first
    angle = torch.atan2(across.norm(dim=-1, keepdim=True), cosine)
    turn = torch.cos(t * angle) * first + torch.sin(t * angle) * _perpendicular(across, first)
    return torch.lerp(radius0, radius1, t) * turn


def _direction(z: Tensor) -> Tensor:
    return normalize(z, dim=-1, eps=torch.finfo(z.dtype).tiny)


def _perpendicular(across: Tensor, first: Tensor) -> Tensor:
    """The direction of ``across``; where that is but rounding, one perpendicular to ``first``."""
    nearest = torch.zeros_like(first).scatter(-1, first.abs().argmin(-1, keepdim=True), 1.0)
    other = nearest - (nearest * first).sum(-1, keepdim=True) * first
    rounding = across.norm(dim=-1, keepdim=True) < 10 * torch.finfo(first.dtype).eps
    return _direction(torch.where(rounding, other, across))


def traverse(z: Tensor, dimension: int, values: Tensor) -> Tensor:
    """Latent vectors with one coordinate set to each of several values in turn.

    Args:
        z: A `*batch x d` tensor.
        dimension: the coordinate, counted from 0.
        values: A `v` tensor, or a sequence of numbers.

    Returns:
        A `*batch x v x d` tensor.

    Raises:
        ArgumentError: there is no such dimension, or ``values`` is no row of numbers.

    Example:
        >>> traverse(torch.tensor([5.0, 6.0]), 1, torch.tensor([-1.0, 0.0, 1.0]))
        tensor([[ 5., -1.],
                [ 5.,  0.],
                [ 5.,  1.]])
    """
    _require_dimension("dimension", dimension, z.shape[-1])
    values = torch.as_tensor(values, dtype=z.dtype, device=z.device)
    if values.dim() != 1 or len(values) == 0:
        raise ArgumentError(f"values has shape {tuple(values.shape)}; it must be a row of numbers, at least one")
    moved = z.unsqueeze(-2).repeat(*[1] * (z.dim() - 1), len(values), 1)
    moved[..., dimension] = values
    return moved


def manifold_grid(
    centre: Tensor, size: int = 15, dims: tuple[int, int] = (0, 1), scale: float | Tensor = 1.0
) -> Tensor:
    r"""A grid in two latent dimensions at Gaussian quantiles; the others stay at the centre.

    .. math:: z_k = \mu + \sigma\, \Phi^{-1}\!\left(\frac{k + 1/2}{n}\right), \qquad k = 0, \dots, n - 1

    for n rows and columns, so that as many draws from N(μ, σ²) fall around one point as around another.

    Args:
        centre: μ, a `d` tensor: the mean of the prior.
        size: rows and columns of the grid, at least 2.
        dims: the dimensions that grow along the columns and along the rows, counted from 0.
        scale: σ, a number or a `d` tensor: the standard deviation of the prior.

    Returns:
        A `size x size x d` tensor: ``grid[row, column]`` is at quantile ``column`` of ``dims[0]`` and ``row`` of
        ``dims[1]``.

    Raises:
        ArgumentError: ``size`` is below 2, ``centre`` is no vector, or ``dims`` are no two dimensions of it.

    References:
        Kingma & Welling 2014, figure 4, https://arxiv.org/abs/1312.6114.

    Example:
        >>> grid = manifold_grid(torch.zeros(3), size=3)
        >>> grid[0, 2]   # the sixth part of the mass on either side of them
        tensor([ 0.9674, -0.9674,  0.0000])
    """
    require_count("size", size, 2)
    if centre.dim() != 1:
        raise ArgumentError(f"centre has shape {tuple(centre.shape)}; it must be one latent vector, `d`")
    for dimension in dims:
        _require_dimension("dims", dimension, len(centre))
    if len(dims) != 2 or dims[0] == dims[1]:
        raise ArgumentError(f"dims is {tuple(dims)}; it must hold two different dimensions")
    levels = (torch.arange(size, dtype=centre.dtype, device=centre.device) + 0.5) / size
    quantiles = torch.special.ndtri(levels)
    scale = torch.as_tensor(scale, dtype=centre.dtype, device=centre.device).expand_as(centre)
    grid = centre.repeat(size, size, 1)
    grid[..., dims[0]] += scale[dims[0]] * quantiles
    grid[..., dims[1]] += scale[dims[1]] * quantiles.unsqueeze(-1)
    return grid


def move(z: Tensor, vector: Tensor, strength: float | Tensor) -> Tensor:
    """Latent vectors moved along a direction, ``z + strength * vector``.

    Args:
        z: A `*batch x d` tensor.
        vector: A `d` tensor, such as an attribute's.
        strength: a number, or an `s` tensor of several.

    Returns:
        `*batch x d` for a number, `*batch x s x d` for several.

    Raises:
        ArgumentError: ``vector`` or ``strength`` has another shape.

    Example:
        >>> move(torch.zeros(2), torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.5]))
        tensor([[-1.0000, -3.0000],
                [ 0.5000,  1.5000]])
    """
    strengths = torch.as_tensor(strength, dtype=z.dtype, device=z.device)
    if vector.shape != z.shape[-1:]:
        raise ArgumentError(f"vector has shape {tuple(vector.shape)}; z needs one of shape {tuple(z.shape[-1:])}")
    if strengths.dim() > 1:
        raise ArgumentError(f"strength has shape {tuple(strengths.shape)}; it must be a number or a row of numbers")
    steps = strengths.unsqueeze(-1) * vector.to(z)
    return z + steps if strengths.dim() == 0 else z.unsqueeze(-2) + steps


def analogy(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """What is to ``c`` as ``b`` is to ``a``: ``c + (b - a)``.

    Args:
        a: A `*batch x d` tensor of latent vectors.
        b: The same, of what ``a`` became.
        c: The same, of what shall change alike; the batch dimensions of the three broadcast.

    Returns:
        A `*batch x d` tensor.

    References:
        Mikolov et al. 2013, "Linguistic regularities in continuous space word representations",
        https://aclanthology.org/N13-1090.

    Example:
        >>> analogy(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0]), torch.tensor([5.0, 0.0]))
        tensor([5., 2.])
    """
    return c + (b - a)


def _require_dimension(argument: str, dimension: int, latent_dim: int) -> None:
    if not isinstance(dimension, int) or isinstance(dimension, bool) or not 0 <= dimension < latent_dim:
        raise ArgumentError(f"{argument} has {dimension!r}; the latent dimensions are 0 … {latent_dim - 1}")
