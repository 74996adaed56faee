"""Handing a checkpoint to Ray Train. Floor 4, worker side; every rank calls it, since Ray's report is a barrier."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from raylit.checkpoint import write


def report_checkpoint(checkpoint: Mapping[str, Any] | None, metrics: dict[str, float]) -> None:
    """Report ``metrics`` with rank 0's ``checkpoint`` (None on the other ranks)."""
    import ray.train

    if checkpoint is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory(prefix="raylit-") as folder:
        write(checkpoint, folder)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
