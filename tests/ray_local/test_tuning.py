"""``lr_find`` and ``scale_batch_size`` on two Ray workers: one test, since each start costs seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import raylit

BATCH = 4


class Net(raylit.Module):
    """The second worker has memory for 20 samples, the first for all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net, self.batch_size, self.lr = nn.Linear(4, 2), BATCH, 0.01
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.seen.append(len(x))
        if len(x) > 20 and self.global_rank == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(160, 4, generator=generator), torch.randn(160, 2, generator=generator))
        return DataLoader(data, batch_size=self.batch_size)


def test_two_workers(ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make(num_workers: int) -> raylit.Trainer:
        return raylit.Trainer(num_workers=num_workers, max_epochs=1, use_gpu=False, storage_path=str(tmp_path))

    model, alone = Net(), Net()
    alone.batch_size = 2 * BATCH
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    search: dict[str, Any] = {"min_lr": 1e-4, "max_lr": 1.0, "num_training": 30}
    found, other = make(2).lr_find(model, **search), make(0).lr_find(alone, **search)
    assert found.results["lr"] == other.results["lr"]
    assert found.results["loss"] == pytest.approx(other.results["loss"], rel=1e-4)
    assert model.lr == found.suggestion() != 0.01
    capsys.readouterr()

    assert make(2).scale_batch_size(model, init_val=8, steps_per_trial=2) == model.batch_size == 16
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("batch size")]
    assert lines == ["batch size 8: fits", "batch size 16: fits",
                     "batch size 32: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB)"]  # fmt: skip
    assert torch.equal(torch.rand(()), expected) and model.seen == [] and not list(tmp_path.iterdir())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
