"""Factories by registered name, so that a run is rebuilt from ``config.json`` and no code is ever pickled."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pyrovae.errors import ArgumentError, unknown_name

__all__ = ["GUIDES", "MODELS", "OBJECTIVES", "SCHEDULES", "Registry", "configuration", "named"]

Factory = TypeVar("Factory", bound=type)


class Registry(Mapping[str, type]):
    """Classes by name; an instance of a registered class remembers the arguments it was built from.

    Args:
        kind: what the registry holds, as a reader would say it (``"model"``).

    Example:
        >>> shapes = Registry("shape")
        >>> @shapes.register
        ... class Square:
        ...     def __init__(self, side, colour="red"):
        ...         self.side = side
        >>> configuration(Square(2))
        {'name': 'Square', 'arguments': {'side': 2, 'colour': 'red'}}
        >>> shapes.build({"name": "Square", "arguments": {"side": 3}}).side
        3
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type] = {}

    def __getitem__(self, name: str) -> type:
        if name not in self._classes:
            raise unknown_name(self.kind, name, self._classes)
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        return len(self._classes)

    def register(self, cls: Factory) -> Factory:
        """Class decorator: enters ``cls`` under its own name and records each instance's arguments."""
        init = cls.__init__  # type: ignore[misc]
        signature = inspect.signature(init)
        kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
        options = kinds.get(inspect.Parameter.VAR_KEYWORD, "")  # the name of its ``**options``

        @functools.wraps(init)
        def recording_init(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            if type(self) is cls:
                bound = signature.bind(self, *args, **kwargs)
                bound.apply_defaults()
                given = dict(list(bound.arguments.items())[1:])
                given.update(given.pop(options, {}))
                object.__setattr__(self, "_arguments", given)

        cls.__init__ = recording_init  # type: ignore[misc]
        self._classes[cls.__name__] = cls
        return cls

    def build(self, config: Mapping[str, Any], *args: Any) -> Any:
        """Builds the object that ``configuration`` described.

        Args:
            config: ``{"name": …, "arguments": {…}}``.
            *args: positional arguments that a configuration leaves out (a guide's model).

        Raises:
            ArgumentError: the name is not registered, or the arguments do not fit it.
        """
        if not isinstance(config, Mapping) or not isinstance(config.get("arguments", {}), Mapping):
            raise ArgumentError(f"a {self.kind} is described by {{'name': …, 'arguments': {{…}}}}, not by {config!r}")
        cls = self[config.get("name", "")]
        arguments = {key: _built(value) for key, value in config.get("arguments", {}).items()}
        try:
            inspect.signature(cls).bind(*args, **arguments)
        except TypeError as error:
            raise ArgumentError(f"{self.kind} {config['name']}: {error}") from error
        return cls(*args, **arguments)


MODELS = Registry("model")
GUIDES = Registry("guide")
OBJECTIVES = Registry("objective")
SCHEDULES = Registry("schedule")


def named(kind: str, given: str | Mapping[str, Any], classes: Mapping[str, Any], *args: Any, **more: Any) -> Any:
    """An instance of one of some classes, by its name or by a dictionary of a ``"name"`` and options.

    Args:
        kind: what the classes are, as a reader would say it.
        given: what the user gave.
        classes: by name.
        *args: of each class.
        **more: likewise.

    Raises:
        ArgumentError: the name is unknown, or the options do not fit its class.

    Example:
        >>> named("number", {"name": "whole", "base": 2}, {"whole": int, "real": float}, "101")
        5
    """
    options = {"name": given} if isinstance(given, str) else dict(given)
    name: Any = options.pop("name", None)
    if name not in classes:
        raise unknown_name(kind, name, classes)
    try:
        return classes[name](*args, **more, **options)
    except TypeError as error:
        raise ArgumentError(f"{kind} {name!r} was given {options!r}: {error}") from error


def configuration(thing: Any) -> dict[str, Any] | None:
    """Name and arguments of an instance of a registered class, ready for JSON; ``None`` for anything else.

    ``None`` too where an argument is a function or a tensor, which a configuration cannot hold. Arguments that are
    themselves registered (a schedule) are described in turn; a guide's model is left out, since a run describes it
    once.
    """
    arguments = getattr(thing, "_arguments", None)
    if arguments is None:
        return None
    described = {key: _described(value) for key, value in arguments.items() if key != "model"}
    try:
        json.dumps(described)
    except TypeError:
        return None
    return {"name": type(thing).__name__, "arguments": described}


def _described(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _described(part) for key, part in value.items()}
    return configuration(value) or value


def _built(value: Any) -> Any:
    """The inverse of :func:`_described`; among arguments only schedules are registered objects."""
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"name", "arguments"}:
        return SCHEDULES.build(value)
    return {key: _built(part) for key, part in value.items()}
