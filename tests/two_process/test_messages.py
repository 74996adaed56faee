"""How many all-reduces a step costs: gradients meet once a step, however many backwards and batches are in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.profiler import ProfilerActivity, profile

from tests.two_process.harness import Processes, run_here
from tests.two_process.modules import Net, loader

BATCHES = 6


class Manual(Net):
    """``backwards`` backwards a batch; a step each ``every`` batches, in the style of 1.0 or of 2.x."""

    automatic_optimization = False

    def __init__(self, style: str, backwards: int = 1, every: int = 1) -> None:
        super().__init__()
        self.style, self.backwards, self.every = style, backwards, every

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for _ in range(self.backwards):
            self.manual_backward(mse_loss(self(x), y))
        optimizer = self.optimizers()
        if self.style == "1.0":
            self.manual_optimizer_step(optimizer)
        elif (batch_idx + 1) % self.every == 0:
            optimizer.step()
            optimizer.zero_grad()


def all_reduces(rank: int, world_size: int, make: Any, arguments: dict[str, Any]) -> tuple[int, int]:
    """Return all-reduces of gradients in a fit, by their size, and the steps."""
    module = make()
    size = sum(parameter.numel() for parameter in module.parameters())
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        ran = run_here(module, loader(BATCHES * 4 * world_size, 4), rank=rank, world_size=world_size, **arguments)
    found = [event for event in profiler.events() if event.name == "gloo:all_reduce"]
    assert found and all(event.input_shapes for event in found)
    # A flag or a mask is smaller than the gradients; DDP sends the gradients with its mark of who took part.
    large = [event for event in found if sum(torch.Size(shape).numel() for shape in event.input_shapes) >= size]
    return len(large), ran.outcome.state.global_step


@pytest.mark.parametrize(
    ("make", "arguments", "steps"),
    [
        (Net, {}, 6),
        (Net, {"accumulate_grad_batches": 3}, 2),
        (Net, {"accumulate_grad_batches": 4}, 2),  # the last group is short
        (lambda: Manual("1.0", backwards=2), {}, 6),
        (lambda: Manual("1.0"), {"accumulate_grad_batches": 3}, 2),
        (lambda: Manual("2.x", backwards=3), {}, 6),
        (lambda: Manual("2.x", every=2), {}, 3),
    ],
    ids=["automatic", "accumulated", "short_group", "manual_1.0", "manual_1.0_accumulated", "manual_2.x", "by_hand"],
)
def test_one_all_reduce_of_the_gradients_a_step(
    two: Processes, make: Any, arguments: dict[str, Any], steps: int
) -> None:
    assert two(all_reduces, make, arguments) == [(steps, steps)] * 2
