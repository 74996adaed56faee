"""How the chaos test draws, counts and tells. Short runs of it are in ``tests/cluster/test_node_lost.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.chaos import Outcome, samples, table
from tests.chaos.faults import EPOCHS, STEPS, Fault, Kind, Run, damage, drawn
from tests.chaos.train import SAMPLES


def test_runs_are_drawn_from_the_seed_and_every_kind_comes_in_turn() -> None:
    runs = [drawn(7, number) for number in range(21)]
    assert runs == [drawn(7, number) for number in range(21)] != [drawn(8, number) for number in range(21)]
    for first in (0, 7, 14):
        assert {run.fault.kind for run in runs[first : first + 7]} == set(Kind)
    assert [drawn(7, number, (Kind.NODE,)).fault.kind for number in range(3)] == [Kind.NODE] * 3


@pytest.mark.parametrize("kind", list(Kind))
def test_the_moment_lies_within_the_run(kind: Kind) -> None:
    for number in range(300):
        run = drawn(1, number, (kind,))
        fault = run.fault
        assert 0 <= fault.step < STEPS and fault.rank in (0, 1)
        if (
            kind is Kind.DISK
        ):  # full for long enough that a checkpoint is due, and room again before the worker is killed
            assert fault.step + 2 * run.every_n_steps <= fault.free_step <= fault.kill_step < STEPS
        if kind is Kind.WRITING:  # three more saves: what is struck is one of their first operations
            assert fault.step + 3 * run.every_n_steps <= STEPS


def test_a_run_travels_to_its_processes(tmp_path: Path) -> None:
    run = drawn(0, 0)
    run.write(tmp_path)
    assert Run.read(tmp_path) == run


def test_samples_that_are_seen_twice_or_never_are_counted(tmp_path: Path) -> None:
    for epoch in range(EPOCHS):
        for rank in (0, 1):
            (tmp_path / f"ids-{epoch}-{rank}").write_text(json.dumps({"ids": list(range(rank, SAMPLES, 2))}))
    assert samples(tmp_path) == (0, 0)
    (tmp_path / "ids-1-0").write_text(json.dumps({"ids": [0, 2, 2, 1, *range(6, SAMPLES, 2)]}))
    (tmp_path / "ids-2-1").unlink()
    assert samples(tmp_path) == (2, 1 + SAMPLES // 2)


@pytest.mark.parametrize("how", ["truncated", "altered", "removed"])
def test_damage_is_damage(tmp_path: Path, how: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    damage(file, how)
    assert (file.read_bytes() if file.exists() else None) == {
        "truncated": b"01234", "altered": b"01234\xca6789", "removed": None,
    }[how]  # fmt: skip


def test_the_table_has_a_line_for_each_kind_that_came() -> None:
    outcomes = [
        Outcome(Run(0, 3, Fault(Kind.NODE)), to_go_on_s=4.0),
        Outcome(Run(0, 3, Fault(Kind.NODE)), ["other weights"], twice=1, to_go_on_s=8.0),
        Outcome(Run(0, 3, Fault(Kind.DISK)), ["the fit did not finish"]),
    ]
    assert table(outcomes).splitlines()[2:] == [
        "| node lost | 2 | 1 | 1 | 0 | 6.0 s | 8.0 s |",
        "| disk full | 1 | 1 | 0 | 0 | - | - |",
        "| all | 3 | 2 | 1 | 0 | 6.0 s | 8.0 s |",
    ]
