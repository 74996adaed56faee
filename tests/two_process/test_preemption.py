"""Several ranks ask for announcements equally often, whatever their loaders, and keep one state together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from raylit.callbacks import ModelCheckpoint
from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store
from raylit.ports import Collective, Notice
from tests.contract.resuming import Net, assert_same, seed_all, shuffled
from tests.two_process.harness import Processes, run_here
from tests.two_process.modules import Numbers, numbers


class Announces:
    """Asked, it meets the other ranks, as Ray's function does; says so at the calls in ``at``, to all ranks."""

    def __init__(self, at: tuple[int, ...] = (), every_s: float = 0.0) -> None:
        self.at, self.every_s, self.calls = at, every_s, 0

    def ask(self, collective: Collective) -> Notice | None:
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, self.calls)
        assert len(set(seen)) == 1, seen
        self.calls += 1
        return Notice(f"node {self.calls - 1}") if self.calls - 1 in self.at else None


class Unsized(IterableDataset[Any]):
    """A number of samples that the loader cannot know, another on each rank."""

    def __init__(self, count: int) -> None:
        self.count = count

    def shard(self, num_shards: int, index: int) -> Unsized:
        return Unsized(1 + 3 * index)

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.count):
            yield torch.tensor([float(index)])


class Validates(Numbers):
    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", batch.mean())


def uneven(rank: int, world_size: int, storage: str) -> tuple[int, int, int]:
    notices = Announces()
    # 3 batches over 2 ranks: one of them has 2, the other 1; then 4 or 1 batches that nobody knows before.
    val = [numbers(5, 6, 10), DataLoader(Unsized(5), batch_size=1)]
    ran = run_here(
        Validates(), numbers(1, 2, 3, 4), val=val, rank=rank, world_size=world_size, storage=storage,
        callbacks=[ModelCheckpoint()], notices=notices, max_epochs=2, val_check_interval=1,
    )  # fmt: skip
    return notices.calls, ran.outcome.state.global_step, ran.outcome.state.eval_batches


def test_ranks_with_unequal_numbers_of_batches_meet(two: Processes, tmp_path: Any) -> None:
    first, second = two(uneven, str(tmp_path))
    # A validation after each batch: 1 batch that both ranks have, and the end of each loader.
    assert first[0] == second[0] == 4 * (1 + 3)
    assert first[1] == second[1] == 4
    assert first[2] != second[2]  # else nothing is uneven here


class Dies(Net):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == self.at:
            raise KeyError("the node is gone")
        return super().training_step(batch, batch_idx)


def lost(rank: int, world_size: int, storage: str, dies_at: int, seed: int, at: tuple[int, ...]) -> Any:
    seed_all(seed + rank)
    notices = Announces(at)
    try:
        ran = run_here(
            Dies(dies_at), shuffled(40)(), val=shuffled(12)(), rank=rank, world_size=world_size, storage=storage,
            callbacks=[ModelCheckpoint.default()], notices=notices, max_epochs=2, accumulate_grad_batches=2,
            val_check_interval=3, order_seed=1,
        )  # fmt: skip
    except KeyError:
        return notices.calls, None, None
    return notices.calls, ran.weights, [e["text"] for e in ran.events if e["kind"] == "note"]


def test_a_notice_on_every_rank_is_one_checkpoint_that_a_lost_run_goes_on_from(two: Processes, tmp_path: Any) -> None:
    whole = two(lost, str(tmp_path / "whole"), -1, 1, ())
    # Calls: 3 batches, a validation of 2 batches and its end, ...; so in a batch, and within a validation.
    for name, call in (("batch", 1), ("within a group", 2), ("validation", 3), ("validation's end", 5)):
        folder = str(tmp_path / name)
        first, second = two(lost, folder, 2, 1, (call,))
        assert first[0] == second[0] > call and first[1] is None
        store = Store(Folder(f"{folder}/checkpoints"))
        (kept,) = store.manifests()
        assert not store.faults(kept) and set(kept.files) >= {"model.ckpt", "rank_00000.ckpt", "rank_00001.ckpt"}
        rest = two(lost, folder, -1, 77, ())
        assert any("going on from step" in text for text in rest[0][2])
        for mine, other in zip(whole, rest):
            assert_same(mine[1], other[1], name)


class Slow(Numbers):
    """Rank 1 takes its time."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.global_rank == 1:
            time.sleep(0.01)
        return super().training_step(batch, batch_idx)


def paced(rank: int, world_size: int, storage: str) -> int:
    notices = Announces(every_s=0.05)
    run_here(Slow(), numbers(*range(120)), rank=rank, world_size=world_size, storage=storage,
             callbacks=[ModelCheckpoint()], notices=notices, max_epochs=1)  # fmt: skip
    return notices.calls


def test_the_slowest_rank_sets_the_rhythm(two: Processes, tmp_path: Any) -> None:
    first, second = two(paced, str(tmp_path))
    # 60 batches of 10 ms at least: with an ask every 25 ms, from 12 on; were each rank to go by its own clock, the
    # counts would differ, and the call itself would fail.
    assert first == second >= 12
