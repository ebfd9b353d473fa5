"""Minibatches from tensors, data sets and loaders; in-memory data live on the device and are shuffled there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyrovae.datasets import LabelledSplit, Split
from pyrovae.errors import ArgumentError, DataError, require_count

__all__ = ["Batches", "Data", "Described", "Key", "Resident", "batches", "key_of"]

Data = Tensor | Sequence[Tensor] | Split | Dataset | DataLoader

Key = tuple[tuple[torch.Size, torch.dtype], ...]  # of each tensor of a minibatch
_EPOCH_STRIDE = 1_000_003  # a prime, so that (seed, epoch) pairs do not meet in practice


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * _EPOCH_STRIDE + epoch) % 2**63  # what a generator takes


def key_of(batch: Sequence[Tensor]) -> Key:
    """Shapes and dtypes of a minibatch."""
    return tuple([(part.shape, part.dtype) for part in batch])


class Batches(ABC):
    """Minibatches of one data source: ``epoch(n)`` gives those of epoch n, always in the same order.

    Args:
        size: number of data points.
        steps: number of minibatches an epoch.
    """

    batch_size = 0  # of most minibatches; 0 where that is not known
    generators: Sequence[torch.Generator] = ()  # a user's own, whose states belong to the fit's random state

    def __init__(self, size: int, steps: int) -> None:
        self.size = size
        self.steps = steps

    @abstractmethod
    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The minibatches of an epoch, each a tuple of tensors on the device; the first ``start`` are skipped at once,
        before the first of the others is drawn."""

    def first(self) -> tuple[Tensor, ...]:
        """The first minibatch of epoch 0, for checks."""
        return next(iter(self.epoch(0)))

    def describe(self) -> dict[str, Any]:
        """What a run's configuration says of the data."""
        return {"size": self.size}


class Described(TensorDataset):
    """Tensors, and what ``data`` in a run's ``config.json`` says of them.

    Args:
        tensors: with the same first dimension, the data points.
        said: by name; plain values.
    """

    def __init__(self, tensors: tuple[Tensor, ...], said: dict[str, Any]) -> None:
        super().__init__(*tensors)
        self.said = said


