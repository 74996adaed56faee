"""How the loss of workers is worded, and of which one."""

from __future__ import annotations

import os
import subprocess
import sys

from raylit.driver.verdict import lost_error

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
