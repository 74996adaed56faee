"""What the parts of one batch log, where the batch is split over devices (``dp``). Worker side.

An epoch's value takes each part's with the part's own size, and needs nothing here. A step has one value: it is made of
the parts' values here, as the key's reduction says, a mean weighted by the parts' sizes. The batches that a worker of
an elastic run takes one after the other in one step are such parts too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from raylit.metrics.reduce import reduce_stacked
from raylit.metrics.slot import Slot


class PartsLog:
    """The step values of one batch's parts. ``begin`` and ``end`` stand around each part, ``finish`` behind all."""

    def __init__(
        self, slots: Mapping[str, Slot], size: int | None, set_size: Callable[[int | None], None],
        shares: bool = False,
    ) -> None:  # fmt: skip
        """``shares``: each part is what a worker of its own would have logged, had there been enough of them."""
        self._slots, self._set_size, self._shares = slots, set_size, shares
        self._size = size  # samples of the whole batch
        self._before: dict[str, Any] = {}  # each key's value of an earlier batch
        self._values: dict[str, list[tuple[Any, int | None]]] = {}
        self._shown: dict[str, Any] = {}  # what ``show`` has put into the slots, and no part has logged
        # Truncated BPTT: what was pending before, with the batch_size given, and what each part added.
        self._pending: dict[str, tuple[int, int | None]] = {}
        self._given: dict[str, int] = {}
        self._added: dict[str, list[tuple[list[Any], int | None]]] = {}

    def begin(self, size: int | None) -> None:
        """Take every key's step value away, to tell what the part logs; an epoch's values weigh ``size`` now."""
        self._set_size(size)
        for key, slot in self._slots.items():
            self._before.setdefault(key, slot.last)
            self._pending.setdefault(key, (len(slot.pending), slot.pending_size))
            slot.last = slot.pending_size = None

    def end(self, size: int | None) -> None:
        """Take what a part of ``size`` samples has logged."""
        shown, self._shown = self._shown, {}
        for key, slot in self._slots.items():
            if slot.last is not None and not (key in shown and slot.last is shown[key]):
                self._values.setdefault(key, []).append((slot.last, size))
            if slot.pending_size is not None:
                self._given[key] = self._given.get(key, 0) + slot.pending_size
                slot.pending_size = None
            start, _ = self._pending.get(key, (0, None))
            if len(slot.pending) > start:
                self._added.setdefault(key, []).append((slot.pending[start:], size))
                del slot.pending[start:]

    def show(self, size: int | None) -> None:
        """Let the values so far be read, in the midst of a part; ``end`` takes what it logs from here on."""
        self.end(size)
        self.finish()
        self._shown = {key: slot.last for key, slot in self._slots.items()}

    def finish(self) -> None:
        """Give every key its step value of the whole batch; one that no part logged keeps the earlier one."""
        self._set_size(self._size)
        for key, slot in self._slots.items():
            values = self._values.get(key)
            slot.last = _combined(slot, values, self._shares) if values else self._before.get(key)
            slot.pending_size = self._given.get(key, self._pending.get(key, (0, None))[1])
            added = self._added.get(key)
            if added is not None:
                # The n-th value of each part belongs together; a part may have logged fewer.
                longest = max(len(values) for values, _ in added)
                rows = [[(values[n], size) for values, size in added if n < len(values)] for n in range(longest)]
                slot.pending += [_combined(slot, row) for row in rows]


def _combined(slot: Slot, values: list[tuple[Any, int | None]], shares: bool = False) -> Any:
    """Return the parts' values as one: a number of the kind that was logged."""
    if len(values) == 1:
        return values[0][0]
    first = values[0][0]
    device = first.device if isinstance(first, Tensor) else None
    stacked = torch.stack([torch.as_tensor(value, device=device) for value, _ in values])
    if not stacked.is_floating_point():
        stacked = stacked.to(torch.float64)
    # Shares of several workers come together as sync_dist says, where it was asked for.
    op = slot.settings.sync_op if shares and slot.settings.sync_op else slot.settings.op
    if op in ("sum", "min", "max"):
        return reduce_stacked(op, None, stacked)
    # Of a callable or a torchmetrics object too: what they would give for the batch cannot be had from the parts'.
    sizes = [1.0 if size is None else float(size) for _, size in values]
    parts: list[Tensor] = [value * (size / sum(sizes)) for value, size in zip(stacked.unbind(), sizes, strict=True)]
    return torch.stack(parts).sum()  # weights as a tensor would be a copy to the device, which waits
