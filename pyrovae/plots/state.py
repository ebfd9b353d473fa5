"""What the plots ask of models, guides and data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError
from pyrovae.plots.interfaces import Decoder, Encoder

__all__ = ["attribute_of", "decode_means", "encode_means", "is_discrete", "prior_moments", "require_data"]

CHUNK = 1000
"""Data points that are encoded or decoded at a time, which bounds the memory."""


def decode_means(model: Decoder, z: Tensor) -> Tensor:
    """Means of the data given z, cut off at 0 and 1, on the CPU.

    Args:
        model: the model.
        z: A `n x latent_dim` tensor of latent vectors on the model's device.

    Returns:
        A `n x *data_shape` tensor.
    """
    decode = attribute_of(model, "model", "decode")
    means = torch.cat([decode(part).mean.float().cpu() for part in z.split(CHUNK)])
    if means.shape[1:] != tuple(model.data_shape):
        raise ArgumentError(
            f"model.decode(z).mean has event shape {tuple(means.shape[1:])}, but data_shape is "
            f"{tuple(model.data_shape)}: let both agree"
        )
    return means.clamp(0.0, 1.0)


def encode_means(guide: Encoder, x: Tensor, device: torch.device) -> Tensor:
    """Posterior means of the data points, on ``device``.

    Args:
        guide: the guide.
        x: A `n x *data_shape` tensor of data points on any device.
        device: where guide and model are.

    Returns:
        A `n x latent_dim` tensor.
    """
    encode = attribute_of(guide, "guide", "encode")
    return torch.cat([encode(part.to(device)).mean for part in x.split(CHUNK)])


def prior_moments(model: Decoder) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the prior; of 10 000 draws where it does not know them (a flow).

    Returns:
        Two `latent_dim` tensors.
    """
    prior = attribute_of(model, "model", "prior")()
    try:
        return prior.mean, prior.stddev
    except NotImplementedError:
        draws = prior.sample((10_000,))
        return draws.mean(0), draws.std(0)


def is_discrete(distribution: Any) -> bool:
    """Whether a prior or a posterior is known to be over codes of whole numbers, between which there is nothing."""
    try:
        return bool(distribution.support.is_discrete)
    except (AttributeError, NotImplementedError):
        return False


def require_data(x: Tensor, event: tuple[int, ...] | None = None, name: str = "x") -> None:
    """Checks that ``x`` holds data points.

    Args:
        x: A `n x *event` tensor.
        event: the event shape of a data point; ``None`` allows any.
        name: what the caller calls ``x``.

    Raises:
        DataError: it is empty or has another shape.
    """
    needed = "n x *data_shape" if event is None else " x ".join(["n", *map(str, event)])
    if x.ndim < 1 or (event is not None and tuple(x.shape[1:]) != tuple(event)):
        one = event is not None and tuple(x.shape) == tuple(event)
        hint = f"; for one data point give {name}[None]" if one else ""
        raise DataError(f"{name} has shape {tuple(x.shape)}, but must be `{needed}`{hint}")
    if len(x) == 0:
        raise DataError(f"{name} holds no data points: its shape is {tuple(x.shape)}; give at least one")


def attribute_of(thing: object, role: str, name: str) -> Any:
    """A method or attribute that a plot needs.

    Args:
        thing: the model or the guide.
        role: ``"model"`` or ``"guide"``.
        name: the name of the method or attribute.

    Raises:
        ArgumentError: there is none, or one that takes labels too.
    """
    if name in ("encode", "decode") and hasattr(thing, "classes"):
        raise ArgumentError(f"{type(thing).__name__} needs the label of each data point; plots.class_grid draws it")
    if not hasattr(thing, name):
        raise ArgumentError(
            f"{role} {getattr(thing, '__name__', type(thing).__name__)} has no {name!r}, which this plot needs; "
            f"take one of pyrovae.{role}s that has it"
        )
    return getattr(thing, name)
