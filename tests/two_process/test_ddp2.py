"""``ddp2``: each of two workers splits its batch over two virtual devices, and DDP averages between the workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from raylit.strategies import DDP2
from tests.two_process.harness import Processes, run_here
from tests.two_process.modules import (
    Net,
    Numbers,
    alone,
    assert_close,
    assert_equal,
    check_equals_one_process,
    fit_case,
    loader,
)
from tests.two_process.test_equality import Gan, Recurrent, sequences


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"strategy": DDP2(3, gradient_as_bucket_view=True)},
    ],
    ids=["plain", "accumulated", "clipped", "own_object"],
)
def test_equals_one_process(two: Processes, arguments: dict[str, Any]) -> None:
    arguments = {"strategy": "ddp2", **arguments}
    ranks = two(fit_case, Net, lambda: loader(32, 4), {**arguments, "max_epochs": 3})
    assert_equal(ranks[0][0], ranks[1][0])
    arguments.pop("strategy")
    assert_close(ranks[0][0], alone(Net, loader(32, 8), max_epochs=3, **arguments).weights)


def test_two_optimizers_and_a_recurrent_network(two: Processes) -> None:
    check_equals_one_process(two, Gan, lambda: loader(24, 4), loader(24, 8), strategy="ddp2")
    check_equals_one_process(
        two, Recurrent, lambda: sequences(2), sequences(4), strategy="ddp2", truncated_bptt_steps=3
    )


class StepEnd(Net):
    """The loss is made of both parts' outputs; keeps what it was given and what it was told."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return {"out": self(x), "y": y}

    def training_step_end(self, step_output: Any) -> Any:
        self.parts = [len(part["y"]) for part in step_output]
        self.told = (self.use_dp, self.use_ddp, self.use_ddp2)
        return mse_loss(torch.cat([p["out"] for p in step_output]), torch.cat([p["y"] for p in step_output]))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.log("val", mse_loss(self(x), y))
        return mse_loss(self(x), y)

    def validation_step_end(self, step_output: Any) -> None:
        self.val_parts = [*getattr(self, "val_parts", []), len(step_output)]


def step_end(rank: int, world_size: int) -> Any:
    ran = run_here(
        StepEnd(), loader(24, 4), rank=rank, world_size=world_size, val=loader(9, 4), strategy="ddp2", max_epochs=2
    )
    return ran.weights, ran.metrics["val"], ran.module.parts, ran.module.told, ran.module.val_parts


def test_step_end_gets_the_parts_of_its_worker(two: Processes) -> None:
    ranks = two(step_end)
    assert_equal(ranks[0][0], ranks[1][0])
    whole = alone(StepEndAlone, loader(24, 8), val=loader(9, 4), max_epochs=2)
    assert_close(ranks[0][0], whole.weights)
    for _, val, parts, told, _ in ranks:
        assert parts == [2, 2] and told == (False, False, True)
        assert val == pytest.approx(whole.metrics["val"], rel=1e-6)
    # 9 samples in batches of 4 over two workers: 4 and 4, then one sample for the first of them.
    assert [val_parts for *_, val_parts in ranks] == [[2, 1] * 2, [2] * 2]


class StepEndAlone(StepEnd):
    def training_step_end(self, step_output: Any) -> Any:
        return mse_loss(step_output["out"], step_output["y"])

    def validation_step_end(self, step_output: Any) -> None:
        pass


class Skips(Numbers):
    """A part with a NaN has no loss."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return None if batch.isnan().any() else super().training_step(batch, batch_idx)


def test_parts_and_ranks_that_skip(two: Processes) -> None:
    nan = float("nan")

    def pairs() -> Any:
        # rank 0, rank 1; rank 0, ...
        return [torch.tensor(pair) for pair in ([1.0, 3], [nan, 4], [nan, nan], [nan, 6], [nan, nan], [nan, nan])]

    ranks = two(fit_case, Skips, pairs, {"strategy": "ddp2"})
    # (2 + 4) / 2, then (0 + 6) / 2, then nobody
    assert [(weights["weight"].item(), steps) for weights, steps in ranks] == [(-6.0, 2)] * 2
