"""What Modules and callbacks of Lightning 2.x read off the trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import raylit
from raylit.engine.decide import stepping_batches
from raylit.errors import NotAttachedError
from tests.two_process.harness import Processes, run_here
from tests.two_process.modules import Net, loader
from tests.unit.engine.small import Numbers, numbers, quiet


class Cosine(Net):
    """A schedule over all steps of the fit, as 2.x's documentation writes it."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        self.total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=max(1, int(self.total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> Any:
        self.asked = getattr(self, "asked", 0) + 1
        return loader(22, 2)


def case(rank: int, world_size: int, arguments: dict[str, Any]) -> Any:
    ran = run_here(Cosine(), rank=rank, world_size=world_size, **arguments)
    (scheduler,) = ran.outcome.state.lr_schedulers
    return ran.module.total, ran.trainer.global_step, ran.module.asked, scheduler.get_last_lr()[0]


@pytest.mark.parametrize(
    ("arguments", "steps", "on_two"),
    [
        ({"max_epochs": 3}, 33, 18),  # 22 samples: 11 batches of 2, or 6 steps of two workers (the tail is shared)
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 6, 4),  # the last group of an epoch is short
        ({"max_epochs": 3, "accumulate_grad_batches": {0: 4, 2: 1}}, 3 + 3 + 11, 2 + 2 + 6),
        ({"max_epochs": 9, "max_steps": 5}, 5, 5),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6, 6),
    ],
)
def test_estimated_stepping_batches_is_what_the_fit_takes(
    two: Processes, arguments: dict[str, Any], steps: int, on_two: int
) -> None:
    # The schedule is at its end when training is, and the loader was asked for once.
    assert case(0, 1, arguments) == (steps, steps, 1, pytest.approx(0.5))
    assert two(case, arguments) == [(on_two, on_two, 1, pytest.approx(0.5))] * 2


def test_where_nobody_can_tell() -> None:
    assert stepping_batches(None, 3, -1, lambda epoch: 1) == math.inf
    assert stepping_batches(10, None, -1, lambda epoch: 1) == math.inf
    assert stepping_batches(None, None, 7, lambda epoch: 1) == 7


def test_outside_a_fit_it_is_said(tmp_path: Path) -> None:
    trainer = quiet(tmp_path)
    for _ in range(2):
        with pytest.raises(NotAttachedError, match="estimated_stepping_batches is known in a fit"):
            _ = trainer.estimated_stepping_batches
        trainer.fit(Numbers(), numbers(1))


def test_what_runs_is_told(tmp_path: Path) -> None:
    class Asks(Numbers):
        told: set[Any] = set()

        def _tell(self, where: str) -> None:
            names = ("training", "validating", "testing", "predicting", "sanity_checking")
            self.told.add((where, *(name for name in names if getattr(self.trainer, name))))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self._tell("train")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self._tell("val")

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self._tell("test")

        def predict_step(self, batch: Any, batch_idx: int) -> None:
            self._tell("predict")

    module = Asks()
    trainer = quiet(tmp_path, num_sanity_val_steps=1)
    trainer.fit(module, numbers(1), numbers(1))
    trainer.test(module, numbers(1))
    trainer.predict(module, numbers(1))
    assert module.told == {("train", "training"), ("val", "validating"), ("val", "sanity_checking"),
                           ("test", "testing"), ("predict", "predicting")}  # fmt: skip
    assert isinstance(trainer, raylit.Trainer) and not (trainer.training or trainer.testing)
