"""What the faults meet: ``going_on.py FOLDER``, an elastic run on one or two workers, until ``FOLDER/end`` is there.

Rank 0 leaves a line in ``FOLDER/steps`` for every optimizer step: the time, the step, and on how many workers.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray.train
import torch

import raylit
from raylit.callbacks import ModelCheckpoint

STEP_S, EVERY_N_STEPS = 0.2, 25  # a checkpoint each 5 s


class Net(raylit.Module):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.folder, self.written = Path(folder), 0

    def on_train_start(self) -> None:
        self.written = self.global_step  # a step on one worker takes two turns, and counts after the second
        # On its own line, so that the person at the terminal, and the test, see who trains where.
        print(f"worker {self.global_rank} of {self.world_size} on {socket.gethostname()} goes on after step "
              f"{self.global_step}", flush=True)  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        threading.Event().wait(STEP_S * self.world_size / 2)  # as a batch of a real model; a step as long on one worker
        return self.layer(batch).square().mean()

    def on_train_batch_end(self) -> None:
        if self.global_rank == 0 and self.global_step != self.written:
            self.written = self.global_step
            with open(self.folder / "steps", "a") as file:
                file.write(f"{time.time()} {self.global_step} {self.world_size}\n")
        if (self.folder / "end").exists():
            self.trainer.should_stop = True

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(folder: str) -> None:
    loader = torch.utils.data.DataLoader(torch.randn(100_000, 2), batch_size=2)
    result = raylit.Trainer(
        num_workers=(1, 2), max_epochs=1, name="going-on", storage_path=f"{folder}/runs", resume="auto",
        max_failures=-1, enable_progress_bar=False,
        callbacks=[ModelCheckpoint(every_n_train_steps=EVERY_N_STEPS, save_last=True)],
        scaling_config=ray.train.ScalingConfig(num_workers=(1, 2), elastic_resize_monitor_interval_s=5),
    ).fit(Net(folder), loader)  # fmt: skip
    print(f"run folder: {result.path}")


if __name__ == "__main__":
    main(sys.argv[1])
