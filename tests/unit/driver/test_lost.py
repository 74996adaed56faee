"""How the loss of workers is worded, and of which one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest

from raylit.driver.verdict import as_callers_error, lost_error
from raylit.errors import WorkerLostError
from raylit.wire import World
from raylit.worker.failure import WorkerFailed, pack

Nodes = Mapping[str, int]  # address -> its node manager's port; 0: given up by Ray

HOSTS = {0: ("alpha (10.0.0.1)", 11), 1: ("beta (10.0.0.11)", 22)}
LOST = {0: RuntimeError("exit"), 1: RuntimeError("exit")}


def test_a_worker_whose_node_is_gone_is_named_with_it() -> None:
    error = lost_error(LOST, HOSTS, {"10.0.0.9", "10.0.0.1"})  # beta's address begins as alpha's
    told = "worker 1 on node beta (10.0.0.11) (process 22) (and 1 more) was lost with its node"
    assert str(error).startswith(told)
    assert error.__dict__["raylit_rank"] == 1


def test_a_worker_that_died_on_a_node_that_lives_died_by_itself() -> None:
    for alive in ({"10.0.0.1", "10.0.0.11"}, None):
        text = str(lost_error(LOST, HOSTS, alive))
        assert text.startswith("worker 0 on node alpha (10.0.0.1) (process 11) (and 1 more) died without an exception")
    assert str(lost_error({0: RuntimeError("exit")}, {}, set())).startswith("worker 0 died without an exception: exit")


def told(monkeypatch: pytest.MonkeyPatch, raised: RuntimeError, nodes: Nodes, since: list[float]) -> BaseException:
    """What comes of a run whose worker 0 raised, and whose worker 1 Ray says nothing of."""
    from ray.train import WorkerGroupError

    monkeypatch.setattr("raylit.driver.cluster.raylets", lambda: {a: [p] if p else [] for a, p in nodes.items()})
    monkeypatch.setattr("raylit.driver.cluster.alive", lambda: {a for a, p in nodes.items() if p} if len(since) < 3
                        else {a for a, p in nodes.items() if p == nodes["127.0.0.1"]})  # fmt: skip
    monkeypatch.setattr("time.sleep", since.append)
    workers = {0: ("alpha (127.0.0.1)", 11), 1: ("beta (127.0.0.2)", 22)}
    world = World(global_rank=0, world_size=2, local_rank=0, local_world_size=1, node_rank=0, node_name="alpha")
    group = WorkerGroupError("failed", {0: WorkerFailed(pack(raised, world))})
    return as_callers_error(group, workers)


CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.2]:28326.")


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@pytest.fixture
def closed() -> int:
    with socket.create_server(("127.0.0.2", 0)) as server:
        return int(server.getsockname()[1])


def test_a_host_that_closed_its_connections_is_named_although_ray_has_not_given_it_up(
    monkeypatch: pytest.MonkeyPatch, listening: int, closed: int
) -> None:
    """Its peers fail at once, and Ray tells of its worker some seconds later: it is waited for."""
    waited: list[float] = []
    error = told(monkeypatch, CLOSED, {"127.0.0.1": listening, "127.0.0.2": closed}, waited)
    assert isinstance(error, WorkerLostError) and len(waited) == 3
    assert str(error).startswith("worker 1 on node beta (127.0.0.2) (process 22) was lost with its node")


def test_a_host_that_ray_has_given_up_meanwhile_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, listening: int
) -> None:
    waited: list[float] = []
    error = told(monkeypatch, CLOSED, {"127.0.0.1": listening, "127.0.0.2": 0}, waited)
    assert isinstance(error, WorkerLostError) and waited == []
    assert "worker 1 on node beta (127.0.0.2) (process 22) was lost with its node" in str(error)


def test_where_every_host_answers_or_the_error_is_a_persons_it_is_shown_as_it_is(
    monkeypatch: pytest.MonkeyPatch, listening: int, closed: int
) -> None:
    with socket.create_server(("127.0.0.2", 0)) as other:
        error = told(monkeypatch, CLOSED, {"127.0.0.1": listening, "127.0.0.2": other.getsockname()[1]}, [])
    assert isinstance(error, RuntimeError) and "Connection closed by peer" in str(error)
    error = told(monkeypatch, RuntimeError("my bug"), {"127.0.0.1": listening, "127.0.0.2": closed}, [])
    assert isinstance(error, RuntimeError) and str(error).startswith("my bug")


def test_ray_does_not_print_of_lost_nodes_beside_raylit() -> None:
    """A variable of Ray's, that is there while Ray is imported."""
    quiet = """
import os
from raylit.driver import cluster
with cluster._quiet_of_lost_nodes():
    import ray
from ray._private import ray_logging
print("RAY_DEDUP_LOGS_SKIP_REGEX" in os.environ)
for line in ("The node with node id: e5ca and address: 10.0.0.1 and node name: a has been marked dead because x",
             "Raylet is terminated. Termination", "The node is mine"):
    print([each["lines"] for each in ray_logging.stdout_deduplicator.deduplicate(
        {"lines": [line], "pid": "raylet", "ip": "", "job": "", "is_err": False})][0])
"""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_DEDUP_LOGS_SKIP_REGEX"}
    ran = subprocess.run([sys.executable, "-c", quiet], env=environment, capture_output=True, text=True, timeout=240)
    assert ran.stdout.splitlines() == ["False", "[]", "[]", "['The node is mine']"], ran.stdout + ran.stderr
