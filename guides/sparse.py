"""Gaussian posterior with a sparse precision matrix, whose zeros are the model's conditional independences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, ClassVar

import numpy as np
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.infer.autoguide import AutoContinuous
from pyro.nn import PyroParam
from scipy import sparse
from scipy.sparse.linalg import splu, spsolve_triangular
from torch import Tensor, nn

from pyrovae.errors import (
    ArgumentError,
    CompilationError,
    ModelGuideError,
    require_count,
    require_positive,
    unknown_name,
)
from pyrovae.guides.gaussian import FirstCall, Init, Program, log_joint
from pyrovae.registry import GUIDES

__all__ = ["SparsePrecision", "SparsePrecisionNormal", "unit_triangular_solve"]

_STRUCTURES = ("auto", "banded", "block-arrow")
_POINTS = 2  # at which the Hessian is looked at; an element that is zero at one by chance is not at the other
_ROUNDING = 1000.0  # units of rounding, relative to the rows' largest elements, below which an element counts as zero
_CHUNK = 2**22  # numbers of the Hessian that are held at a time
_RIDGE = 1e-8


# ---------------------------------------------------------------------------------------------------------
# The triangular solve


@torch.library.custom_op("pyrovae::unit_triangular_solve", mutates_args=())
def unit_triangular_solve(
    values: Tensor, rows: Tensor, cols: Tensor, position: Tensor, right: Tensor, transpose: bool
) -> Tensor:
    r"""Solves ``U y = b`` or ``Uᵀ y = b``, U sparse with unit diagonal and lower triangular in some order.

    The time is linear in the non-zeros. SciPy solves on the CPU, also for tensors that lie elsewhere.

    Args:
        values: `(nonzeros,)`, the elements of U below the diagonal.
        rows: `(nonzeros,)`, their rows.
        cols: `(nonzeros,)`, their columns.
        position: `(n,)`, the place of each row and column in the order in which U is lower triangular.
        right: `*batch x n`, the right-hand sides b.
        transpose: whether to solve with Uᵀ.

    Returns:
        y, `*batch x n`.

    Raises:
        CompilationError: it runs while a CUDA graph is recorded, which cannot hold work of the host.

    Example:
        >>> rows, cols, position = torch.tensor([1]), torch.tensor([0]), torch.arange(2)
        >>> unit_triangular_solve(torch.tensor([0.5]), rows, cols, position, torch.ones(2), False)
        tensor([1.0000, 0.5000])
    """
    if right.is_cuda and torch.cuda.is_current_stream_capturing():
        raise CompilationError(
            "SparsePrecision solves on the host, which no CUDA graph can hold; on a GPU fit it with compile=False"
        )
    place, n = position.cpu().numpy(), len(position)
    i, j = place[rows.cpu().numpy()], place[cols.cpu().numpy()]
    diagonal = np.arange(n)
    elements = np.concatenate([values.detach().cpu().numpy(), np.ones(n, dtype=_numpy_type(values))])
    at = (np.concatenate([i, diagonal]), np.concatenate([j, diagonal]))
    factor = sparse.csr_matrix((elements, at[::-1] if transpose else at), shape=(n, n))
    ordered = np.empty((n, right.numel() // n), dtype=_numpy_type(right))
    ordered[place] = right.detach().cpu().numpy().reshape(-1, n).T
    solved = spsolve_triangular(factor, ordered, lower=not transpose, unit_diagonal=True, overwrite_b=True)
    return torch.from_numpy(np.ascontiguousarray(solved[place].T)).reshape(right.shape).to(right.device)


def _numpy_type(tensor: Tensor) -> Any:
    return np.float64 if tensor.dtype == torch.float64 else np.float32


@unit_triangular_solve.register_fake
def _(values: Tensor, rows: Tensor, cols: Tensor, position: Tensor, right: Tensor, transpose: bool) -> Tensor:
    return right.new_empty(right.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, rows, cols, position, _, ctx.transpose = inputs
    ctx.save_for_backward(values, rows, cols, position, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """With y = U⁻¹ b, the gradient of b is w = U⁻ᵀ g, and that of U is −w yᵀ at the non-zeros."""
    values, rows, cols, position, solution = ctx.saved_tensors
    adjoint = unit_triangular_solve(values, rows, cols, position, gradient, not ctx.transpose)
    left, right = (solution, adjoint) if ctx.transpose else (adjoint, solution)
    products = left[..., rows] * right[..., cols]
    return -products.sum_to_size(len(rows)), None, None, None, adjoint, None


unit_triangular_solve.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------
# The distribution


class SparsePrecisionNormal(TorchDistribution):
    r"""Gaussian whose precision matrix has a sparse triangular factor T = diag(1/s) U.

    .. math:: z = \mu + T^{-\top} \varepsilon = \mu + s \odot U^{-\top} \varepsilon, \qquad \Omega = T T^\top, \qquad
        \log q(z) = -\sum_i \log s_i - \tfrac{n}{2} \log 2\pi - \tfrac12 \lVert T^\top (z - \mu) \rVert^2

    U has a unit diagonal and is lower triangular in the order that ``position`` tells. Sampling and log-density take
    time linear in the non-zeros.

    Args:
        loc: `*batch x n`, the mean μ.
        scale: `(n,)`, s, the standard deviation of each coordinate given those after it in the order.
        values: `(nonzeros,)`, the elements of U below the diagonal.
        rows: `(nonzeros,)`, their rows.
        cols: `(nonzeros,)`, their columns.
        position: `(n,)`, the place of each coordinate in the order.

    References:
        Tan & Nott 2018, https://arxiv.org/abs/1605.05622.

    Example:
        >>> rows, cols, position = torch.tensor([1]), torch.tensor([0]), torch.arange(2)
        >>> q = SparsePrecisionNormal(torch.zeros(2), torch.ones(2), torch.tensor([-0.5]), rows, cols, position)
        >>> q.precision_matrix
        tensor([[ 1.0000, -0.5000],
                [-0.5000,  1.2500]])
        >>> q.rsample((7,)).shape, q.log_prob(torch.zeros(7, 2)).shape
        (torch.Size([7, 2]), torch.Size([7]))
    """

    arg_constraints: ClassVar = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "values": constraints.real_vector,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        values: Tensor,
        rows: Tensor,
        cols: Tensor,
        position: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale, self.values = loc, scale, values
        self.rows, self.cols, self.position = rows, cols, position
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> SparsePrecisionNormal:
        new = self._get_checked_instance(SparsePrecisionNormal, _instance)
        loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        new.__init__(loc, self.scale, self.values, self.rows, self.cols, self.position, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws `*sample_shape x *batch x n`, differentiable in every parameter."""
        noise = torch.randn(
            self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device
        )
        return self.loc + self.scale * self._solve(noise, transpose=True)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, `*batch`, of `*batch x n` values."""
        if self._validate_args:
            self._validate_sample(value)
        scaled = (value - self.loc) / self.scale
        white = scaled.index_add(-1, self.cols, self.values * scaled[..., self.rows])  # Uᵀ scaled
        constant = 0.5 * self.event_shape[0] * math.log(2 * math.pi)
        return -0.5 * white.square().sum(-1) - self.scale.log().sum() - constant

    def _solve(self, right: Tensor, transpose: bool) -> Tensor:
        return unit_triangular_solve(self.values, self.rows, self.cols, self.position, right, transpose)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variances, `*batch x n`, in n solves: time O(n · nonzeros), memory linear."""
        n, total = self.event_shape[0], torch.zeros_like(self.scale)
        for start in range(0, n, max(1, _CHUNK // n)):
            unit = _unit_rows(start, min(n, start + max(1, _CHUNK // n)), self.scale)
            total = total + self._solve(unit, transpose=True).square().sum(0)
        return (self.scale.square() * total).expand(self.loc.shape)

    @property
    def precision_matrix(self) -> Tensor:
        """Ω as a dense matrix, `n x n`, for small n."""
        n = self.event_shape[0]
        factor = torch.eye(n, dtype=self.scale.dtype, device=self.scale.device)
        factor = factor.index_put((self.rows, self.cols), self.values) / self.scale.unsqueeze(-1)
        return factor @ factor.mT


def _unit_rows(start: int, stop: int, like: Tensor) -> Tensor:
    """Rows ``start`` to ``stop`` of the identity."""
    rows = torch.zeros(stop - start, len(like), dtype=like.dtype, device=like.device)
    return rows.index_put_((torch.arange(stop - start), torch.arange(start, stop)), rows.new_ones(()))


# ---------------------------------------------------------------------------------------------------------
# The guide


@GUIDES.register
class SparsePrecision(FirstCall, AutoContinuous):
    r"""Gaussian over all latents together whose precision matrix has the zeros of the model's own structure.

    .. math:: u = \mu + T^{-\top} \varepsilon, \qquad \Omega = T T^\top, \qquad T = \mathrm{diag}(1/s)\, U

    Where two coordinates are independent given all others, Ω has a zero. ``structure`` tells which pairs are not;
    T, lower triangular with positive diagonal, then has the non-zeros of the Cholesky factor of such an Ω, in an order
    of the coordinates that keeps them few. So the guide holds *every* Gaussian with these independences, and
    sampling and log-density take time linear in the non-zeros of T (about 2n for a chain).

    Args:
        model: Pyro model with continuous latents.
        structure: which pairs of coordinates may depend on each other, given the rest.
            ``"auto"``: those where the Hessian of the log joint density is not zero at two random points; time O(n²)
            once, at the first call. It sees chains inside a vector-valued site. It misses a dependence that no second
            derivative shows (a Laplace density) and one that the data of the first call do not show.
            ``"block-arrow"``: all pairs but those to which a plate that they share gives different indices.
            ``"banded"``: neighbours up to ``bandwidth`` apart, all sites laid end to end.
            A boolean matrix `n x n`, dense (tensor or array) or of ``scipy.sparse``: its non-zeros, and their mirror.
        bandwidth: for ``"banded"``, the largest distance of dependent coordinates; 1 unless given.
        init_scale: initial s, the standard deviation of a coordinate given those after it; U starts at the identity.
        init_loc_fn: initial value of a site, one of Pyro's ``init_to_…``; ``None`` for the model's
            ``start_values``, or else ``init_to_median``.

    Raises:
        ArgumentError: an argument is out of range, or, at the first call, a matrix of another size.
        ModelGuideError: at the first call, a latent site that is discrete, in a sequential or in a subsampled plate.
        RuntimeError: at the first call, a model without latents.

    References:
        Tan & Nott 2018, https://arxiv.org/abs/1605.05622.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
        ...     pyro.factor("chain", -(z[..., 1:] - z[..., :-1]).square().sum(-1))
        ...     pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)
        >>> guide = SparsePrecision(model)
        >>> guide(torch.zeros(100))["z"].shape
        torch.Size([100])
        >>> len(guide.rows)   # below the diagonal of T
        99
    """

    rows: Tensor
    cols: Tensor
    position: Tensor

    def __init__(
        self,
        model: Program,
        structure: Any = "auto",
        bandwidth: int | None = None,
        init_scale: float = 0.1,
        *,
        init_loc_fn: Init | None = None,
    ) -> None:
        if isinstance(structure, str) and structure not in _STRUCTURES:
            raise unknown_name("structure", structure, _STRUCTURES)
        if bandwidth is not None:
            if not (isinstance(structure, str) and structure == "banded"):
                raise ArgumentError(f"bandwidth={bandwidth!r} goes with structure='banded' only")
            require_count("bandwidth", bandwidth, 0)
        self._init_scale = require_positive("init_scale", init_scale)
        if not isinstance(structure, str):
            structure = _as_sparse(structure)
        self._structure, self._bandwidth = structure, 1 if bandwidth is None else bandwidth
        super().__init__(model, init_loc_fn=init_loc_fn)

    def _make_parameters(self, *args: Any, **kwargs: Any) -> None:
        loc = self._init_loc()
        if self._loaded:  # a saved guide keeps the structure that it was saved with
            rows, cols, position = (self._loaded[name] for name in ("rows", "cols", "position"))
        else:
            rows, cols, position = (torch.from_numpy(part) for part in cholesky_pattern(self._pattern(*args, **kwargs)))
        for name, index in (("rows", rows), ("cols", cols), ("position", position)):
            self.register_buffer(name, index.to(loc.device))
        self.loc = nn.Parameter(loc)
        self.scale = PyroParam(torch.full_like(loc, self._init_scale), constraints.softplus_positive)
        self.values = nn.Parameter(loc.new_zeros(len(rows)))

    def _pattern(self, *args: Any, **kwargs: Any) -> sparse.csr_matrix:
        """Which pairs of coordinates may depend on each other, `latent_dim x latent_dim`."""
        n = self.latent_dim
        if not isinstance(self._structure, str):
            if self._structure.shape != (n, n):
                raise ArgumentError(f"structure has shape {self._structure.shape}; the model's latents need {(n, n)}")
            return self._structure
        if self._structure == "banded":
            width = min(self._bandwidth, n - 1)
            offsets = range(-width, width + 1)
            return sparse.diags([np.ones(n - abs(k)) for k in offsets], list(offsets), format="csr")
        if self._structure == "block-arrow":
            return self._by_plates()
        return self._by_hessian(*args, **kwargs)

    def _by_hessian(self, *args: Any, **kwargs: Any) -> sparse.csr_matrix:
        """Where the Hessian of the log joint density is not zero, computed a block of rows at a time."""
        n, parts = self.latent_dim, []
        size = max(1, _CHUNK // n)
        with torch.enable_grad():
            for _ in range(_POINTS):
                start = self._init_loc()
                point = (start + torch.randn_like(start)).requires_grad_()
                (slope,) = torch.autograd.grad(log_joint(self, point, *args, **kwargs), point, create_graph=True)
                if not slope.requires_grad:  # linear in the latents
                    continue
                for first in range(0, n, size):
                    unit = _unit_rows(first, min(n, first + size), point)
                    (block,) = torch.autograd.grad(
                        slope, point, unit, retain_graph=True, is_grads_batched=True, materialize_grads=True
                    )
                    part = block.detach().to_sparse().cpu()
                    (row, col), value = part.indices().numpy(), part.values().abs().numpy()
                    parts.append(sparse.csr_matrix((value, (row + first, col)), shape=(n, n)))
        if not parts:
            return sparse.csr_matrix((n, n))
        hessian = reduce(lambda one, two: one.maximum(two), parts).tocoo()
        if not np.isfinite(hessian.data).all():
            raise ModelGuideError(
                "the Hessian of the log joint density is not finite at a random point near the start, so that"
                " structure='auto' cannot tell the dependences from it. Give another structure ('banded',"
                " 'block-arrow' or a matrix), or another init_loc_fn."
            )
        largest = hessian.max(axis=1).toarray().ravel()
        rounding = _ROUNDING * torch.finfo(point.dtype).eps * np.sqrt(largest[hessian.row] * largest[hessian.col])
        real = hessian.data > rounding
        return sparse.csr_matrix((hessian.data[real], (hessian.row[real], hessian.col[real])), shape=(n, n))

    def _by_plates(self) -> sparse.csr_matrix:
        """All pairs whose indices agree in every plate that they share."""
        sites = list(self.prototype_trace.iter_stochastic_nodes())
        indices = [self._plate_indices(name, site) for name, site in sites]
        return sparse.bmat([[_agreeing(one, two) for two in indices] for one in indices], format="csr")

    def _plate_indices(self, name: str, site: dict[str, Any]) -> dict[str, np.ndarray]:
        """For each plate of a site, the index that it gives to every unconstrained coordinate."""
        shape = tuple(self._unconstrained_shapes[name])
        event = site["fn"].event_dim + len(shape) - site["value"].dim()
        found = {"": np.zeros(int(np.prod(shape)), dtype=int)}  # as if all sites shared a plate of one element
        for frame in site["cond_indep_stack"]:
            axis = len(shape) - event + frame.dim
            along = np.arange(shape[axis]).reshape([-1 if k == axis else 1 for k in range(len(shape))])
            found[frame.name] = np.broadcast_to(along, shape).ravel()
        return found

    def get_posterior(self, *args: Any, **kwargs: Any) -> SparsePrecisionNormal:
        """The posterior over the unconstrained latents, `(latent_dim,)`."""
        return SparsePrecisionNormal(self.loc, self.scale, self.values, self.rows, self.cols, self.position)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.loc, self.get_posterior().variance.sqrt()


def cholesky_pattern(pattern: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the Cholesky factor of a matrix of that pattern is not zero, in an order that keeps it sparse.

    Args:
        pattern: sparse matrix `n x n`; its non-zeros and their mirror count, the diagonal always.

    Returns:
        Rows and columns of the non-zeros below the diagonal, in the coordinates of ``pattern``; and the place of each
        coordinate in the order (minimum degree) in which the factor is lower triangular.
    """
    linked = sparse.csc_matrix(((abs(pattern) + abs(pattern).T) > 0).astype(float))
    linked.setdiag(0)
    linked.eliminate_zeros()
    degrees = np.asarray(linked.sum(axis=0)).ravel()
    # Every update of a graph Laplacian's factors is negative, so that none cancels. The ridge makes it regular, and is
    # so small that what passes through a long path of eliminated coordinates does not underflow.
    matrix = sparse.diags(degrees + _RIDGE, format="csc") - linked
    solver = splu(matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    position = solver.perm_c.astype(np.int64)
    original = np.argsort(position)
    lower = sparse.tril(solver.L, k=-1, format="coo")
    return original[lower.row], original[lower.col], position


def _agreeing(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> sparse.csr_matrix:
    """For the coordinates of two sites, the pairs with the same index in every shared plate."""
    shared = sorted(one.keys() & two.keys())
    sizes = [1 + max(one[name].max(initial=0), two[name].max(initial=0)) for name in shared]

    def members(indices: dict[str, np.ndarray]) -> sparse.csr_matrix:
        group = reduce(lambda key, pair: key * pair[1] + indices[pair[0]], zip(shared, sizes, strict=True), 0)
        count = len(indices[""])
        return sparse.csr_matrix((np.ones(count), (np.arange(count), group)), shape=(count, int(np.prod(sizes))))

    return members(one) @ members(two).T


def _as_sparse(structure: Any) -> sparse.csr_matrix:
    """A user's matrix as a sparse one of numbers."""
    if isinstance(structure, Tensor):
        structure = structure.detach().cpu().numpy()
    try:
        matrix = structure if sparse.issparse(structure) else np.asarray(structure, dtype=float)
    except (TypeError, ValueError):
        matrix = None
    if matrix is None or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        said = getattr(structure, "shape", structure)
        raise ArgumentError(
            f"structure is {said!r}; it must be one of {', '.join(map(repr, _STRUCTURES))}, or a square boolean matrix"
            " (tensor, array or scipy.sparse) that is true where two coordinates depend on each other"
        )
    return sparse.csr_matrix(matrix, dtype=float)
