"""What Ray Train says of nodes that will be taken away (spot instances, maintenance). Floor 4, on a Ray worker.

Implements ``ports.Notices``. Ray's own function is a round trip of all ranks to one actor, a few milliseconds, so the
engine calls it every few seconds only (``raylit/engine/notices.py``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from raylit.ports import Collective, Notice
from raylit.worker.report import MOST_WORKERS_AT_A_BARRIER

# Ray Train's public settings; the driver hands them on to every worker.
_WATCHER, _INTERVAL = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"
_DEFAULT_INTERVAL_S = 5.0
# All ranks wait while that actor answers one after the other, some 0.4 ms each. The engine asks twice in an interval:
# of many workers' time a twentieth at most is spent on it.
INTERVAL_S_OF_WORKER = 0.02


class RayNotices:
    """Tells of each node once.

    ``ask``: ``ray.train.get_preemption_info``. ``name``: (node id) -> what people call it. ``now``: Unix time.
    ``leaves``: (number of workers that will be lost) -> whether the run goes on without them at once.
    """

    def __init__(
        self, ask: Callable[[], Any], every_s: float, name: Callable[[str], str],
        now: Callable[[], float] = time.time, leaves: Callable[[int], bool] = lambda lost: False,
    ) -> None:  # fmt: skip
        self.every_s = every_s
        self._ask, self._name, self._now, self._leaves = ask, name, now, leaves
        self._told: set[str] = set()

    def ask(self, collective: Collective) -> Notice | None:
        """The nodes that were announced since the last time, in a line. A barrier of all ranks, by Ray's own means."""
        info = self._ask()
        if info is None:
            return None
        ranks: dict[str, list[int]] = info.preempted_node_to_ranks
        new = [node for node in ranks if node not in self._told]
        if not new:
            return None
        self._told.update(new)
        nodes = ", ".join(f"node {self._name(node)} with {_workers(ranks[node])}" for node in new)
        when = "soon"
        if info.deadline_ms is not None:
            when = f"in {max(info.deadline_ms / 1000 - self._now(), 0.0):.0f} s"
        return Notice(f"{nodes} will be taken away {when}", self._leaves(sum(map(len, ranks.values()))))


def _workers(ranks: list[int]) -> str:
    return f"worker{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def interval_s(num_workers: int) -> float:
    """Seconds in which so many workers look for an announcement twice: 5 up to 250 of them, then 0.02 each.

    An interval that is set for Ray's own watcher holds here too.
    """
    given = os.environ.get(_INTERVAL)
    return max(_DEFAULT_INTERVAL_S, num_workers * INTERVAL_S_OF_WORKER) if given is None else float(given)


def notices_of_ray(num_workers: int, leaves: Callable[[int], bool] = lambda lost: False) -> RayNotices | None:
    """What this Ray Train worker can ask; None where nobody watches (one machine alone), or Ray is too old for it.

    None, too, of more workers than Ray's barrier takes: they would wait in it for ever.
    """
    if num_workers > MOST_WORKERS_AT_A_BARRIER or os.environ.get(_WATCHER, "1").lower() in ("0", "false"):
        return None
    import ray.train

    ask = getattr(ray.train, "get_preemption_info", None)
    if ask is None:
        return None
    return RayNotices(ask, interval_s(num_workers), node_name, leaves=leaves)


def node_name(node_id: str) -> str:
    """Host name and address of a node, or its id where Ray knows no more."""
    import ray

    for node in ray.nodes():
        if node["NodeID"] == node_id:
            return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
    return node_id
