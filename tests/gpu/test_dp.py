"""``dp`` with a GPU: parts on another device than the Module's run on copies, and everything comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from raylit.strategies import DataParallel
from tests.gpu.test_gpu import Net, data, trainer

pytestmark = pytest.mark.gpu


class Mixed(DataParallel):
    """The GPU and, for want of a second one, the CPU."""

    def attach(self, visible: Any, collective: Any, name: str = "dp") -> DataParallel:
        return super().attach([visible[0], torch.device("cpu")], collective, name)


class Split(Net):
    """Notes the devices of the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.parts.append((self.device.type, batch[0].device.type, len(batch[0]), self.use_dp))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.log("val", mse_loss(self.net(x), y))
        return self.net(x)

    def validation_step_end(self, outputs: Any) -> None:
        self.ends = [(part.device.type, len(part)) for part in outputs]


def run(tmp_path: Path, **arguments: Any) -> tuple[Split, dict[str, float]]:
    module = Split()
    asked = trainer(tmp_path, **arguments)
    if "strategy" not in arguments:
        module.validation_step_end = lambda outputs: None  # type: ignore[method-assign]
    asked.fit(module, DataLoader(data(), batch_size=9), DataLoader(data(), batch_size=9))
    return module, {name: float(value) for name, value in asked.callback_metrics.items()}


def test_parts_on_two_devices(tmp_path: Path) -> None:
    plain, metrics = run(tmp_path / "plain")
    split, split_metrics = run(tmp_path / "split", strategy=Mixed())
    assert split.parts[:2] == [("cuda", "cuda", 5, True), ("cpu", "cpu", 4, True)]
    assert split.ends == [("cuda", 3), ("cuda", 3)]  # the outputs are where the Module is
    for mine, other in zip(split.parameters(), plain.parameters(), strict=True):
        assert isinstance(mine, nn.Parameter) and mine.device == other.device
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    assert split_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert split_metrics[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs a machine with just one GPU")
def test_one_gpu_is_one_part(tmp_path: Path) -> None:
    split, _ = run(tmp_path, strategy="dp")
    assert set(split.parts) == {("cuda", "cuda", 9, True), ("cuda", "cuda", 6, True)}
    predictions = trainer(tmp_path, strategy="dp").predict(split, DataLoader(data(), batch_size=9))
    torch.testing.assert_close(
        torch.cat(predictions), split.net(data().tensors[0].to(split.device)).cpu(), rtol=1e-3, atol=1e-4
    )
