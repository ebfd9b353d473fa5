"""What a data set is: three splits of images (or of rows of numbers), each of which knows how it is binarized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyrovae.errors import ArgumentError, DataError, require_count

__all__ = [
    "BINARIZATIONS",
    "STATIC_SEED",
    "Binarization",
    "LabelledSplit",
    "Split",
    "Splits",
    "is_binary",
    "make_splits",
    "random_rows",
]

Binarization = Literal["none", "static", "dynamic"]
BINARIZATIONS: tuple[Binarization, ...] = get_args(Binarization)

# Part of what "static" means: a bound on statically binarized images depends on which pixels were drawn.
STATIC_SEED = 2008


@dataclass(frozen=True, eq=False)
class Split(Dataset[Tensor]):
    """One split: images, their labels, and how an image becomes an observation.

    Args:
        x: A float32 `n x *event_shape` tensor: {0, 1} where ``binarization`` is ``"static"``, intensities in
            [0, 1] where it is ``"dynamic"``, finite numbers where it is ``"none"`` (images are in [0, 1] there too).
        y: An int64 `n` tensor of labels, or ``None`` where the data have none.
        binarization: ``"none"`` observes ``x`` as it is; ``"static"`` observes pixels that were drawn once;
            ``"dynamic"`` draws each pixel from Bernoulli(intensity) anew whenever it is observed.
        name: of the data set it belongs to, for a run's configuration; empty where it belongs to none.

    Raises:
        ArgumentError: ``binarization`` is none of the three.
        DataError: ``x`` is empty, not float32 or outside its support, or ``y`` does not label each row of it.

    Reference:
        Salakhutdinov & Murray 2008, On the quantitative analysis of deep belief networks,
        https://doi.org/10.1145/1390156.1390266 (binarization by sampling from the intensities).

    Example:
        >>> split = Split(torch.full((4, 2, 2), 0.5), None, "dynamic")
        >>> len(split), split.event_shape, split[0].shape
        (4, torch.Size([2, 2]), torch.Size([2, 2]))
        >>> sorted(set(split.draw(split.x).flatten().tolist()) - {0.0, 1.0})
        []
    """

    x: Tensor
    y: Tensor | None
    binarization: Binarization
    name: str = ""

    def __post_init__(self) -> None:
        if self.binarization not in BINARIZATIONS:
            raise ArgumentError(f"binarization is {self.binarization!r}; allowed are: {', '.join(BINARIZATIONS)}")
        if self.x.dtype != torch.float32 or self.x.dim() < 2 or self.x.numel() == 0:
            raise DataError(
                f"x is {self.x.dtype} of shape {tuple(self.x.shape)}; "
                "it must be float32 of shape n x *event_shape and not empty"
            )
        if self.y is not None and (self.y.dtype != torch.int64 or self.y.shape != self.x.shape[:1]):
            raise DataError(
                f"y is {self.y.dtype} of shape {tuple(self.y.shape)}; "
                f"it must be int64 of shape ({len(self.x)},), a label for each row of x, or None"
            )
        low, high = (bound.item() for bound in torch.aminmax(self.x))
        if not math.isfinite(high - low):
            raise DataError(f"x lies in [{low:g}, {high:g}]; it must be finite")
        if self.binarization != "none" and not (low >= 0 and high <= 1):
            raise DataError(
                f"x lies in [{low:g}, {high:g}]; intensities to be binarized ({self.binarization}) must be in [0, 1]"
            )
        if self.binarization == "static" and not is_binary(self.x):
            raise DataError("x has values between 0 and 1; a static split holds pixels that are 0 or 1")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int | slice | Tensor) -> Tensor:
        """One draw of ``x[i]``: a `*event_shape` tensor for an int, rows of them for a slice or a tensor."""
        return self.draw(self.x[i])

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one image."""
        return self.x.shape[1:]

    def draw(self, x: Tensor) -> Tensor:
        """Observations of rows of ``self.x``, on whichever device these rows are.

        Args:
            x: A `... x *event_shape` tensor of intensities or pixels.

        Returns:
            A tensor shaped like ``x``: Bernoulli(x), from the global generator of its device, where the split
            is dynamic; ``x`` itself otherwise.

        Example:
            >>> split = Split(torch.full((4, 2, 2), 0.5), None, "none")
            >>> split.draw(split.x) is split.x
            True
        """
        return torch.bernoulli(x) if self.binarization == "dynamic" else x

    def labelled(self, count: int | None = None, *, seed: int = 0) -> LabelledSplit:
        """The split that also hands its labels to model and guide, as ``fit(model, guide, split.labelled())``.

        Args:
            count: number of labels to keep, as evenly over the classes as it allows; the others become -1, which is a
                missing label. ``None`` keeps all.
            seed: of the choice.

        Raises:
            DataError: there are no labels, or fewer than ``count``.

        Example:
            >>> split = Split(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), "none")
            >>> split.labelled(2).y.ge(0).sum()
            tensor(2)
        """
        if self.y is None:
            raise DataError(f"{self.name or 'the split'} has no labels; take data that have them")
        if count is None:
            return LabelledSplit(self.x, self.y, self.binarization, self.name)
        if require_count("count", count) > len(self.y):
            raise DataError(f"count is {count}, but there are {len(self.y)} labels; give at most so many")
        order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(seed))
        rank = torch.empty_like(self.y)  # of each data point within its class
        for label in self.y.unique():
            members = order[self.y[order] == label]
            rank[members] = torch.arange(len(members))
        kept = order[rank[order].argsort(stable=True)[:count]]
        y = torch.full_like(self.y, -1).index_put((kept,), self.y[kept])
        return LabelledSplit(self.x, y, self.binarization, self.name)


