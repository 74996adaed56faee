"""Values on their way from the device to the host. A snapshot taken on the step path waits for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """A dict of numbers and 0-d tensors, captured now and read later.

    CUDA tensors are stacked and copied to pinned memory on the current stream, with an event behind the copy.
    Everything else is read at once; on devices other than CPU and CUDA that waits for the device.
    """

    def __init__(self, values: Mapping[str, Tensor | float]) -> None:
        self._names = list(values)
        self._host: dict[str, float] = {}
        self._copies: list[tuple[list[str], Tensor, Any]] = []  # names, pinned float64 [len(names)], event
        by_device: dict[torch.device, list[str]] = {}
        for name, value in values.items():
            if isinstance(value, Tensor) and value.device.type == "cuda":
                by_device.setdefault(value.device, []).append(name)
            else:
                self._host[name] = float(value)
        for device, names in by_device.items():
            with torch.no_grad(), torch.cuda.device(device):
                stacked = torch.stack([torch.as_tensor(values[n]).detach().to(torch.float64) for n in names])
                pinned = torch.empty(len(names), dtype=torch.float64, pin_memory=True)
                pinned.copy_(stacked, non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
            self._copies.append((names, pinned, event))

    def ready(self) -> bool:
        """Return whether :meth:`read` would not wait."""
        return all(event.query() for _, _, event in self._copies)

    def read(self) -> dict[str, float]:
        """Return the values in the order captured; waits for the copy where it is not done."""
        for names, pinned, event in self._copies:
            event.synchronize()
            self._host.update(zip(names, pinned.tolist()))
        self._copies.clear()
        return {name: self._host[name] for name in self._names}
