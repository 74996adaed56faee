"""Callbacks on a CUDA device: the same averages as on the CPU, and no wait for the device in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from raylit.callbacks import DeviceStatsMonitor, EMAWeightAveraging, StochasticWeightAveraging, TerminateOnNaN
from raylit.errors import NonFiniteError
from raylit.loggers import CSVLogger
from tests.gpu.test_gpu import BATCHES, Net, NeverWaits, data, trainer

pytestmark = pytest.mark.gpu


def weights(tmp_path: Path, make: Any, **given: Any) -> dict[str, Tensor]:
    module = Net()
    trainer(tmp_path, max_epochs=4, callbacks=[make()], **given).fit(module, DataLoader(data(), batch_size=8))
    return {name: tensor.cpu() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("make", [
    lambda: EMAWeightAveraging(decay=0.9), lambda: EMAWeightAveraging(decay=0.9, device="cpu"),
    lambda: StochasticWeightAveraging(0.01, 2), lambda: StochasticWeightAveraging(0.01, 2, device=None),
])  # fmt: skip
def test_an_average_is_that_of_the_cpu_wherever_it_lies(make: Any, tmp_path: Path) -> None:
    mine, other = weights(tmp_path, make), weights(tmp_path, make, use_gpu=False)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [
    lambda: TerminateOnNaN(), lambda: EMAWeightAveraging(decay=0.9), lambda: DeviceStatsMonitor(cpu_stats=False),
])  # fmt: skip
def test_a_step_does_not_wait_for_the_device(make: Any, tmp_path: Path) -> None:
    assert BATCHES < 20  # TerminateOnNaN looks every 20
    given = {"logger": CSVLogger(tmp_path / "logs"), "log_every_n_steps": 3, "max_epochs": 1}
    try:
        trainer(tmp_path, callbacks=[make()], **given).fit(
            NeverWaits(), DataLoader(data(), batch_size=8, pin_memory=True)
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Breaks(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 5:
            self.net[2].weight.data.fill_(float("nan"))
        return super().training_step(batch, batch_idx)


def test_the_first_bad_step_is_named_though_found_late(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"epoch 0, batch 5 \(global_step 5\); not finite: the parameters net.0"):
        trainer(tmp_path, callbacks=[TerminateOnNaN()]).fit(Breaks(), DataLoader(data(), batch_size=8))


def test_memory_statistics_are_logged(tmp_path: Path) -> None:
    given = {"logger": CSVLogger(tmp_path / "logs"), "log_every_n_steps": 3, "max_epochs": 1}
    trainer(tmp_path, callbacks=[DeviceStatsMonitor()], **given).fit(Net(), DataLoader(data(), batch_size=8))
    head = next((tmp_path / "logs").rglob("metrics.csv")).read_text().splitlines()[0]
    assert "DeviceStatsMonitor.on_train_batch_end/allocated_bytes.all.peak" in head and "cpu_percent" not in head
