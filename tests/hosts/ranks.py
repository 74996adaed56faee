"""What ``ray submit`` sends to the cluster: ``ranks.py FOLDER NUM_WORKERS``; each worker leaves a note of who it is."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import torch

import raylit


class Net(raylit.Module):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.folder = Path(folder)

    def on_train_start(self) -> None:
        said = {"host": socket.gethostname(), "local": self.local_rank, "node": self.node_rank, "of": self.world_size}
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(said))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    folder, workers = sys.argv[1:]
    loader = torch.utils.data.DataLoader(torch.randn(24, 2), batch_size=2)
    raylit.Trainer(num_workers=int(workers), max_epochs=1).fit(Net(folder), loader)
