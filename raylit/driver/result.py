"""What ``fit`` returns where Ray is not imported: the fields of ``ray.train.Result``. Floor 5, the local process."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from raylit.worker.storage import download


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint folder of this machine, with ``ray.train.Checkpoint``'s ways to get at it."""

    path: str

    @contextlib.contextmanager
    def as_directory(self) -> Iterator[str]:
        """Give the folder; nothing is copied."""
        yield self.path

    def to_directory(self, path: str | None = None) -> str:
        """Copy the folder to ``path``, or to a new temporary one, and return that."""
        target = path or tempfile.mkdtemp(prefix="checkpoint_")
        shutil.copytree(self.path, target, dirs_exist_ok=True)
        return os.fspath(target)


@dataclass(frozen=True)
class StoredCheckpoint(LocalCheckpoint):
    """A checkpoint folder on a storage: a URI, or a path on ``filesystem``. It is copied here when it is asked for."""

    filesystem: Any = None

    @contextlib.contextmanager
    def as_directory(self) -> Iterator[str]:
        """Give a temporary copy of the folder, which goes at the end."""
        with tempfile.TemporaryDirectory(prefix="checkpoint_") as folder:
            yield self.to_directory(folder)

    def to_directory(self, path: str | None = None) -> str:
        """Copy the folder to ``path``, or to a new temporary one, and return that."""
        target = path or tempfile.mkdtemp(prefix="checkpoint_")
        os.makedirs(target, exist_ok=True)
        download(self.path, target, self.filesystem)
        return os.fspath(target)


@dataclass(frozen=True)
class LocalResult:
    """The outcome of a fit in this process. ``metrics`` is never None."""

    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: LocalCheckpoint | None = None
    path: str | None = None
    error: Exception | None = None
    best_checkpoints: list[tuple[LocalCheckpoint, dict[str, float]]] = field(default_factory=list)  # all that are kept

    @property
    def metrics_dataframe(self) -> Any:
        """One row of metrics for each kept checkpoint, as a pandas DataFrame; None without checkpoint."""
        if not self.best_checkpoints:
            return None
        import pandas as pd

        return pd.DataFrame([metrics for _, metrics in self.best_checkpoints])
