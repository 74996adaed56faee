"""A node that will be taken away: one checkpoint of that moment, wherever the fit is, and the fit goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from raylit.callbacks import ModelCheckpoint
from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store
from raylit.engine.notices import NoticeWatch, WorkersChange
from raylit.ports import Collective, Notice, RunSnapshot
from raylit.stage import SafePoint
from tests.contract.resuming import Net, Noisy, WithOutputs, assert_same, run_recorded, seed_all, shuffled, through_file
from tests.two_process.harness import run_here


@dataclass
class Announces:
    """Says so at the calls numbered in ``at`` (from 0); due at every batch."""

    at: tuple[int, ...] = ()
    every_s: float = 0.0
    calls: int = 0

    def ask(self, collective: Collective) -> Notice | None:
        self.calls += 1
        return Notice(f"node {self.calls - 1}") if self.calls - 1 in self.at else None


@dataclass
class Keeps:
    """A checkpointer that keeps what a notice asks for, and the state at the end."""

    kept: list[RunSnapshot] = field(default_factory=list)
    end: RunSnapshot | None = None

    def safe_point(self, point: SafePoint, take: Callable[[], RunSnapshot]) -> None:
        if point is SafePoint.PREEMPTION:
            taken = take()
            self.kept.append(RunSnapshot(through_file(taken.common), through_file(taken.own)))
        elif point is SafePoint.END:
            taken = take()
            self.end = RunSnapshot(through_file(taken.common), through_file(taken.own))


def validation() -> Any:
    return [DataLoader(Noisy(6, seed=1), batch_size=3, shuffle=True), DataLoader(Noisy(4, seed=2), batch_size=3)]


class TwoLoaders(WithOutputs):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch) + torch.rand(()))


RUNS: dict[str, dict[str, Any]] = {
    "plain": {"make": Net},
    "accumulation": {"make": Net, "accumulate_grad_batches": 3},
    "validation": {"make": TwoLoaders, "val": validation, "val_check_interval": 2, "accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_state_at_any_notice_goes_on_to_the_bit(kind: str) -> None:
    """A notice after every single batch, of training and of validation."""
    given = {"max_epochs": 2, **RUNS[kind]}
    make = given.pop("make")
    undisturbed = Keeps()
    run_recorded(make, shuffled(), seed=1, recorder=undisturbed, **given)
    always, kept = Announces(tuple(range(1000))), Keeps()
    run_recorded(make, shuffled(), seed=1, recorder=kept, notices=always, **given)
    assert undisturbed.end is not None and kept.end is not None
    assert_same(undisturbed.end.common, kept.end.common, "keeping changes nothing")
    # 2 epochs of 4 batches. A validation has 2 + 2 batches and 2 loader's ends, every second batch.
    assert len(kept.kept) == always.calls == {"validation": 8 + 4 * 6}.get(kind, 8)
    half_done = 0
    for number, state in enumerate(kept.kept):
        half_done += state.common["loops"]["fit_loop"]["unfinished"] == "validation"
        rest = Keeps()
        start = {"common": state.common, "own": {0: state.own}}
        run_recorded(make, shuffled(), seed=77, recorder=rest, **start, **given)
        assert rest.end is not None
        assert_same(undisturbed.end.common, rest.end.common, f"from notice {number}: common")
        assert_same(undisturbed.end.own, rest.end.own, f"from notice {number}: own")
    assert half_done == (4 * 6 if kind == "validation" else 0)


def test_one_checkpoint_and_one_line_a_notice_in_the_middle_of_an_epoch() -> None:
    kept = Keeps()
    notices = Announces((1, 5))
    ran, _ = run_recorded(Net, shuffled(), seed=1, recorder=kept, notices=notices, max_epochs=2)
    assert [each.common["global_step"] for each in kept.kept] == [2, 6]
    assert ran.outcome.state.global_step == notices.calls == 8
    assert [e["text"] for e in ran.events if e["kind"] == "note"] == [
        f"node {call}; keeping the state of now, and going on" for call in (1, 5)
    ]


def test_nobody_is_asked_where_nothing_is_kept() -> None:
    notices = Announces()
    run_here(Net(), shuffled()(), notices=notices)
    assert notices.calls == 0


def test_the_sanity_check_is_not_kept() -> None:
    kept, notices = Keeps(), Announces((0,))
    val = DataLoader(Noisy(6), batch_size=3)
    run_recorded(Net, shuffled(), seed=1, recorder=kept, notices=notices, val=lambda: val, num_sanity_val_steps=2,
                 max_epochs=1)  # fmt: skip
    assert [each.common["global_step"] for each in kept.kept] == [1]


# What is written -----------------------------------------------------------------------------------------------------
class Lost(Exception):
    """The node is gone."""


class Dies(Net):
    """Is lost in a batch, after it looked for what lies in the run's folder."""

    def __init__(self, folder: str, at: int) -> None:
        super().__init__()
        self.folder, self.at = folder, at
        self.there: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == self.at:
            store = Store(Folder(self.folder))
            self.there = [each.step for each in store.manifests() if not each.weights_only and not store.faults(each)]
            raise Lost(self.there)
        return super().training_step(batch, batch_idx)


