"""What an encoder learnt without labels is worth to a classifier that has few of them."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from pyrovae.datasets import Split
from pyrovae.errors import ArgumentError, DataError, require_count, require_positive, unknown_name
from pyrovae.modes import device_of, evaluating, modules_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FeatureAccuracies", "FeatureAccuracy", "classify_features"]

Encode = Callable[[Tensor], Any]
Labelled = Split | tuple[Tensor, Tensor]
Method = Literal["features", "fine-tuned", "from scratch"]
METHODS: tuple[Method, ...] = get_args(Method)

_CHUNK = 1000  # data points that are encoded at a time


@dataclass(frozen=True)
class FeatureAccuracy:
    """One classifier on test data that it has not seen.

    Args:
        method: ``"features"``, ``"fine-tuned"`` or ``"from scratch"``.
        labels: number of labelled data points that it was fitted to.
        correct: number of test data points that it labels rightly.
        points: number of test data points.
    """

    method: str
    labels: int
    correct: int
    points: int

    @property
    def accuracy(self) -> float:
        """The share of test data points that are labelled rightly."""
        return self.correct / self.points

    @property
    def error(self) -> float:
        """Binomial standard error of the accuracy, from the choice of test data alone."""
        return math.sqrt(self.accuracy * (1.0 - self.accuracy) / self.points)


@dataclass(frozen=True)
class FeatureAccuracies(Sequence[FeatureAccuracy]):
    """A table of accuracies: a line for each method, a column for each number of labels.

    Args:
        rows: the accuracies, by number of labels and method.
    """

    rows: tuple[FeatureAccuracy, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """A row by its place, or by its method and number of labels: ``found["features", 100]``."""
        if not isinstance(index, tuple):
            return self.rows[index]
        by_name = {(row.method, row.labels): row for row in self.rows}
        if index not in by_name:
            raise KeyError(f"there is no {index!r}; there are: {', '.join(map(repr, by_name))}")
        return by_name[index]

    def __iter__(self) -> Iterator[FeatureAccuracy]:
        return iter(self.rows)

    def __repr__(self) -> str:
        labels = list(dict.fromkeys(row.labels for row in self.rows))
        lines = [["accuracy ± s.e.", *(f"{number:,} labels" for number in labels)]]
        for method in dict.fromkeys(row.method for row in self.rows):
            found = (self[method, number] for number in labels)
            lines.append([method, *(f"{row.accuracy:.3f} ± {row.error:.3f}" for row in found)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws accuracy against the number of labels, with bars of one standard error, and returns the Axes.

        Args:
            ax: the Axes to draw in; by default those of a new figure.
        """
        from pyrovae.plots.style import PALETTE, axes_or_new, tidy

        ax = axes_or_new(ax, (6.4, 4.0))
        for colour, method in zip(PALETTE, dict.fromkeys(row.method for row in self.rows), strict=False):
            rows = sorted((row for row in self.rows if row.method == method), key=lambda row: row.labels)
            accuracies, errors = [row.accuracy for row in rows], [row.error for row in rows]
            ax.errorbar(
                [row.labels for row in rows], accuracies, errors, color=colour, marker="o", capsize=3, label=method
            )
        ax.set_xscale("log")
        ax.set_xlabel("labelled data points")
        ax.set_ylabel("accuracy on test data (± standard error)")
        ax.set_title("What the features are worth")
        ax.legend(frameon=False, loc="best")
        tidy(ax)
        return ax


