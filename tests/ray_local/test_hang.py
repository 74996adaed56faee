"""A rank that hangs on Ray workers: named, with its stack, long before the collectives' own time-out."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import raylit
from raylit.errors import ProgressTimeoutError


class Hangs(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and self.current_epoch == 1 and batch_idx == 2:
            self.waits_for_a_lock_that_nobody_releases()
        return self.layer(batch).square().mean()

    def waits_for_a_lock_that_nobody_releases(self) -> None:
        threading.Event().wait()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_hanging_rank_is_named_and_the_run_ends(ray_session: None, tmp_path: Path) -> None:
    trainer = raylit.Trainer(
        num_workers=2, use_gpu=False, max_epochs=3, progress_timeout={"seconds": 4}, logger=False,
        enable_progress_bar=False, storage_path=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(ProgressTimeoutError) as raised:
        trainer.fit(Hangs(), DataLoader(torch.ones(16, 1), batch_size=2))
    text = str(raised.value)
    assert "worker 1 made no progress for 4 s and was ended" in text
    assert "fit, epoch 1, batch 2, step 6" in text
    assert "in waits_for_a_lock_that_nobody_releases: threading.Event().wait()" in text
    assert len(text.splitlines()) <= 15
