"""The way to a worker and home again, by the bytes that Ray would carry: what callbacks counted is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import raylit
from raylit import callbacks
from raylit.assemble import RunSpec, run
from raylit.config.trainer import parse_trainer_args
from raylit.stage import Stage
from raylit.travel import Departure, pack, pack_spec, receive, unpack, unpack_spec, with_gpu
from raylit.view import RunState, WorkerTrainer
from raylit.wire import World
from tests.unit.engine.small import Net, batches


class Big(Net):
    """100 kB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.more = torch.nn.Linear(5, 5000)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx) + self.more(batch[0]).pow(2).mean()
        self.log("loss", loss, on_epoch=True)
        return loss


def on_a_worker(*given: raylit.Callback) -> tuple[Any, list[raylit.Callback]]:
    """Fit two epochs as a Ray worker does; return what came home and the caller's own callbacks."""
    module = Big()
    config = parse_trainer_args(
        max_epochs=2, num_workers=1, log_every_n_steps=1, enable_checkpointing=False, logger=False
    )
    sent = RunSpec(Stage.FIT, config, module, None, {"train": batches(3)}, callbacks=list(given))
    spec, _ = unpack_spec(with_gpu(pack_spec(sent), False))
    departure, view = Departure.of(spec), WorkerTrainer(RunState())
    home = unpack(pack(run(spec, World(), view, None, False), departure, view))
    receive(home, module, list(given))
    return home, list(given)


def test_what_they_counted_comes_home() -> None:
    stopper = callbacks.EarlyStopping("loss", patience=1, min_delta=100.0)
    home, (_, timer, monitor) = on_a_worker(stopper, callbacks.Timer({"hours": 1}), callbacks.LearningRateMonitor())
    assert home.epoch == 2 and stopper.wait_count == 1 and "did not improve by 100" in stopper.stopping_reason_message
    assert 0 < timer.time_elapsed() < 3600 and timer.time_remaining() == 3600 - timer.time_elapsed()
    assert monitor.lrs == {"lr-SGD": [0.05] * 6}


@pytest.mark.parametrize("make", [
    lambda: callbacks.EMAWeightAveraging(decay=0.5), lambda: callbacks.StochasticWeightAveraging(0.01, 1),
    lambda: callbacks.TerminateOnNaN(5),
])  # fmt: skip
def test_weights_do_not_travel_with_a_callback(make: Any) -> None:
    home, _ = on_a_worker(make())
    assert sum(len(pickled) for pickled in home.callbacks[0].set.values()) < 10_000


def test_every_callback_travels() -> None:
    made = [
        callbacks.GradientAccumulationScheduler({0: 2}),
        callbacks.LambdaCallback(on_train_end=lambda trainer, module: None),
        callbacks.RichModelSummary(2), callbacks.TQDMProgressBar(3), callbacks.TerminateOnNaN(),
    ]  # fmt: skip
    home, _ = on_a_worker(*made)
    assert home.global_step == 4 and not home.lost


def test_the_page_lists_every_one() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "callbacks.md").read_text()
    for name in callbacks.__all__:
        assert f"`{name}`" in page or name in ("Callback", "ProgressBar"), name