def classify_features(
    encode: Encode,
    train: Labelled,
    test: Labelled,
    labels: Sequence[int | None] = (100, 1000, None),
    *,
    methods: Sequence[Method] = METHODS,
    untrained: Encode | None = None,
    steps: int = 500,
    batch_size: int = 100,
    lr: float = 1e-3,
    seed: int = 0,
) -> FeatureAccuracies:
    r"""Accuracy of classifiers from few labels, with and without what an encoder learnt from unlabelled data.

    Of the labelled data each class gives the same number of points, but for one, and the points of a smaller number of
    labels are among those of a larger one. Three methods are compared on the same points:

    - ``"features"``: logistic regression on the encoder's features, standardised; the encoder is left as it is;
    - ``"fine-tuned"``: a linear layer on the encoder, both trained by gradient steps, from the encoder's parameters;
    - ``"from scratch"``: the same network and steps, from random parameters.

    Args:
        encode: from `n x *event` data to `n x features` features, or to a distribution whose mean they are:
            ``guide.encode``, ``autoencoder.encode`` or a module. It is left as it was. A plain function serves for
            ``methods=("features",)``.
        train: a labelled split, or a pair of tensors `n x *event` and `n`. Dynamically binarized data are drawn once.
        test: likewise.
        labels: numbers of labelled data points, each at least the number of classes; ``None`` for all.
        methods: which of the three.
        untrained: an encoder of the same architecture with random parameters; ``None`` draws those of a copy anew, as
            the layers of torch do at first (``reset_parameters``).
        steps: gradient steps of Adam for each network.
        batch_size: data points of a step, drawn anew.
        lr: learning rate.
        seed: of the choice of points, of random parameters and of minibatches; the caller's random state is left as it
            was.

    Returns:
        A :class:`FeatureAccuracies`, which prints as a table; ``plot()`` draws it.

    Raises:
        ArgumentError: an argument is out of range, or the encoder cannot be trained or drawn anew.
        DataError: the data have no labels, or labels and data do not fit each other.

    References:
        Alain & Bengio 2017 (linear classifiers on features), https://arxiv.org/abs/1610.01644; Hinton & Salakhutdinov
        2006 (fine-tuning), https://doi.org/10.1126/science.1127647.

    Example:
        >>> import pyrovae
        >>> digits = pyrovae.datasets.load("digits", binarization="none")
        >>> pixels = classify_features(lambda x: x.flatten(1), digits.train, digits.test, (100,), methods=["features"])
        >>> pixels["features", 100].accuracy > 0.8
        True
    """
    for method in methods:
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
    require_count("steps", steps)
    require_count("batch_size", batch_size)
    require_positive("lr", lr)
    for argument, given in (("encode", encode), ("untrained", untrained)):
        _require_encoder(argument, given, methods)
    place = device_of(encode)
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        (x, y), (test_x, test_y) = (_labelled(name, data) for name, data in (("train", train), ("test", test)))
        values, codes = torch.unique(torch.cat([y, test_y]), return_inverse=True)
        x, test_x, y, test_y = (part.to(place) for part in (x, test_x, *codes.split([len(y), len(test_y)])))
        numbers = _numbers(labels, len(y), len(values))
        order = _balanced(y, len(values))
        rows = []
        for number in numbers:
            chosen = order[:number]
            for method in methods:
                torch.manual_seed(seed)
                if method == "features":
                    found = _regression(encode, x[chosen], y[chosen], test_x)
                else:
                    network = copy.deepcopy(encode if method == "fine-tuned" else (untrained or encode))
                    used = _used(network, x[:1])
                    if method == "from scratch" and untrained is None:
                        _draw_anew(network, used)
                    classifier = _Classifier(network, used, x[:1], len(values))
                    found = classifier.fit(x[chosen], y[chosen], steps, min(batch_size, number), lr).predict(test_x)
                rows.append(FeatureAccuracy(method, number, int((found == test_y).sum()), len(test_y)))
    return FeatureAccuracies(tuple(rows))


def _require_encoder(argument: str, encode: Any, methods: Sequence[str]) -> None:
    """The networks are trained in copies, which exist of modules and their methods alone."""
    if encode is None:
        return
    if not callable(encode):
        raise ArgumentError(f"{argument} is a {type(encode).__name__}; it must be a function of data, as guide.encode")
    owner = encode.__self__ if inspect.ismethod(encode) else encode
    if not isinstance(owner, nn.Module) and set(methods) != {"features"}:
        raise ArgumentError(
            f"{argument} is a {type(encode).__name__}, of which no copy can be trained; give a module or a module's"
            " method, as guide.encode, or methods=('features',)"
        )


