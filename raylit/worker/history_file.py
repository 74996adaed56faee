"""``history.parquet`` in the run folder while a run goes on. Floor 4; rank 0.

The file is replaced as a whole (Parquet cannot be appended to), so whoever reads it, during a run or after one that was
killed, finds a table of all rows up to the last write. A write is begun at the first row after ``_EVERY_S`` seconds, in
a thread: the loop pays for a copy of the numbers (1 ms for 10,000 rows of 10 metrics). The time between two writes
grows with what the last one took, so that a history of any length costs at most 2 % of one core.
"""

from __future__ import annotations

import contextlib
import glob
import os
import threading
import time
import warnings

from raylit.metrics.history import History

NAME = "history.parquet"
_EVERY_S = 2.0  # at most so many seconds of rows are lost with a killed process
_COST_FACTOR = 50  # a write that took t seconds of a core is followed by 50 t seconds without one


class HistoryFile:
    """Keeps the file in ``folder`` up with ``history``; ``every_s``: the least seconds between two writes."""

    def __init__(self, history: History, folder: str, every_s: float = _EVERY_S) -> None:
        self._history, self._path, self._every_s = history, os.path.join(folder, NAME), every_s
        self._due = time.monotonic() + every_s
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        for left in glob.glob(os.path.join(glob.escape(folder), f".{NAME}.*.tmp")):  # by a killed attempt of this run
            with contextlib.suppress(OSError):
                os.unlink(left)

    def follow(self) -> None:
        """A row was added: begin a write where one is due."""
        if time.monotonic() < self._due or (self._thread is not None and self._thread.is_alive()):
            return
        self._say()
        # Not in the thread: a loader's worker that is forked while a module is being imported could never import it.
        import pyarrow.parquet  # noqa: F401

        copy = self._history.readable()
        self._thread = threading.Thread(target=self._write, args=(copy,), name="raylit-history", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write every row; a later row begins anew."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if len(self._history):
            self._write(self._history)
        self._say()

    def _write(self, rows: History) -> None:
        began = time.thread_time()  # not the clock: a loop that holds Python's lock makes this thread wait, not work
        try:
            rows.write_parquet(self._path)
            self._history.was_written(len(rows))
        except Exception as error:  # a full disk must not end a training; said on the run's own thread
            self._error = error
        self._due = time.monotonic() + max(self._every_s, _COST_FACTOR * (time.thread_time() - began))

    def _say(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            warnings.warn(f"the history could not be written to {self._path} ({error}); trainer.history has it, and "
                          "the next write is tried all the same", stacklevel=2)  # fmt: skip
