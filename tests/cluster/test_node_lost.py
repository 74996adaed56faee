"""Runs that meet a fault of the chaos test (``tests/chaos``): what comes of them is the run without it, to the bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.chaos.chaos import disturbed, note, undisturbed
from tests.chaos.faults import Fault, Kind, Run, drawn
from tests.cluster.hosts import Cluster
from tests.two_process.harness import Processes

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),  # several raylets start and stop, on few cores
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs several loopback addresses"),
]


def test_a_damaged_checkpoint_is_passed_over_after_a_drawn_fault(
    three_hosts: Cluster, two: Processes, tmp_path: Path
) -> None:
    run = drawn(1, 0, (Kind.DAMAGE,))
    outcome = disturbed(run, three_hosts, tmp_path / "run", undisturbed(run, two, tmp_path / "undisturbed"))
    assert outcome.problems == [] and (outcome.twice, outcome.never) == (0, 0)


def test_a_node_that_is_lost_without_notice_costs_nothing(three_hosts: Cluster, two: Processes, tmp_path: Path) -> None:
    run = Run(seed=3, every_n_steps=5, fault=Fault(Kind.NODE, rank=1, step=33))
    outcome = disturbed(run, three_hosts, tmp_path / "run", undisturbed(run, two, tmp_path / "undisturbed"))
    assert outcome.problems == [] and (outcome.twice, outcome.never) == (0, 0)
    places = [{rank: note(tmp_path / "run", f"start-{rank}-{attempt}") for rank in (0, 1)} for attempt in (0, 1)]
    nodes = [{place["node"] for place in attempt.values() if place} for attempt in places]
    assert len(nodes[0]) == len(nodes[1]) == 2 and nodes[0] != nodes[1]
    steps = {place["step"] for place in places[1].values() if place}
    assert len(steps) == 1 and steps <= {30, 25}  # that of step 30 may be on its way to the disk at step 33