class Resident(Batches):
    """Tensors on the device, gathered there.

    Args:
        tensors: with the same first dimension, the data points.
        data: what they were made of. The ``draw`` of a split makes the first of a minibatch's tensors, anew at every
            minibatch where it is binarized dynamically; others stay as they are.
        batch_size: data points of each minibatch but the last of an epoch, which has what remains.
        device: where the tensors are put.
        seed: of the order of each epoch; ``None`` keeps the order.
    """

    def __init__(
        self, tensors: tuple[Tensor, ...], data: Data, batch_size: int, device: torch.device, seed: int | None
    ) -> None:
        size = len(tensors[0])
        super().__init__(size, -(-size // batch_size))
        self.tensors = tuple(tensor.to(device) for tensor in tensors)
        self.split = data if isinstance(data, Split) else None
        self.said = data.said if isinstance(data, Described) else {}
        self.batch_size = batch_size
        self.seed = seed

    @property
    def whole(self) -> int:
        """Number of minibatches of the full size, the first ones of an epoch."""
        return self.size // self.batch_size

    @property
    def key(self) -> Key:
        """Shapes and dtypes of these."""
        return tuple((torch.Size([self.batch_size, *tensor.shape[1:]]), tensor.dtype) for tensor in self.tensors)

    def order(self, number: int) -> Tensor:
        """The rows in the order of an epoch."""
        device = self.tensors[0].device
        if self.seed is None:
            return torch.arange(self.size, device=device)
        generator = torch.Generator().manual_seed(_epoch_seed(self.seed, number))
        return torch.randperm(self.size, generator=generator).to(device)

    def gather(self, rows: Tensor | slice, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The minibatch of some rows of the tensors."""
        batch = tuple(tensor[rows] for tensor in tensors)
        return batch if self.split is None else (self.split.draw(batch[0]), *batch[1:])

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        order = None if self.seed is None else self.order(number)
        for step in range(start, self.steps):
            part = slice(step * self.batch_size, (step + 1) * self.batch_size)
            yield self.gather(part if order is None else order[part], self.tensors)

    def describe(self) -> dict[str, Any]:
        shapes = [list(tensor.shape[1:]) for tensor in self.tensors]
        said: dict[str, Any] = {"size": self.size, "event_shapes": shapes} | self.said
        if self.split is not None:
            said |= {"name": self.split.name, "binarization": self.split.binarization}
        if isinstance(self.split, LabelledSplit):
            said["labels"] = int((self.tensors[1] >= 0).sum())
        return said


class _Loaded(Batches):
    """A torch ``DataLoader``, the user's or one made for a ``Dataset``."""

    def __init__(self, loader: DataLoader, size: int, device: torch.device) -> None:
        super().__init__(size, len(loader))
        self.loader = loader
        self.device = device
        inner = getattr(loader.batch_sampler, "sampler", None)
        owned = [getattr(owner, "generator", None) for owner in (loader, loader.sampler, inner)]
        self.generators = list({id(own): own for own in owned if isinstance(own, torch.Generator)}.values())

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        minibatches = iter(self.loader)
        for _ in range(start):
            next(minibatches)
        return map(self._tensors, minibatches)

    def _tensors(self, batch: Any) -> tuple[Tensor, ...]:
        return tuple(part.to(self.device) for part in (batch if isinstance(batch, tuple | list) else (batch,)))


class _Seeded(_Loaded):
    """A loader of our own over a ``Dataset``, its order given by the seed and the epoch."""

    def __init__(self, dataset: Dataset, batch_size: int, device: torch.device, seed: int | None) -> None:
        self.generator = torch.Generator()
        self.seed = seed
        loader: DataLoader = DataLoader(
            dataset, batch_size, shuffle=seed is not None, generator=self.generator if seed is not None else None
        )
        super().__init__(loader, len(dataset), device)  # type: ignore[arg-type]

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        if self.seed is not None:
            self.generator.manual_seed(_epoch_seed(self.seed, number))
        return super().epoch(number, start)


def batches(
    data: Data,
    batch_size: int | None,
    device: torch.device,
    seed: int | None,
    name: str = "data",
    likelihood: Any = None,
) -> Batches:
    """Minibatches of whatever the user calls data, checked.

    Args:
        data: a tensor `n x *event`; a sequence of tensors with the same n (passed to model and guide as arguments);
            a :class:`pyrovae.datasets.Split` (with its labels, if it is ``split.labelled()``); a ``TensorDataset``, any
            map-style ``Dataset``, or a ``DataLoader`` (used as it is).
        batch_size: data points a minibatch; ``None`` for 100 (it must be ``None`` with a ``DataLoader``).
        device: where the minibatches are to be.
        seed: of the shuffling; ``None`` keeps the order.
        name: of the argument, for error messages.
        likelihood: a packaged model's likelihood, whose ``support`` the first tensor's elements must lie in and whose
            ``advice`` says what to do otherwise; ``None`` for any other model.

    Raises:
        DataError: empty data, NaN or infinities, tensors of different length, values outside the support.
        ArgumentError: ``data`` is of another kind, or ``batch_size`` is out of range.
    """
    if batch_size is not None:
        require_count("batch_size", batch_size)
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise ArgumentError(f"batch_size={batch_size} was given with a DataLoader, which has its own; leave it out")
        source: Batches = _Loaded(data, _length(data.dataset, name), device)
        if source.steps == 0:
            raise DataError(
                f"{name} gives no minibatch: its batch_size is above its {source.size} data points (drop_last)"
            )
    else:
        tensors = _tensors(data, name)
        if tensors is not None:
            _check_tensors(tensors, name)
            source = Resident(tensors, data, batch_size or 100, device, seed)
        elif isinstance(data, Dataset):
            _length(data, name)
            source = _Seeded(data, batch_size or 100, device, seed)
        else:
            raise ArgumentError(
                f"{name} is a {type(data).__name__}; it must be a tensor, a sequence of tensors, a Dataset or a"
                " DataLoader (a numpy array becomes a tensor by torch.as_tensor)"
            )
    if likelihood is not None:
        _check_values(source, name, likelihood)
    return source


def _tensors(data: Any, name: str) -> tuple[Tensor, ...] | None:
    if isinstance(data, LabelledSplit):
        assert data.y is not None
        return data.x, data.y
    if isinstance(data, Split):
        return (data.x,)
    if isinstance(data, Tensor):
        return (data,)
    if isinstance(data, TensorDataset):
        return tuple(data.tensors)
    if isinstance(data, tuple | list) and data and all(isinstance(part, Tensor) for part in data):
        return tuple(data)
    return None


def _length(dataset: Any, name: str) -> int:
    try:
        size = len(dataset)
    except TypeError:
        raise ArgumentError(f"{name} is an iterable data set without a length; give a map-style Dataset") from None
    if size == 0:
        raise DataError(f"{name} is empty; give at least one data point")
    return size


def _check_tensors(tensors: tuple[Tensor, ...], name: str) -> None:
    for tensor in tensors:
        if tensor.dim() == 0:
            raise DataError(f"{name} holds a scalar; a batch has the data points along its first dimension")
        _length(tensor, name)
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        raise DataError(f"{name} holds tensors of different lengths {lengths}; they must have the same first dimension")
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            row = int((~tensor.isfinite()).reshape(len(tensor), -1).any(1).nonzero()[0])
            raise DataError(
                f"{name} holds NaN or infinite values (the first in row {row}). Remove or impute them, or mask them in"
                " the model (pyro.poutine.mask)."
            )


def _check_values(source: Batches, name: str, likelihood: Any) -> None:
    """The likelihood's support, on all data where they are at hand as they will be drawn, else on one minibatch."""
    if not source.first()[0].is_floating_point():
        raise DataError(
            f"{name} holds {source.first()[0].dtype}; this model takes floating-point data: convert it, as in"
            " data.float() / 255 for 8-bit images"
        )
    whole = isinstance(source, Resident) and (source.split is None or source.split.binarization != "dynamic")
    x = source.tensors[0] if isinstance(source, Resident) and whole else source.first()[0]
    outside = ~likelihood.support.check(x)
    if bool(outside.any()):
        raise DataError(
            f"{name} holds {float(x[outside][0]):g}, outside the support of the model's likelihood. {likelihood.advice}"
        )
