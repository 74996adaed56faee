"""What ranks do together: stop, prepare data, log, gather, start from the same weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from raylit.errors import ConfigError, LogError
from tests.two_process.harness import Processes, RankFailed, run_here
from tests.two_process.modules import FEATURES, TARGETS, Net, Numbers, assert_equal, fit_case, loader, numbers


# Stopping ---------------------------------------------------------------------------------------------------------
class Stops(Net):
    """Asks to stop on rank 1 alone, at a batch."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and self.global_step == self.at:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


def stop_case(rank: int, world_size: int, at: int, arguments: dict[str, Any]) -> Any:
    ran = run_here(Stops(at), loader(200, 2), rank=rank, world_size=world_size, **arguments)
    state = ran.outcome.state
    return state.global_step, state.epoch, ran.trainer.should_stop, ran.weights


@pytest.mark.parametrize(
    ("at", "arguments", "least", "most"),
    [
        (3, {"max_epochs": 4}, 4, 49),  # in the epoch that runs
        (49, {"max_epochs": 4}, 50, 50),  # its last batch
        (3, {"max_epochs": 4, "min_epochs": 2}, 100, 100),
        (3, {"max_epochs": 4, "min_steps": 30}, 30, 50),
    ],
)
def test_one_ranks_wish_stops_all_at_the_same_step(
    two: Processes, at: int, arguments: dict[str, Any], least: int, most: int
) -> None:
    ranks = two(stop_case, at, arguments)
    assert ranks[0][:3] == ranks[1][:3]
    assert least <= ranks[0][0] <= most
    assert_equal(ranks[0][3], ranks[1][3])


