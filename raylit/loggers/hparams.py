"""``hparams.yaml``: hyperparameters as a file that a person reads and any YAML reader loads. Any process.

Only what YAML's safe schema can hold is written, so the file loads anywhere and executes nothing. PyYAML is imported
here at first use.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

_MAX_ELEMENTS = 1000  # of an array: a person reads this file
_MAX_DEPTH = 20  # deeper is most likely a structure that holds itself


class _UnsafeValue(Exception):
    """A value that the safe schema cannot hold."""


def write_yaml(path: str | os.PathLike[str], params: Mapping[str, Any]) -> list[str]:
    """Write ``params`` to ``path``, whole or not at all, and return the names that were left out.

    A name inside a nested mapping is given with dots (``optim.schedule``). Tuples become lists, paths and enum members
    text, numbers of numpy and tensors of one element plain numbers, other arrays and tensors nested lists up to 1000
    elements; a list with one value that cannot be written is left out as a whole.
    """
    import yaml

    left_out: list[str] = []
    plain = _plain_mapping(params, "", left_out, 0)
    words = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=False)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(words)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 would keep colleagues out of a shared folder
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return left_out


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what ``write_yaml`` wrote; an empty file is an empty dict. ValueError where it holds no mapping."""
    import yaml

    with open(path, encoding="utf-8") as file:
        loaded = yaml.safe_load(file)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; hyperparameters are a mapping of names to values")
    return loaded


def flatten(params: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """Return nested mappings, Namespaces and dataclass objects as one level: ``{"optim/lr": 0.1}``."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        inner = _as_mapping(value)
        if inner:
            flat.update({f"{key}{separator}{name}": item for name, item in flatten(inner, separator).items()})
        else:
            flat[str(key)] = value
    return flat


def plain_value(value: Any) -> Any:
    """Return ``value`` as YAML's safe schema can hold it; ``str(value)`` where it cannot (for loggers' tables)."""
    try:
        return _plain(value, "", [], 0)
    except _UnsafeValue:
        return str(value)


def _plain_mapping(params: Mapping[Any, Any], prefix: str, left_out: list[str], depth: int) -> dict[Any, Any]:
    plain: dict[Any, Any] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str | int | float | bool | None):
            left_out.append(name)
            continue
        try:
            plain[key] = _plain(value, f"{name}.", left_out, depth + 1)
        except _UnsafeValue:
            left_out.append(name)
    return plain


def _plain(value: Any, prefix: str, left_out: list[str], depth: int) -> Any:
    """Return the value in types that yaml.safe_dump takes; their subclasses become the type itself."""
    if depth > _MAX_DEPTH:
        raise _UnsafeValue
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, str):
        return str.__str__(value)  # not str(value): a subclass may print itself in its own way
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, PurePath):
        return str(value)
    if type(value) in (datetime.date, datetime.datetime):
        return value
    mapping = _as_mapping(value)
    if mapping is not None:
        return _plain_mapping(mapping, prefix, left_out, depth)
    if isinstance(value, tuple | list | set | frozenset):
        inside: list[str] = []
        items = [_plain(item, "", inside, depth + 1) for item in value]
        if inside:  # a mapping in the list lost a value: half an entry would be misleading
            raise _UnsafeValue
        return sorted(items, key=repr) if isinstance(value, set | frozenset) else items
    listed = getattr(value, "tolist", None)
    size = math.prod(getattr(value, "shape", ()))
    if callable(listed) and not isinstance(value, type) and size != 1 and size <= _MAX_ELEMENTS:
        return _plain(listed(), prefix, left_out, depth + 1)
    return _number(value)


def _number(value: Any) -> Any:
    """Return a numpy scalar's or a one-element tensor's number, without importing either library."""
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) in ((), (1,)) and not isinstance(value, type):
        number = item()
        if isinstance(number, bool | int | float | str):
            return number
    raise _UnsafeValue


def _as_mapping(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, argparse.Namespace):
        return vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
