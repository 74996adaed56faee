"""The base of every profiler, and the one that measures nothing. Worker side; standard library only."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Profiler(ABC):
    """Measures named actions. A subclass overrides ``start`` and ``stop``, and ``summary`` for its report.

    It is made on the driver and travels by pickle; ``setup`` is called on each worker before the first action,
    ``teardown`` after the last. ``dirpath``: where reports go, by default the run folder. With ``filename`` the report
    is written to ``{filename}-{stage}-rank{rank}.txt`` there; without one, rank 0's is printed.
    """

    def __init__(self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None) -> None:
        self.dirpath = None if dirpath is None else os.fspath(dirpath)
        self.filename = filename
        self.stage = "fit"
        self.rank = 0
        self._log_dir: str | None = None

    def setup(self, stage: str, rank: int = 0, log_dir: str | os.PathLike[str] | None = None) -> None:
        """A stage begins on this worker; ``log_dir`` is the run folder."""
        self.stage, self.rank = stage, rank
        self._log_dir = None if log_dir is None else os.fspath(log_dir)

    @abstractmethod
    def start(self, action_name: str) -> None:
        """An action begins."""

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """The action ends; ValueError if it had not begun."""

    def step(self) -> None:
        """One training batch is done."""
        return None

    def summary(self) -> str:
        """Return the report on what was measured so far; empty where there is none."""
        return ""

    @contextmanager
    def profile(self, action_name: str) -> Iterator[None]:
        """Measure the body of a ``with`` statement; also when it raises."""
        self.start(action_name)
        try:
            yield
        finally:
            self.stop(action_name)

    def describe(self) -> None:
        """Write the report to its file, or print rank 0's."""
        report = self.summary()
        if not report:
            return
        if self.filename is not None:
            with open(self.path(".txt"), "w", encoding="utf-8") as file:
                file.write(report + "\n")
        elif self.rank == 0:
            print(report, file=sys.stdout, flush=True)

    def teardown(self, stage: str) -> None:
        """The stage is over on this worker: report."""
        self.describe()

    def path(self, ending: str) -> str:
        """Return where a file of this profiler's goes, its folder made."""
        folder = self.dirpath or self._log_dir or "."
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, f"{self.filename or 'profile'}-{self.stage}-rank{self.rank}{ending}")


class PassThroughProfiler(Profiler):
    """Measures nothing: what ``trainer.profiler`` is where none was given, so that a person's own calls still work."""

    _nothing: AbstractContextManager[None] = nullcontext()

    def start(self, action_name: str) -> None:
        """Measure nothing."""

    def stop(self, action_name: str) -> None:
        """Measure nothing."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        """Return a context that does nothing, the same each time."""
        return self._nothing
