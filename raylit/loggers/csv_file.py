"""``metrics.csv``: one row each time values are logged. Rank 0 of a run."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from typing import Any

from raylit.loggers.base import FolderLogger
from raylit.loggers.hparams import write_yaml


class CSVLogger(FolderLogger):
    """Writes ``metrics.csv`` to the run folder, or to ``save_dir/name/version`` where ``save_dir`` is given.

    Rows go to the disk as they come; ``flush_logs_every_n_steps`` lets them wait for that many steps.
    """

    goes_on_with = ("metrics.csv",)

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 1,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        self._flush_steps = flush_logs_every_n_steps
        self._saved_at: int | None = None

    def open(self) -> CSVWriter:
        """Go on with the file that is there, or begin one at the first row."""
        writer = CSVWriter(self._folder(), self._purge_step)
        self._purge_step = None
        return writer

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row."""
        if self.rank != 0 or not metrics:
            return
        self.experiment.log_metrics(self._named(metrics), step)
        waits = step is not None and self._saved_at is not None and step < self._saved_at + self._flush_steps
        if self._flush_steps <= 1 or not waits:
            self.experiment.save()
            self._saved_at = step

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Keep the hyperparameters for ``hparams.yaml``."""
        if self.rank == 0:
            self.hparams.update(params)

    def save(self) -> None:
        """Write the rows that wait, and ``hparams.yaml`` where the logger has a folder of its own."""
        if self.rank != 0:
            return
        if self._experiment is not None:
            self._experiment.save()
        self._save_hparams()

    def finalize(self, status: str) -> None:
        """Write what waits; the next row reads the file's columns again."""
        self.save()
        self._experiment = None


class CSVWriter:
    """One growing CSV file: ``step`` first, then a column for each name in the order of appearance.

    A new name rewrites the file with one more column, whole or not at all. A file that is there is gone on with: a row
    that a crash cut off is dropped, and so are rows of ``purge_step`` and later.
    """

    NAME_METRICS_FILE = "metrics.csv"
    NAME_HPARAMS_FILE = "hparams.yaml"

    def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
        self.log_dir = log_dir
        self.metrics_file_path = os.path.join(log_dir, self.NAME_METRICS_FILE)
        self.metrics: list[dict[str, Any]] = []  # rows that wait
        self._columns: list[str] = []
        if os.path.exists(self.metrics_file_path):
            self._take_up(purge_step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Note one row."""
        self.metrics.append({"step": "" if step is None else step, **metrics})

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Write ``hparams.yaml`` beside the file."""
        write_yaml(os.path.join(self.log_dir, self.NAME_HPARAMS_FILE), params)

    def save(self) -> None:
        """Write the rows that wait."""
        rows, self.metrics = self.metrics, []
        if not rows:
            return
        new = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in self._columns]
        if new:
            known = self._read() if self._columns else []
            self._columns += new
            self._rewrite(known + rows)
            return
        # Opened for each write: at most once in many steps, and nothing is left open in a process that is killed.
        with open(self.metrics_file_path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerows(rows)

    def _take_up(self, purge_step: int | None) -> None:
        with open(self.metrics_file_path, encoding="utf-8", newline="") as file:
            words = file.read()
        whole = words[: words.rfind("\n") + 1]
        reader = csv.DictReader(whole.splitlines(keepends=True))
        self._columns = list(reader.fieldnames or ())
        rows = list(reader)
        kept = [row for row in rows if purge_step is None or not _is_from(row.get("step"), purge_step)]
        if whole != words or len(kept) != len(rows):
            self._rewrite(kept)

    def _read(self) -> list[dict[str, Any]]:
        with open(self.metrics_file_path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        temporary = f"{self.metrics_file_path}.{os.getpid()}.part"
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.metrics_file_path)


def _is_from(step: str | None, first: int) -> bool:
    try:
        return int(step or "") >= first
    except ValueError:  # a row without a step
        return False
