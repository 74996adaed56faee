"""A run on Ray workers that loses one of them goes on from its newest checkpoint; a mistake in the script does not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit
from raylit.callbacks import ModelCheckpoint
from tests.two_process.harness import Processes, run_here


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(24, 3, generator=generator)), 2, shuffle=True)


class Lossy(raylit.Module):
    """At step 7 the worker of ``rank`` is killed, or raises: once for each mark that is not there yet."""

    def __init__(self, marks: str, kill: bool, times: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.marks, self.kill, self.times = marks, kill, times
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 7 and self.global_rank == 1:
            for mark in (Path(self.marks, str(number)) for number in range(self.times)):
                if not mark.exists():
                    mark.touch()
                    if self.kill:
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise KeyError("a mistake")
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


GIVEN: dict[str, Any] = {"max_epochs": 2, "seed": 5, "log_every_n_steps": 1}


def keeping() -> ModelCheckpoint:
    return ModelCheckpoint(monitor="loss_epoch", every_n_train_steps=3, save_last=True)


def fit(folder: Path, kill: bool, times: int, **given: Any) -> Any:
    (folder / "marks").mkdir()
    model, callback = Lossy(str(folder / "marks"), kill, times), keeping()
    trainer = raylit.Trainer(
        num_workers=2, use_gpu=False, storage_path=str(folder / "runs"), callbacks=[callback], logger=False,
        enable_model_summary=False, **GIVEN, **given,
    )  # fmt: skip
    return model, trainer, trainer.fit(model, data()), callback


def whole_case(rank: int, world_size: int, folder: str) -> Any:
    """The same run on two processes, which nobody kills."""
    ran = run_here(Lossy(folder, False, 0), data(), rank=rank, world_size=world_size, callbacks=[keeping()],
                   storage=folder, order_seed=5, **GIVEN)  # fmt: skip
    return ran.weights, ran.trainer.history, ran.metrics


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_is_killed_costs_nothing(
    two: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default a lost worker is replaced; what comes of it is the run without the loss, to the bit."""
    (tmp_path / "whole").mkdir()
    weights, history, metrics = two(whole_case, str(tmp_path / "whole"))[0]
    model, trainer, result, callback = fit(tmp_path, kill=True, times=1)
    told = "".join(capsys.readouterr())
    assert (tmp_path / "marks" / "0").exists()
    assert "starting again (restart 1 of 3)" in told and "going on from step 6" in told
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    assert trainer.history.equals(history) and trainer.global_step == 12
    assert result.metrics == metrics
    names = [Path(each.path).name for each, _ in result.best_checkpoints]
    assert sorted(names) == sorted(os.listdir(tmp_path / "whole" / "checkpoints"))
    assert callback.last_model_path == f"{result.checkpoint.path}/model.ckpt"
    with result.checkpoint.as_directory() as folder:
        assert {"model.ckpt", "rank_00000.ckpt", "rank_00001.ckpt"} <= set(os.listdir(folder))
    again = raylit.Trainer(num_workers=0, max_epochs=3, logger=False, storage_path=str(tmp_path / "more"),
                           enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    again.fit(Lossy(str(tmp_path), False, 0), data(), ckpt_path=result.checkpoint)
    assert again.current_epoch == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_a_mistake_at_one_place_is_tried_twice_at_most(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="a mistake"):
        fit(tmp_path, kill=False, times=9, max_failures=5)
    assert len(list((tmp_path / "marks").iterdir())) == 2
