"""What a run folder holds, written so that a crash at any moment leaves the old file or the new one, never half."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pyrovae.atomic import write_atomically
from pyrovae.errors import CorruptFileError, RunError

__all__ = ["BEST", "CONFIG", "METRICS", "MODEL", "TRAINING", "read_json"]

CONFIG = "config.json"
MODEL = "model.safetensors"
BEST = "best.safetensors"
TRAINING = "training.pt"
METRICS = "metrics.jsonl"

Row = dict[str, Any]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a run's ``config.json``.

    Raises:
        RunError: there is no such file.
        CorruptFileError: it is not a JSON object.
    """
    try:
        return _object(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{path.parent} holds no run: there is no {path.name} in it") from None
    except ValueError as error:
        raise CorruptFileError(f"{path} is not valid JSON ({error}); restore it from a copy, or fit again") from error


def _object(content: bytes) -> dict[str, Any]:
    read = json.loads(content)
    if not isinstance(read, dict):
        raise ValueError(f"a {type(read).__name__} where an object should be")
    return read


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, safetensors.torch.save(own))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        RunError: there is no such file.
        CorruptFileError: it is truncated or altered.
    """
    try:
        return safetensors.torch.load(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{path.parent} holds no saved parameters: there is no {path.name} in it") from None
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CorruptFileError(
            f"{path} is truncated or corrupt ({error}). Restore it from a copy; if {TRAINING} in the same folder is"
            " whole, fit(…, resume=True) writes it anew."
        ) from error


def write_training(path: Path, state: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomically(path, buffer.getvalue())


def read_training(path: Path) -> dict[str, Any]:
    """Reads ``training.pt`` without running any code of it.

    Raises:
        RunError: there is no such file.
        CorruptFileError: it is truncated, altered, or holds something other than plain data.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict):
            raise ValueError(f"a {type(saved).__name__} where a dictionary should be")
        return saved
    except FileNotFoundError:
        raise RunError(f"{path.parent} holds no training state to resume: there is no {path.name} in it") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptFileError(
            f"{path} is truncated or corrupt ({reason}). The saved model ({MODEL}) can still be read by pyrovae.load;"
            " to train on, restore the file from a copy or start a new run folder."
        ) from error


def write_history(path: Path, history: list[Row]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in history).encode())


def read_history(path: Path) -> list[Row]:
    """The rows of ``metrics.jsonl``; none when it is missing.

    Raises:
        CorruptFileError: a line is not a JSON object.
    """
    if not path.exists():
        return []
    rows: list[Row] = []
    try:
        for line in path.read_bytes().splitlines():
            rows.append(_object(line))  # noqa: PERF401 (the error says how many were read)
    except ValueError as error:  # of JSON or of UTF-8
        raise CorruptFileError(f"{path}, line {len(rows) + 1}, is not valid JSON ({error})") from error
    return rows


def rng_state(device: torch.device, generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The state of torch's random generators on the CPU and, if it is another, the device, and of ``generators``."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "own": [own.get_state() for own in generators]}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device, generators: Sequence[torch.Generator] = ()) -> None:
    """Restores what :func:`rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    for own, saved in zip(generators, state["own"], strict=True):
        own.set_state(saved)
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
