"""Tools of the latent space against closed forms, scikit-learn, scipy and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from pyro import distributions as dist
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

import pyrovae
from pyrovae import latent
from pyrovae.distributions.von_mises_fisher import SphericalUniform
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides import AmortizedFlow, AmortizedNormal
from pyrovae.models import VAE


class Linear(nn.Module):
    """q(z | x) = N(Ax, diag s²(x)), with dropout that a careless caller would see."""

    def __init__(self, width: int = 6, latent_dim: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(width, latent_dim, generator=generator))
        self.dropout = nn.Dropout(0.5)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Normal(self.dropout(x @ self.weight), 0.5 + x[..., :3].square()).to_event(1)


DATA = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))


class TestInterpolate:
    def test_straight_is_numpys_linspace(self):
        z0, z1 = torch.randn(2, 5, 4, 3, dtype=torch.float64)
        expected = np.moveaxis(np.linspace(z0.numpy(), z1.numpy(), 7), 0, -2)
        np.testing.assert_allclose(latent.interpolate(z0, z1, 7), expected, rtol=1e-12, atol=1e-14)

    def test_great_circle_is_shoemakes_formula(self):
        z0, z1 = torch.randn(2, 5, 4, 3, dtype=torch.float64)
        u0, u1 = z0 / z0.norm(dim=-1, keepdim=True), z1 / z1.norm(dim=-1, keepdim=True)
        angle = torch.acos((u0 * u1).sum(-1, keepdim=True))
        found = latent.interpolate(z0, z1, 6, "great-circle")
        assert found.shape == (5, 4, 6, 3)
        for k in range(6):
            t = k / 5
            direction = (torch.sin((1 - t) * angle) * u0 + torch.sin(t * angle) * u1) / torch.sin(angle)
            norm = torch.lerp(z0.norm(dim=-1, keepdim=True), z1.norm(dim=-1, keepdim=True), t)
            torch.testing.assert_close(found[..., k, :], norm * direction, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_great_circle_stays_on_the_sphere_at_equal_angles(self, dtype):
        z0, z1 = SphericalUniform(4).sample((2, 50)).to(dtype)
        z = latent.interpolate(z0, z1, 9, "great-circle")
        assert z.dtype == dtype
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(50, 9, dtype=dtype))
        angles = torch.acos((z[:, 1:] * z[:, :-1]).sum(-1).clamp(-1, 1))
        torch.testing.assert_close(angles, angles[:, :1].expand_as(angles), rtol=1e-3, atol=1e-3)

    def test_parallel_vectors_are_joined_by_a_line(self):
        z0 = torch.tensor([1.0, 2.0, -2.0])
        found = latent.interpolate(z0, 3 * z0, 5, "great-circle")
        torch.testing.assert_close(found, latent.interpolate(z0, 3 * z0, 5))

    @pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
    def test_opposite_vectors_are_joined_by_half_a_circle(self, scale):
        z0 = scale * torch.tensor([[0.0, 3.0, 4.0], [1.0, 1.0, 1.0]])
        found = latent.interpolate(z0, -z0, 5, "great-circle") / scale
        torch.testing.assert_close(found[:, 0], z0 / scale)
        torch.testing.assert_close(found[:, -1], -z0 / scale)
        torch.testing.assert_close(found.norm(dim=-1), (z0 / scale).norm(dim=-1, keepdim=True).expand(2, 5))
        torch.testing.assert_close((found[:, 2] * z0 / scale).sum(-1), torch.zeros(2), atol=1e-5, rtol=0)

    def test_zero_has_no_direction_to_turn_from(self):
        z = torch.tensor([3.0, 4.0])
        for ends in ((torch.zeros(2), z), (z, torch.zeros(2)), (torch.zeros(2), torch.zeros(2))):
            torch.testing.assert_close(latent.interpolate(*ends, 4, "great-circle"), latent.interpolate(*ends, 4))

    def test_one_dimension_passes_through_zero(self):
        found = latent.interpolate(torch.tensor([2.0]), torch.tensor([-2.0]), 3, "great-circle")
        torch.testing.assert_close(found, torch.tensor([[2.0], [0.0], [-2.0]]), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("path", ["straight", "great-circle"])
    def test_batches_broadcast_and_gradients_are_finite(self, path):
        z0 = torch.randn(4, 1, 3, requires_grad=True)
        z1 = torch.cat([torch.randn(5, 3), -z0[0].detach(), z0[0].detach()]).requires_grad_()
        found = latent.interpolate(z0, z1, 3, path)
        assert found.shape == (4, 7, 3, 3)
        found.square().sum().backward()
        assert z0.grad.isfinite().all()
        assert z1.grad.isfinite().all()


def test_traverse_sets_one_coordinate():
    z = torch.randn(4, 2, 3)
    found = latent.traverse(z, 1, [-1.0, 0.5])
    assert found.shape == (4, 2, 2, 3)
    assert torch.equal(found[..., 1], torch.tensor([-1.0, 0.5]).expand(4, 2, 2))
    for other in (0, 2):
        assert torch.equal(found[..., other], z[..., other, None].expand(4, 2, 2))


def test_manifold_grid_lies_at_scipys_quantiles():
    centre, scale = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.5, 2.0]).double()
    grid = latent.manifold_grid(centre, 5, dims=(2, 0), scale=scale)
    levels = (np.arange(5) + 0.5) / 5
    np.testing.assert_allclose(grid[3, :, 2], scipy.stats.norm.ppf(levels, 3.0, 2.0))
    np.testing.assert_allclose(grid[:, 3, 0], scipy.stats.norm.ppf(levels, 1.0, 1.0))
    assert (grid[..., 1] == 2.0).all()
    assert torch.equal(centre, torch.tensor([1.0, 2.0, 3.0]).double())


class TestAttributes:
    def test_vector_is_the_difference_of_mean_latents(self):
        guide = Linear()
        expected = (DATA[:15].mean(0) - DATA[15:].mean(0)) @ guide.weight
        torch.testing.assert_close(latent.attribute_vector(guide, DATA[:15], DATA[15:]), expected.detach())
        assert guide.training

    def test_every_label_and_every_attribute(self):
        guide, y = Linear(), torch.arange(40) % 3 + 5
        found = latent.attribute_vectors(guide, DATA, y)
        assert found.shape == (3, 3)
        for row, label in zip(found, (5, 6, 7), strict=True):
            torch.testing.assert_close(row, latent.attribute_vector(guide, DATA[y == label], DATA[y != label]))
        torch.testing.assert_close(latent.attribute_vectors(guide, DATA, torch.stack([y == 5, y == 7], 1)), found[::2])

    def test_moves_along_it(self):
        z, vector = torch.randn(4, 2, 3), torch.randn(3)
        torch.testing.assert_close(latent.move(z, vector, -2.0), z - 2 * vector)
        several = latent.move(z, vector, torch.tensor([0.0, 1.5]))
        assert several.shape == (4, 2, 2, 3)
        torch.testing.assert_close(several[..., 1, :], z + 1.5 * vector)
        torch.testing.assert_close(latent.analogy(z, z + vector, 2 * z), 2 * z + vector)


class TestNeighbours:
    @pytest.mark.parametrize("chunk", [7, 1000])
    def test_agree_with_scikit_learn(self, monkeypatch, chunk):
        monkeypatch.setattr("pyrovae.latent.posteriors._CHUNK", chunk)
        guide = Linear()
        means = (DATA @ guide.weight).detach().numpy()
        distances, indices = NearestNeighbors(n_neighbors=4).fit(means).kneighbors(means[:9])
        found = latent.nearest_neighbours(guide, DATA[:9], DATA, k=4)
        np.testing.assert_allclose(found.distances, distances, atol=1e-5)
        np.testing.assert_array_equal(found.indices, indices)

    @pytest.mark.parametrize("chunk", [7, 1000])
    def test_by_the_divergence_written_out(self, monkeypatch, chunk):
        monkeypatch.setattr("pyrovae.latent.posteriors._CHUNK", chunk)
        guide = Linear().eval()
        with torch.no_grad():
            q = guide.encode(DATA)
        mean, sd = q.mean, q.stddev
        ratio = sd[:9, None] / sd
        kl = 0.5 * (ratio**2 + ((mean[:9, None] - mean) / sd) ** 2 - 1) - ratio.log()
        expected = kl.sum(-1).sort(dim=-1)
        found = latent.nearest_neighbours(guide, DATA[:9], DATA, k=4, metric="kl")
        torch.testing.assert_close(found.distances, expected.values[:, :4], atol=1e-4, rtol=1e-4)
        assert torch.equal(found.indices, expected.indices[:, :4])


def flow_guide():
    return AmortizedFlow(VAE(data_shape=(6,), latent_dim=2, hidden=(4,)), flow="maf", depth=1)


Z = torch.zeros(4, 3)
MISTAKES = {
    "steps": (ArgumentError, "steps is 1", lambda: latent.interpolate(Z, Z, 1)),
    "path": (ArgumentError, "unknown path 'circle'", lambda: latent.interpolate(Z, Z, 3, "circle")),
    "lengths": (ArgumentError, r"z1 \(4, 2\)", lambda: latent.interpolate(Z, Z[:, :2])),
    "dimension": (ArgumentError, "dimension has 3; .* 0 … 2", lambda: latent.traverse(Z, 3, [0.0])),
    "values": (ArgumentError, r"values has shape \(0,\)", lambda: latent.traverse(Z, 0, [])),
    "size": (ArgumentError, "size is 1", lambda: latent.manifold_grid(Z[0], 1)),
    "centre": (ArgumentError, "one latent vector", lambda: latent.manifold_grid(Z)),
    "dims": (ArgumentError, "dims has 3", lambda: latent.manifold_grid(Z[0], 3, (0, 3))),
    "equal dims": (ArgumentError, "two different", lambda: latent.manifold_grid(Z[0], 3, (1, 1))),
    "vector": (ArgumentError, r"vector has shape \(2,\)", lambda: latent.move(Z, torch.zeros(2), 1.0)),
    "strength": (ArgumentError, "a number or a row", lambda: latent.move(Z, Z[0], torch.zeros(2, 2))),
    "no encode": (ArgumentError, "guide Linear has no 'encode'", lambda: latent.posterior_means(nn.Linear(1, 1), Z)),
    "no data": (DataError, "at least one data point", lambda: latent.attribute_vector(Linear(), DATA, DATA[:0])),
    "no label": (DataError, r"y has shape \(39,\)", lambda: latent.attribute_vectors(Linear(), DATA, DATA[1:, 0])),
    "one label": (DataError, "without it", lambda: latent.attribute_vectors(Linear(), DATA, torch.ones(40))),
    "k": (ArgumentError, "k is 41, but data holds 40", lambda: latent.nearest_neighbours(Linear(), DATA, DATA, 41)),
    "metric": (
        ArgumentError,
        "unknown metric 'cosine'",
        lambda: latent.nearest_neighbours(Linear(), DATA, DATA, 2, "cosine"),
    ),
    "no kl": (
        ArgumentError,
        "AmortizedFlow's have none",
        lambda: latent.nearest_neighbours(flow_guide(), DATA, DATA, 2, "kl"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    error, message, call = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
def test_a_probe_of_decoded_digits_rises_along_the_attribute_of_their_label():
    """The probe never sees the VAE: it is a logistic regression on the pixels of the training data."""
    digits = pyrovae.datasets.load("digits")
    x, y = digits.train.x, digits.train.y
    model = VAE(data_shape=(8, 8), latent_dim=8, hidden=(64,))
    guide = AmortizedNormal(model)
    pyrovae.fit(model, guide, digits.train, epochs=30, lr=3e-3, compile=False, progress=False, seed=0)
    probe = LogisticRegression(max_iter=2000).fit(x.flatten(1), y)
    vectors = latent.attribute_vectors(guide, x, y)
    for label in (0, 3):
        others = digits.test.x[digits.test.y != label][:100]
        z = latent.move(latent.posterior_means(guide, others), vectors[label], torch.linspace(-1.0, 2.0, 7))
        with torch.no_grad():
            pixels = model.decode(z).mean.flatten(0, 1).flatten(1)
        score = probe.decision_function(pixels)[:, label].reshape(len(others), 7).mean(0)
        chosen = (probe.predict(pixels) == label).reshape(len(others), 7).mean(0)
        assert (np.diff(score) > 0).all(), score
        assert chosen[-1] > chosen[2] + 0.5  # from none and 12 % at strength 0 to 100 and 88 % at 2
