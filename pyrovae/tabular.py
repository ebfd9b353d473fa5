"""Models of tables and series: what each takes from named columns, and what it starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae.datasets import Table
from pyrovae.datasets.base import is_binary
from pyrovae.errors import ArgumentError, DataError, unknown_name
from pyrovae.registry import MODELS

__all__ = ["SERIES", "TABULAR", "Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """A model and the data to fit it to.

    Args:
        model: the model.
        data: what model and guide take: tensors, all rows in each.
        used: what became of the columns, in one line.
    """

    model: Any
    data: tuple[Tensor, ...]
    used: str


@dataclass(frozen=True)
class _Roles:
    """The columns of a table and what they are to a model."""

    table: Table
    response: str | None
    inputs: tuple[str, ...] | None
    groups: tuple[str, ...]

    @property
    def numbers(self) -> list[str]:
        """Columns of numbers that group nothing."""
        grouping = {group.partition(":")[0] for group in self.groups}
        return [
            name for name, column in self.table.columns.items() if isinstance(column, Tensor) and name not in grouping
        ]

    def y(self) -> Tensor:
        """The response: the column that was named, else the last one of numbers that is no input."""
        return self.table[self.y_name()]

    def y_name(self) -> str:
        left = [name for name in self.numbers if name not in (self.inputs or ())]
        if self.response is None and not left:
            raise DataError(f"{self.table!r} has no column of numbers left for the response; name it")
        return left[-1] if self.response is None else self.response

    def x_names(self, but: str | None = None) -> list[str]:
        """The inputs: the columns that were named, else all of numbers but one."""
        return [name for name in self.numbers if name != but] if self.inputs is None else list(self.inputs)

    def explained(self) -> tuple[str, Tensor, list[str]]:
        """The name of the response, the response, and the names of the inputs."""
        y_name = self.y_name()
        return y_name, self.table[y_name], self.x_names(but=y_name)

    def x(self, names: Sequence[str]) -> Tensor:
        """Columns side by side, `n x columns`."""
        if not names:
            raise DataError(f"{self.table!r} has no column of numbers for the inputs; name one at least")
        return torch.stack([self.table[name] for name in names], dim=1)


# Arguments of the model, the data (of which the model may make a part), and what was used.
_Made = tuple[dict[str, Any], Callable[[Any], tuple[Tensor, ...]], str]


def _regression(roles: _Roles) -> _Made:
    y_name, y, names = roles.explained()
    x = roles.x(names)
    arguments = {"features": len(names) + 1, "intercept": True, "prior_precision": 1e-4, "noise_rate": _variance(y)}
    return arguments, lambda model: (x, y), f"{y_name} on {', '.join(names)}"


def _network(roles: _Roles) -> _Made:
    """One hidden layer of 50, inputs and response standardised inside; logits where the response is 0 and 1."""
    y_name, y, names = roles.explained()
    x = roles.x(names)

    def data(model: Any) -> tuple[Tensor, ...]:
        model.standardize(x, y)
        return x, y

    likelihood = "bernoulli" if is_binary(y) else "normal"
    arguments = {"net": [len(names), 50, 1], "likelihood": likelihood, "num_data": len(y)}
    return arguments, data, f"{y_name} on {', '.join(names)}, {likelihood}"


def _process(roles: _Roles) -> _Made:
    y_name, y, names = roles.explained()
    x = roles.x(names)
    variance = _variance(y)
    arguments = {
        "features": len(names),
        "lengthscale": float(x.std(0).mean()),
        "variance": variance,
        "noise": variance / 10,
    }
    return arguments, lambda model: (x, y - y.mean()), f"{y_name}, centred, on {', '.join(names)}"


def _mixture(roles: _Roles) -> _Made:
    names = roles.x_names()
    x = roles.x(names)
    variances = torch.diag(x.var(0)).tolist()
    arguments = {"components": 2, "features": len(names), "mean": x.mean(0).tolist(), "scale": variances}
    return arguments, lambda model: (x,), ", ".join(names)


def _pair(roles: _Roles) -> _Made:
    names = roles.x_names()
    if len(names) != 2:
        raise DataError(f"the inputs are {', '.join(names) or 'none'}; this model takes two columns of zeros and ones")
    x = roles.x(names)
    if not is_binary(x):
        raise DataError(f"{' and '.join(names)} hold other numbers than 0 and 1, which is all that this model takes")
    return {}, lambda model: (x,), " and ".join(names)


def _groups(roles: _Roles) -> _Made:
    if len(roles.groups) != 1:
        raise ArgumentError(f"groups is {roles.groups!r}; this model takes one grouping column")
    codes, levels = roles.table.codes(roles.groups[0])
    y, y_name = roles.y(), roles.y_name()
    means = torch.zeros(len(levels), dtype=y.dtype).index_add(0, codes, y) / codes.bincount(minlength=len(levels))
    rest = max(len(y) - len(levels), 1)
    within, spread = float(((y - means[codes]).square().sum() / rest).sqrt()), _variance(y) ** 0.5
    arguments = {
        "groups": len(levels),
        "noise": within or spread,
        "mean_loc": float(y.mean()),
        "mean_scale": 2.5 * spread,
        "spread_scale": spread,
    }
    return arguments, lambda model: (codes, y), f"{y_name} by {roles.groups[0]} ({len(levels)} groups)"


def _mixed(roles: _Roles) -> _Made:
    """``subject`` groups intercepts, ``subject:days`` intercepts and slopes of that column."""
    if not roles.groups:
        raise ArgumentError(
            "groups is empty; this model takes grouping columns, as Subject, or as Subject:Days for slopes"
        )
    y_name, y, names = roles.explained()
    ones, spread = torch.ones(len(y), 1, dtype=y.dtype), _variance(y) ** 0.5
    X = torch.cat([ones, *([roles.x(names)] if names else [])], dim=1)
    designs, levels, groups, scales = {}, {}, {}, {}
    for text in roles.groups:
        group, _, slopes = text.partition(":")
        columns = [name for name in slopes.split(":") if name]
        designs[group] = torch.cat([ones, *([roles.x(columns)] if columns else [])], dim=1)
        levels[group], known = roles.table.codes(group)
        groups[group] = [len(known), designs[group].shape[1]]
        scales[group] = [spread / _unit(column) for column in designs[group].T]
    arguments = {
        "fixed": X.shape[1],
        "groups": groups,
        "fixed_scale": [abs(float(y.mean())) + 2.5 * spread, *(2.5 * spread / _unit(column) for column in X.T[1:])],
        "effect_scales": scales,
        "residual_scale": spread,
    }
    used = f"{y_name} on {', '.join(['1', *names])}; effects by {', '.join(roles.groups)}"
    return arguments, lambda model: (X, *model.stack(designs, levels), y), used


def _study(roles: _Roles) -> _Made:
    y_name, y, names = roles.explained()
    if len(names) != 1:
        raise DataError(f"the inputs are {', '.join(names) or 'none'}; this model takes one: the standard errors")
    used = f"{y_name} with standard errors {names[0]}"
    return {"standard_errors": roles.table[names[0]].tolist()}, lambda model: (y.unsqueeze(0),), used


def _level(roles: _Roles) -> _Made:
    y = _standardised(roles.y())
    arguments: dict[str, Any] = {
        "transition": [[1.0]],
        "observation": [[1.0]],
        "state_covariance": [[0.1]],
        "observation_covariance": [[0.5]],
        "initial_mean": [float(y[0])],
        "steps": len(y),
    }
    said = f"{_moments(roles.y_name(), roles.y())}, as a local level"
    return arguments, lambda model: (y.reshape(1, -1, 1),), said


def _returns(roles: _Roles) -> _Made:
    y = roles.y()
    return {"steps": len(y)}, lambda model: ((y - y.mean()).unsqueeze(0),), f"{roles.y_name()}, centred"


def _growth(roles: _Roles) -> _Made:
    y = roles.y()
    return {"steps": len(y)}, lambda model: (y.reshape(1, -1, 1),), roles.y_name()


def _filter(roles: _Roles) -> _Made:
    names = list(roles.inputs) if roles.inputs else [roles.y_name()]
    columns = [roles.table[name] for name in names]
    x = torch.stack([_standardised(column) for column in columns], dim=1).unsqueeze(0)
    arguments = {"features": len(names), "latent_dim": 2, "steps": x.shape[1]}
    return arguments, lambda model: (x,), "; ".join(map(_moments, names, columns))


TABULAR: dict[str, Callable[[_Roles], _Made]] = {
    "BayesianLinearRegression": _regression,
    "BNN": _network,
    "GaussianProcess": _process,
    "GaussianMixture": _mixture,
    "TwoBernoulli": _pair,
    "HierarchicalNormal": _groups,
    "LinearMixedModel": _mixed,
    "EightSchools": _study,
    "LinearGaussianStateSpace": _level,
    "StochasticVolatility": _returns,
    "GrowthModel": _growth,
    "DeepKalmanFilter": _filter,
}
"""By name of the model: its arguments and data, of columns with roles."""

SERIES = ("LinearGaussianStateSpace", "StochasticVolatility", "GrowthModel", "DeepKalmanFilter")
"""Models whose data point is a whole series, in the order of the rows."""


def prepare(
    name: str,
    table: Table,
    *,
    response: str | None = None,
    inputs: Sequence[str] | None = None,
    groups: Sequence[str] = (),
    **arguments: Any,
) -> Prepared:
    """A registered model for a table, with priors of the order of its columns, and the table as the model takes it.

    What a column is, by model:

    - ``BayesianLinearRegression``, ``BNN``, ``GaussianProcess``: ``response`` on ``inputs`` (the process: centred; the
      network: one hidden layer of 50, standardised inside, with logits where the response is 0 and 1).
    - ``LinearMixedModel``: the same with effects by ``groups``: ``"Subject"`` for intercepts, ``"Subject:Days"`` for
      intercepts and slopes of ``Days``. Priors are in units of the response's standard deviation.
    - ``HierarchicalNormal``: ``response`` by one of ``groups``; its noise is the spread within groups.
    - ``GaussianMixture``, ``TwoBernoulli``: ``inputs``.
    - ``EightSchools``: ``response`` with its standard errors as the one of ``inputs``.
    - ``LinearGaussianStateSpace`` (a local level, standardised), ``StochasticVolatility`` (centred), ``GrowthModel``:
      the series ``response``; ``DeepKalmanFilter``: that, or the series ``inputs``, standardised.

    Args:
        name: of the model, one of ``TABULAR``.
        table: the columns.
        response: what is explained; ``None`` for the last column of numbers that is nothing else.
        inputs: what explains; ``None`` for all other columns of numbers.
        groups: grouping columns.
        **arguments: of the model, instead of those that the table suggests.

    Raises:
        ArgumentError: there is no such model or column, or an argument is out of range.
        DataError: the table has too few columns.

    Example:
        >>> table = Table("sleep", {"ms": torch.randn(9), "day": torch.arange(9.0) % 3, "who": list("aaabbbccc")})
        >>> made = prepare("LinearMixedModel", table, response="ms", groups=["who:day"])
        >>> made.used, [tuple(part.shape) for part in made.data]
        ('ms on 1, day; effects by who:day', [(9, 2), (9, 2), (9, 1), (9,)])
    """
    if name not in TABULAR:
        raise unknown_name("model of tables", name, TABULAR)
    if isinstance(inputs, str) or isinstance(groups, str):
        raise ArgumentError("inputs and groups must be lists of names of columns")
    roles = _Roles(table, response, None if inputs is None else tuple(inputs), tuple(groups))
    suggested, data, used = TABULAR[name](roles)
    model = MODELS.build({"name": name, "arguments": suggested | arguments})
    return Prepared(model, data(model), used)


def _variance(y: Tensor) -> float:
    """Of a column; 1 where it is constant."""
    return float(y.var()) or 1.0


def _standardised(column: Tensor) -> Tensor:
    return (column - column.mean()) / _unit(column)


def _moments(name: str, column: Tensor) -> str:
    return f"{name}, standardised (mean {float(column.mean()):.6g}, standard deviation {_unit(column):.6g})"


def _unit(column: Tensor) -> float:
    """The standard deviation of a column; 1 for a constant one."""
    return float(column.std()) or 1.0
