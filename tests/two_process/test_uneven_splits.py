"""Truncated BPTT over sequences that are longer on one rank than on the other: nobody waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.two_process.harness import Processes
from tests.two_process.modules import Numbers, fit_case


class Splits(Numbers):
    """The loss is weight * the split's sum."""

    def training_step(self, batch: Tensor, batch_idx: int, hiddens: Any) -> Any:
        assert hiddens is None or hiddens == batch_idx
        return {"loss": self.weight * batch.sum(), "hiddens": batch_idx}

    def training_epoch_end(self, outputs: Any) -> None:
        self.outputs = outputs


def sequences() -> list[Tensor]:
    """For rank 0 one of two steps and one of three; for rank 1 one of five and one of two."""
    return [torch.tensor([each]) for each in ([1.0, 2], [1.0, 1, 2, 2, 4], [2.0, 2, 2], [4.0, 4])]


@pytest.mark.parametrize(
    ("arguments", "weight", "steps"),
    [
        # Splits of two. First batch: (3 + 2) / 2, (0 + 4) / 2, (0 + 4) / 2; second one: (4 + 8) / 2, (2 + 0) / 2.
        ({}, -(2.5 + 2 + 2 + 6 + 1), 2),
        # All of it together in one group, halved: the steps come at the second batch's splits.
        ({"accumulate_grad_batches": 2}, -(2.5 + 2 + 2 + 6 + 1) / 2, 1),
    ],
)
def test_a_longer_sequence_on_one_rank(two: Processes, arguments: Any, weight: float, steps: int) -> None:
    ranks = two(fit_case, Splits, sequences, {"truncated_bptt_steps": 2, **arguments})
    assert [(found["weight"].item(), count) for found, count in ranks] == [(pytest.approx(weight), steps)] * 2


class TwoOptimizers(Splits):
    def __init__(self) -> None:
        super().__init__()
        self.other = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int, optimizer_idx: int, hiddens: Any) -> Any:
        return {"loss": (self.weight, self.other)[optimizer_idx] * batch.sum(), "hiddens": batch_idx}

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([weight], lr=1.0) for weight in (self.weight, self.other)]


def test_with_two_optimizers(two: Processes) -> None:
    ranks = two(fit_case, TwoOptimizers, sequences, {"truncated_bptt_steps": 2})
    for weights, _ in ranks:
        assert weights["weight"].item() == weights["other"].item() == pytest.approx(-13.5)