KEEPERS: dict[str, Callable[[], list[ModelCheckpoint]]] = {
    "the default's": lambda: [ModelCheckpoint.default()],
    "newest": lambda: [ModelCheckpoint()],
    "best by a metric": lambda: [ModelCheckpoint(monitor="val_loss", save_top_k=2)],
    "no last state": lambda: [ModelCheckpoint(monitor="val_loss", save_last=False)],
    "weights alone": lambda: [ModelCheckpoint(save_weights_only=True, every_n_train_steps=1)],
    "the second of two": lambda: [ModelCheckpoint(save_weights_only=True), ModelCheckpoint(save_last=True)],
}


@pytest.mark.parametrize("kind", KEEPERS)
def test_it_is_written_before_the_next_batch_and_an_attempt_goes_on_from_it(kind: str, tmp_path: Path) -> None:
    """Whatever the callbacks keep otherwise: no rhythm of theirs saves here."""

    def attempt(module: Net, seed: int, notices: Any = None, folder: Path = tmp_path / "run") -> Any:
        seed_all(seed)
        return run_here(
            module, shuffled()(), val=DataLoader(Noisy(6, seed=1), batch_size=3), storage=str(folder), order_seed=1,
            callbacks=KEEPERS[kind](), notices=notices, max_epochs=2,
        )  # fmt: skip

    whole = attempt(Net(), 1, folder=tmp_path / "undisturbed")
    with pytest.raises(Lost) as lost:
        attempt(Dies(str(tmp_path / "run" / "checkpoints"), at=2), 1, Announces((1,)))
    assert lost.value.args[0] == [2]
    rest = attempt(Net(), 77)
    assert any("going on from step 2" in e["text"] for e in rest.events if e["kind"] == "note")
    assert_same(whole.weights, rest.weights)
    assert whole.metrics == rest.metrics


RHYTHMS: dict[str, tuple[dict[str, Any], list[int]]] = {  # and the steps whose states are kept
    "by steps": ({"every_n_train_steps": 3, "save_top_k": -1}, [3, 6, 8]),
    "the newest": ({"every_n_train_steps": 3, "save_last": False}, [6]),
    "by validations": ({"monitor": "val_loss", "save_on_train_epoch_end": False, "save_top_k": 9}, [2, 4, 6, 8, 8]),
    # The metric of a state that nobody asked for is not waited for.
    "never": ({"monitor": "val_loss", "every_n_train_steps": 100, "save_top_k": 9}, [8]),
}


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("kind", RHYTHMS)
def test_a_checkpoint_that_was_kept_for_a_notice_changes_no_rhythm(kind: str, at: int, tmp_path: Path) -> None:
    """What is kept otherwise is kept still, and with the same metrics."""
    given, steps = RHYTHMS[kind]

    def kept(folder: str, notices: Any) -> Counter[tuple[int, float | None]]:
        seed_all(1)
        run_here(
            Net(), shuffled()(), val=DataLoader(Noisy(6, seed=1), batch_size=3), storage=str(tmp_path / folder),
            order_seed=1, callbacks=[ModelCheckpoint(filename="{step}", **given)], notices=notices, max_epochs=2,
            val_check_interval=2,
        )  # fmt: skip
        manifests = Store(Folder(str(tmp_path / folder / "checkpoints"))).manifests()
        return Counter((each.step, each.score) for each in manifests)

    without, notices = kept("without", None), Announces((at,))
    assert sorted(step for step, _ in without.elements()) == steps
    with_notice = kept("with", notices)
    assert notices.calls > at
    assert with_notice == without


