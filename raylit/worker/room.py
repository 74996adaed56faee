"""Room for more workers of an elastic run: requests for it are kept open at Ray. Floor 4, on workers.

Rank 0 makes the requests and looks which are met: placement groups, each of the resources from one number of workers
that the run may have to the next, all or nothing. A cluster that grows by itself sees them as what is wanted. The
driver removes them before it starts the run again.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

from raylit.ports import Collective, Notice, Notices
from raylit.wire import Elastic, World
from raylit.worker.preemption import INTERVAL_S_OF_WORKER, notices_of_ray

_LOOK_S = 5.0  # the least between two looks; a look is one question to Ray for each request


class ElasticNotices:
    """Implements ``ports.Notices``: what ``preemption`` hears, and, every ``elastic.every_s``, room that is of use.

    ``requests``: for how many more workers the open requests are met; asked on rank 0 alone. Every rank has one.
    """

    def __init__(self, elastic: Elastic, world: World, preemption: Notices | None, requests: Callable[[], int],
                 now: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._elastic, self._world, self._preemption = elastic, world, preemption
        self._requests, self._now = requests, now
        pause_s = max(min(elastic.every_s, _LOOK_S), 0.1)
        self.every_s = pause_s
        if preemption is not None:
            least_s = min(preemption.every_s, world.world_size * INTERVAL_S_OF_WORKER)  # to ask many workers takes long
            self.every_s = max(min(preemption.every_s, pause_s), least_s)
        self._due = now() + elastic.every_s

    def ask(self, collective: Collective) -> Notice | None:
        """A barrier: every rank calls it equally often, and all get the same."""
        notice = None if self._preemption is None else self._preemption.ask(collective)
        room = 0
        if self._world.global_rank == 0 and self._now() >= self._due:
            room = self._requests()
            self._due = self._now() + self._elastic.every_s
        room = int(collective.broadcast_object(room))
        if notice is not None:
            return notice
        size = self._world.world_size
        if self._elastic.workers(size + room) <= size:
            return None
        return Notice(f"there is room for {room} more worker{'s' * (room != 1)}", leave=True)


class OpenRequests:
    """Placement groups for the workers that an elastic run has not. Made at the first call."""

    def __init__(self, elastic: Elastic, world_size: int) -> None:
        self._elastic = elastic
        sizes = [world_size, *(size for size in elastic.sizes if size > world_size)]
        self._steps = [more - size for size, more in itertools.pairwise(sizes)]
        self._groups: list[Any] = []

    def __call__(self) -> int:
        """Return how many more workers there is room for. A look that fails is none: the run goes on as it is."""
        from ray.util import placement_group, placement_group_table

        room = 0
        try:
            for number, workers in enumerate(self._steps):
                if number == len(self._groups):
                    bundles = [dict(self._elastic.bundle)] * workers
                    self._groups.append(placement_group(bundles, name=f"{self._elastic.request}{number}"))
            for workers, group in zip(self._steps, self._groups):
                if placement_group_table(group).get("state") != "CREATED":
                    break
                room += workers
        except Exception as error:
            warnings.warn(f"Ray could not be asked for room for more workers: {error}", stacklevel=2)
        return room


def elastic_notices(elastic: Elastic, world: World) -> ElasticNotices:
    """What a worker of an elastic run hears of."""
    size = world.world_size
    preemption = notices_of_ray(size, lambda lost: elastic.workers(size - lost) > 0)
    return ElasticNotices(elastic, world, preemption, OpenRequests(elastic, world.world_size))
