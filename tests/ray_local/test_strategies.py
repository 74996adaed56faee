"""``ddp2`` on two Ray workers, in one job: numbers, and what the caller is told afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import raylit


class Net(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(4, 2)
        self.told: Any = None
        self.parts: list[int] = []

    def flags(self) -> set[str]:
        return {name for name in ("use_dp", "use_ddp", "use_ddp2", "use_amp", "use_tpu", "on_gpu")
                if getattr(self, name)}  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.told = self.flags()
        return self.net(batch[0]).float(), batch[1]

    def training_step_end(self, outputs: Any) -> Any:
        if not isinstance(outputs, list):
            return mse_loss(*outputs)
        self.parts = [len(y) for _, y in outputs]
        return mse_loss(torch.cat([out for out, _ in outputs]), torch.cat([y for _, y in outputs]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_ddp2(ray_session: None, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(24, 4, generator=generator), torch.randn(24, 2, generator=generator))

    def fit(batch_size: int, **arguments: Any) -> Net:
        model = Net()
        raylit.Trainer(
            max_epochs=2, use_gpu=False, enable_progress_bar=False, logger=False, precision="bf16-mixed",
            storage_path=str(tmp_path), **arguments,
        ).fit(model, DataLoader(data, batch_size=batch_size))  # fmt: skip
        return model

    model, alone = fit(4, num_workers=2, strategy="ddp2"), fit(8, num_workers=0)
    assert model.told == model.flags() == {"use_ddp2", "use_amp"} and alone.flags() == {"use_amp"}
    assert model.parts == [2, 2]
    for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3)