# The rhythm ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("batch_s", "every_s", "most"),
    [(0.001, 5.0, 3.8), (0.1, 5.0, 3.8), (2.0, 5.0, 3.8), (30.0, 5.0, 30.0)],
)
def test_it_asks_as_often_as_is_of_use(batch_s: float, every_s: float, most: float) -> None:
    """Not more than twice in the time of Ray's own looks, and after no more than one batch where these are long."""
    clock, asked = [0.0], []

    class Notices:
        def __init__(self) -> None:
            self.every_s = every_s

        def ask(self, collective: Collective) -> Notice | None:
            asked.append(clock[0])
            return None

    parts: Any = SimpleNamespace(
        state=SimpleNamespace(world=SimpleNamespace(world_size=1)), strategy=SimpleNamespace(collective=None)
    )
    checkpointer: Any = None
    watch = NoticeWatch(parts, Notices(), checkpointer, lambda: RunSnapshot({}, {}), now=lambda: clock[0])
    batches = int(200 / batch_s)
    for _ in range(batches):
        clock[0] += batch_s
        watch.batch_done()
    pauses = [later - before for before, later in pairwise(asked)]
    assert pauses and max(pauses) <= most + 1e-6
    assert min(pauses) >= every_s / 4


class Leaves(Announces):
    """A notice on which an elastic run stops, to be taken up by another number of workers."""

    def ask(self, collective: Collective) -> Notice | None:
        notice = super().ask(collective)
        return None if notice is None else Notice(notice.text, leave=True)


@pytest.mark.parametrize(
    "keeper",
    [lambda: ModelCheckpoint(), lambda: ModelCheckpoint(monitor="val_loss", save_top_k=2),
     lambda: ModelCheckpoint(every_n_train_steps=3, save_last=True), lambda: ModelCheckpoint(save_top_k=-1)],
)  # fmt: skip
def test_a_run_that_is_resized_keeps_what_it_would_have_kept(
    tmp_path: Path, keeper: Callable[[], ModelCheckpoint]
) -> None:
    """The checkpoint of a change goes once a later state is kept, and is never one of the best; three changes."""

    def attempt(folder: Path, notices: Any = None) -> Any:
        seed_all(1)
        return run_here(Net(), shuffled(14, 4)(), val=validation()[0], order_seed=1, max_epochs=3, storage=str(folder),
                        callbacks=[keeper()], notices=notices, num_workers=(1, 2))  # fmt: skip

    def kept(folder: Path) -> list[tuple[str, dict[str, float]]]:
        return [(each.name, each.metrics) for each in Store(Folder(str(folder / "checkpoints"))).manifests()]

    attempt(tmp_path / "whole")
    for at in (1, 2, 0):
        with pytest.raises(WorkersChange):
            attempt(tmp_path / "resized", Leaves(at=(at,)))
    assert any(not found.faults for found in Store(Folder(str(tmp_path / "resized" / "checkpoints"))).survey())
    attempt(tmp_path / "resized")
    mine, theirs = kept(tmp_path / "resized"), kept(tmp_path / "whole")
    assert [name for name, _ in mine] == [name for name, _ in theirs]
    assert [metrics for _, metrics in mine] == [pytest.approx(metrics) for _, metrics in theirs]
