"""What is done to one batch, whatever it is made of: its size, its device, its pieces in time."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from raylit.errors import DataError


@runtime_checkable
class Movable(Protocol):
    """Anything that moves itself: a graph batch, a tokenizer's encoding, a packed sequence."""

    def to(self, device: torch.device) -> Any: ...


# Never movable: spares them the look-up of a protocol's methods, the dearest part of the walk.
_PLAIN = frozenset({dict, list, tuple, str, int, float, bool, type(None)})
# A list of as many of these as there are samples has one for each of them.
_ONE_A_SAMPLE = (str, bytes, int, float)


def batch_size_of(batch: Any) -> int | None:
    """Return the number of samples in ``batch``, or None where it does not show.

    It is dimension 0 of the first tensor found, depth first, in the order of fields and keys; a tensor without
    dimensions counts 1. Without any tensor: the length of the first list or tuple of strings. Never waits for a device.
    """
    size = _first_tensor_size(batch)
    return _first_strings_size(batch) if size is None else size


def _first_tensor_size(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])  # batch_sizes always lies on the CPU; dimension 0 of .data counts time steps
    for part in _parts(batch):
        size = _first_tensor_size(part)
        if size is not None:
            return size
    return None


def _first_strings_size(batch: Any) -> int | None:
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], str):
        return len(batch)
    for part in _parts(batch):
        size = _first_strings_size(part)
        if size is not None:
            return size
    return None