@dataclass(frozen=True, eq=False)
class LabelledSplit(Split):
    """A split whose data points come with their labels: model and guide are called as ``model(x, y)``.

    :meth:`Split.labelled` makes it. A label of -1 is a missing one.

    Example:
        >>> split = Split(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), "none").labelled()
        >>> split[1]
        (tensor([1., 1.]), tensor(1))
    """

    def __getitem__(self, i: int | slice | Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """One draw of ``x[i]``, and the labels."""
        assert self.y is not None
        return super().__getitem__(i), self.y[i]


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set: its training, validation and test splits.

    Where ``binarization`` is ``"dynamic"``, only the training split is: validation and test are drawn once,
    with a fixed seed, and marked ``"static"``, so that bounds on them can be compared between epochs and runs.

    Args:
        name: the name it was loaded by; ``load(name)`` gives these splits again.
        train: what to fit.
        validation: what to choose by.
        test: what to report.
        classes: name of each label; empty where the data have no labels.
        binarization: what was asked of ``load``.
        note: what a reader of figures on these splits should know, such as that they are only a part of a
            data set; empty where there is nothing to say.

    Example:
        >>> from pyrovae import datasets
        >>> digits = datasets.load("digits")
        >>> digits.event_shape, len(digits.train), len(digits.classes)
        (torch.Size([8, 8]), 1197, 10)
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    binarization: Binarization
    note: str = ""

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one image, the same in all splits."""
        return self.train.event_shape

    def describe(self) -> dict[str, Any]:
        """What there is to say of the data in a run's ``config.json``; only strings, ints, lists and dicts.

        Example:
            >>> from pyrovae import datasets
            >>> datasets.load("digits").describe()["sizes"]
            {'train': 1197, 'validation': 300, 'test': 300}
        """
        described = {
            "name": self.name,
            "binarization": self.binarization,
            "sizes": {part: len(getattr(self, part)) for part in ("train", "validation", "test")},
            "event_shape": list(self.event_shape),
        }
        return described | ({"note": self.note} if self.note else {})


def is_binary(x: Tensor) -> bool:
    """Whether all elements are 0 or 1.

    Example:
        >>> is_binary(torch.tensor([0.0, 1.0])), is_binary(torch.tensor([0.0, 0.5]))
        (True, False)
    """
    return bool(((x == 0) | (x == 1)).all())


def make_splits(
    name: str,
    images: Sequence[Tensor],
    labels: Sequence[Tensor | None],
    classes: tuple[str, ...],
    binarization: Binarization,
    note: str = "",
) -> Splits:
    """Splits from intensities, drawn once with the fixed seed where ``binarization`` says so.

    Args:
        name: the data set's name.
        images: intensities of train, validation and test, each a float32 `n x *event_shape` tensor, in [0, 1]
            unless ``binarization`` is ``"none"``.
        labels: an int64 `n` tensor each, or ``None``.
        classes: name of each label.
        binarization: how to binarize, see ``Split`` and ``Splits``.
        note: see ``Splits``.

    Returns:
        The splits; validation and test are the same pixels for ``"static"`` and ``"dynamic"``.

    Example:
        >>> images = [torch.full((n, 2, 2), 0.5) for n in (4, 2, 2)]
        >>> parts = make_splits("grey", images, [None] * 3, (), "dynamic")
        >>> parts.train.binarization, parts.validation.binarization
        ('dynamic', 'static')
    """
    parts = []
    for index, (x, y) in enumerate(zip(images, labels, strict=True)):
        kind: Binarization = "static" if binarization == "dynamic" and index > 0 else binarization
        # Binary pixels are their own draw, and what is no intensity Split refuses, and says why.
        if kind == "static" and bool((x >= 0).all()) and bool((x <= 1).all()) and not is_binary(x):
            # A generator for each split, so that a split's pixels do not depend on the size of the one before.
            x = torch.bernoulli(x, generator=torch.Generator().manual_seed(STATIC_SEED + index))
        parts.append(Split(x, y, kind, name))
    train, validation, test = parts
    return Splits(name, train, validation, test, classes, binarization, note)


def random_rows(
    rows: int, validation: int, test: int, seed: int, stratify: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers of a random partition into train, validation and test, the same on every machine.

    Args:
        rows: how many there are.
        validation: how many validate.
        test: how many test; the other rows train.
        seed: of the partition.
        stratify: a label for each row, to have every class in proportion; ``None`` leaves that to chance.

    Returns:
        int64 tensors of row numbers, each in ascending order.

    Example:
        >>> [part.tolist() for part in random_rows(6, validation=2, test=1, seed=0)]
        [[1, 3, 4], [0, 2], [5]]
    """
    # Imported here because it is slow to import. Its permutations are those of numpy's RandomState, which is frozen.
    from sklearn.model_selection import train_test_split

    def apart(where: Tensor, size: int) -> tuple[Tensor, Tensor]:
        labels = None if stratify is None else stratify[where]
        rest, chosen = train_test_split(where.numpy(), test_size=size, stratify=labels, random_state=seed)
        return torch.from_numpy(rest).sort().values, torch.from_numpy(chosen).sort().values

    rest, held_out = apart(torch.arange(rows), test)
    train, validating = apart(rest, validation)
    return train, validating, held_out
