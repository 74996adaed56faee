"""How many workers an elastic run has, and when it hears of room for more: pure decisions, with fakes of Ray."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylit.ports import Notice
from raylit.strategies.collective import LocalCollective
from raylit.wire import Elastic, World
from raylit.worker.room import ElasticNotices, OpenRequests

ALONE = LocalCollective(torch.device("cpu"))


@pytest.mark.parametrize(
    ("least", "most", "room", "workers"),
    [(1, 4, 0, 0), (1, 4, 1, 1), (1, 4, 2, 2), (1, 4, 3, 2), (1, 4, 4, 4), (1, 4, 9, 4), (2, 4, 1, 0), (1, 8, 7, 4),
     (1, 3, 2, 1), (3, 12, 5, 4)],
)  # fmt: skip
def test_as_many_workers_as_share_a_step_evenly(least: int, most: int, room: int, workers: int) -> None:
    assert Elastic(least, most, True, {"CPU": 1.0}).workers(room) == workers
    assert Elastic(least, most, False, {}).workers(room) == (min(room, most) if room >= least else 0)


@given(least=st.integers(1, 12), more=st.integers(0, 12), room=st.integers(0, 30))
def test_every_worker_has_as_many_shares(least: int, more: int, room: int) -> None:
    most = least + more
    chosen = Elastic(least, most, True, {}).workers(room)
    possible = [size for size in range(least, min(room, most) + 1) if most % size == 0]
    assert chosen == max(possible, default=0)
    if chosen:
        assert World(world_size=chosen, shares=most).turns * chosen == most


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Preempts:
    every_s = 2.0

    def __init__(self) -> None:
        self.notice: Notice | None = None

    def ask(self, collective: Any) -> Notice | None:
        return self.notice


def test_room_is_looked_for_now_and_then_and_leads_to_more_workers_where_they_help() -> None:
    clock, room, asked = Clock(), [0], []

    def requests() -> int:
        asked.append(clock.now_s)
        return room[0]

    elastic = Elastic(1, 4, True, {"CPU": 1.0}, every_s=60.0)
    notices = ElasticNotices(elastic, World(world_size=2), None, requests, clock)
    assert notices.every_s == 5.0
    for now_s in (0.0, 30.0, 59.0, 60.0, 61.0, 119.0, 121.0):
        clock.now_s = now_s
        assert notices.ask(ALONE) is None
    assert asked == [60.0, 121.0]
    clock.now_s, room[0] = 190.0, 1
    assert notices.ask(ALONE) is None  # three workers would not share four
    clock.now_s, room[0] = 260.0, 2
    assert notices.ask(ALONE) == Notice("there is room for 2 more workers", leave=True)
    scales = ElasticNotices(Elastic(1, 4, False, {}, every_s=60.0), World(world_size=2), None, lambda: 1, clock)
    clock.now_s = 330.0
    assert scales.ask(ALONE) == Notice("there is room for 1 more worker", leave=True)


def test_a_node_that_goes_comes_before_room_and_only_rank_0_looks() -> None:
    clock, preempts = Clock(), Preempts()
    elastic = Elastic(1, 4, True, {}, every_s=1.0)
    notices = ElasticNotices(elastic, World(world_size=2), preempts, lambda: 2, clock)
    assert notices.every_s == 1.0
    preempts.notice, clock.now_s = Notice("node a goes", leave=True), 10.0
    assert notices.ask(ALONE) == preempts.notice

    def never() -> int:
        raise AssertionError("rank 0 alone asks Ray")

    other = ElasticNotices(elastic, World(global_rank=1, world_size=2), None, never, clock)
    clock.now_s = 20.0
    assert other.ask(ALONE) is None


class Groups:
    """Ray's placement groups: what was asked for, and which of them there is room for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import ray.util

        self.asked: dict[str, int] = {}
        self.met: set[str] = set()
        self.fails = False
        monkeypatch.setattr(ray.util, "placement_group", self.ask)
        monkeypatch.setattr(ray.util, "placement_group_table", self.look)

    def ask(self, bundles: list[Any], name: str) -> str:
        self.asked[name] = len(bundles)
        return name

    def look(self, name: str) -> dict[str, str]:
        if self.fails:
            raise RuntimeError("Ray is away")
        return {"state": "CREATED" if name in self.met else "PENDING"}


def test_requests_are_for_the_steps_from_one_size_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = Groups(monkeypatch)
    look = OpenRequests(Elastic(1, 8, True, {"CPU": 1.0}, request="r"), 1)
    assert look() == 0 and groups.asked == {"r0": 1, "r1": 2, "r2": 4}  # to 2, to 4, to 8 workers
    groups.met = {"r0", "r2"}
    assert look() == 1
    groups.met.add("r1")
    assert look() == 7 and len(groups.asked) == 3
    groups.fails = True
    with pytest.warns(UserWarning, match="could not be asked for room .*Ray is away"):
        assert look() == 0
