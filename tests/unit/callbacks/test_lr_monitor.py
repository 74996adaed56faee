"""LearningRateMonitor: names, when, and the values in history against the schedule worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raylit.callbacks import LearningRateMonitor
from raylit.errors import ConfigError
from raylit.loggers import CSVLogger
from tests.unit.engine.small import Net, batches, quiet

Halve = torch.optim.lr_scheduler.ExponentialLR


def run(tmp_path: Path, configure: Any, monitor: LearningRateMonitor, **given: Any) -> Any:
    given = {"max_epochs": 2, "log_every_n_steps": 2, **given}
    trainer = quiet(tmp_path, callbacks=[monitor], **given)
    trainer.fit(Net(configure), batches(4))
    return trainer


def rows(trainer: Any, name: str) -> list[tuple[int, float]]:
    """(step, value) of each row of history that has the metric."""
    table = trainer.history
    return [
        (step, value) for step, value in zip(table["step"].to_pylist(), table[name].to_pylist()) if value is not None
    ]


def scheduled(interval: str, **more: Any) -> Any:
    def configure(parameters: Any) -> Any:
        optimizer = torch.optim.AdamW(parameters, lr=0.8, betas=(0.7, 0.9), weight_decay=0.03)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": Halve(optimizer, 0.5), "interval": interval, **more},
        }

    return configure


def test_by_step_is_the_rate_in_use_for_that_step(tmp_path: Path) -> None:
    trainer = run(tmp_path, scheduled("step"), LearningRateMonitor())
    # Step n is done with 0.8 / 2 ** (n - 1); kept are steps 2, 4, 6 and 8.
    assert rows(trainer, "lr-AdamW") == [(n, 0.8 / 2 ** (n - 1)) for n in (2, 4, 6, 8)]
    assert float(trainer.callback_metrics["lr-AdamW"]) == 0.8 / 2**7


def test_by_epoch_is_the_rate_at_its_start(tmp_path: Path) -> None:
    monitor = LearningRateMonitor()
    trainer = run(tmp_path, scheduled("epoch"), monitor, max_epochs=3)
    assert rows(trainer, "lr-AdamW") == [(4, 0.8), (8, 0.4), (12, 0.2)]
    assert monitor.lrs == {"lr-AdamW": [0.8, 0.4, 0.2]}


def test_the_interval_asked_for_goes_first(tmp_path: Path) -> None:
    trainer = run(tmp_path, scheduled("step"), LearningRateMonitor(logging_interval="epoch"))
    assert rows(trainer, "lr-AdamW") == [(4, 0.8), (8, 0.8 / 2**4)]
    trainer = run(tmp_path, scheduled("epoch"), LearningRateMonitor(logging_interval="step"))
    assert rows(trainer, "lr-AdamW") == [(2, 0.8), (4, 0.8), (6, 0.4), (8, 0.4)]


def test_momentum_and_weight_decay(tmp_path: Path) -> None:
    trainer = run(tmp_path, scheduled("epoch"), LearningRateMonitor(log_momentum=True, log_weight_decay=True))
    assert rows(trainer, "lr-AdamW-momentum") == [(4, 0.7), (8, 0.7)]
    assert rows(trainer, "lr-AdamW-weight_decay") == [(4, 0.03), (8, 0.03)]

    def sgd(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.6)

    trainer = run(tmp_path, sgd, LearningRateMonitor(log_momentum=True))
    assert rows(trainer, "lr-SGD-momentum") == [(n, 0.6) for n in (2, 4, 6, 8)]  # without scheduler: by step


def test_a_schedulers_name_and_groups(tmp_path: Path) -> None:
    def configure(parameters: Any) -> Any:
        one, two, *rest = parameters
        optimizer = torch.optim.SGD([{"params": [one], "lr": 0.5}, {"params": [two], "name": "bias"}, {"params": rest}],
                                    lr=0.25)  # fmt: skip
        return [optimizer], [{"scheduler": Halve(optimizer, 0.5), "name": "rate"}]

    trainer = run(tmp_path, configure, LearningRateMonitor(), max_epochs=1)
    assert [rows(trainer, f"rate/{group}") for group in ("pg1", "bias", "pg3")] == [
        [(4, 0.5)],
        [(4, 0.25)],
        [(4, 0.25)],
    ]


def test_several_optimizers_of_one_class(tmp_path: Path) -> None:
    class Two(Net):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            return super().training_step(batch, batch_idx)

    def configure(parameters: Any) -> Any:
        one, two, *rest = parameters
        made = [torch.optim.SGD(each, lr=lr) for each, lr in (([one], 0.1), ([two], 0.2))]
        made.append(torch.optim.Adam(rest, lr=0.3))
        return made, [Halve(made[1], 0.5)]

    trainer = quiet(tmp_path, log_every_n_steps=4, callbacks=[LearningRateMonitor()])
    trainer.fit(Two(configure), batches(4))
    assert {name: rows(trainer, name) for name in ("lr-SGD", "lr-SGD-1", "lr-Adam")} == {
        "lr-SGD": [(4, 0.1)], "lr-SGD-1": [(4, 0.2)], "lr-Adam": [(4, 0.3)],
    }  # fmt: skip


def test_loggers_get_it(tmp_path: Path) -> None:
    run(tmp_path, scheduled("step"), LearningRateMonitor(), logger=CSVLogger(tmp_path / "logs"))
    text = next((tmp_path / "logs").rglob("metrics.csv")).read_text().splitlines()
    assert "lr-AdamW" in text[0] and len(text) == 5


def test_accumulated_batches(tmp_path: Path) -> None:
    trainer = run(tmp_path, scheduled("step"), LearningRateMonitor(), accumulate_grad_batches=2, log_every_n_steps=1)
    assert rows(trainer, "lr-AdamW") == [(n, 0.8 / 2 ** (n - 1)) for n in (1, 2, 3, 4)]


def test_no_step_values_are_kept_and_nothing_is_logged(tmp_path: Path) -> None:
    monitor = LearningRateMonitor()
    run(tmp_path, scheduled("step"), monitor, log_every_n_steps=0)
    assert monitor.lrs == {}


def test_an_unknown_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected 'step', 'epoch' or None"):
        LearningRateMonitor("batch")
