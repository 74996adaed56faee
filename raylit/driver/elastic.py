"""With how many workers an elastic run starts: as many as there is room for now. Runs on the driver.

Room is found out by asking for it: a placement group of each worker's resources. That counts what other jobs hold, and
neither a node that is being drained nor one whose death Ray has not noticed yet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from raylit.driver import cluster
from raylit.driver.waiting import Asked, wait_for
from raylit.wire import Elastic

_SETTLE_S = 3.0  # without another request met, what there is now is taken


def sized(
    pooled: bool, elastic: Elastic, failures: Any, again: bool, say: Callable[[str], None],
    timeout_s: float | None = None,
) -> tuple[int, Any]:  # fmt: skip
    """The number of workers to start now, and Ray's FailureConfig for them."""
    import ray.train

    from raylit.driver import pool

    if pooled:
        return workers_to_evaluate(elastic), failures
    pool.release()  # workers that an evaluation left hold resources that count
    if not again:
        cluster.check_fits(elastic.least, elastic.bundle, use_gpu=False)
    workers = workers_now(elastic, say, timeout_s)
    say(f"starting {workers} Ray worker{'s' * (workers != 1)} (of {elastic.least} to {elastic.most}) ...")
    # After a node was taken away, or where the room has gone meanwhile, Ray would wait; raylit takes what is there.
    given = failures or ray.train.FailureConfig()
    known = {each.name for each in dataclasses.fields(given)} & {"max_preemption_failures", "controller_failure_limit"}
    return workers, dataclasses.replace(given, **dict.fromkeys(known, 0))


def workers_now(
    elastic: Elastic, say: Callable[[str], None], timeout_s: float | None = None,
    now: Callable[[], float] = time.monotonic,
) -> int:  # fmt: skip
    """Wait until there is room for ``elastic.least`` workers, as ``waiting.room`` does; return how many to start."""
    with requested(elastic) as groups:
        met, since, workers = 0, now(), 0

        def settled() -> bool:
            nonlocal met, since, workers
            count = sum(group.wait(timeout_seconds=0.05) for group in groups)
            if count > met:
                met, since = count, now()
            workers = elastic.workers(count)
            return bool(workers) and (
                count >= min(elastic.most, _of_all_nodes(elastic)) or now() - since >= _SETTLE_S
            )

        wait_for(settled, Asked(elastic.least, elastic.bundle), say, timeout_s, now)
        return workers


@contextlib.contextmanager
def requested(elastic: Elastic) -> Iterator[list[Any]]:
    """A placement group for each of the most workers, while the context is open."""
    from ray.util import placement_group, remove_placement_group

    groups: list[Any] = []
    try:
        for _ in range(elastic.most):
            groups.append(placement_group([dict(elastic.bundle)]))
        yield groups
    finally:
        for group in groups:
            remove_placement_group(group)


@contextlib.contextmanager
def open_requests(elastic: Elastic | None) -> Iterator[None]:
    """Remove the requests for room (``worker/room.py``) that an attempt's workers have open when it ends.

    What they hold is wanted for the next attempt.
    """
    try:
        yield
    finally:
        if elastic is not None:
            from ray.util import get_placement_group, remove_placement_group

            for number in range(elastic.most):
                with contextlib.suppress(Exception):  # ValueError: none of this name; else Ray itself is gone
                    remove_placement_group(get_placement_group(f"{elastic.request}{number}"))


def workers_to_evaluate(elastic: Elastic) -> int:
    """Return with how many workers an evaluation runs: its numbers are the same with any number."""
    return max(elastic.least, min(elastic.most, _of_all_nodes(elastic)))


def _of_all_nodes(elastic: Elastic) -> int:
    """Workers that all living nodes have the resources for, used or free: there will be no more of them soon."""
    import ray

    room = 0
    for node in ray.nodes():
        if node["Alive"]:
            fits = [node["Resources"].get(name, 0.0) / amount + 1e-9 for name, amount in elastic.bundle.items()]
            room += math.floor(min(fits)) if fits else elastic.most
    return room if not cluster.may_grow() else elastic.most