def _labelled(name: str, data: Any) -> tuple[Tensor, Tensor]:
    """Data and labels; dynamically binarized data are drawn."""
    x, y = (data.draw(data.x), data.y) if isinstance(data, Split) else data
    if y is None:
        raise DataError(f"{name} has no labels; give a data set that has them, or a pair of data and labels")
    if y.dim() != 1 or len(y) != len(x) or y.is_floating_point() or not len(y):
        raise DataError(
            f"{name} has {len(x)} data points and labels of {y.dtype} and shape {tuple(y.shape)}; it must have a whole"
            " number for each data point, and at least one"
        )
    return x, y


def _numbers(labels: Sequence[int | None], size: int, classes: int) -> list[int]:
    numbers = [size if number is None else require_count("labels", number) for number in labels]
    for number in numbers:
        if not classes <= number <= size:
            raise ArgumentError(
                f"labels has {number}; there are {size} labelled data points in {classes} classes, so that it must lie"
                " between these two, or be None for all"
            )
    return list(dict.fromkeys(numbers))


def _balanced(y: Tensor, classes: int) -> Tensor:
    """A random order of the data points in which the classes take turns."""
    order = torch.randperm(len(y)).to(y.device)
    earlier = nn.functional.one_hot(y[order], classes).cumsum(0)  # of each class, up to here
    turn = earlier.gather(1, y[order].unsqueeze(1)).squeeze(1)
    return order[turn.argsort(stable=True)]


def _features(encode: Encode, x: Tensor) -> Tensor:
    found = encode(x)
    features = found if isinstance(found, Tensor) else found.mean
    if features.dim() != 2 or len(features) != len(x):
        raise ArgumentError(
            f"encode gives features of shape {tuple(features.shape)} for {len(x)} data points; they must be a matrix"
            " `n x features`"
        )
    return features


def _regression(encode: Encode, x: Tensor, y: Tensor, test_x: Tensor) -> Tensor:
    """Labels of the test data by logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with evaluating(encode):
        features, unseen = (
            torch.cat([_features(encode, part) for part in data.split(_CHUNK)]).double().cpu().numpy()
            for data in (x, test_x)
        )
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(features, y.cpu().numpy())
    return torch.as_tensor(regression.predict(unseen), device=y.device)


def _used(encode: Encode, x: Tensor) -> list[nn.Parameter]:
    """The parameters that the features depend on."""
    parameters = [p for module in modules_of(encode) for p in module.parameters() if p.requires_grad]
    features = _features(encode, x)
    if not parameters or not features.requires_grad:
        raise ArgumentError(
            "encode has no parameters to train (the features have no gradient); give the encoder itself, such as"
            " autoencoder.encode, or methods=('features',)"
        )
    gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def _draw_anew(encode: Encode, used: Sequence[nn.Parameter]) -> None:
    drawn = set()
    for module in (part for root in modules_of(encode) for part in root.modules()):
        reset: Any = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            drawn |= {id(parameter) for parameter in module.parameters(recurse=False)}
    if any(id(parameter) not in drawn for parameter in used):
        raise ArgumentError(
            "encode has parameters outside of torch's layers, which cannot be drawn anew; give untrained=…, an encoder"
            " of the same architecture with random parameters"
        )


class _Classifier:
    """A linear layer on an encoder, trained with it.

    Args:
        encode: the encoder, trained in place.
        used: its parameters that the features depend on.
        example: a data point, to see the number of features.
        classes: number of classes.
    """

    def __init__(self, encode: Encode, used: Sequence[nn.Parameter], example: Tensor, classes: int) -> None:
        features = _features(encode, example)
        self.encode = encode
        self.head = nn.Linear(features.shape[1], classes).to(features)
        self.parameters = [*used, *self.head.parameters()]

    def fit(self, x: Tensor, y: Tensor, steps: int, batch_size: int, lr: float) -> _Classifier:
        """Minimises the cross-entropy of the labels."""
        optimizer = torch.optim.Adam(self.parameters, lr=lr, fused=True)
        for module in modules_of(self.encode):
            module.train()
        for _ in range(steps):
            rows = torch.randint(len(x), (batch_size,), device=x.device)
            loss = nn.functional.cross_entropy(self.head(_features(self.encode, x[rows])), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self

    def predict(self, x: Tensor) -> Tensor:
        """The most probable labels."""
        with evaluating(self.encode):
            return torch.cat([self.head(_features(self.encode, part)).argmax(1) for part in x.split(_CHUNK)])