class Slow(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 0:
            time.sleep(0.002)
        return super().training_step(batch, batch_idx)


def time_case(rank: int, world_size: int) -> Any:
    # Rank 1 has all the time of the world: its clock must not matter.
    limit = {"seconds": 0.3} if rank == 0 else {"hours": 1}
    ran = run_here(Slow(), loader(400, 2), rank=rank, world_size=world_size, max_time=limit, max_epochs=1000)
    return ran.outcome.state.global_step, ran.outcome.state.epoch


def test_max_time_stops_all_at_the_same_step(two: Processes) -> None:
    began = time.monotonic()
    ranks = two(time_case)
    assert ranks[0] == ranks[1] and ranks[0][0] > 0
    assert time.monotonic() - began < 10


# Preparing --------------------------------------------------------------------------------------------------------
class Prepares(Net):
    """Writes into a file what happens, with the time."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _note(self, what: str) -> None:
        with open(self.folder / str(self.global_rank), "a") as file:
            file.write(f"{what} {time.monotonic()}\n")

    def prepare_data(self) -> None:
        self._note("prepare")
        time.sleep(0.5)
        self._note("prepared")

    def setup(self, stage: str) -> None:
        self._note(stage)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("x", mse_loss(self(batch[0]), batch[1]))


def prepare_case(rank: int, world_size: int, folder: Path, arguments: dict[str, Any], stage: str) -> None:
    run_here(Prepares(folder), loader(8, 2), stage=stage, rank=rank, world_size=world_size, **arguments)


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_data_is_prepared_once_before_anyones_setup(two: Processes, tmp_path: Path, stage: str) -> None:
    two(prepare_case, tmp_path, {}, stage)
    zero, one = ([line.split() for line in (tmp_path / r).read_text().splitlines()] for r in "01")
    assert [what for what, _ in zero] == ["prepare", "prepared", stage]
    assert [what for what, _ in one] == [stage]
    assert float(one[0][1]) > float(zero[1][1])


def test_data_is_prepared_on_each_node(two: Processes, tmp_path: Path) -> None:
    # The harness's ranks are on one node: only local rank 0 prepares.
    two(prepare_case, tmp_path, {"prepare_data_per_node": True}, "fit")
    assert "prepare" not in (tmp_path / "1").read_text()


# Logging ----------------------------------------------------------------------------------------------------------
class LogsAlone(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("both", loss, on_epoch=True)
        if self.global_rank == 1:
            self.log("lonely", loss, on_epoch=True)
        return loss


def test_a_metric_of_one_rank_is_an_error_that_names_it(two: Processes) -> None:
    with pytest.raises(RankFailed) as caught:
        two(fit_case, LogsAlone, lambda: loader(8, 2), {})
    for error in caught.value.errors.values():
        assert isinstance(error, LogError)
        assert "'lonely'" in str(error) and "rank 1" in str(error) and "both" not in str(error)
    assert set(caught.value.errors) == {0, 1}


class LogsForItself(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.global_rank == 0:
            self.log("mine", 3.0, on_epoch=True, rank_zero_only=True)
        self.log("rank", float(self.global_rank), on_step=True, on_epoch=True, sync_dist=True)
        return loss


def log_case(rank: int, world_size: int) -> Any:
    ran = run_here(LogsForItself(), loader(8, 2), rank=rank, world_size=world_size, log_every_n_steps=1)
    table = ran.trainer.history
    return ran.metrics, None if table is None else table.to_pydict()


def test_rank_zero_only_and_the_history_of_rank_zero(two: Processes) -> None:
    ranks = two(log_case)
    assert ranks[0][0]["mine"] == 3.0 and ranks[0][0]["rank"] == ranks[1][0]["rank"] == 0.5
    history = ranks[0][1]
    assert [v for v in history["rank_step"] if v is not None] == [0.5, 0.5]
    assert [v for v in history["rank_epoch"] if v is not None] == [0.5]
    assert not ranks[1][1] or not ranks[1][1].get("rank_step")


# Gathering --------------------------------------------------------------------------------------------------------
class Gathers(Numbers):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        nested = {
            "a": torch.full((2, 3), float(self.global_rank)),
            "b": [torch.tensor(self.global_rank), "text"],
            "c": 7,
        }
        self.found = self.all_gather(nested)
        mine = self.weight * (self.global_rank + 1)
        every = self.all_gather(mine.view(1), sync_grads=True)
        apart = self.all_gather(mine.view(1))
        self.found |= {"every": every.detach(), "grads": (every.requires_grad, apart.requires_grad)}
        # Each rank weighs the ranks' values by (1, 10) times (rank + 1): d/dw is known by hand.
        return (every.view(-1) * torch.tensor([1.0, 10.0])).sum() * (self.global_rank + 1)


def gather_case(rank: int, world_size: int) -> Any:
    ran = run_here(Gathers(), numbers(1, 1), rank=rank, world_size=world_size)
    return ran.module.found, ran.weights["weight"].item()


def test_all_gather(two: Processes) -> None:
    for found, weight in two(gather_case):
        assert found["a"].shape == (2, 2, 3) and found["a"][:, 0, 0].tolist() == [0.0, 1.0]
        assert found["b"][0].tolist() == [0, 1] and found["b"][1] == "text"
        assert found["c"].tolist() == [7, 7]
        assert found["every"].shape == (2, 1)
        assert found["grads"] == (True, False)
        # Sum over ranks r of (r + 1) * (1 * 1 + 10 * 2) = 21 + 42, averaged by DDP.
        assert weight == pytest.approx(-(21 + 42) / 2)


# Starting ---------------------------------------------------------------------------------------------------------
class DrawsInSetup(Net):
    """Each rank draws its own layers, and a buffer, in setup."""

    def setup(self, stage: str) -> None:
        torch.manual_seed(100 + self.global_rank)
        self.net = nn.Sequential(nn.Linear(FEATURES, 3), nn.Linear(3, TARGETS))
        self.register_buffer("drawn", torch.randn(3), persistent=False)
        self.at_start: Tensor | None = None

    def on_train_start(self) -> None:
        self.at_start = self.net[0].weight.detach().clone()

    def on_test_start(self) -> None:
        self.at_start = self.net[0].weight.detach().clone()

    def test_step(self, batch: Any, batch_idx: int) -> None: ...


def setup_case(rank: int, world_size: int, stage: str) -> Any:
    ran = run_here(DrawsInSetup(), loader(8, 2), stage=stage, rank=rank, world_size=world_size)
    return ran.module.at_start, ran.weights


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_weights_that_setup_draws_are_made_equal(two: Processes, stage: str) -> None:
    ranks = two(setup_case, stage)
    torch.manual_seed(100)
    assert torch.equal(ranks[0][0], nn.Linear(FEATURES, 3).weight)
    assert torch.equal(ranks[0][0], ranks[1][0])
    assert_equal(ranks[0][1], ranks[1][1])


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(TARGETS), nn.Tanh())


class Woken(Lazy):
    def setup(self, stage: str) -> None:
        self.net(torch.zeros(1, FEATURES))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_layer_needs_its_shape_before(two: Processes) -> None:
    with pytest.raises(RankFailed) as caught:
        two(fit_case, Lazy, lambda: loader(8, 2), {})
    for error in caught.value.errors.values():
        assert isinstance(error, ConfigError) and "net.0.weight belongs to a lazy layer" in str(error)
    ranks = two(fit_case, Woken, lambda: loader(8, 2), {})
    assert_equal(ranks[0][0], ranks[1][0])


class Unused(Net):
    """One layer has no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


def test_unused_parameters(two: Processes) -> None:
    from raylit.strategies import DDP

    with pytest.raises(RankFailed, match="find_unused_parameters=True"):
        two(fit_case, Unused, lambda: loader(8, 2), {}, collective_s=5)
    ranks = two(fit_case, Unused, lambda: loader(8, 2), {"strategy": DDP(find_unused_parameters=True)})
    assert_equal(ranks[0][0], ranks[1][0])
    fresh = Unused()
    assert torch.equal(ranks[0][0]["spare.weight"], fresh.spare.weight)


# Randomness -------------------------------------------------------------------------------------------------------
def random_case(rank: int, world_size: int, seed: int) -> Any:
    class Draws(Net):
        def on_train_start(self) -> None:
            self.drawn = torch.rand(3)

    ran = run_here(Draws(), loader(16, 2, shuffle=True), rank=rank, world_size=world_size, seed=seed, order_seed=seed)
    return ran.module.drawn, ran.weights


def test_ranks_draw_different_numbers_and_a_seed_repeats_them(two: Processes) -> None:
    first, again, other = two(random_case, 5), two(random_case, 5), two(random_case, 6)
    assert not torch.equal(first[0][0], first[1][0])
    assert torch.equal(first[0][0], again[0][0]) and torch.equal(first[1][0], again[1][0])
    assert_equal(first[0][1], again[0][1])
    assert not torch.equal(first[1][0], other[1][0])


# Schedulers, validation -------------------------------------------------------------------------------------------
class Scheduled(Net):
    """Its scheduler watches a value that only validation knows."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val"}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", mse_loss(self(batch[0]), batch[1]))


def scheduled_case(rank: int, world_size: int) -> Any:
    ran = run_here(
        Scheduled(), loader(16, 2), val=loader(7, 2), rank=rank, world_size=world_size, max_epochs=3,
        num_sanity_val_steps=1, val_check_interval=2,
    )  # fmt: skip
    return ran.metrics["val"], ran.outcome.state.optimizers[0].param_groups[0]["lr"], ran.weights


def test_validation_and_schedulers_agree(two: Processes) -> None:
    ranks = two(scheduled_case)
    assert ranks[0][:2] == ranks[1][:2]
    assert ranks[0][1] < 0.05
    assert_equal(ranks[0][2], ranks[1][2])
    alone = run_here(
        Scheduled(), loader(16, 4), val=loader(7, 2), max_epochs=3, num_sanity_val_steps=1, val_check_interval=2
    )
    assert alone.metrics["val"] == pytest.approx(ranks[0][0], abs=1e-6)
    assert alone.outcome.state.optimizers[0].param_groups[0]["lr"] == ranks[0][1]


class Expanded(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1).expand(3))


def expanded_case(rank: int, world_size: int) -> None:
    run_here(Expanded(), loader(8, 2), rank=rank, world_size=world_size)


def test_an_expanded_buffer_is_named(two: Processes) -> None:
    with pytest.raises(RankFailed, match=r"scale was expanded.*\.clone\(\)"):
        two(expanded_case)
