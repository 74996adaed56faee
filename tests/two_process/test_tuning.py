"""The range of learning rates on two ranks: the mean loss of both, and one decision to stop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raylit.callbacks.rate_range import LearningRateRange
from raylit.driver.tuning import ladder
from tests.two_process.harness import Processes, run_here
from tests.two_process.modules import Net, Numbers, loader, numbers

RATES = ladder(1e-3, 0.5, 12, "exponential")
NAN = float("nan")


def find(rank: int, world_size: int, make: Any, data: Any, rates: list[float] = RATES, threshold: float | None = 4.0,
         **arguments: Any) -> tuple[list[float], list[float], int]:  # fmt: skip
    seen = LearningRateRange(rates, threshold)
    ran = run_here(make(), data(), rank=rank, world_size=world_size, callbacks=[seen],
                   **{"max_epochs": len(rates), "max_steps": len(rates), **arguments})  # fmt: skip
    assert not seen._pending
    return seen.lrs, seen.losses, ran.outcome.state.global_step


def case(rank: int, world_size: int, make: Any, data: Any, arguments: dict[str, Any]) -> Any:
    return find(rank, world_size, make, data, **arguments)


def test_two_ranks_find_what_one_process_finds_with_the_whole_batch(two: Processes) -> None:
    ranks = two(case, Net, lambda: loader(24, 4), {})
    lrs, losses, steps = find(0, 1, Net, lambda: loader(24, 8))
    assert ranks[0] == ranks[1] and steps == 12 and ranks[0][0] == lrs == RATES
    assert ranks[0][1] == pytest.approx(losses, rel=1e-5)


class Shown(Numbers):
    """The batch's mean is the loss; steps change nothing."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return None if batch.isnan().any() else self.weight * 0 + batch.mean()


def test_a_loss_that_diverges_on_one_rank_stops_both_at_the_same_step(two: Processes) -> None:
    # Rank 0 sees 1, 1, 1, ...; rank 1 sees 1, 1, then 100.
    data = lambda: numbers(*[1.0] * 4, *[1.0, 100.0] * 6)  # noqa: E731
    lrs, losses, steps = two(case, Shown, data, {})[1]
    assert steps == len(lrs) == len(losses) == 3
    assert losses == pytest.approx([1.0, 1.0, (0.98**2 + 0.98 + 50.5) / (0.98**2 + 0.98 + 1)])
    assert two(case, Shown, data, {"threshold": None})[0][2] == 8 + 4  # the loader begins anew


def test_a_rank_that_skips_has_no_part_in_the_mean(two: Processes) -> None:
    ranks = two(case, Shown, lambda: numbers(1.0, 3.0, NAN, 2.0, 2.0, NAN), {"rates": RATES[:3]})
    assert ranks[0] == ranks[1] and ranks[0][1] == pytest.approx([2.0, 2.0, 2.0])


def test_shares_of_an_elastic_step_count_alike(two: Processes) -> None:
    """Four shares a step on two ranks: each takes two of them, one after the other."""
    arguments = {"num_workers": (1, 4), "enable_checkpointing": True, "rates": RATES[:3]}
    ranks = two(case, Shown, lambda: numbers(1, 2, 6, 3, 3, 3, 3, 3, 1, 1, 4, 2), arguments)
    assert ranks[0] == ranks[1]
    assert ranks[0][1] == pytest.approx([3.0, 3.0, (0.98**2 * 3 + 0.98 * 3 + 2) / (0.98**2 + 0.98 + 1)])


def test_the_weights_are_those_of_steps_with_these_rates(two: Processes) -> None:
    def weights(rank: int, world_size: int) -> float:
        seen = LearningRateRange([0.5, 1.0, 2.0], None)
        ran = run_here(Numbers(lr=9.0), numbers(1, 3, 2, 4, 1, 1), rank=rank, world_size=world_size, callbacks=[seen])
        return float(ran.weights["weight"])

    assert two(weights) == [pytest.approx(-(0.5 * 2 + 1.0 * 3 + 2.0 * 1))] * 2
    assert torch.get_num_threads() == 1
