"""Writing beside training: one save at a time, every rank its part, the manifest last, failures told and survived."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from typing import Any

import pytest
import torch

from raylit.checkpoint.folder import Clock
from raylit.checkpoint.store import Store
from raylit.checkpoint.writer import Job, Outcome, Writer
from raylit.errors import CheckpointError
from raylit.ports import RunSnapshot
from tests.unit.checkpoint.faulty import Memory, disk_full, manifest, no_permission


def snapshot(step: int, rank: int = 0) -> RunSnapshot:
    common = {"state_dict": {"w": torch.full((50,), float(step))}, "global_step": step} if rank == 0 else {}
    return RunSnapshot(common, {"rank": rank, "step": step})


def job(store: Store, name: str, step: int, obsolete: tuple[str, ...] = (), **facts: Any) -> Job:
    return Job(store, manifest(name, step, **facts), obsolete)


def written(writer: Writer, *jobs: Job, rank: int = 0, step: int = 1) -> list[Outcome]:
    writer.save(jobs, snapshot(step, rank))
    return writer.wait()


def test_a_save_runs_beside_the_caller_and_the_copy_goes_with_it() -> None:
    memory, go = Memory(), threading.Event()

    def waiting(operation: str) -> None:
        assert go.wait(60)

    writer, taken = Writer(0, 1), snapshot(1)
    tensor = weakref.ref(taken.common["state_dict"]["w"])
    writer.save([job(memory.store(waiting), "a", 1)], taken)
    del taken
    assert writer.busy and writer.wait(0.0) == [] and memory.store().manifests() == []
    with pytest.raises(CheckpointError, match="a save is in flight"):
        writer.save([], snapshot(2))
    go.set()
    outcomes = writer.wait()
    assert [each.error for each in outcomes] == [None] and not writer.busy and writer.wait() == []
    assert [each.name for each in memory.store().manifests()] == ["a"]
    gc.collect()
    assert tensor() is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads share their process's priority")
def test_the_writer_leaves_the_cpu_to_training() -> None:
    seen: set[int] = set()
    before = os.getpriority(os.PRIO_PROCESS, 0)
    written(Writer(0, 1), job(Memory().store(lambda _: seen.add(os.getpriority(os.PRIO_PROCESS, 0))), "a", 1))
    assert seen == {min(before + 10, 19)} and os.getpriority(os.PRIO_PROCESS, 0) == before


def test_the_old_one_goes_only_when_the_new_one_is_whole() -> None:
    memory, writer = Memory(), Writer(0, 1)
    written(writer, job(memory.store(), "old", 1))
    for fault in (disk_full, no_permission):
        (outcome,) = written(writer, job(memory.store(fault), "new", 2, obsolete=("old",)), step=2)
        assert outcome.error is not None and ("space" in outcome.error or "Permission" in outcome.error)
        assert writer.failed is None  # told by wait
        assert [each.name for each in memory.store().manifests()] == ["old"]
    (outcome,) = written(writer, job(memory.store(), "new", 2, obsolete=("old",)), step=2)
    assert outcome.error is None and outcome.deleted == ["old"]
    assert [each.name for each in memory.store().survey()] == ["new"]


def test_what_cannot_be_deleted_is_named_and_the_save_counts() -> None:
    def no_deleting(operation: str) -> None:
        if operation == "delete_file":
            no_permission(operation)

    memory, writer = Memory(), Writer(0, 1)
    written(writer, job(memory.store(), "old", 1))
    (outcome,) = written(writer, job(memory.store(no_deleting), "new", 2, obsolete=("old",)), step=2)
    assert outcome.error is None and outcome.deleted == []
    assert outcome.left_over == ["/run/checkpoints/old: PermissionError: [Errno 13] Permission denied"]


def test_every_rank_writes_its_part_and_rank_0_waits_for_all() -> None:
    memory = Memory()
    writers = [Writer(rank, 3) for rank in range(3)]
    for rank in (0, 2, 1):  # rank 0 first: it has to wait
        writers[rank].save([job(memory.store(), "a", 4, world_size=3)], snapshot(4, rank))
    assert [each.error for writer in writers for each in writer.wait()] == [None] * 3
    store = memory.store()
    (there,) = store.manifests()
    assert set(there.files) == {"model.ckpt", "rank_00000.ckpt", "rank_00001.ckpt", "rank_00002.ckpt"}
    assert store.faults(there) == ()
    assert {name.rpartition("/")[2] for name in memory.fs.store} == {*there.files, "manifest.json"}  # no notes are left


def test_a_rank_that_fails_fails_the_checkpoint_and_says_why() -> None:
    def own_disk_full(operation: str, seen: list[str] = []) -> None:  # noqa: B006
        seen.append(operation)
        if seen.count("open_output_stream") == 1:
            disk_full(operation)

    memory = Memory()
    writers = [Writer(rank, 2) for rank in range(2)]
    writers[0].save([job(memory.store(), "a", 4, world_size=2)], snapshot(4, 0))
    writers[1].save([job(memory.store(own_disk_full), "a", 4, world_size=2)], snapshot(4, 1))
    outcomes = [writer.wait()[0] for writer in writers]
    assert outcomes[0].error is not None and outcomes[0].error.startswith("rank 1: OSError: [Errno 28] No space left")
    assert memory.store().manifests() == []


def test_a_rank_that_never_comes_is_given_up() -> None:
    memory = Memory()
    writer = Writer(0, 3, peers_s=10.0, clock=memory.time.clock)
    (outcome,) = written(writer, job(memory.store(), "a", 4, world_size=3))
    assert outcome.error == "the part of rank 1, 2 did not come within 10 s"
    assert 10.0 <= memory.time.now_s < 12.0 and memory.store().survey() == []


def test_a_rank_that_is_known_to_have_failed_is_not_waited_for() -> None:
    """Its disk may be so full that it could leave no word of it."""
    memory, why = Memory(), "rank 1: OSError: [Errno 28] No space left on device"
    of_a, of_b = job(memory.store(), "a", 4, world_size=2), job(memory.store(), "b", 4, world_size=2)
    (other,) = written(Writer(1, 2), of_b, rank=1, step=4)

    def hears(seconds: float) -> None:
        memory.time.sleep(seconds)
        writer.lost[of_a.key] = why

    writer = Writer(0, 2, clock=Clock(memory.time.clock.now, hears))
    writer.save([of_a, of_b], snapshot(4))
    assert [other.error, *(each.error for each in writer.wait())] == [None, why, None]
    assert memory.time.now_s < 1.0


def test_weights_alone_are_rank_0s() -> None:
    memory = Memory()
    (outcome,) = written(Writer(0, 2), job(memory.store(), "w", 1, world_size=2, weights_only=True))
    assert outcome.error is None and set(memory.store().manifests()[0].files) == {"model.ckpt"}
    assert written(Writer(1, 2), job(memory.store(), "w", 1, weights_only=True), rank=1)[0].error is None


def test_one_snapshot_may_be_kept_twice_and_one_place_failing_costs_only_that() -> None:
    memory, other = Memory(), Memory()
    outcomes = written(Writer(0, 1), job(memory.store(disk_full), "a", 1), job(other.store(), "b", 1))
    assert [each.error is None for each in outcomes] == [False, True]
    assert memory.store().survey() == [] and [each.name for each in other.store().manifests()] == ["b"]


def test_what_a_killed_rank_left_is_not_taken_for_this_attempts() -> None:
    memory = Memory()
    left = Writer(1, 2)
    left.attempt = "first"
    written(left, job(memory.store(), "a", 4, world_size=2), rank=1, step=99)
    writer = Writer(0, 2, peers_s=10.0, clock=memory.time.clock)
    writer.attempt = "second"
    (outcome,) = written(writer, job(memory.store(), "a", 4, world_size=2), step=4)
    assert outcome.error == "the part of rank 1 did not come within 10 s" and memory.store().manifests() == []
