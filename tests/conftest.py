"""Fixtures for every test: one thread a process, one local Ray and sets of processes for the tests that need them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.two_process.harness import Processes

# Before torch or Ray is imported anywhere: two cores are shared by the driver and its workers, and libraries that
# each start a thread per core make tests slow and their order of additions uncertain. Ray workers inherit these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit it: no test of Ctrl-C could pass."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray of two CPUs in this machine, started by the first test that asks and stopped after the last."""
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    if started_here:
        ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and what takes minutes; the reason is printed at the end (-rs is on)."""
    if not os.environ.get("RAYLIT_TEST_LONG"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="several hosts for minutes: make test-long"))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none here"))


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[[int], Processes]]:
    """``processes(2)``: two processes in one gloo group that run cases (tests/two_process/harness.py)."""
    from tests.two_process.harness import Processes, here_on_path

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
