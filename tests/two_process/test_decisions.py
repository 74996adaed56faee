"""Places where ranks must decide alike: closures, plateau schedulers, fractions of uneven loaders, dropped groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.two_process.harness import Processes, run_here
from tests.two_process.modules import Net, Numbers, assert_close, assert_equal, fit_case, loader, numbers

NAN = float("nan")


class ManualClosure(Net):
    """Manual optimisation, the gradients computed in a closure."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = super(ManualClosure, self).training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


def test_manual_closure_equals_one_process_of_the_whole_batch(two: Processes) -> None:
    ranks = two(fit_case, ManualClosure, lambda: loader(16, 4), {"gradient_clip_val": 0.05})
    assert_equal(ranks[0][0], ranks[1][0])
    assert_close(ranks[0][0], run_here(Net(), loader(16, 8), gradient_clip_val=0.05).weights)


class StepsByClosure(Numbers):
    """An override of Lightning 2.x's kind; NaN batches are skipped."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return None if batch.isnan().any() else super().training_step(batch, batch_idx)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)


def test_a_rank_that_skips_takes_part_in_closures(two: Processes) -> None:
    ranks = two(fit_case, StepsByClosure, lambda: numbers(1, NAN, 2, 4, NAN, NAN), {})
    assert [(r[0]["weight"].item(), r[1]) for r in ranks] == [(pytest.approx(-(0.5 + 3)), 2)] * 2


class Twice(StepsByClosure):
    """Computes each pass a second time."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer_closure()
        optimizer_closure()
        optimizer.step()


def test_passes_computed_anew_meet_on_all_ranks_and_count_for_their_own_group_only(two: Processes) -> None:
    ranks = two(fit_case, Twice, lambda: numbers(1, NAN, NAN, NAN, 2, 4), {})
    assert [(r[0]["weight"].item(), r[1]) for r in ranks] == [(pytest.approx(-(0.5 + 3)), 2)] * 2


class OwnLoss(Numbers):
    """A plateau scheduler on a step's value, which is another on each rank."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("loss", batch.mean())  # rank 0 sees 1, 1, ...; rank 1 a rising one
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "interval": "step", "monitor": "loss"}}


def rate(rank: int, world_size: int) -> float:
    ran = run_here(OwnLoss(), numbers(3, 1, 2, 2, 1, 3), rank=rank, world_size=world_size)
    return float(ran.outcome.state.optimizers[0].param_groups[0]["lr"])


def test_plateau_on_a_steps_value_decides_alike(two: Processes) -> None:
    # The ranks' mean is 2 at each step: no better after the first, so two cuts by a half.
    assert two(rate) == [0.25, 0.25]


class ReadsMetrics(Numbers):
    """Reads what the epoch's batches logged in the epoch's hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("train", batch.mean(), on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", batch.mean() + self.current_epoch)

    def on_validation_epoch_end(self) -> None:
        self.seen.append(("val", float(self.trainer.callback_metrics["val"])))
        self.log("late", 1.0)

    def on_train_epoch_end(self) -> None:
        self.seen.append(("train", float(self.trainer.callback_metrics["train"])))


def reads(rank: int, world_size: int) -> Any:
    ran = run_here(ReadsMetrics(), numbers(1, 2, 3, 4), val=numbers(5, 6, 10), rank=rank, world_size=world_size,
                   max_epochs=2)  # fmt: skip
    return ran.module.seen, {k: float(v) for k, v in ran.outcome.state.callback_metrics.items()}


def test_epoch_hooks_read_this_epochs_values_of_the_whole_job(two: Processes) -> None:
    expected = [("val", 7.0), ("train", 2.5), ("val", 8.0), ("train", 2.5)]
    for seen, metrics in [reads(0, 1), *two(reads)]:
        assert seen == expected
        assert metrics["late"] == 1.0 and metrics["val"] == 8.0 and metrics["train"] == 2.5


def half(rank: int, world_size: int) -> float:
    module = ReadsMetrics()
    run_here(module, numbers(1, 2), val=numbers(5, 6, 10), rank=rank, world_size=world_size, limit_val_batches=0.5)
    return module.seen[0][1]


def test_a_fraction_is_of_the_longest_ranks_loader(two: Processes) -> None:
    # Three batches over two ranks: two steps, half of them is one: the batches 5 and 6.
    assert two(half) == [5.5, 5.5]


class EndsEpoch(StepsByClosure):
    """The first epoch ends inside a group of two."""

    optimizer_step = Numbers.optimizer_step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if self.current_epoch == 0 and batch_idx == 1 else None


def test_a_dropped_group_leaves_no_mark(two: Processes) -> None:
    class Later(EndsEpoch):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if self.current_epoch else super().training_step(batch, batch_idx)

    arguments = {"accumulate_grad_batches": 2, "max_epochs": 2}
    ranks = two(fit_case, Later, lambda: numbers(1, 2, 3, 4), arguments)
    assert [(r[0]["weight"].item(), r[1]) for r in ranks] == [(0.0, 0)] * 2


def strategy_seen(rank: int, world_size: int) -> Any:
    class Asks(Numbers):
        def on_train_start(self) -> None:
            self.seen = (self.use_ddp, self.use_dp, self.world_size)

    return run_here(Asks(), numbers(1, 2), rank=rank, world_size=world_size).module.seen


def test_use_ddp_tells_the_truth(two: Processes) -> None:
    assert strategy_seen(0, 1) == (False, False, 1)
    assert two(strategy_seen) == [(True, False, 2)] * 2
