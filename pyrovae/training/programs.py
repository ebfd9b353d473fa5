"""The parameters and the state of a model and a guide, whether modules, autoguides or plain functions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import RunError
from pyrovae.modes import modules_of
from pyrovae.structure import Program, dry_run

__all__ = ["buffers_of", "local_params", "named_parameters", "state_of"]


@contextlib.contextmanager
def local_params(*programs: Program) -> Iterator[None]:
    """Parameters live in the modules, not in Pyro's global store, for the length of the block.

    ``pyro.param`` in plain functions still uses the store. Modules built while the setting was off lack the local
    store that Pyro gives the others at construction; they get it here.
    """
    with pyro.settings.context(module_local_params=True):
        for module in [m for program in programs for root in modules_of(program) for m in root.modules()]:
            if isinstance(module, PyroModule) and not hasattr(module._pyro_context, "param_state"):
                module._pyro_context.param_state = {"params": {}, "constraints": {}}
        yield


@contextlib.contextmanager
def untouched(*programs: Program) -> Iterator[None]:
    """What runs in the block leaves the random state and the buffers (batch-norm statistics) as they were."""
    buffers = buffers_of(*programs)
    before = [buffer.clone() for buffer in buffers]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def buffers_of(*programs: Program) -> list[Tensor]:
    """The buffers of model and guide."""
    return [buffer for program in programs for module in modules_of(program) for buffer in module.buffers()]


def named_parameters(model: Program, guide: Program, *args: Any) -> dict[str, Tensor]:
    """Every unconstrained leaf tensor that model and guide learn, by a name a reader recognises.

    Modules contribute all their parameters; plain functions those that one run with ``args`` shows.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        *args: passed to both.
    """
    with untouched(model, guide), torch.no_grad():
        model_trace, guide_trace = dry_run(model, guide, *args)
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, program in (("model", model), ("guide", guide)):
        if isinstance(program, nn.Module):
            for name, parameter in program.named_parameters():
                found.setdefault(id(parameter), (f"{prefix}.{name}", parameter))
    for trace in (model_trace, guide_trace):
        for name, node in trace.nodes.items():
            if node["type"] == "param" and node["value"] is not None:
                value = node["value"]
                leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
                found.setdefault(id(leaf), (f"param.{name}", leaf))
    return {name: leaf for name, leaf in found.values() if leaf.requires_grad}


def state_of(model: Program, guide: Program, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that must be saved of model and guide: parameters and buffers, by unique names, sharing memory."""
    state: dict[str, Tensor] = {}
    for prefix, program in (("model", model), ("guide", guide)):
        if isinstance(program, nn.Module):
            state.update({f"{prefix}.{name}": value for name, value in program.state_dict().items()})
    for name, leaf in parameters.items():
        if name.startswith("param."):
            state[name] = leaf.detach()
    return state


@torch.no_grad()
def restore_state(live: dict[str, Tensor], saved: dict[str, Tensor], where: str) -> None:
    """Copies saved values into the tensors of :func:`state_of`, after checking that names and shapes agree.

    Raises:
        RunError: a name or a shape differs between the two.
    """
    missing, extra = sorted(live.keys() - saved.keys()), sorted(saved.keys() - live.keys())
    shapes = [
        f"{name} {tuple(saved[name].shape)} instead of {tuple(live[name].shape)}"
        for name in sorted(live.keys() & saved.keys())
        if live[name].shape != saved[name].shape
    ]
    if missing or extra or shapes:
        said = [
            text
            for text in (
                f"lacks {', '.join(missing)}" if missing else "",
                f"has besides {', '.join(extra)}" if extra else "",
                f"has {'; '.join(shapes)}" if shapes else "",
            )
            if text
        ]
        raise RunError(
            f"{where} does not fit this model and guide: it {', '.join(said)}. Build the model and guide that the run"
            " was made with (its config.json lists their arguments)."
        )
    for name, value in live.items():
        value.copy_(saved[name])
