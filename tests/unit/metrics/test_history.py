"""Snapshot and History."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from raylit.errors import CheckpointError
from raylit.metrics.history import History
from raylit.metrics.snapshot import Snapshot


def test_a_snapshot_holds_the_values_of_its_moment() -> None:
    loss = torch.tensor(1.5)
    snapshot = Snapshot({"loss": loss, "lr": 0.1})
    loss += 1
    assert snapshot.ready()
    assert snapshot.read() == {"loss": 1.5, "lr": 0.1}
    assert list(snapshot.read()) == ["loss", "lr"]


@pytest.mark.gpu
def test_a_snapshot_on_cuda_does_not_wait() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.cuda._sleep(200_000_000)
    snapshot = Snapshot({"a": torch.tensor(2.0, device="cuda"), "b": 3.0, "c": torch.ones((), device="cuda")})
    assert snapshot.read() == {"a": 2.0, "b": 3.0, "c": 1.0}


def test_rows_become_a_table_with_nulls() -> None:
    history = History()
    history.append(0, 1, {"loss": 1.0})
    history.append(0, 2, {"loss": torch.tensor(math.nan), "step": 7.0})
    history.append(1, 2, Snapshot({"val": torch.tensor(0.5)}))
    assert history.table().to_pydict() | {"loss": None} == {
        "epoch": [0, 0, 1], "step": [1, 2, 2], "loss": None, "step_logged": [None, 7.0, None],
        "val": [None, None, 0.5],
    }  # fmt: skip
    first, second, third = history.table()["loss"].to_pylist()
    assert first == 1.0
    assert math.isnan(second)
    assert third is None


def test_an_empty_history_is_a_table() -> None:
    assert History().table().column_names == ["epoch", "step"]


def test_parquet_is_replaced_whole_and_a_resume_goes_back_to_its_position(tmp_path: Path) -> None:
    path = tmp_path / "run" / "history.parquet"
    history = History()
    for step in range(3):
        history.append(0, step, {"loss": float(step)})
    history.write_parquet(path)
    assert [p.name for p in path.parent.iterdir()] == ["history.parquet"]
    history.append(1, 3, {"loss": 3.0, "val": 1.0})
    state = history.state_dict()
    at_checkpoint = history.table()
    history.append(1, 4, {"loss": 4.0})
    history.write_parquet(path)  # the run goes on, and then crashes
    assert pq.read_table(path).num_rows == 5

    resumed = History()
    resumed.load_state_dict(state, path)
    assert resumed.table().equals(at_checkpoint)
    resumed.append(1, 4, {"loss": 4.5})
    assert resumed.table()["loss"].to_pylist() == [0.0, 1.0, 2.0, 3.0, 4.5]

    elsewhere = History()
    elsewhere.load_state_dict(state)
    assert elsewhere.table().to_pydict() == {"epoch": [1], "step": [3], "loss": [3.0], "val": [1.0]}


def test_a_file_with_too_few_rows_is_named(tmp_path: Path) -> None:
    history = History()
    history.append(0, 0, {"a": 1.0})
    history.write_parquet(tmp_path / "h.parquet")
    history.append(0, 1, {"a": 1.0})
    state = history.state_dict()
    with pytest.raises(CheckpointError, match=r"h.parquet has 1 rows"):
        History().load_state_dict({**state, "start": 2}, tmp_path / "h.parquet")
