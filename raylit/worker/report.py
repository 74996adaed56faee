"""Handing a checkpoint to Ray Train. Floor 4, worker side; every rank calls it, since Ray's report is a barrier."""

from __future__ import annotations

import tempfile

from raylit.checkpoint import write
from raylit.checkpoint.ranks import file_name
from raylit.ports import RunSnapshot


def write_snapshot(snapshot: RunSnapshot, folder: str) -> None:
    """Write what this rank has of a checkpoint into its folder: its own part, and rank 0 ``model.ckpt``."""
    write(snapshot.own, folder, file_name(snapshot.own["rank"]))
    if snapshot.common:  # last: a folder without it is no checkpoint
        write(snapshot.common, folder)


def report_checkpoint(snapshot: RunSnapshot | None, metrics: dict[str, float]) -> None:
    """Report ``metrics`` with a checkpoint, into whose folder every rank puts its part; None: metrics alone."""
    import ray.train

    if snapshot is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory(prefix="raylit-") as folder:
        write_snapshot(snapshot, folder)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