def _parts(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return batch.values()
    if isinstance(batch, (list, tuple)):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return ()


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with every tensor in it on ``device``; the same object where nothing had to move.

    Goes through mappings, lists, tuples, named tuples and dataclasses; an object with a method ``to`` moves itself.
    Copies to CUDA do not wait, so pinned batches travel beside the computation.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    if type(batch) not in _PLAIN and isinstance(batch, Movable) and not isinstance(batch, type):
        moved = batch.to(device)
        return batch if moved is None else moved  # None: it moved in place
    if isinstance(batch, (list, tuple, Mapping)) or dataclasses.is_dataclass(batch):
        return _rebuilt(batch, lambda part: to_device(part, device))
    return batch


def _rebuilt(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Return a container like ``batch`` with ``change`` applied to its parts; itself where every part came back."""
    if isinstance(batch, Mapping):
        changed = {key: new for key, old in batch.items() if (new := change(old)) is not old}
        if not changed:
            return batch
        if type(batch) is dict:
            return {**batch, **changed}
        if isinstance(batch, MutableMapping):
            fresh = copy.copy(batch)  # keeps a default factory, or attributes of the user's own
            fresh.update(changed)
            return fresh
        return type(batch)({**batch, **changed})  # type: ignore[call-arg]
    if isinstance(batch, (list, tuple)):
        parts = [change(part) for part in batch]
        if all(new is old for new, old in zip(parts, batch)):
            return batch
        if isinstance(batch, list):
            if type(batch) is list:
                return parts
            fresh_list = copy.copy(batch)
            fresh_list[:] = parts
            return fresh_list
        return _like_tuple(batch, parts)
    if isinstance(batch, type):
        return batch  # a dataclass itself, not one of its objects
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    changed = {name: new for name, old in values.items() if (new := change(old)) is not old}
    if not changed:
        return batch
    # Not dataclasses.replace: that calls __init__ again, and refuses fields with init=False.
    fresh_object = copy.copy(batch)
    for name, value in changed.items():
        object.__setattr__(fresh_object, name, value)  # frozen dataclasses too
    return fresh_object


def _like_tuple(old: tuple[Any, ...], parts: list[Any]) -> Any:
    return type(old)(*parts) if hasattr(old, "_fields") else type(old)(parts)


def split_samples(batch: Any, parts: int) -> list[tuple[Any, int]]:
    """Split a batch into at most ``parts`` pieces along its samples; return each with its number of samples.

    The pieces are in order and differ by one sample at most, the larger ones first; with fewer samples than ``parts``
    there are fewer pieces. Split are, wherever they stand in lists, tuples, mappings and dataclasses: tensors of shape
    (samples, ...), and lists or tuples of texts and numbers, one a sample. Tensors without dimensions and whatever
    else has no samples go whole into each piece.

    Raises ``DataError`` where no number of samples shows, a tensor has another one, or an object cannot be split.
    """
    size = batch_size_of(batch)
    if size is None:
        raise DataError(
            f"a batch of type {type(batch).__name__} cannot be split over devices: no tensor in it tells the number of "
            "samples. Use tensors with the samples in dimension 0, or strategies.DataParallel(split=function)"
        )
    count = max(1, min(parts, size))
    if count == 1:
        return [(batch, size)]
    least, more = divmod(size, count)
    pieces, begin = [], 0
    for index in range(count):
        end = begin + least + (index < more)
        pieces.append((_samples(batch, begin, end, size), end - begin))
        begin = end
    return pieces


def _samples(part: Any, begin: int, end: int, size: int) -> Any:
    """Return samples ``begin`` to ``end`` of ``size`` of a part of the batch."""
    if isinstance(part, Tensor):
        if not part.ndim:
            return part
        if part.shape[0] != size:
            raise DataError(
                f"the batch cannot be split over devices: one tensor has {size} samples and another the shape "
                f"{tuple(part.shape)}. Put the samples in dimension 0 of each, or use "
                "strategies.DataParallel(split=function)"
            )
        return part[begin:end]
    if isinstance(part, PackedSequence):
        raise DataError("a PackedSequence cannot be split over devices: pack it in the step, or use "
                        "strategies.DataParallel(split=function)")  # fmt: skip
    if isinstance(part, (list, tuple)) and len(part) == size and all(isinstance(item, _ONE_A_SAMPLE) for item in part):
        return part[begin:end]
    if isinstance(part, (list, tuple, Mapping)) or (dataclasses.is_dataclass(part) and not isinstance(part, type)):
        return _rebuilt(part, lambda inner: _samples(inner, begin, end, size))
    if type(part) not in _PLAIN and isinstance(part, Movable) and not isinstance(part, type):
        raise DataError(f"a {type(part).__name__} in the batch cannot be split over devices; use "
                        "strategies.DataParallel(split=function)")  # fmt: skip
    return part


def split_time(batch: Any, split_size: int) -> list[Any]:
    """Split a batch into pieces of at most ``split_size`` time steps, for truncated backpropagation through time.

    Split along dimension 1: tensors of shape (batch, time, ...), and sequences of sequences by their inner ones. What
    has no dimension 1 (a tensor of one label a sample, a number, strings) goes whole into each piece. The batch may be
    one tensor, a list, a tuple, a named tuple or a mapping; each piece is of the same kind.

    Raises ``DataError`` where nothing has a time dimension, or parts disagree on its length.
    """
    if isinstance(split_size, bool) or not isinstance(split_size, int) or split_size < 1:
        raise DataError(f"truncated_bptt_steps must be an integer of at least 1; got {split_size!r}")
    lengths = _time_lengths(batch)
    if not lengths:
        raise DataError(
            f"Nothing in a batch of type {type(batch).__name__} has a time dimension: truncated BPTT splits tensors of "
            "shape (batch, time, ...) and sequences of sequences along dimension 1. Put the time there, or override "
            "tbptt_split_batch in the Module"
        )
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{where}: {length}" for where, length in lengths.items())
        raise DataError(
            f"The parts of the batch differ in their number of time steps, dimension 1 ({found}). Pad or cut them to "
            "one length, or override tbptt_split_batch in the Module"
        )
    total = next(iter(lengths.values()))
    return [_piece(batch, begin, begin + split_size) for begin in range(0, total, split_size)]


def _fields_of(batch: Any) -> list[tuple[str, Any]]:
    if isinstance(batch, Mapping):
        return [(repr(key), part) for key, part in batch.items()]
    if isinstance(batch, (list, tuple)):
        return [(f"part {i}", part) for i, part in enumerate(batch)]
    return [("batch", batch)]


def _is_nested(part: Any) -> bool:
    """Whether ``part`` is a sequence of sequences, or of tensors with dimensions: samples by time."""
    return (
        isinstance(part, Sequence)
        and not isinstance(part, (str, bytes))
        and len(part) > 0
        and all((isinstance(x, Sequence) and not isinstance(x, (str, bytes))) or _has_steps(x) for x in part)
    )


def _has_steps(sample: Any) -> bool:
    return isinstance(sample, Tensor) and sample.ndim > 0


def _time_lengths(batch: Any) -> dict[str, int]:
    lengths: dict[str, int] = {}
    for where, part in _fields_of(batch):
        if isinstance(part, Tensor):
            if part.ndim > 1:
                lengths[where] = part.shape[1]
        elif _is_nested(part):
            inner = [len(x) for x in part]
            lengths[where] = inner[0]
            for i, length in enumerate(inner):
                if length != inner[0]:
                    lengths[f"{where}, sample {i}"] = length
    return lengths


def _piece(batch: Any, begin: int, end: int) -> Any:
    def cut(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part[:, begin:end] if part.ndim > 1 else part
        if _is_nested(part):
            return [sample[begin:end] for sample in part]
        return part

    if isinstance(batch, (Mapping, list, tuple)):
        return _rebuilt(batch, cut)
    return cut(batch)
