"""Sparse precision: the solve against dense algebra, the pattern against the model, the fit against Kalman."""

from __future__ import annotations

import math
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import sparse
from test_gaussian import fit

import pyrovae
from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.guides.sparse import SparsePrecision, SparsePrecisionNormal, cholesky_pattern, unit_triangular_solve

PHI, Q, R = 0.9, 0.5, 1.0  # AR(1): coefficient, variance of the innovations, variance of the noise


@pytest.fixture(autouse=True)
def parameters_in_modules():
    with pyro.settings.context(module_local_params=True):
        yield


def random_factor(n=7, density=0.3, dtype=torch.float64):
    """A random pattern with its fill-in, and elements below the diagonal."""
    links = sparse.csr_matrix((np.random.default_rng(0).random((n, n)) < density).astype(float))
    rows, cols, position = (torch.from_numpy(part) for part in cholesky_pattern(links))
    values = 0.5 * torch.randn(len(rows), dtype=dtype)
    dense = torch.eye(n, dtype=dtype).index_put((rows, cols), values)
    return links, values, rows, cols, position, dense


def chain(n):
    """AR(1) plus noise; a vector-valued latent of stationary density, a chain."""

    def model(y):
        z = pyro.sample("z", dist.Normal(y.new_zeros(n), 1.0).to_event(1).mask(False))
        start = dist.Normal(y.new_zeros(()), (Q / (1 - PHI**2)) ** 0.5).log_prob(z[..., 0])
        moves = dist.Normal(PHI * z[..., :-1], Q**0.5).log_prob(z[..., 1:]).sum(-1)
        pyro.factor("prior", start + moves)
        pyro.sample("y", dist.Normal(z, R**0.5).to_event(1), obs=y)

    return model


def simulated(n):
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, n, generator=generator, dtype=torch.float64)
    z = noise[0].clone() * Q**0.5
    z[0] *= (1 - PHI**2) ** -0.5
    for t in range(1, n):
        z[t] += PHI * z[t - 1]
    return z + R**0.5 * noise[1]


def kalman_smoother(y):
    """Means and variances of z given all y (Rauch, Tung & Striebel 1965), and log p(y)."""
    n, evidence = len(y), 0.0
    mean, variance, ahead_mean, ahead_variance = (np.zeros(n) for _ in range(4))
    for t in range(n):
        ahead_mean[t] = PHI * mean[t - 1] if t else 0.0
        ahead_variance[t] = PHI**2 * variance[t - 1] + Q if t else Q / (1 - PHI**2)
        total, error = ahead_variance[t] + R, y[t] - ahead_mean[t]
        evidence -= 0.5 * (math.log(2 * math.pi * total) + error**2 / total)
        mean[t] = ahead_mean[t] + ahead_variance[t] / total * error
        variance[t] = ahead_variance[t] * R / total
    for t in range(n - 2, -1, -1):
        gain = PHI * variance[t] / ahead_variance[t + 1]
        mean[t] += gain * (mean[t + 1] - ahead_mean[t + 1])
        variance[t] += gain**2 * (variance[t + 1] - ahead_variance[t + 1])
    return torch.from_numpy(mean), torch.from_numpy(variance), evidence


# ---------------------------------------------------------------------------------------------------------
# The operator and the distribution


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in opcheck
@pytest.mark.parametrize("transpose", [False, True])
def test_solve_is_the_dense_one_and_its_gradient_is_right(transpose):
    _, values, rows, cols, position, dense = random_factor()
    right = torch.randn(2, 3, 7, dtype=torch.float64)
    solved = unit_triangular_solve(values, rows, cols, position, right, transpose)
    matrix = dense.mT if transpose else dense
    torch.testing.assert_close(solved, torch.linalg.solve(matrix, right.unsqueeze(-1)).squeeze(-1))
    arguments = (values.requires_grad_(), rows, cols, position, right.requires_grad_(), transpose)
    torch.autograd.gradcheck(lambda v, r: unit_triangular_solve(v, rows, cols, position, r, transpose), arguments[::4])
    torch.library.opcheck(unit_triangular_solve, arguments)


