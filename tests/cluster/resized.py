"""What ``test_elastic.py`` trains: slowly, until the test has changed the cluster under it in every way."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit

MOST, SAMPLES, BATCH, EPOCHS = 2, 242, 2, 3  # 61 steps an epoch, the last of two samples


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(SAMPLES, 3, generator=generator), torch.arange(SAMPLES))
    return DataLoader(data, batch_size=BATCH, shuffle=True)


class Net(raylit.Module):
    """Dropout, a logged value, and the samples of each epoch; ``folder``: where it says what happens."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.folder = folder

    def on_train_start(self) -> None:
        if self.folder is None:
            return
        import ray
        import ray.util

        count = len(list(self.folder.glob("start-*-0"))) if self.global_rank == 0 else 0
        attempt = int(self.all_gather(torch.tensor(count)).max())
        said(self.folder / f"start-{attempt}-{self.global_rank}", {
            "node": ray.get_runtime_context().get_node_id(), "address": ray.util.get_node_ip_address(),
            "step": self.global_step, "workers": self.world_size,
        })  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.folder is not None and not (self.folder / "hurry").exists():
            threading.Event().wait(0.05)  # as a batch of a real model
        loss: Tensor = self.net(batch[0]).square().mean()
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return {"loss": loss, "ids": batch[1]}

    def training_epoch_end(self, outputs: Any) -> None:
        if self.folder is not None:
            ids = [number for output in outputs for number in output["ids"].tolist()]
            said(self.folder / f"epoch-{self.current_epoch}-{self.global_rank}-of-{self.world_size}", ids)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def said(path: Path, what: Any) -> None:
    """Write a small file that is there whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(what))
    new.rename(path)
