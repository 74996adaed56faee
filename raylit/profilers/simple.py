"""Wall-clock time by action. Worker side."""

from __future__ import annotations

import os
import time

from raylit.profilers.base import Profiler


class SimpleProfiler(Profiler):
    """Adds up how often each action ran and how long it took.

    Times are those of the Python code. On a GPU, work goes on after a call has returned, and its time shows in the next
    action that waits for the device; use PyTorchProfiler to see the device itself. ``extended=False`` leaves counts
    and shares out of the report.
    """

    def __init__(
        self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None, extended: bool = True
    ) -> None:
        super().__init__(dirpath, filename)
        self.extended = extended
        self._running: dict[str, float] = {}
        self._calls: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._since: float | None = None

    def setup(self, stage: str, rank: int = 0, log_dir: str | os.PathLike[str] | None = None) -> None:
        """Begin a stage with empty counts."""
        super().setup(stage, rank, log_dir)
        self._running, self._calls, self._seconds = {}, {}, {}
        self._since = time.perf_counter()

    def start(self, action_name: str) -> None:
        """Note the time; ValueError if this action runs already."""
        if action_name in self._running:
            raise ValueError(f"start({action_name!r}): this action has begun and not ended; call stop() first")
        if self._since is None:
            self._since = time.perf_counter()
        self._running[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Add the time since ``start``."""
        end = time.perf_counter()
        begin = self._running.pop(action_name, None)
        if begin is None:
            raise ValueError(f"stop({action_name!r}): this action has not begun; call start() first")
        self._calls[action_name] = self._calls.get(action_name, 0) + 1
        self._seconds[action_name] = self._seconds.get(action_name, 0.0) + end - begin

    def summary(self) -> str:
        """Return a table, the longest first. Actions inside one another are counted in both."""
        if not self._seconds:
            return ""
        total = max(time.perf_counter() - (self._since or 0.0), 1e-12)
        head = ["Action", "Mean s", "Total s"]
        if self.extended:
            head += ["Calls", "%"]
        rows = []
        for name, seconds in sorted(self._seconds.items(), key=lambda item: -item[1]):
            row = [name, f"{seconds / self._calls[name]:.6f}", f"{seconds:.3f}"]
            rows.append([*row, str(self._calls[name]), f"{100 * seconds / total:.1f}"] if self.extended else row)
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in [head, *rows]
        ]
        title = f"Profile of {self.stage}, rank {self.rank}, {total:.3f} s"
        return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])
