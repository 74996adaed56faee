"""Keeping the state when the cluster announces that it will take a node away. Floor 3; every rank alike.

To ask is a barrier of all ranks, so they agree on the batches after which they do: after the first, then as far apart
as the slowest rank's batches allow for asking twice in the time that an announcement takes anyway. A batch in between
costs one subtraction. One announcement leads to one checkpoint, and the loop goes on; or, in an elastic run, it ends on
all ranks, to be taken up by another number of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from raylit.engine.parts import Parts
from raylit.ports import Checkpointer, Notices, RunSnapshot
from raylit.stage import SafePoint

_MOST_BATCHES = 200  # between two looks, however short: batches may suddenly take a hundred times as long


class WorkersChange(BaseException):
    """The state is kept, and the run goes on with another number of workers. Raised on every rank at once; no error."""


class NoticeWatch:
    """Looks out for announcements in one loop. Every rank calls each method equally often, after the same batches."""

    def __init__(self, parts: Parts, notices: Notices, checkpointer: Checkpointer,
                 take: Callable[[], RunSnapshot], now: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._parts, self._notices, self._checkpointer, self._take = parts, notices, checkpointer, take
        self._now = now
        world_size = parts.state.world.world_size
        self._collective = parts.strategy.collective if world_size > 1 else None
        self._all = parts.strategy.collective
        self._target_s = notices.every_s / 2
        self._waited_s = 0.0  # since anyone was asked, within this loop; the same on every rank
        self._apart = self._left = 1  # batches
        self._since = self._now()

    @classmethod
    def of(cls, parts: Parts, take: Callable[[], RunSnapshot]) -> NoticeWatch | None:
        """The watch of a loop whose state ``take`` copies; None where nobody announces, or nobody keeps."""
        if parts.notices is None or parts.checkpointer is None:
            return None
        return cls(parts, parts.notices, parts.checkpointer, take)

    def begin(self, batches: int | None) -> int:
        """A walk over ``batches`` batches of this rank begins (None: unknown); return how many every rank has.

        After those alone may ``batch_done`` be called.
        """
        self._since, self._left = self._now(), self._apart
        if self._collective is None:
            return sys.maxsize
        known = torch.tensor(0.0 if batches is None else float(batches))
        return int(self._collective.all_reduce(known, "min").item())

    def batch_done(self) -> None:
        """A batch is done, on every rank."""
        self._left -= 1
        if self._left <= 0:
            self.look()

    def look(self) -> None:
        """Ask where it is time to, and keep the state where something new is announced."""
        passed_s = self._now() - self._since
        if self._collective is not None:  # a message on the CPU: nothing waits for the device
            passed_s = float(self._collective.all_reduce(torch.tensor(passed_s), "max").item())
        self._waited_s += passed_s
        done = self._apart - self._left
        if done > 0:
            fitting = int(self._target_s * done / max(passed_s, 1e-9))
            self._apart = max(1, min(fitting, 2 * self._apart, _MOST_BATCHES))
        if self._waited_s + passed_s / 2 >= self._target_s:  # nearer to it now than at the next look
            self._waited_s = 0.0
            notice = self._notices.ask(self._all)
            if notice is not None:
                then = "starting again" if notice.leave else "going on"
                self._parts.output.note(f"{notice.text}; keeping the state of now, and {then}")
                with torch.inference_mode(False):  # on_save_checkpoint meets tensors as it does elsewhere
                    kept = self._checkpointer.safe_point(SafePoint.PREEMPTION, self._take)
                if notice.leave and kept:
                    raise WorkersChange
        self._left, self._since = self._apart, self._now()
