"""Three hosts that the tests of lost nodes share: to start them takes longer than what most tests do with them."""

from __future__ import annotations

import contextlib

import pytest

from tests.cluster.hosts import ALERT, Cluster, environment_of

_STARTED = contextlib.ExitStack()
_CLUSTERS: list[Cluster] = []


@pytest.fixture
def three_hosts() -> Cluster:
    """A head and two members; a test may lose one, and another one has joined before the next test."""
    if not _CLUSTERS:
        environment = _STARTED.enter_context(environment_of(**ALERT))
        _CLUSTERS.append(_STARTED.enter_context(Cluster(environment)))
        _STARTED.callback(_CLUSTERS.clear)
    (cluster,) = _CLUSTERS
    while len(cluster.members) < 2:
        cluster.join()
    return cluster


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End them before the first test that has no use for them: they take a part of the machine."""
    if nextitem is None or "three_hosts" not in getattr(nextitem, "fixturenames", ()):
        _STARTED.close()
