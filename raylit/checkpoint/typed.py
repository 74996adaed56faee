"""Giving plain values back the types that an ``__init__`` is annotated with. Floor 2, any process.

A checkpoint keeps an enum's value, a path's text, a dataclass object's fields. Where the signature says what these
were, the Module is built from the same types again; where it does not, it gets the plain form.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import pathlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from raylit.hparams import HParams


def annotations_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a function's arguments by name; what cannot be looked up is left out."""
    try:
        return typing.get_type_hints(function)
    except Exception:  # a name that exists for type checkers only spoils all of them
        return {name: hint for name, hint in getattr(function, "__annotations__", {}).items() if type(hint) is not str}


def as_annotated(value: Any, hint: Any) -> Any:
    """Return ``value`` as the annotated enum, path, Namespace or dataclass; unchanged for every other type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        changed = (as_annotated(value, each) for each in typing.get_args(hint))
        return next((each for each in changed if each is not value), value)
    if typing.get_origin(hint) is typing.Annotated:
        return as_annotated(value, typing.get_args(hint)[0])
    if not isinstance(hint, type):
        return value
    if issubclass(hint, enum.Enum):
        return value if isinstance(value, hint) else _member(hint, value)
    if issubclass(hint, pathlib.PurePath) and isinstance(value, str):
        return hint(value)
    if hint is argparse.Namespace and isinstance(value, Mapping):
        return argparse.Namespace(**value)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _dataclass(hint, value)
    if hint is tuple and isinstance(value, list):  # YAML has lists only
        return tuple(value)
    return value


def _member(hint: type[enum.Enum], value: Any) -> Any:
    """The member of this value, or, as YAML has it, of this name."""
    try:
        return hint(value)
    except ValueError:
        return hint.__members__.get(value, value) if isinstance(value, str) else value


def _dataclass(hint: type[Any], value: Mapping[str, Any]) -> Any:
    hints = annotations_of(hint)
    fields = dataclasses.fields(hint)
    if not set(value) <= {field.name for field in fields}:
        return HParams(value)  # more was saved under this name than the dataclass holds
    typed = {name: as_annotated(each, hints.get(name)) for name, each in value.items()}
    built = hint(**{field.name: typed[field.name] for field in fields if field.init and field.name in typed})
    for field in fields:
        if not field.init and field.name in typed:
            object.__setattr__(built, field.name, typed[field.name])
    return built
