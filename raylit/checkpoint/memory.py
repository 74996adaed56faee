"""Copies of a state's tensors on the CPU. Floor 2, any process.

The copies of one checkpoint go to the memory that those of the one before had: memory that is new to a process costs
more than the copying, since the system hands it out page by page, each filled with zeros first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

_LEAST_BYTES = 1 << 14  # smaller ones are not worth a place
_ALIGNED = 64  # bytes, as torch's own memory


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

    The memory is as large as the last state was. While anybody still has a tensor of the last state (a writer, or a
    hook that has kept one), that state's memory is left to them, and another is taken.
    """

    def __init__(self) -> None:
        self._memory: Any = None
        self._references = 0  # to it, while nobody has a tensor in it
        self._at = self._wanted = 0  # bytes

    def begin(self) -> None:
        """The next copies are of another state."""
        held = self._memory is not None and sys.getrefcount(self._memory) > self._references
        if held or self._memory is None or self._memory.nbytes < self._wanted:
            self._memory = None  # it goes before there is another
            if self._wanted:
                # Not by numpy.empty, which asks for huge pages: the system may take long to make room for them.
                self._memory = torch.empty(self._wanted + _ALIGNED, dtype=torch.uint8).numpy()
                self._references = sys.getrefcount(self._memory)
        self._at, self._wanted = 0 if self._memory is None else -self._memory.ctypes.data % _ALIGNED, 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy on the CPU, detached."""
        size = tensor.numel() * tensor.element_size()
        if size < _LEAST_BYTES or not _is_plain(tensor) or not tensor.is_contiguous():  # others keep their strides
            return plain_copy(tensor)
        start, space = self._at, -(-size // _ALIGNED) * _ALIGNED
        self._wanted += space
        if self._memory is None or start + size > self._memory.nbytes:
            return plain_copy(tensor)
        self._at += space
        # Each in a storage of its own: torch.save writes whole storages.
        place = torch.from_numpy(self._memory[start : start + size]).view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor.detach())


def _is_plain(tensor: Tensor) -> bool:
    """It is the numbers at its place in memory, and nothing else."""
    known = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
    return known and tensor.numel() > 0 and not tensor.is_conj() and not tensor.is_neg() and tensor.data_ptr() != 0
