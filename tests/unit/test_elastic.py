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
from raylit.worker.room import ElasticNotices

ALONE = LocalCollective(torch.device("cpu"))


@pytest.mark.parametrize(
    ("least", "most", "room", "workers"),
    [(1, 4, 0, 0), (1, 4, 1, 1), (1, 4, 2, 2), (1, 4, 3, 2), (1, 4, 4, 4), (1, 4, 9, 4), (3, 4, 3, 3), (3, 4, 2, 0),
     (1, 8, 7, 4), (1, 8, 3, 3), (5, 8, 6, 5)],
)  # fmt: skip
def test_no_more_workers_than_get_through_a_step_sooner(least: int, most: int, room: int, workers: int) -> None:
    assert Elastic(least, most, True, {"CPU": 1.0}).workers(room) == workers


@given(least=st.integers(1, 12), more=st.integers(0, 12), room=st.integers(0, 30))
def test_the_fewest_workers_of_the_fewest_turns(least: int, more: int, room: int) -> None:
    most = least + more
    chosen = Elastic(least, most, True, {}).workers(room)
    possible = range(least, min(room, most) + 1)
    turns = {workers: World(world_size=workers, shares=most).turns for workers in possible}
    if not possible:
        assert chosen == 0
    else:
        assert chosen == min(workers for workers in possible if turns[workers] == min(turns.values()))
    assert Elastic(least, most, False, {}).workers(room) == (max(possible) if possible else 0)


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
    assert notices.ask(ALONE) is None  # three workers take two turns as well
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
