"""How Ray Train's announcements are worded, and told once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from raylit.strategies.collective import LocalCollective
from raylit.wire import Elastic, World
from raylit.worker.preemption import RayNotices, interval_s, notices_of_ray
from raylit.worker.room import ElasticNotices

ALONE = LocalCollective(torch.device("cpu"))


@dataclass
class Info:
    """Ray's ``PreemptionInfo``, as far as it is read."""

    preempted_node_to_ranks: dict[str, list[int]]
    deadline_ms: int | None = None


def told(*answers: Any) -> list[str | None]:
    waiting = list(answers)
    notices = RayNotices(lambda: waiting.pop(0), 5.0, lambda node: f"{node}.lan (10.0.0.1)", lambda: 1000.0)
    said = [notices.ask(ALONE) for _ in answers]
    return [None if each is None else each.text for each in said]


def test_an_elastic_run_leaves_where_enough_workers_are_left() -> None:
    asked = []
    info = Info({"a": [0, 1], "b": [3]})
    notices = RayNotices(lambda: info, 5.0, str, leaves=lambda lost: not asked.append(lost))
    notice = notices.ask(ALONE)
    assert notice is not None and notice.leave and asked == [3]


def test_each_node_is_told_once_with_workers_and_time_left() -> None:
    first, both = Info({"b": [2]}, 1_019_600), Info({"b": [2], "a": [0, 1]})
    assert told(None, first, first, both, both) == [
        None,
        "node b.lan (10.0.0.1) with worker 2 will be taken away in 20 s",
        None,
        "node a.lan (10.0.0.1) with workers 0, 1 will be taken away soon",
        None,
    ]


def test_a_deadline_that_has_passed() -> None:
    assert told(Info({"b": [2]}, 1)) == ["node b.lan (10.0.0.1) with worker 2 will be taken away in 0 s"]


@pytest.mark.parametrize("setting", ["0", "False"])
def test_where_ray_watches_not_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", setting)
    assert notices_of_ray(2) is None


@pytest.mark.parametrize(("workers", "seconds"), [(1, 5.0), (250, 5.0), (500, 10.0), (1000, 20.0)])
def test_many_workers_ask_less_often(monkeypatch: pytest.MonkeyPatch, workers: int, seconds: float) -> None:
    monkeypatch.delenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", raising=False)
    assert interval_s(workers) == seconds
    world = World(world_size=workers)
    preemption = RayNotices(lambda: None, interval_s(workers), str)
    elastic = ElasticNotices(Elastic(1, 2000, False, {}, every_s=60.0), world, preemption, lambda: 0)
    assert elastic.every_s == seconds  # an elastic run, which looks for room besides, asks no oftener


def test_an_interval_that_a_person_set_holds_for_many_workers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    assert interval_s(1000) == 0.5
    preemption = RayNotices(lambda: None, interval_s(1000), str)
    elastic = ElasticNotices(Elastic(1, 2000, False, {}), World(world_size=1000), preemption, lambda: 0)
    assert elastic.every_s == 0.5


@pytest.mark.parametrize(("workers", "asks"), [(1000, True), (1001, False)])
def test_more_workers_than_rays_barrier_takes_do_not_ask(
    monkeypatch: pytest.MonkeyPatch, workers: int, asks: bool
) -> None:
    import ray.train

    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", raising=False)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None, raising=False)  # newer than the oldest Ray
    assert (notices_of_ray(workers) is not None) == asks
