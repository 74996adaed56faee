"""How Ray Train's announcements are worded, and told once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from raylit.strategies.collective import LocalCollective
from raylit.worker.preemption import RayNotices, notices_of_ray

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
    assert notices_of_ray() is None
