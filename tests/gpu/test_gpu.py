"""What only a CUDA device shows: the same numbers as a hand-written loop on it, and a step that never waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import raylit

pytestmark = pytest.mark.gpu
BATCHES = 12


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(8 * BATCHES, 16, generator=generator), torch.randn(8 * BATCHES, 4, generator=generator)
    )


class Net(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        self.seen: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if batch_idx == 0:
            self.seen = [x.device.type, str(self.device.type), str(self.on_gpu), str(self.use_amp)]
        loss = mse_loss(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def trainer(tmp_path: Path, **arguments: Any) -> raylit.Trainer:
    defaults: dict[str, Any] = {
        "num_workers": 0, "use_gpu": True, "max_epochs": 2, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "storage_path": str(tmp_path), "deterministic": "warn",
    }  # fmt: skip
    return raylit.Trainer(**{**defaults, **arguments})


def by_hand(mixed: bool) -> dict[str, Tensor]:
    model = Net().cuda()
    optimizer, scaler = model.configure_optimizers(), torch.amp.GradScaler("cuda", enabled=mixed)
    for _ in range(2):
        for x, y in DataLoader(data(), batch_size=8):
            with torch.autocast("cuda", torch.float16, enabled=mixed):
                loss = mse_loss(model.net(x.cuda()), y.cuda())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("precision", ["32", "16-mixed"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_weights_are_those_of_a_hand_written_loop(
    tmp_path: Path, precision: str, num_workers: int, request: pytest.FixtureRequest
) -> None:
    if num_workers:
        request.getfixturevalue("ray_session")
    model = Net()
    trainer(tmp_path, precision=precision, num_workers=num_workers).fit(model, DataLoader(data(), batch_size=8))
    assert model.seen == ["cuda", "cuda", "True", str(precision == "16-mixed")]
    for name, expected in by_hand(precision == "16-mixed").items():
        torch.testing.assert_close(model.state_dict()[name].cpu(), expected, rtol=0, atol=0)


class NeverWaits(Net):
    """Turns every wait for the device into an error, from the second batch to the last but one."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == BATCHES - 2:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_does_not_wait_for_the_device(tmp_path: Path) -> None:
    try:
        trainer(tmp_path, max_epochs=1).fit(NeverWaits(), DataLoader(data(), batch_size=8, pin_memory=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_predictions_come_back(tmp_path: Path) -> None:
    model = Net()
    outputs = trainer(tmp_path).predict(model, DataLoader(data(), batch_size=8))
    with torch.no_grad():
        expected = model.cpu().net(data().tensors[0])
    torch.testing.assert_close(torch.cat([output.cpu() for output in outputs]), expected, rtol=1e-4, atol=1e-5)


def test_two_workers_over_nccl_agree_with_one_of_twice_the_batch(ray_session: None, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices: NCCL refuses two ranks on one")
    two, one = Net(), Net()
    trainer(tmp_path, num_workers=2).fit(two, DataLoader(data(), batch_size=4))
    trainer(tmp_path).fit(one, DataLoader(data(), batch_size=8))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name].cpu(), tensor.cpu(), rtol=0, atol=1e-6)
