"""The keeper of a fit's checkpoints, asked at the safe points of a scripted fit, with a clock that the test sets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyarrow.fs import PyFileSystem

from raylit.callbacks import ModelCheckpoint
from raylit.ports import RunSnapshot
from raylit.stage import Loop, SafePoint
from raylit.strategies.collective import LocalCollective
from raylit.view import RunState
from raylit.worker.keeper import CheckpointKeeper
from tests.unit.checkpoint.faulty import Handler, Memory

BATCHES = 4  # of an epoch


class ScriptedFit:
    """A fit as its keeper sees it: steps are counted up, and each save has come to its end before the next step."""

    def __init__(
        self, *callbacks: ModelCheckpoint, memory: Memory | None = None,
        fault: Callable[[str], None] = lambda operation: None,
    ) -> None:  # fmt: skip
        self.now_s, self.notes, self.memory = 0.0, list[str](), memory or Memory()
        self.state = RunState(callbacks=list(callbacks), num_training_batches=BATCHES)
        self.state.take = lambda weights_only: self._take()
        parts: Any = SimpleNamespace(
            state=self.state, strategy=SimpleNamespace(collective=LocalCollective(torch.device("cpu"))),
            output=SimpleNamespace(note=self.notes.append), hooks=SimpleNamespace(event=lambda name: None),
            metrics=SimpleNamespace(step_metrics=lambda: SimpleNamespace(callback={})),
        )  # fmt: skip
        filesystem = PyFileSystem(Handler(self.memory.fs, fault))
        self.keeper = CheckpointKeeper(parts, "/run", filesystem, now=lambda: self.now_s)
        self.keeper.start()

    def _take(self) -> RunSnapshot:
        return RunSnapshot({"state_dict": {"w": torch.full((3,), float(self.state.global_step))}}, {"rank": 0})

    def at(self, now_s: float, point: SafePoint = SafePoint.BATCH, **metrics: float) -> list[str]:
        """One step, and what follows it; returns the names of the checkpoints that this has added."""
        state, before = self.state, self.names
        self.now_s = now_s
        if point is not SafePoint.END:
            state.loop, state.batch_idx, state.global_step = Loop.TRAIN, state.batch_idx + 1, state.global_step + 1
        if point is SafePoint.EPOCH:
            state.loop, state.epoch, state.batch_idx = None, state.epoch + 1, -1
        state.measured = {name: (state.global_step, torch.tensor(value)) for name, value in metrics.items()}
        state.callback_metrics = {name: torch.tensor(value) for name, value in metrics.items()}
        self.keeper.safe_point(point, self._take)
        return [name for name in self.names if name not in before]

    @property
    def names(self) -> list[str]:
        """Of the checkpoints that are there and whole, the newest last."""
        for thread in threading.enumerate():
            if thread.name == "raylit-checkpoint":
                thread.join()
        store = self.memory.store()
        assert all(store.faults(each) == () for each in store.manifests())
        return [each.name for each in store.manifests()]


# -- rhythms ----------------------------------------------------------------------------------------------------------
def test_without_a_model_checkpoint_an_epochs_end_is_kept_once_the_last_one_is_5_minutes_old() -> None:
    fit = ScriptedFit(ModelCheckpoint.default())
    assert fit.at(100.0, SafePoint.EPOCH) == []
    assert fit.at(250.0) == [] and fit.at(299.9, SafePoint.EPOCH) == []
    assert fit.at(320.0) == fit.at(321.0, SafePoint.VALIDATION) == []  # within an epoch nothing is kept
    assert fit.at(330.0, SafePoint.EPOCH) == ["epoch=2-step=6"]
    assert fit.at(629.0, SafePoint.EPOCH) == []
    assert fit.at(631.0, SafePoint.EPOCH) == ["epoch=4-step=8"] and fit.names == ["epoch=4-step=8"]
    assert fit.at(640.0, SafePoint.EPOCH) == [] and fit.at(641.0, SafePoint.END) == ["epoch=5-step=9"]
    assert fit.names == ["epoch=5-step=9"]


@pytest.mark.parametrize("given", [
    {"train_time_interval": timedelta(minutes=2)}, {"train_time_interval": "00:00:02:00"},
    {"train_time_interval": {"minutes": 2}}, {"every_n_seconds": 120},
])  # fmt: skip
def test_by_the_time_since_the_last_one(given: dict[str, Any]) -> None:
    fit = ScriptedFit(ModelCheckpoint(save_top_k=-1, save_last=False, **given))
    assert fit.at(60.0) == fit.at(119.0) == []
    assert fit.at(150.0) == ["epoch=0-step=3"]
    assert fit.at(200.0, SafePoint.VALIDATION) == fit.at(269.0) == []
    assert fit.at(271.0, SafePoint.VALIDATION) == ["epoch=0-step=6"]
    assert fit.at(400.0, SafePoint.EPOCH) == []  # looked at within epochs
    assert fit.at(401.0) == ["epoch=1-step=8"]


# -- names ------------------------------------------------------------------------------------------------------------
def test_of_one_name_without_a_version_counter_the_earlier_goes_once_the_later_is_whole() -> None:
    given: dict[str, Any] = {"filename": "only", "every_n_train_steps": 1, "save_last": False}
    for rule in ({"save_top_k": -1}, {"save_top_k": 3, "monitor": "loss"}):
        fit = ScriptedFit(ModelCheckpoint(enable_version_counter=False, **rule, **given))
        for step, loss in enumerate((0.6, 0.5, 0.4, 0.3, 0.2, 0.1)):
            (added,) = fit.at(float(step), loss=loss)
            assert fit.names == [added]
    counted = ScriptedFit(ModelCheckpoint(save_top_k=-1, **given))
    assert [counted.at(float(step)) for step in range(3)] == [["only"], ["only-v1"], ["only-v2"]]
    assert counted.names == ["only", "only-v1", "only-v2"]


def test_a_fixed_name_is_never_written_over_in_place() -> None:
    """Before each operation of the storage: a whole checkpoint is there, and no byte of one has changed."""
    memory, seen, counts = Memory(), dict[str, bytes](), list[int]()

    def look(operation: str) -> None:
        files = {path: bytes(file.getvalue()) for path, file in memory.fs.store.items()}
        whole = {path.rpartition("/")[0] for path in files if path.endswith("/manifest.json")}
        now = {path: data for path, data in files.items() if path.rpartition("/")[0] in whole}
        assert all(now[path] == data for path, data in seen.items() if path in now)
        seen.clear()
        seen.update(now)
        counts.append(len(whole))

    fit = ScriptedFit(ModelCheckpoint(filename="only", every_n_train_steps=1), memory=memory, fault=look)
    for step in range(6):
        fit.at(float(step))
        assert len(fit.names) == 1 and fit.notes == []
    assert 0 not in counts[counts.index(1) :] and max(counts) == 2


# -- arguments that say how ------------------------------------------------------------------------------------------
def test_verbose_says_a_line_for_each_save() -> None:
    for verbose in (True, False):
        fit = ScriptedFit(ModelCheckpoint(monitor="loss", save_last=False, verbose=verbose))
        for loss in (0.5, 0.75, 0.25):
            fit.at(0.0, SafePoint.EPOCH, loss=loss)
        said = ["ModelCheckpoint: saving epoch=0-step=1 (step 1, loss = 0.5)",
                "ModelCheckpoint: saving epoch=2-step=3 (step 3, loss = 0.25)"]  # fmt: skip
        assert fit.notes == (said if verbose else [])


def test_save_last_link_is_save_last() -> None:
    linked, last = (ModelCheckpoint(monitor="loss", every_n_train_steps=1, save_last=each) for each in ("link", True))
    fits = [ScriptedFit(callback) for callback in (linked, last)]
    for step, loss in enumerate((0.5, 0.25, 0.75), start=1):
        for fit in fits:
            fit.at(0.0, loss=loss)
        assert linked.last_model_path == last.last_model_path == f"/run/checkpoints/epoch=0-step={step}/model.ckpt"
        assert fits[0].names == fits[1].names
    assert fits[0].names == ["epoch=0-step=2", "epoch=0-step=3"]