def test_a_diagonal_precision_is_fitted():
    """No element below the diagonal: the gradient of none of them has a shape too."""

    def model():
        pyro.sample("z", dist.Normal(torch.ones(3).double(), 0.5).to_event(1))

    guide = fit(model, SparsePrecision(model, "banded", bandwidth=0), steps=300)
    assert len(guide.rows) == 0
    torch.testing.assert_close(guide.get_posterior().mean, torch.ones(3).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(guide.get_posterior().variance, torch.full((3,), 0.25).double(), atol=0, rtol=0.05)


def test_log_density_and_variance_are_those_of_torch():
    _, values, rows, cols, position, dense = random_factor()
    loc, scale = torch.randn(7).double(), 0.5 + torch.rand(7).double()
    q = SparsePrecisionNormal(loc, scale, values, rows, cols, position)
    factor = dense / scale[:, None]
    exact = torch.distributions.MultivariateNormal(loc, precision_matrix=factor @ factor.mT)
    z = torch.randn(4, 3, 7).double()
    torch.testing.assert_close(q.log_prob(z), exact.log_prob(z))
    torch.testing.assert_close(q.expand((4, 3)).log_prob(z), exact.log_prob(z))
    torch.testing.assert_close(q.variance, exact.variance)
    torch.testing.assert_close(q.precision_matrix, exact.precision_matrix)
    assert q.expand((4, 1)).rsample((2,)).shape == (2, 4, 1, 7)


def test_samples_have_the_covariance_of_the_density():
    _, values, rows, cols, position, _ = random_factor()
    q = SparsePrecisionNormal(torch.zeros(7).double(), torch.ones(7).double(), values, rows, cols, position)
    z = q.rsample((50_000,))
    products = torch.einsum("ki,kj->kij", z, z)
    error = products.std(0) / len(z) ** 0.5
    # 28 distinct comparisons at 4.5 standard errors: a false alarm once in 5 000 seeds.
    assert ((products.mean(0) - q.precision_matrix.inverse()).abs() < 4.5 * error).all()


# ---------------------------------------------------------------------------------------------------------
# The pattern


def test_pattern_holds_the_cholesky_factor_of_every_matrix_of_the_structure():
    links, _, rows, cols, position, _ = random_factor(n=12, density=0.15)
    dense = torch.from_numpy(links.toarray())
    dense = dense * torch.rand(12, 12) + dense.mT * torch.rand(12, 12)
    matrix = dense + dense.mT + 12 * torch.eye(12)
    order = position.argsort()
    factor = torch.linalg.cholesky(matrix[order][:, order])
    allowed = torch.eye(12, dtype=torch.bool).index_put((position[rows], position[cols]), torch.tensor(True))
    assert (position[rows] > position[cols]).all()
    assert ((factor.abs() > 1e-12) <= allowed).all()
    assert len(rows) < 12 * 11 / 2


def fill_in(links, position):
    """Non-zeros of the factor below the diagonal by symbolic elimination in the given order."""
    n = links.shape[0]
    above = [set() for _ in range(n)]
    for i, j in zip(*(position[index] for index in links.nonzero()), strict=True):
        if i != j:
            above[min(i, j)].add(max(i, j))
    for column in above:
        if column:
            above[min(column)] |= column - {min(column)}
    return sum(map(len, above))


def test_no_fill_in_is_lost_on_long_cycles():
    """Where thousands of coordinates are eliminated between two others, their link is not rounded to zero."""
    n = 5000
    links = sparse.diags([np.ones(n - 1)], [1], format="lil")
    links[0, n - 1] = 1
    rows, _, position = cholesky_pattern(links)
    assert len(rows) == fill_in(links, position) == 2 * n - 3


def test_a_hessian_that_is_not_finite_is_no_structure():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("root", -(z.sum(-1) - 50).sqrt())

    with pyro.validation_enabled(False), pytest.raises(ModelGuideError, match="Hessian of the log joint.* not finite"):
        nonzeros("auto", model)


def school(y):
    """Two global latents; for each of 30 schools one latent, and 4 classes in each."""
    a = pyro.sample("a", dist.Normal(y.new_zeros(()), 1.0))
    s = pyro.sample("s", dist.LogNormal(y.new_zeros(()), 1.0))
    with pyro.plate("schools", 30, dim=-1):
        z = pyro.sample("z", dist.Normal(a, s))
        with pyro.plate("classes", 4, dim=-2):
            c = pyro.sample("c", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(c, 1.0), obs=y)


def nonzeros(structure, model, *args, **more):
    guide = SparsePrecision(model, structure, **more)
    guide(*args)
    return len(guide.rows)


def test_structure_is_found_in_the_model():
    y = torch.randn(4, 30)
    # The pair of a and s; each z with both; each c with its z, and by the plates alone with a and s as well.
    assert nonzeros("auto", school, y) == 1 + 2 * 30 + 120
    assert nonzeros("block-arrow", school, y) == 1 + 2 * 30 + 3 * 120
    assert nonzeros("auto", chain(50), simulated(50)) == 49


def test_structure_is_the_same_whatever_the_random_points():
    """Elements that cancel but for rounding, here of a Dirichlet's unconstrained coordinates, count as zero."""

    def model():
        with pyro.plate("data", 20):
            pyro.sample("p", dist.Dirichlet(2 * torch.ones(3)))

    assert {nonzeros("auto", model) for _ in range(5)} == {0}


def test_given_structures():
    y = simulated(20)
    assert nonzeros("banded", chain(20), y) == 19
    assert nonzeros("banded", chain(20), y, bandwidth=3) == 19 + 18 + 17
    assert nonzeros("banded", chain(20), y, bandwidth=0) == 0
    assert nonzeros("banded", chain(20), y, bandwidth=100) == 190
    tridiagonal = sparse.diags([np.ones(19), np.ones(20)], [1, 0])
    for matrix in (tridiagonal, tridiagonal.toarray(), torch.from_numpy(tridiagonal.toarray()).bool()):
        assert nonzeros(matrix, chain(20), y) == 19


def test_a_saved_guide_keeps_its_structure():
    y = simulated(20)
    guide = SparsePrecision(chain(20), "banded", bandwidth=3)
    guide(y)
    other = SparsePrecision(chain(20))
    other.load_state_dict(guide.state_dict())
    other(y)
    torch.testing.assert_close(other.rows, guide.rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(structure="bandid"), "unknown structure 'bandid' .did you mean 'banded'"),
        (dict(structure="banded", bandwidth=-1), "bandwidth is -1; it must be a whole number"),
        (dict(structure="banded", bandwidth=1.5), "bandwidth is 1.5; it must be a whole number"),
        (dict(bandwidth=2), "bandwidth=2 goes with structure='banded' only"),
        (dict(structure=torch.ones(2, 3)), "structure is .*2, 3.*or a square boolean matrix"),
        (dict(structure=3.0), "structure is 3.0; it must be one of"),
        (dict(structure=object()), "structure is .*; it must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        SparsePrecision(school, **arguments)


def test_a_structure_of_another_size_is_refused():
    with pytest.raises(ArgumentError, match=r"structure has shape \(3, 3\); the model's latents need \(20, 20\)"):
        nonzeros(torch.eye(3), chain(20), simulated(20))


# ---------------------------------------------------------------------------------------------------------
# Exactness and time


@pytest.mark.slow
def test_a_short_state_space_model_is_fitted_exactly():
    y = simulated(20)
    mean, variance, evidence = kalman_smoother(y.numpy())
    guide = fit(chain(20), SparsePrecision(chain(20)), y, steps=800)
    q = guide.get_posterior()
    torch.testing.assert_close(q.mean, mean, atol=0.02, rtol=0)
    torch.testing.assert_close(q.variance, variance, atol=0, rtol=0.02)
    assert float(pyrovae.ELBO(20).estimate(chain(20), guide, y).bound) == pytest.approx(evidence, abs=0.01)


@pytest.mark.slow
def test_a_state_space_model_of_2000_steps_is_fitted_exactly():
    """Against Kalman's smoother: every mean, every variance, and the evidence."""
    n = 2000
    y = simulated(n)
    mean, variance, evidence = kalman_smoother(y.numpy())
    guide = fit(chain(n), SparsePrecision(chain(n)), y, steps=1500)
    assert len(guide.rows) == n - 1
    q = guide.get_posterior()
    torch.testing.assert_close(q.mean, mean, atol=0.01, rtol=0)
    torch.testing.assert_close(q.variance, variance, atol=0, rtol=0.01)
    # nats over all 2 000 steps
    assert float(pyrovae.ELBO(20).estimate(chain(n), guide, y).bound) == pytest.approx(evidence, abs=0.1)


@pytest.mark.slow
def test_time_is_linear_in_the_length():
    """Sampling, log-density and gradient of a chain; four times the length takes less than eight times as long.

    Processor time, the sizes in turn: on a busy machine the wall clock also counts the wait for a processor.
    """
    sizes, times = (10_000, 40_000), {10_000: [], 40_000: []}
    for n in sizes * 15:
        at = torch.arange(n - 1)
        parameters = [torch.zeros(n), torch.ones(n), torch.full((n - 1,), -0.5)]
        parameters = [parameter.requires_grad_() for parameter in parameters]
        start = time.process_time()
        q = SparsePrecisionNormal(*parameters, at + 1, at, torch.arange(n))
        q.log_prob(q.rsample()).backward()
        times[n].append(time.process_time() - start)
    short, long = (float(np.median(times[n])) for n in sizes)
    assert long < 8 * short, (short, long)


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_compiled_steps_equal_eager_steps():
    model, y = chain(30), simulated(30).float()

    def losses(compiled):
        torch.manual_seed(0)
        guide = SparsePrecision(model)
        svi = pyrovae.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=pyrovae.ELBO(4), compile=compiled)
        return torch.tensor([svi.step(y) for _ in range(5)])

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-4, atol=1e-3)
