"""Convolutional networks with and without residual blocks: shapes, gradients, and what they were before."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyrovae.errors import ArgumentError
from pyrovae.models.networks import ConvDecoder, ConvEncoder, ResidualBlock

IMAGES = [(1, 28, 28), (3, 32, 32), (1, 28, 20), (3, 64, 64), (2, 7, 9), (1, 1, 5)]
sizes = pytest.mark.parametrize("image", IMAGES, ids=["x".join(map(str, image)) for image in IMAGES])


def pair(image, blocks, activation="silu", channels=(4, 8)):
    encoder = ConvEncoder(image, channels, (16,), 6, activation, blocks)
    decoder = ConvDecoder(6, (16,), channels[::-1], image, 2 * image[0], activation, blocks)
    return encoder, decoder


@sizes
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_every_size_is_encoded_and_decoded(image, blocks):
    encoder, decoder = pair(image, blocks)
    x = torch.randn(2, 3, *image)
    z = encoder(x)
    assert z.shape == (2, 3, 6)
    out = decoder(z)
    assert out.shape == (2, 3, 2 * image[0], *image[1:])
    for network, given, many in ((encoder, x, z), (decoder, z, out)):  # the batch on the left is one more batch
        one = torch.stack([network(part) for part in given])
        torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-5)
        assert network(given[0, 0]).shape == many.shape[2:]
    out.square().sum().backward()
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_without_blocks_the_networks_are_those_of_saved_runs():
    encoder, decoder = pair((1, 9, 7), 0, "relu")
    x = torch.randn(5, 1, 9, 7)
    e, d = encoder.state_dict(), decoder.state_dict()
    assert [*e] == [f"network.{place}.{kind}" for place in (0, 2, 5, 7) for kind in ("weight", "bias")]
    assert [*d] == [f"network.{place}.{kind}" for place in (0, 2, 6, 9) for kind in ("weight", "bias")]

    def weights(state, place):
        return state[f"network.{place}.weight"], state[f"network.{place}.bias"]

    h = functional.conv2d(x, *weights(e, 0), stride=2, padding=1).relu()
    h = functional.conv2d(h, *weights(e, 2), stride=2, padding=1).relu()
    z = functional.linear(functional.linear(h.flatten(1), *weights(e, 5)).relu(), *weights(e, 7))
    torch.testing.assert_close(encoder(x), z)
    h = functional.linear(functional.linear(z, *weights(d, 0)).relu(), *weights(d, 2)).relu().reshape(5, 8, 3, 2)
    h = functional.conv2d(functional.interpolate(h, (5, 4)), *weights(d, 6), padding=1).relu()
    out = functional.conv2d(functional.interpolate(h, (9, 7)), *weights(d, 9), padding=1)
    torch.testing.assert_close(decoder(z), out)


def test_blocks_are_counted_by_level():
    for blocks in (0, 1, 2):
        for network in pair((1, 28, 28), blocks, channels=(4, 8, 16)):
            found = [module for module in network.modules() if isinstance(module, ResidualBlock)]
            assert len(found) == 3 * blocks
    again, same = pair((1, 28, 28), 2)[0], pair((1, 28, 28), 2)[0]
    again.load_state_dict(same.state_dict())
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(again(x), same(x))


def test_a_block_is_its_formula():
    block = ResidualBlock(4, "tanh")
    x = torch.randn(3, 4, 5, 6)
    first, second = block.residual[1], block.residual[3]
    torch.testing.assert_close(block(x), x + second(first(x.tanh()).tanh()))
    with torch.no_grad():
        second.weight.zero_()
    assert torch.equal(block(x), x)


def test_the_variance_does_not_grow_with_depth():
    x = torch.randn(8, 16, 12, 12)
    for depth in (1, 16, 64):
        blocks = nn.Sequential(*(ResidualBlock(16, "relu", depth) for _ in range(depth)))
        with torch.no_grad():
            grown = float(blocks(x).var() / x.var())
        # Each block adds at most 1/depth of the variance it is given: (1 + 1/depth)^depth, below e; 3.5 for chance.
        assert 1.0 < grown < 3.5, (depth, grown)


@pytest.mark.parametrize("blocks", [-1, 1.5, True])
def test_bad_numbers_of_blocks_are_named(blocks):
    for build in (
        lambda: ConvEncoder((1, 8, 8), (4,), (), 2, "relu", blocks),
        lambda: ConvDecoder(2, (), (4,), (1, 8, 8), 1, "relu", blocks),
    ):
        with pytest.raises(ArgumentError, match=f"blocks is {blocks!r}; it must be a whole number, at least 0"):
            build()
    with pytest.raises(ArgumentError, match="unknown activation 'rely'"):
        ResidualBlock(4, "rely")
