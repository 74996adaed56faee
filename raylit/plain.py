"""Turning whatever a checkpoint was given into what ``weights_only`` loading gives back. Floor 1, any process.

Weights, optimizers, callbacks and hooks may hold anything. A file that cannot be read is found out when it is needed,
so what has no safe form is left out, with one warning that names it; the training behind it is not lost for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

# As they are. Other classes of the same kind (np.float64, IntEnum, str subclasses) become one of these.
_EXACT = (str, bytes, float, bool, complex, type(None), torch.dtype, torch.device, torch.Size)
_BASES: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (str, str.__str__), (bytes, bytes), (bytearray, bytes), (int, int), (float, float), (complex, complex),
)  # fmt: skip
_MOST_BITS = 2000  # of a whole number: weights_only loading refuses those that need a long length
_DEEPEST = 100
# Built from by load_from_checkpoint: a parameter with half of its content is worse than none.
_WHOLE = ("hyper_parameters", "datamodule_hyper_parameters")


def plain_entries(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the entries that have a plain form, in it, and what the others are or hold (``"a MSELoss"``), by name.

    Each entry is kept whole or not at all: a hyperparameter with half of its content is worse than none.
    """
    kept: dict[str, Any] = {}
    lost: dict[str, str] = {}
    for name, value in values.items():
        try:
            kept[name] = _value(value, name, None, [])
        except _Unsafe as error:
            lost[name] = _kind(error.value, value)
    return kept, lost


class _Unsafe(Exception):
    """``value`` has no safe form."""

    def __init__(self, value: Any) -> None:
        self.value = value


def made_safe(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checkpoint with plain values and tensors only; one UserWarning names all that was left out.

    NumPy scalars become numbers, arrays tensors, mappings, Namespaces and dataclass objects dicts, paths strings, enums
    their values, other sequences lists. From a dict only the unsafe entries go, of a list or a set all goes: its other
    items would change places.
    """
    lost: list[str] = []
    safe: dict[str, Any] = _mapping(checkpoint, "", lost, [])
    if lost:
        hint = " Pass the hyperparameters to load_from_checkpoint." if any(p.startswith(_WHOLE) for p in lost) else ""
        warnings.warn(
            f"left out of the checkpoint, as they are no plain values or tensors: {', '.join(lost)}.{hint}",
            UserWarning,
            stacklevel=3,
        )
    return safe


def _mapping(value: Mapping[Any, Any], path: str, lost: list[str] | None, around: list[int]) -> dict[Any, Any]:
    """``lost`` takes the paths of what is left out; where it is None, the first such thing is raised."""
    safe: dict[Any, Any] = {}
    for key, item in value.items():
        here = f"{path}[{key!r}]" if path else str(key)
        try:
            name = _value(key, here, None, around)
            if not isinstance(name, Hashable):
                raise _Unsafe(key)
            safe[name] = _value(item, here, None if path in _WHOLE else lost, around)
        except _Unsafe as error:
            if lost is None:
                raise
            lost.append(f"{here} ({_kind(error.value, item)})")
    return safe


def _kind(unsafe: Any, entry: Any) -> str:
    kind = type(unsafe).__name__
    return f"a {kind}" if unsafe is entry else f"holds a {kind}"


def fields_of(value: Any) -> dict[str, Any] | None:
    """Return the contents of a Namespace or dataclass object; None for anything else."""
    if isinstance(value, argparse.Namespace):
        return dict(vars(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _value(value: Any, path: str, lost: list[str] | None, around: list[int]) -> Any:
    if isinstance(value, Tensor):
        return _tensor(value)
    if type(value) in _EXACT:
        return value
    if isinstance(value, Enum):
        return _value(value.value, path, None, around)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return _from_numpy(value, path, around)
    for base, convert in _BASES:
        if isinstance(value, base):
            if base is int and int(value).bit_length() > _MOST_BITS:
                raise _Unsafe(value)
            return convert(value)
    fields = fields_of(value)
    if fields is None and (not isinstance(value, (Mapping, Sequence, Set)) or isinstance(value, memoryview)):
        raise _Unsafe(value)
    if id(value) in around or len(around) > _DEEPEST:  # it holds itself
        raise _Unsafe(value)
    around.append(id(value))
    try:
        if fields is not None or isinstance(value, Mapping):
            return _mapping(value if fields is None else fields, path, lost, around)
        items = [_value(item, f"{path}[{i}]", lost, around) for i, item in enumerate(value)]
    finally:
        around.pop()
    if isinstance(value, tuple):
        return tuple(items)
    if isinstance(value, Set):
        try:
            return set(items)
        except TypeError:  # what became of an item cannot be in a set
            return items
    return items


def _tensor(value: Tensor) -> Tensor:
    if torch.nn.parameter.is_lazy(value):
        raise _Unsafe(value)  # no shape yet, and a class that weights_only does not know
    safe = value.detach()  # attributes that someone put on the tensor stay behind
    if safe.layout is torch._mkldnn:  # type: ignore[attr-defined]
        safe = safe.to_dense()
    if type(safe) is not Tensor and not safe.is_nested:
        safe = safe.as_subclass(Tensor)
    safe = safe.cpu() if safe.device.type != "meta" else safe
    if safe.layout is torch.strided and not safe.is_nested and safe.device.type == "cpu" and not safe.is_quantized:
        # A view would take the whole storage that it looks at into the file.
        return safe.clone() if safe.untyped_storage().nbytes() > safe.nbytes else safe
    return safe


def _from_numpy(value: Any, path: str, around: list[int]) -> Any:
    if isinstance(value, np.generic):
        item = value.item()
        if isinstance(item, np.generic):  # longdouble, and what Python has no type for
            if not isinstance(item, np.floating):
                raise _Unsafe(value)
            item = float(item)
        return _value(item, path, None, around)
    native = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
    try:
        return torch.from_numpy(native)
    except TypeError:  # text, objects, dates: what torch has no number format for
        return _value(native.tolist(), path, None, around)


def is_faithful(value: Any) -> bool:
    """Tell whether a file gives ``value`` back as it is: tensors and plain values in dicts, lists and tuples alone."""
    if type(value) in (*_EXACT, Tensor, int):
        return True
    if type(value) is dict:
        return all(type(key) in (str, int) and is_faithful(item) for key, item in value.items())
    return type(value) in (list, tuple) and all(is_faithful(item) for item in value)
