"""Devices as users name them."""

from __future__ import annotations

import torch

from pyrovae.errors import ArgumentError

__all__ = ["resolve_device"]


def resolve_device(name: str | torch.device) -> torch.device:
    """The torch device of that name; ``"auto"`` is the GPU where there is one, else the CPU.

    Args:
        name: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, … or a ``torch.device``.

    Raises:
        ArgumentError: there is no such device here.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"device is {name!r}, which cannot be used here ({reason}); use 'auto' or 'cpu'") from error
    return device
