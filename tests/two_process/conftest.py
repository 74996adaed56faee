"""The processes that the cases run on, one set for each world size and session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.two_process.harness import Processes, here_on_path


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[[int], Processes]]:
    """``processes(2)``: two processes that run cases."""
    here_on_path()
    kept: dict[int, Processes] = {}
    yield lambda world_size: kept.setdefault(world_size, Processes(world_size))
    for each in kept.values():
        each.close()


@pytest.fixture
def two(processes: Callable[[int], Processes]) -> Processes:
    """Two processes."""
    return processes(2)


@pytest.fixture
def three(processes: Callable[[int], Processes]) -> Processes:
    """Three processes."""
    return processes(3)
