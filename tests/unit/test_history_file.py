"""history.parquet while a run goes on: whole at any time, in step, and no reason for a run to end."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raylit.metrics.history import History
from raylit.worker.history_file import HistoryFile


def grown(history: History, rows: int, **more: float) -> History:
    for row in range(rows):
        history.append(0, row, {"loss": float(row), **more})
    return history


def wait_for_thread(file: HistoryFile) -> None:
    assert file._thread is not None
    file._thread.join()


def test_rows_are_in_the_file_before_the_end(tmp_path: Path) -> None:
    history = History()
    file = HistoryFile(history, str(tmp_path), every_s=0.0)
    seen = []
    for row in range(3):
        grown(history, 1, **({"late": 1.0} if row == 2 else {}))
        file._due = 0.0  # the cost of the write before asks for a pause
        file.follow()
        wait_for_thread(file)
        seen.append(pq.read_table(tmp_path / "history.parquet"))
    assert [table.num_rows for table in seen] == [1, 2, 3]
    assert seen[2].to_pydict()["late"] == [None, None, 1.0]
    assert history.state_dict()["start"] == 3  # a checkpoint may count on the file
    assert os.listdir(tmp_path) == ["history.parquet"]


def test_nothing_is_written_before_it_is_due_and_everything_at_the_end(tmp_path: Path) -> None:
    history = History()
    file = HistoryFile(history, str(tmp_path))
    for _ in range(1000):
        grown(history, 1)
        file.follow()
    assert os.listdir(tmp_path) == []
    file.close()
    assert pq.read_table(tmp_path / "history.parquet").equals(history.table())
    grown(history, 1)
    file.close()
    assert pq.read_table(tmp_path / "history.parquet").num_rows == 1001


def test_without_rows_no_file(tmp_path: Path) -> None:
    HistoryFile(History(), str(tmp_path)).close()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_attempt_left_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / ".history.parquet.123.tmp").write_bytes(b"PAR1 half")
    (tmp_path / "history.parquet.backup").touch()
    HistoryFile(History(), str(tmp_path))
    assert os.listdir(tmp_path) == ["history.parquet.backup"]


def test_a_file_that_cannot_be_written_is_a_warning_and_no_end_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "folder").touch()  # where a folder is needed
    history = grown(History(), 2)
    file = HistoryFile(history, str(tmp_path / "folder"), every_s=0.0)
    file.follow()
    wait_for_thread(file)
    with pytest.warns(UserWarning, match="history could not be written to .*/history.parquet .*trainer.history has"):
        file.close()
    assert len(history) == 2


def test_a_copy_for_the_thread_has_the_rows_whose_values_are_here(tmp_path: Path) -> None:
    class Pending:
        def ready(self) -> bool:
            return False

        def read(self) -> dict[str, float]:
            return {"loss": 7.0}

    history = grown(History(), 2)
    history._pending.append((2, Pending()))  # type: ignore[arg-type]
    history._epochs.append(0)
    history._steps.append(2)
    copy = history.readable()
    assert copy.table().to_pydict() == {"epoch": [0, 0], "step": [0, 1], "loss": [0.0, 1.0]}
    assert history.table().to_pydict()["loss"] == [0.0, 1.0, 7.0]
    assert len(copy) == 2
