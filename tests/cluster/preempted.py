"""What ``test_preemption.py`` trains: its first attempt waits until a node is announced as lost, and then is."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import raylit
from tests.chaos.faults import wait_for

BATCHES, EPOCHS = 200, 2  # of each rank


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(torch.randn(2 * 2 * BATCHES, 3, generator=generator), batch_size=2, shuffle=True)


class Net(raylit.Module):
    """Dropout and a logged value; ``folder``: where it says what happens, None: it just trains."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.folder = folder
        self.disturbed, self.more = False, 0

    def on_train_start(self) -> None:
        if self.folder is None:
            return
        import ray
        import ray.util

        mine = f"start-{self.global_rank}-"
        attempt = len(list(self.folder.glob(f"{mine}*")))
        self.disturbed = attempt == 0
        where = f"{ray.get_runtime_context().get_node_id()} {ray.util.get_node_ip_address()} {self.global_step}"
        (self.folder / "new").mkdir(exist_ok=True)
        (self.folder / "new" / f"{mine}{attempt}").write_text(where)
        (self.folder / "new" / f"{mine}{attempt}").rename(self.folder / f"{mine}{attempt}")  # there at once, or not

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.disturbed:
            self.wait()
        loss: Tensor = self.net(batch).square().mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def wait(self) -> None:
        assert self.folder is not None
        if self.global_step == 5:
            wait_for((self.folder / "drained").exists, "the test drains the node")
        if not list(self.folder.glob("results/*/checkpoints/*/manifest.json")):
            threading.Event().wait(0.1)  # as a batch of a real model
            return
        self.more += 1
        if self.more == 3:
            (self.folder / f"went-on-{self.global_rank}").touch()
            wait_for(lambda: False, "the node is lost, or Ray ends the workers")

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)
