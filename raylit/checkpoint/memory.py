"""Copies of a state's tensors on the CPU. Floor 2, any process.

The copies of one checkpoint go to the memory that those of the one before had: memory that is new to a process costs
more than the copying, since the system hands it out page by page, each filled with zeros first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

_LEAST_BYTES = 1 << 14  # smaller ones are not worth a place


def plain_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, detached, in memory of its own."""
    return tensor.detach().cpu().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()


def to_cpu(value: Any, copied: Callable[[Tensor], Tensor] = plain_copy) -> Any:
    """Return a copy of a nested value with every tensor ``copied``; what a lazy layer has not made yet stays.

    A tensor that is there under two names (tied weights) is copied once, and the copies are one again.
    """
    return _nested(value, copied, {})


def _nested(value: Any, copied: Callable[[Tensor], Tensor], known: dict[Any, tuple[Tensor, Tensor]]) -> Any:
    if isinstance(value, Tensor):
        if is_lazy(value):
            return value
        if not _is_plain(value):
            return copied(value)
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in known:
            known[key] = (value, copied(value))  # with the original: no other tensor comes to lie at its place
        return known[key][1]
    if isinstance(value, Mapping):
        return {key: _nested(item, copied, known) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_nested(item, copied, known) for item in value)
    return value


class CopyMemory:
    """Copies the tensors of one state after the other: ``begin``, then ``copy`` for each.

    A copy goes to the place of one of the same size in the last state. While anybody still has that one (a writer, or a
    hook that has kept it), its place is left to them.
    """

    def __init__(self) -> None:
        self._places: list[tuple[Any, weakref.ref[Any]]] = []  # of the last state; gone: nobody has a tensor there
        self._free: dict[int, list[Any]] = {}  # by bytes

    def begin(self) -> None:
        """The next copies are of another state."""
        self._free = {}
        for place, taken in self._places:
            if taken() is None:
                self._free.setdefault(place.nbytes, []).append(place)
        self._places = []

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy on the CPU, detached."""
        size = tensor.numel() * tensor.element_size()
        if size < _LEAST_BYTES or not _is_plain(tensor) or not tensor.is_contiguous():  # others keep their strides
            return plain_copy(tensor)
        free = self._free.get(size)
        # Not by numpy.empty, which asks for huge pages: the system may take long to make room for them.
        place = free.pop() if free else torch.empty(size, dtype=torch.uint8).numpy()
        view = place[:]  # torch holds it as long as there is a tensor with this storage
        self._places.append((place, weakref.ref(view)))
        return torch.from_numpy(view).view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def _is_plain(tensor: Tensor) -> bool:
    """It is the numbers at its place in memory, and nothing else."""
    known = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
    return known and tensor.numel() > 0 and not tensor.is_conj() and not tensor.is_neg() and tensor.data_ptr() != 0
