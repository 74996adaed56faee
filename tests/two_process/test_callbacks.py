"""raylit's callbacks on several ranks: one decision, one average, one set of statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, update_bn

import raylit
from raylit.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LambdaCallback,
    LearningRateMonitor,
    StochasticWeightAveraging,
    TerminateOnNaN,
    Timer,
)
from raylit.errors import NonFiniteError
from tests.two_process.harness import Processes, RankFailed, run_here
from tests.two_process.modules import FEATURES, TARGETS, Numbers, assert_equal, loader, numbers


# -- EarlyStopping ---------------------------------------------------------------------------------------------------
class Overshoots(Numbers):
    """The weight moves by 1 a step, past the values that validation compares it with."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("seen", batch.mean(), on_step=True, on_epoch=False)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("distance", (self.weight + batch).pow(2).mean())


def stopping(rank: int, world_size: int, monitor: str, values: list[float], val: list[float], **given: Any) -> Any:
    stopper = EarlyStopping(monitor, patience=2)
    ran = run_here(
        Overshoots(), numbers(*values), val=torch.utils.data.DataLoader(torch.tensor(val), batch_size=2), rank=rank,
        world_size=world_size, max_epochs=20, callbacks=[stopper], log_every_n_steps=1, **given,
    )  # fmt: skip
    state = ran.outcome.state
    return state.epoch, state.global_step, stopper.wait_count, stopper.stopped_epoch, float(stopper.best_score)


VAL = [2.0, 3.0, 7.0]  # an uneven shard: rank 0 has two of them, or on three ranks one each


@pytest.mark.parametrize("world_size", [2, 3])
def test_early_stopping_decides_as_one_process_does(world_size: int, processes: Any) -> None:
    ranks = processes(world_size)(stopping, "distance", [1.0] * world_size, VAL)
    # After n epochs the weight is -n; the mean of (value - n)^2 is least at the mean, 4: two worse ones follow.
    best = sum((value - 4.0) ** 2 for value in VAL) / 3
    assert ranks == [(6, 6, 2, 5, pytest.approx(best))] * world_size
    assert stopping(0, 1, "distance", [1.0], VAL) == ranks[0]


def test_a_validation_in_the_middle_of_an_epoch_stops_all_at_one_step(two: Processes) -> None:
    ranks = two(stopping_within)
    assert ranks[0] == ranks[1]
    # The least is met by the check after step 4, the second worse one is after step 6; ranks agree every 20 batches.
    assert ranks[0][2:4] == (16, 0) and ranks[0][1] == 20


def stopping_within(rank: int, world_size: int) -> Any:
    return stopping(rank, world_size, "distance", [1.0] * 80, VAL, val_check_interval=1)


def test_a_step_value_is_another_on_each_rank_and_its_mean_decides(two: Processes) -> None:
    # Rank 0 sees 1, 1, 1, ..., rank 1 sees 9: the same mean in each epoch, so two checks without improvement.
    assert two(stopping, "seen", [1.0, 9.0], VAL) == [(3, 3, 2, 2, 5.0)] * 2


# -- averages --------------------------------------------------------------------------------------------------------
class Normed(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, TARGETS))
        self.validated: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append({name: tensor.clone() for name, tensor in self.net.state_dict().items()})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def averaging(rank: int, world_size: int, callback: Any) -> Any:
    ended: list[dict[str, Tensor]] = []
    watch = LambdaCallback(
        on_train_epoch_end=lambda trainer, module: ended.append(
            {n: t.clone() for n, t in module.net.state_dict().items()}
        )
    )
    ran = run_here(
        Normed(), loader(16, 2), val=loader(8, 2), rank=rank, world_size=world_size, max_epochs=3,
        callbacks=[callback(), watch],
    )  # fmt: skip
    return {n: t.clone() for n, t in ran.module.net.state_dict().items()}, ran.module.validated, ended


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(0.05, 2, annealing_epochs=0)


def test_swa_and_its_batchnorm_statistics_over_the_data_of_all_ranks(two: Processes) -> None:
    ranks = two(averaging, swa)
    assert_equal(ranks[0][0], ranks[1][0])
    averaged = AveragedModel(Normed().net)
    for epoch in (1, 2):
        net = Normed().net
        net.load_state_dict(ranks[0][2][epoch])
        averaged.update_parameters(net)
    # Two ranks with batches of 2 see the batches that one process with batches of 2 sees.
    update_bn(loader(16, 2), averaged)
    for name, tensor in averaged.module.state_dict().items():
        if name != "1.num_batches_tracked":  # each rank counts its own
            torch.testing.assert_close(ranks[0][0][name], tensor, rtol=1e-5, atol=1e-6)


def ema() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.7)


def test_one_average_is_validated_on_all_ranks(two: Processes) -> None:
    ranks = two(averaging, ema)
    for mine, other in zip(ranks[0][1], ranks[1][1], strict=True):
        assert_equal(mine, other)
    parameters = [name for name, _ in Normed().net.named_parameters()]
    assert_equal({n: ranks[0][0][n] for n in parameters}, {n: ranks[1][0][n] for n in parameters})
    assert not torch.equal(ranks[0][1][0]["0.weight"], ranks[0][2][0]["0.weight"])  # it was the average indeed


# -- the others ------------------------------------------------------------------------------------------------------
def timed(rank: int, world_size: int) -> int:
    timer = Timer({"microseconds": 1} if rank == 1 else {"hours": 1}, interval="epoch")
    ran = run_here(Numbers(), numbers(1, 2), rank=rank, world_size=world_size, max_epochs=9, callbacks=[timer])
    return ran.outcome.state.global_step


def test_the_first_rank_whose_time_is_up_stops_all(two: Processes) -> None:
    assert two(timed) == [0, 0]  # it had passed when training began


class Scheduled(Numbers):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)]


def rates(rank: int, world_size: int) -> Any:
    callbacks = [LearningRateMonitor()]
    ran = run_here(Scheduled(), numbers(1, 2), rank=rank, world_size=world_size, max_epochs=3, callbacks=callbacks)
    return ran.metrics["lr-SGD"], ran.outcome.state.history.table()["lr-SGD"].to_pylist() if rank == 0 else None


def test_rates_are_exact_on_several_ranks(two: Processes) -> None:
    ranks = two(rates)
    assert ranks[0][1] == [1.0, 0.1, 0.1 * 0.1] and ranks[0][0] == ranks[1][0] == 0.1 * 0.1


def not_a_number(rank: int, world_size: int) -> None:
    run_here(Numbers(), numbers(1, float("nan")), rank=rank, world_size=world_size, callbacks=[TerminateOnNaN()])


def test_the_rank_with_the_bad_batch_says_so(two: Processes) -> None:
    with pytest.raises(RankFailed) as failed:
        two(not_a_number, collective_s=5)
    assert isinstance(failed.value.errors[1], NonFiniteError)
