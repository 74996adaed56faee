"""The watch over a run's counters, with a clock of the test's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from raylit.driver.verdict import stalled_error
from raylit.errors import ProgressTimeoutError, WorkerLostError
from raylit.stage import Loop, Stage
from raylit.strategies.collective import LocalCollective
from raylit.view import RunState
from raylit.wire import World
from raylit.worker import watch as watching
from raylit.worker.preemption import RayNotices
from raylit.worker.watch import ProgressWatch, is_waiting, own_frames


class Watched:
    """A run that stands where the test puts it, and what its watch did."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.state = RunState(stage=Stage.FIT, loop=Loop.TRAIN, epoch=2, batch_idx=7, global_step=27)
        self.said: list[dict[str, Any]] = []
        self.ended_at: list[float] = []
        self.watch = ProgressWatch(
            self.state, World(global_rank=1, world_size=2, node_name="here"), 10.0, self.said.append,
            end=lambda: self.ended_at.append(self.now_s), clock=lambda: self.now_s,
        )  # fmt: skip

    def look_at(self, *seconds: float) -> None:
        for self.now_s in seconds:
            self.watch.look()


def test_a_rank_that_stands_still_is_named_and_ended() -> None:
    run = Watched()
    run.look_at(0, 9.9)
    assert not run.said and not run.ended_at
    run.look_at(10.0)
    (event,) = run.said
    assert run.ended_at == [10.0]
    assert (event["rank"], event["node"], event["waiting"]) == (1, "here", False)
    assert event["where"] == {"stage": "fit", "loop": "train", "epoch": 2, "batch_idx": 7, "global_step": 27}
    assert event["frames"][-1][0] == __file__  # this test's own frame: the thread that made the watch


@pytest.mark.parametrize("counter", ["epoch", "batch_idx", "global_step", "eval_batches"])
def test_any_counter_that_moves_is_progress(counter: str) -> None:
    run = Watched()
    for second in range(0, 50, 9):
        setattr(run.state, counter, second)
        run.look_at(second)
    assert not run.said and not run.ended_at
    run.look_at(45 + 10)
    assert run.ended_at == [55]


def test_outside_a_loop_nothing_is_watched() -> None:
    run = Watched()
    run.state.loop = None  # setup, saving, hooks around the training
    run.look_at(0, 100, 200)
    run.state.loop = Loop.TRAIN
    run.look_at(201, 210)
    assert not run.said and not run.ended_at
    run.look_at(212)
    assert run.ended_at == [212]


def test_a_rank_that_waits_for_others_lets_them_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "is_waiting", lambda frame: True)
    run = Watched()
    run.look_at(0, 10, 12, 14.9)
    assert [event["waiting"] for event in run.said] == [True]  # once
    assert not run.ended_at
    run.look_at(15.0)
    assert run.ended_at == [15.0]


def standing_in(file: str, inner: Any = None) -> Any:
    """A frame of a function in ``file`` of torch's folder, or the one of ``inner`` called from there."""
    names: dict[str, Any] = {}
    path = Path(torch.__file__).parent / file
    source = "import sys\ndef stand(inner):\n    return inner() if inner else sys._getframe()\n"
    exec(compile(source, path, "exec"), names)
    return names["stand"](inner)


def test_a_rank_that_asks_for_announcements_waits_for_others() -> None:
    names: dict[str, Any] = {"frames": []}
    source = "import sys\ndef ask():\n    frames.append(sys._getframe())\n"
    exec(compile(source, Path(torch.__file__).parent / "cuda/streams.py", "exec"), names)  # in Ray's place
    RayNotices(names["ask"], 5.0, str).ask(LocalCollective(torch.device("cpu")))
    assert is_waiting(names["frames"][0])


def test_waiting_is_told_from_the_files_of_the_innermost_frames() -> None:
    assert is_waiting(standing_in("distributed/distributed_c10d.py"))
    assert is_waiting(standing_in("autograd/graph.py"))
    assert not is_waiting(standing_in("nn/functional.py"))
    # The person's code is what stands still, and DDP is around it.
    assert not is_waiting(standing_in("nn/parallel/distributed.py", lambda: sys._getframe()))
    assert not is_waiting(None)
    assert own_frames(sys._getframe())[-1][2] == "test_waiting_is_told_from_the_files_of_the_innermost_frames"


def said(rank: int, waiting: bool, batch_idx: int = 3) -> dict[str, Any]:
    return {
        "kind": "stalled", "rank": rank, "node": f"node{rank}", "waiting": waiting, "timeout_s": 30.0,
        "where": {"stage": "fit", "epoch": 4, "batch_idx": batch_idx, "global_step": 40},
        "frames": [["train.py", 12, "training_step", "lock.acquire()"]],
    }  # fmt: skip


WORKERS = {0: ("node0", 10), 1: ("node1", 11), 2: ("node2", 12)}


def test_the_rank_that_waits_for_nobody_is_the_one() -> None:
    error = stalled_error({0: said(0, True), 2: said(2, False), 1: said(1, True)}, WORKERS)
    assert isinstance(error, ProgressTimeoutError) and isinstance(error, WorkerLostError)
    assert str(error).startswith("worker 2 made no progress for 30 s and was ended.")
    assert "worker 2, node node2, fit, epoch 4, batch 3, step 40" in str(error)
    assert 'File "train.py", line 12, in training_step: lock.acquire()' in str(error)
    assert error.__dict__["raylit_rank"] == 2


def test_a_rank_that_cannot_speak_is_named() -> None:
    error = stalled_error({0: said(0, True), 2: said(2, True)}, WORKERS)
    assert "worker 1 on node node1 (process 11) made no progress for 30 s" in str(error)


def test_where_all_wait_the_one_behind_is_shown() -> None:
    error = stalled_error({rank: said(rank, True, batch_idx=9 - rank) for rank in WORKERS}, WORKERS)
    assert "worker 2" in str(error) and "do all of them call the same collectives?" in str(error)
