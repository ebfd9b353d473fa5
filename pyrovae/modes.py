"""Asking a model or a guide something without leaving a trace: no gradients, no mode or random state changed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

__all__ = ["device_of", "evaluating", "modules_of"]


def modules_of(program: Any) -> list[nn.Module]:
    """The modules that a program is or refers to: itself, a method's owner, or what a function closes over."""
    if isinstance(program, nn.Module):
        return [program]
    if isinstance(program, functools.partial):
        return [m for part in (program.func, *program.args, *program.keywords.values()) for m in modules_of(part)]
    if inspect.ismethod(program):
        return modules_of(program.__self__)
    if inspect.isfunction(program):
        names = inspect.getclosurevars(program)
        return [value for value in (*names.nonlocals.values(), *names.globals.values()) if isinstance(value, nn.Module)]
    return []


def device_of(*programs: Any) -> torch.device:
    """Where the first parameter or buffer of the programs is; the CPU when there is none."""
    modules = [module for program in programs for module in modules_of(program)]
    tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@contextmanager
def evaluating(*programs: Any, seed: int | None = None) -> Iterator[torch.device]:
    """Evaluation mode without gradients; modes and RNG states are as before afterwards.

    Args:
        *programs: models and guides; modules that a function closes over count as well.
        seed: seeds the generators that are in use inside; ``None`` continues from a copy of their state.

    Yields:
        The device of the first parameter or buffer, or the CPU.
    """
    modules = [module for program in programs for module in modules_of(program)]
    device = device_of(*programs)
    modes = {part: part.training for module in modules for part in module.modules()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if seed is not None:
            # torch.manual_seed would also seed the devices, whose states are not forked here.
            torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            accelerator = torch.get_device_module(device)
            stack.callback(accelerator.set_rng_state, accelerator.get_rng_state())
            if seed is not None:
                accelerator.manual_seed(seed)
        try:
            for module in modules:
                module.eval()
            yield device
        finally:
            for part, mode in modes.items():
                part.training = mode
