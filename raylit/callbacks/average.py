"""A running average of a Module's weights, and putting it in their place and back. Floor 2.

Kept as plain tensors by name, in 32 bits at least: in bfloat16 an average with a weight of 0.001 would never move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

AverageFunction = Callable[[Tensor, Tensor, int], Tensor]  # (average, weights now, how many are in it) -> new average


class Average:
    """The average of one Module's parameters, with ``buffers`` also of its floating buffers; others follow as they are.

    ``device``: where it lies; None: beside the weights. Elsewhere each update copies all weights over.
    """

    def __init__(self, module: nn.Module, device: torch.device | str | int | None, buffers: bool) -> None:
        named = [*module.named_parameters(), *(module.named_buffers() if buffers else ())]
        self.buffer_names = {name for name, _ in module.named_buffers()} if buffers else set()
        # The live tensors: an update must not walk the Module's tree at each step.
        self._live = [tensor for _, tensor in named]
        with torch.inference_mode(False), torch.no_grad():
            self.tensors = {name: _room_for(tensor, device) for name, tensor in named}
        self._averages = list(self.tensors.values())
        self._floating = [index for index, tensor in enumerate(self._averages) if tensor.is_floating_point()]
        self._backup: list[Tensor] | None = None
        self.count = 0  # weights that are in it

    @property
    def swapped(self) -> bool:
        """True while the average stands in the Module's place."""
        return self._backup is not None

    @torch.no_grad()
    def update(self, weight: float | None = None, function: AverageFunction | None = None) -> None:
        """Take the weights as they are now into the average; the first are the average.

        ``weight``: of the new ones, 0 to 1; None: an equal share. ``function`` computes the new average instead.
        """
        now = [
            live.detach().to(average.device, average.dtype)
            for live, average in zip(self._live, self._averages, strict=True)
        ]
        floating = set(self._floating)
        for index, tensor in enumerate(now):
            if self.count == 0 or index not in floating:
                self._averages[index].copy_(tensor)
            elif function is not None:
                self._averages[index].copy_(function(self._averages[index], tensor, self.count))
        if self.count and function is None and self._floating:
            averages = [self._averages[index] for index in self._floating]
            share = 1 / (self.count + 1) if weight is None else weight
            torch._foreach_lerp_(averages, [now[index] for index in self._floating], share)
        self.count += 1

    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the average in the Module's place; its own weights are kept until :meth:`swap_out`."""
        if self._backup is None:
            self._backup = [live.detach().clone() for live in self._live]
            for live, average in zip(self._live, self._averages, strict=True):
                live.copy_(average)

    @torch.no_grad()
    def put(self) -> None:
        """Put the average in the Module's place for good."""
        self._backup = None
        for live, average in zip(self._live, self._averages, strict=True):
            live.copy_(average)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Give the Module its own weights back, bit for bit."""
        if self._backup is not None:
            for live, own in zip(self._live, self._backup, strict=True):
                live.copy_(own)
            self._backup = None

    @contextmanager
    def in_place(self, swapped: bool) -> Iterator[None]:
        """For a while have the average in the Module's place (``swapped``), or the Module's own weights."""
        before = self.swapped
        change, undo = (self.swap_in, self.swap_out) if swapped else (self.swap_out, self.swap_in)
        if before == swapped:
            yield
            return
        change()
        try:
            yield
        finally:
            undo()

    def state_dict(self) -> dict[str, Any]:
        """Return copies on the CPU."""
        return {"count": self.count, "tensors": {name: to_cpu(tensor) for name, tensor in self.tensors.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state's average; names that the Module has no more are left out."""
        self.count = int(state["count"])
        for (name, tensor), live in zip(self.tensors.items(), self._live, strict=True):
            tensor.copy_(state["tensors"].get(name, live))


def to_cpu(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that the next update does not change."""
    return tensor.detach().cpu().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()


def weights_of(module: nn.Module) -> dict[str, Any]:
    """Return a copy of the Module's ``state_dict()`` on the CPU."""
    return {name: to_cpu(value) if isinstance(value, Tensor) else value for name, value in module.state_dict().items()}


def _room_for(tensor: Tensor, device: torch.device | str | int | None) -> Tensor:
    dtype = tensor.dtype
    if tensor.is_floating_point() and torch.finfo(dtype).bits < 32:
        dtype = torch.float32
    room = torch.empty_like(tensor.detach(), dtype=dtype, device=tensor.device if device is None else device)
    return room.copy_(tensor.detach())
