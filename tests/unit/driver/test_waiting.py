"""Waiting for resources: when it is told, what is said, when it ends; and whether a cluster could ever have them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylit.driver import cluster, waiting
from raylit.driver.fitting import beyond_growth, fitting, misfit
from raylit.driver.waiting import Asked, autoscaler_says, line, start, tell_of_start, wait_for
from raylit.errors import ResourceError

GPU = Asked(4, {"CPU": 1.0, "GPU": 0.5})
# What Ray 2.60 prints where nodes are coming and one kind could not be had; and of a cluster at rest.
STATUS = """======== Autoscaler status: 2026-11-27 20:00:00.000000 ========
Node status
---------------------------------------------------------------
Active:
 1 head
Idle:
 (no idle nodes)
Pending:
 gpu_worker, 2 launching
 10.0.0.7: gpu_worker, setting-up
Recent failures:
 spot_worker: InsufficientInstanceCapacity (latest_attempt: 20:00:00)

Resources
---------------------------------------------------------------
Total Usage:
 1.0/2.0 CPU
From request_resources:
 (none)
Pending Demands:
 {'CPU': 1.0, 'GPU': 0.5} * 4 (PACK): 1+ pending placement groups
"""
AT_REST = STATUS.replace(" gpu_worker, 2 launching\n 10.0.0.7: gpu_worker, setting-up", " (no pending nodes)").replace(
    " spot_worker: InsufficientInstanceCapacity (latest_attempt: 20:00:00)", " (no failures)")  # fmt: skip


def test_what_is_said() -> None:
    said = line(GPU, {"CPU": 3.0}, {"CPU": 8.0, "GPU": 2.0}, 2, 35.4)
    assert said == (
        "waiting for 4 workers x (1 CPU, 0.5 GPU): free are 3 of 8 CPU, 0 of 2 GPU on 2 nodes; 35 s so far"
    )
    one = line(Asked(1, {"CPU": 2.0}), {"CPU": 3.0}, {"CPU": 4.0}, 4, 150, "the autoscaler brings x")
    assert one == (
        "waiting for 1 worker x (2 CPU): free are 3 of 4 CPU on 4 nodes, in pieces too small; the autoscaler brings x; "
        "2 min so far"
    )
    apart = line(Asked(2, {"CPU": 1.0}, "STRICT_SPREAD"), {"CPU": 3.0}, {"CPU": 4.0}, 1, 10)
    assert "on 1 node, not as STRICT_SPREAD wants them; 10 s so far" in apart


def test_what_the_autoscaler_does() -> None:
    assert autoscaler_says(STATUS) == (
        "the autoscaler brings gpu_worker, 2 launching, 10.0.0.7: gpu_worker, setting-up; it could not bring "
        "spot_worker: InsufficientInstanceCapacity (latest_attempt: 20:00:00)"
    )
    assert autoscaler_says(AT_REST) == "the autoscaler brings no node yet"
    assert autoscaler_says(None) == "the autoscaler does not answer"
    assert autoscaler_says("something else") == "the autoscaler brings no node yet"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """A clock on which each look takes a second; the cluster could give what is asked."""
    monkeypatch.setattr(cluster, "problem_of", lambda workers, bundle: None)
    monkeypatch.setattr(waiting, "told", lambda asked, waited_s: f"told at {waited_s:g}")
    ticks = itertools.count()
    return lambda: float(next(ticks))


def met_after(looks: int) -> Callable[[], bool]:
    counted = itertools.count()
    return lambda: next(counted) >= looks


def test_a_line_now_and_then(clock: Callable[[], float]) -> None:
    said: list[str] = []
    wait_for(met_after(1500), GPU, said.append, None, clock)
    assert said == [f"told at {at}" for at in (10, 20, 40, 80, 160, 320, 620, 920, 1220)]


def test_nothing_is_said_of_a_moment(clock: Callable[[], float]) -> None:
    said: list[str] = []
    wait_for(met_after(9), GPU, said.append, None, clock)
    assert said == []


def test_workers_that_start_are_told_of_until_one_is_there() -> None:
    said, waited = [], []  # type: list[str], list[float]

    def ended(pause_s: float) -> bool:
        waited.append(pause_s)
        return False

    tell_of_start(2, lambda: sum(waited) > 1000, said.append, ended)
    assert [line.partition(";")[0] for line in said] == ["2 workers have a place"] * 6
    assert [line.rpartition("; ")[2] for line in said] == [
        "30 s so far", "60 s so far", "2 min so far", "4 min so far", "8 min so far", "13 min so far"]  # fmt: skip
    assert waited == [30, 30, 60, 120, 240, 300, 300]


def test_a_start_that_is_over_leaves_no_thread_and_no_line() -> None:
    said: list[str] = []
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), start(1, lambda: False, said.append):
        raise KeyboardInterrupt
    assert said == [] and threading.active_count() == before


def test_it_ends_after_the_time_that_was_given(clock: Callable[[], float]) -> None:
    with pytest.raises(ResourceError, match="start_timeout: there was no room within 25 s. told at 25. Wait longer"):
        wait_for(met_after(1000), GPU, lambda text: None, 25.0, clock)


def test_a_host_that_was_lost_is_waited_for_and_not_for_ever(
    clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = itertools.count()
    monkeypatch.setattr(cluster, "problem_of", lambda *asked: "too small" if next(looks) < 200 else None)
    wait_for(met_after(400), GPU, lambda text: None, None, clock)  # it came back after 200 s
    monkeypatch.setattr(cluster, "problem_of", lambda *asked: "too small")
    with pytest.raises(ResourceError, match="waited 300 s for nodes to come back. too small"):
        wait_for(met_after(400), GPU, lambda text: None, None, clock)


HEAD = ("10.0.0.1", {"CPU": 2.0, "node:__internal_head__": 1.0})


def config(most: int, **kinds: tuple[dict[str, float] | None, int]) -> dict[str, Any]:
    types: dict[str, Any] = {"head": {"resources": {"CPU": 2}, "max_workers": 0}}
    types |= {name: {"resources": has, "max_workers": count} for name, (has, count) in kinds.items()}
    return {"max_workers": most, "head_node_type": "head", "available_node_types": types}


def test_how_far_a_cluster_may_grow() -> None:
    def problem(workers: int, bundle: dict[str, float], file: dict[str, Any]) -> str | None:
        return beyond_growth("too small now.", workers, bundle, [HEAD], file)

    cpus, gpus = ({"CPU": 4}, 3), ({"CPU": 8, "GPU": 1}, 2)
    assert problem(14, {"CPU": 1.0}, config(3, cpu=cpus)) is None  # 2 of the head, 3 x 4
    assert "holds 14 such workers" in str(problem(15, {"CPU": 1.0}, config(3, cpu=cpus)))
    assert "holds 10 such workers" in str(problem(14, {"CPU": 1.0}, config(2, cpu=cpus)))  # two nodes in all
    assert problem(22, {"CPU": 1.0}, config(3, cpu=cpus, gpu=gpus)) is None  # 2 + 8 + 8 + 4
    assert "holds 2 such workers" in str(problem(3, {"GPU": 1.0}, config(9, cpu=cpus, gpu=gpus)))
    assert "too small now." in str(problem(3, {"GPU": 1.0}, config(9, cpu=cpus, gpu=gpus)))
    assert problem(99, {"CPU": 1.0}, config(3, cpu=(None, 3))) is None  # what such a node has is not known
    assert problem(99, {"CPU": 1.0}, {}) is None


def test_hosts_of_ones_own_are_waited_for_until_all_are_there() -> None:
    kind = {"local.cluster.node": {"resources": {}, "min_workers": 2, "max_workers": 2}}
    file = {"provider": {"type": "local"}, "max_workers": 2, "head_node_type": "local.cluster.node",
            "available_node_types": kind}  # fmt: skip
    there = [HEAD, ("10.0.0.2", {"CPU": 8.0}), ("10.0.0.3", {"CPU": 8.0})]
    assert beyond_growth("too small now.", 18, {"CPU": 1.0}, there[:2], file) is None
    assert "All 2 workers of the cluster's file are there" in str(
        beyond_growth("too small now.", 99, {"CPU": 1.0}, there, file)
    )


kinds = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=3)


@given(st.integers(1, 12), st.integers(1, 3), kinds, st.integers(0, 5))
def test_growth_is_counted_as_by_trying_every_set_of_nodes(
    workers: int, each: int, nodes: list[tuple[int, int]], most: int
) -> None:
    file = config(most, **{f"k{at}": ({"CPU": float(cpus)}, count) for at, (cpus, count) in enumerate(nodes)})
    best = max(sum(number * (cpus // each) for number, (cpus, _) in zip(chosen, nodes))
               for chosen in itertools.product(*(range(count + 1) for _, count in nodes)) if sum(chosen) <= most)
    can = 2 // each + best >= workers
    assert (beyond_growth("", workers, {"CPU": float(each)}, [HEAD], file) is None) == can


def test_misfit_counts_node_by_node() -> None:
    nodes = [("10.0.0.1", {"CPU": 3.0}), ("10.0.0.2", {"CPU": 3.0})]
    assert misfit(2, {"CPU": 3.0}, nodes) is None
    problem = misfit(3, {"CPU": 2.0}, nodes)
    assert problem is not None and "room for 2 such workers" in problem and "node 10.0.0.2: 3 CPU -> 1" in problem
    assert fitting({"CPU": 0.1}, {"CPU": 1.0}) == 10
