"""The turns of a step in an elastic run: several batches on this rank, one step of the fit. Floor 3.

Checkpoints, validation, logging and stopping wait for the step to be whole, so that they come at the same places
whatever the number of workers; and what the turns log by steps is one value of the step.
"""

from __future__ import annotations

from raylit.metrics.parts import PartsLog
from raylit.metrics.store import MetricStore


class Turns:
    """Counts the turns of steps. ``begin`` and ``end`` stand around each batch with its hooks."""

    def __init__(self, count: int, metrics: MetricStore) -> None:
        self._count, self._metrics = count, metrics
        self._log: PartsLog | None = None

    def begin(self) -> None:
        """A batch begins."""
        if self._log is None:
            self._log = self._metrics.begin_turns()
        self._log.begin(1)

    def show(self) -> None:
        """The step is taken: let its values so far be read, by schedulers and in the hooks that follow."""
        if self._log is not None:
            self._log.show(1)

    def end(self, batch_idx: int) -> bool:
        """A batch and its hooks are done. Tell whether it was the step's last turn; then its step values are there."""
        log = self._log
        if log is not None:
            log.end(1)
        if (batch_idx + 1) % self._count:
            return False
        self._log = None
        if log is not None:
            log.finish()
        return True
