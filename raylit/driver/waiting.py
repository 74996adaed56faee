"""Waiting for a cluster's resources, and for workers to start, told in one line now and then. Floor 5, driver.

Ray is imported inside functions only.

Ray Train waits for a minute without a word, and then fails. So raylit asks for the room itself, before Ray Train does:
a placement group of all workers, which an autoscaler takes for what it is, a request. It is given back when it is met.
"""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylit.driver import cluster
from raylit.errors import ResourceError

TELL_S = 10.0  # waiting is told after this long, then at twice the time, and so on
_MOST_S = 300.0  # between two lines
_START_S = 30.0  # the first line about workers that start; Python, torch and Ray take 5 to 20 s to load
_GRACE_S = 300.0  # for a host that was lost, and may be booting, on a cluster that nobody adds nodes to
_STATUS_S = 20.0  # for ``ray status``


@dataclass(frozen=True)
class Asked:
    """Room that a run needs: ``workers`` times ``bundle``, laid out by Ray's placement ``strategy``."""

    workers: int
    bundle: Mapping[str, float]
    strategy: str = "PACK"

    @property
    def text(self) -> str:
        """``4 workers x (1 CPU, 1 GPU)``."""
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.bundle.items())
        return f"{self.workers} worker{'s' * (self.workers != 1)} x ({each})"


@contextlib.contextmanager
def room(asked: Asked, say: Callable[[str], None], timeout_s: float | None = None,
         now: Callable[[], float] = time.monotonic) -> Iterator[Any]:  # fmt: skip
    """Wait for the room; give the placement group that holds it while the context is open.

    ``say`` gets a line now and then. Raises ResourceError after ``timeout_s`` (None: no limit), and where the
    cluster has lost what it would take and nobody adds nodes to it.
    """
    from ray.util import placement_group, remove_placement_group

    group = placement_group([dict(asked.bundle)] * asked.workers, strategy=asked.strategy)
    try:
        wait_for(lambda: bool(group.wait(timeout_seconds=0.5)), asked, say, timeout_s, now)
        yield group
    finally:
        with contextlib.suppress(Exception):  # the connection may be gone, and all requests with it
            remove_placement_group(group)


@contextlib.contextmanager
def start(workers: int, there: Callable[[], object], say: Callable[[str], None]) -> Iterator[None]:
    """While the context is open, and until a worker is ``there``: ``say`` a line now and then that they start."""
    ended = threading.Event()
    watch = threading.Thread(target=tell_of_start, args=(workers, there, say, ended.wait), name="raylit-start",
                             daemon=True)  # fmt: skip
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def tell_of_start(workers: int, there: Callable[[], object], say: Callable[[str], None],
                  ended: Callable[[float], bool]) -> None:  # fmt: skip
    """As ``start``; ``ended`` waits for so many seconds and returns whether the end has come."""
    waited, pause_s = 0.0, _START_S
    while not ended(pause_s) and not there():
        waited += pause_s
        who = f"{workers} workers have" if workers != 1 else "the worker has"
        say(f"{who} a place; Python, torch and Ray are loading, and the workers meet; {_clock(waited)} so far")
        pause_s = min(waited, _MOST_S)


def wait_for(met: Callable[[], bool], asked: Asked, say: Callable[[str], None], timeout_s: float | None = None,
             now: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
    """Call ``met``, which takes a moment, until it is true. Otherwise as ``room``."""
    began, tell_at, never_since = now(), TELL_S, None
    while not met():
        waited = now() - began
        problem = cluster.problem_of(asked.workers, asked.bundle)
        never_since = (waited if never_since is None else never_since) if problem else None
        if never_since is not None and waited - never_since >= _GRACE_S:
            raise ResourceError(f"waited {_GRACE_S:g} s for nodes to come back. {problem}")
        if timeout_s is not None and waited >= timeout_s:
            raise ResourceError(
                f"start_timeout: there was no room within {timeout_s:g} s. {told(asked, waited)}. Wait longer, or ask "
                "for less: num_workers, resources_per_worker"
            )
        if waited >= tell_at:
            say(told(asked, waited))
            tell_at = waited + min(max(waited, TELL_S), _MOST_S)


def told(asked: Asked, waited_s: float) -> str:
    """The line of this moment: what is asked for, what the cluster has, what the autoscaler does, how long."""
    import ray

    free = {str(name): float(amount) for name, amount in ray.available_resources().items()}
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    scaler = autoscaler_says(_status()) if cluster.may_grow() else ""
    return line(asked, free, cluster.available(), nodes, waited_s, scaler)


def line(asked: Asked, free: Mapping[str, float], has: Mapping[str, float], nodes: int, waited_s: float,
         scaler: str = "") -> str:  # fmt: skip
    """Word it. ``free``, ``has``: of the whole cluster, by resource."""
    parts = [f"{free.get(name, 0.0):g} of {has.get(name, 0.0):g} {name}" for name in asked.bundle]
    text = f"waiting for {asked.text}: free are {', '.join(parts)} on {nodes} node{'s' * (nodes != 1)}"
    enough = all(free.get(name, 0.0) + 1e-9 >= amount * asked.workers for name, amount in asked.bundle.items())
    if enough and asked.strategy.startswith("STRICT"):
        text += f", not as {asked.strategy} wants them"
    elif enough:
        text += ", in pieces too small"
    return f"{text}{f'; {scaler}' if scaler else ''}; {_clock(waited_s)} so far"


def autoscaler_says(status: str | None) -> str:
    """What ``ray status`` prints of nodes that are coming, or cannot be had; None: it could not be asked."""
    if status is None:
        return "the autoscaler does not answer"
    pending, failed = _section(status, "Pending:"), _section(status, "Recent failures:")
    says = []
    if pending:
        says.append(f"the autoscaler brings {', '.join(pending[:3])}{' and more' * (len(pending) > 3)}")
    if failed:
        says.append(f"it could not bring {failed[0]}" if pending else f"the autoscaler could not bring {failed[0]}")
    return "; ".join(says) or "the autoscaler brings no node yet"


def _section(status: str, title: str) -> list[str]:
    """The lines below a title; none for the remark in brackets that there are none."""
    found: list[str] = []
    rows = iter(status.splitlines())
    for row in rows:
        if row.strip() == title:
            for below in rows:
                if not below.startswith(" "):
                    break
                if not re.fullmatch(r"\(no .*\)", below.strip()):
                    found.append(" ".join(below.split()))
            break
    return found


def _status() -> str | None:
    """What ``ray status`` prints; the public way to ask the autoscaler."""
    import ray

    command = [str(Path(sys.executable).with_name("ray")), "status",
               "--address", ray.get_runtime_context().gcs_address]  # fmt: skip
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_STATUS_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{math.floor(seconds / 60)} min"
