"""Measures a run for its profiler: the actions of each batch, under Lightning's names. Floor 4, worker side.

A callback that ``assemble`` puts first where a profiler was given; without one no batch pays for it.
"""

from __future__ import annotations

from typing import Any

from raylit.callback import Callback
from raylit.profilers import Profiler


class ProfiledRun(Callback):
    """Starts and stops the profiler around what the hooks delimit."""

    def __init__(self, profiler: Profiler) -> None:
        self.profiler = profiler
        self._in_batch = False

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.profiler.setup(stage, trainer.global_rank, trainer.log_dir)

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        self.profiler.teardown(stage)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.profiler.start("run_training_epoch")

    # Without naming outputs: they would be kept for it.
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.profiler.stop("run_training_epoch")

    def on_train_batch_start(
        self, trainer: Any, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._in_batch:  # a hook ended the last epoch in this place
            self.profiler.stop("run_training_batch")
        self._in_batch = True
        self.profiler.start("run_training_batch")

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._in_batch = False
        self.profiler.stop("run_training_batch")
        self.profiler.step()

    def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
        self.profiler.start("backward")

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.profiler.stop("backward")

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.profiler.start("run_validation")

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.profiler.stop("run_validation")

    def on_test_start(self, trainer: Any, module: Any) -> None:
        self.profiler.start("run_test")

    def on_test_end(self, trainer: Any, module: Any) -> None:
        self.profiler.stop("run_test")

    def on_predict_start(self, trainer: Any, module: Any) -> None:
        self.profiler.start("run_predict")

    def on_predict_end(self, trainer: Any, module: Any) -> None:
        self.profiler.stop("run_predict")
