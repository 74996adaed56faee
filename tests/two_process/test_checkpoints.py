"""ModelCheckpoint on two ranks: both decide alike, each writes its own part, and an attempt that was killed goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from raylit.callbacks import ModelCheckpoint
from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store
from raylit.checkpoint.writer import Writer
from tests.two_process.harness import Processes, RankFailed, run_here
from tests.two_process.modules import Net, loader


class Scored(Net):
    """Validation on every rank; a step's value that is another on each; dropout, so that random states count."""

    def __init__(self, dies_at: int = -1) -> None:
        super().__init__()
        self.dies_at = dies_at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == self.dies_at:
            raise KeyError("the end of this attempt")
        self.log("mine", float(self.global_rank) + self.global_step)
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nn.functional.dropout(torch.ones(8), 0.5).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", sum(p.detach().sum() for p in self.parameters()) + batch[0].mean())


ATTRIBUTES = ("best_model_path", "best_model_score", "last_model_path", "best_k_models", "kth_best_model_path",
              "current_score")  # fmt: skip


def case(rank: int, world_size: int, storage: str, callbacks: list[dict[str, Any]], given: dict[str, Any],
         dies_at: int = -1) -> Any:  # fmt: skip
    torch.manual_seed(rank)
    kept = [ModelCheckpoint(**each) for each in callbacks]
    ran = run_here(
        Scored(dies_at), loader(24, 2), val=loader(6, 2), rank=rank, world_size=world_size, callbacks=kept,
        storage=storage, **given,
    )  # fmt: skip
    told = [{name: getattr(each, name) for name in ATTRIBUTES} for each in kept]
    return ran.weights, told, [event["text"] for event in ran.events if event["kind"] == "note"]


def test_ranks_decide_alike_and_each_writes_its_part(two: Processes, tmp_path: Path) -> None:
    callbacks = [
        {"monitor": "val", "every_n_train_steps": 2, "save_top_k": 2},
        {"monitor": "mine", "mode": "max", "every_n_train_steps": 1, "filename": "m-{step}", "save_last": False},
        {"every_n_seconds": 1e-9, "filename": "t-{step}", "save_top_k": -1, "save_last": False},
    ]
    ranks = two(case, str(tmp_path), callbacks, {"max_epochs": 4, "val_check_interval": 3})
    assert ranks[0][1] == ranks[1][1]
    store = Store(Folder(str(tmp_path / "checkpoints")))
    there = store.manifests()
    assert all(store.faults(each) == () for each in there)
    assert all({"model.ckpt", "rank_00000.ckpt", "rank_00001.ckpt"} == set(each.files) for each in there)
    assert sorted(os.listdir(tmp_path / "checkpoints" / there[0].name)) == [
        "manifest.json", "model.ckpt", "rank_00000.ckpt", "rank_00001.ckpt",
    ]  # fmt: skip
    mine = [each for each in there if each.name.startswith("m-")]
    # A step's value is the mean over the ranks: step number 24 - 1, plus a half.
    assert [(each.step, each.metrics["mine"]) for each in mine] == [(24, 23.5)]
    assert [each.step for each in there if each.name.startswith("t-")] == [20]  # the clock is asked every 20 batches


# At step 10 nothing is owed; at 5 the state of step 4 was not measured yet, and the next one that is must be ranked.
@pytest.mark.parametrize(("dies_at", "from_step"), [(10, 8), (5, 4)])
def test_an_attempt_that_ended_goes_on_to_the_bit(
    two: Processes, tmp_path: Path, dies_at: int, from_step: int
) -> None:
    callbacks = [{"every_n_train_steps": 4, "monitor": "val", "save_last": True, "save_top_k": 9}]
    given = {"max_epochs": 3, "accumulate_grad_batches": 1}
    whole = two(case, str(tmp_path / "whole"), callbacks, given)
    with pytest.raises(RankFailed, match="the end of this attempt"):
        two(case, str(tmp_path / "one"), callbacks, given, dies_at)
    assert [each.step for each in Store(Folder(str(tmp_path / "one" / "checkpoints"))).manifests()][-1] == from_step
    again = two(case, str(tmp_path / "one"), callbacks, given)
    for before, after in zip(whole, again):
        assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert any(text.startswith(f"going on from step {from_step}:") for text in again[0][2])
    paths = [{name: str(value).replace("/whole/", "/one/") for name, value in each[1][0].items()} for each in whole]
    assert paths == [{name: str(value) for name, value in each[1][0].items()} for each in again]
    left = [sorted(os.listdir(tmp_path / run / "checkpoints")) for run in ("whole", "one")]
    assert left[0] == left[1]


def test_a_damaged_checkpoint_that_was_passed_over_is_none_of_the_best(two: Processes, tmp_path: Path) -> None:
    callbacks, given = [{"every_n_train_steps": 4, "monitor": "val", "save_top_k": 9}], {"max_epochs": 3}
    with pytest.raises(RankFailed, match="the end of this attempt"):
        two(case, str(tmp_path), callbacks, given, 13)
    damaged = tmp_path / "checkpoints" / "epoch=1-step=12"
    data = (damaged / "model.ckpt").read_bytes()
    (damaged / "model.ckpt").write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])  # of the same size
    ranks = two(case, str(tmp_path), callbacks, given)
    assert any(text.startswith("going on from step 6:") for text in ranks[0][2])
    for _, (told,), _ in ranks:
        best = [Path(path).parent.name for path in told["best_k_models"]]
        assert sorted(best) == ["epoch=0-step=6", "epoch=1-step=12-v1", "epoch=2-step=18"]


def full_case(rank: int, world_size: int, storage: str, no_note: bool) -> Any:
    """Rank 1's disk is full for the second checkpoint; ``no_note``: so full that it cannot even tell rank 0."""
    written, left = Writer._write, Writer._leave_note
    count = 0

    def write(self: Writer, job: Any, snapshot: Any) -> None:
        nonlocal count
        count += 1
        if rank == 1 and count == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(self, job, snapshot)

    def leave_note(self: Writer, job: Any, content: dict[str, object]) -> None:
        if count == 2 and no_note:
            raise OSError(errno.ENOSPC, "No space left on device")
        left(self, job, content)

    Writer._write, Writer._leave_note = write, leave_note  # type: ignore[method-assign]
    try:
        return case(rank, world_size, storage, [{"every_n_train_steps": 4}], {"max_steps": 12})
    finally:
        Writer._write, Writer._leave_note = written, left  # type: ignore[method-assign]


@pytest.mark.parametrize("no_note", [False, True])
def test_a_disk_that_is_full_on_one_rank_costs_that_checkpoint(
    two: Processes, tmp_path: Path, no_note: bool
) -> None:
    ranks = two(full_case, str(tmp_path), no_note)
    assert ranks[0][1] == ranks[1][1]
    (text,) = [text for text in ranks[0][2] if "could not be written" in text]
    assert "rank 1: OSError: [Errno 28] No space left on device" in text
    store = Store(Folder(str(tmp_path / "checkpoints")))
    (there,) = store.manifests()
    assert there.step == 12 and store.faults(there) == ()


def test_another_number_of_ranks_goes_on(two: Processes, tmp_path: Path) -> None:
    callbacks = [{"every_n_train_steps": 3}]
    two(case, str(tmp_path), callbacks, {"max_epochs": 1})
    ran = run_here(Scored(), loader(24, 2), val=loader(6, 2), callbacks=[ModelCheckpoint(every_n_train_steps=3)],
                   storage=str(tmp_path), max_epochs=2)  # fmt: skip
    assert ran.trainer.global_step == 6 + 12
