"""Sharing a ``ray.data.Dataset`` over a run's workers, and whether its tasks find a CPU beside them. Floor 4.

Runs on the workers; the driver asks ``problem`` before it starts them. Imports Ray inside functions only.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from raylit.config.fit import FitConfig
from raylit.data.ray_data import RayDataset, RayRows, datasets_of, stretches
from raylit.errors import ResourceError
from raylit.ports import Collective
from raylit.wire import ClusterCpus


class WorkersSharing:
    """``data.ray_data.Sharing`` over the workers of one run: worker 0 splits its Dataset, each takes its part."""

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._quiet: list[tuple[logging.Handler, int]] = []

    @contextlib.contextmanager
    def beginning(self, dataset: Any, *, ordered: bool) -> Iterator[None]:
        """Begin a walk in the body, which is when Ray reads its settings; the Dataset's own are put back.

        Without Ray's progress bars, and with its lines about each execution in its log file alone.
        """
        context = dataset.context
        options = context.execution_options
        before = context.enable_progress_bars, options.preserve_order
        consoles = [each for each in logging.getLogger("ray.data").handlers if isinstance(each, logging.StreamHandler)]
        if not self._quiet:
            self._quiet = [(each, each.level) for each in consoles]
        for each in consoles:
            each.setLevel(logging.ERROR)  # it warns of bars that are off
        context.enable_progress_bars, options.preserve_order = False, ordered or before[1]
        try:
            yield
        finally:
            context.enable_progress_bars, options.preserve_order = before
            for each in consoles:
                each.setLevel(logging.WARNING)

    def close(self) -> None:
        """Put back how much Ray Data says on the terminal."""
        for handler, level in self._quiet:
            handler.setLevel(level)
        self._quiet = []

    def stream(self, dataset: Any, *, equal: bool) -> RayRows:
        """Return this rank's part of Ray's ``streaming_split``. It lives as long as worker 0's does."""
        import ray

        ranks = self._collective
        nodes = ranks.all_gather_object(ray.get_runtime_context().get_node_id())
        parts = None
        if ranks.rank == 0:
            # On one node every block is near; hints would only make Ray hold blocks back.
            hints = nodes if len(set(nodes)) > 1 else None
            with self.beginning(dataset, ordered=False):
                parts = dataset.streaming_split(ranks.world_size, equal=equal, locality_hints=hints)
        sent = ranks.broadcast_object(parts)
        # Worker 0 keeps what it made: Ray ends the actor behind the parts when its maker lets go of it.
        rows: RayRows = (parts or sent)[ranks.rank]
        return rows

    def stretch(self, dataset: Any, batch_size: int | None) -> RayRows:
        """Make all rows in order, in Ray's object store, and return this rank's stretch of them."""
        import ray

        ranks = self._collective
        box = None
        if ranks.rank == 0:
            with self.beginning(dataset, ordered=True):
                whole = dataset.materialize()
            parts = whole.split_at_indices(stretches(whole.count(), ranks.world_size, batch_size))
            # Through an actor: references that travel past Ray are never let go of, and the rows with them.
            options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": "DEFAULT"}
            box = ray.remote(_Box).options(**options).remote(parts)
        box = ranks.broadcast_object(box)
        rows: RayRows = ray.get(box.part.remote(ranks.rank))
        ranks.barrier()  # all have theirs; the actor ends with worker 0's handle
        return rows


class _Box:
    """Holds the parts until each worker has its own."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    def part(self, rank: int) -> Any:
        """The part of one rank."""
        return self._parts[rank]


def needs_cpus(source: Any, *, split: bool = False) -> int:
    """How many Datasets in what a user gave as loaders run tasks of Ray's when they are read.

    A ``MaterializedDataset`` runs none, but where it is to be ``split`` in order. Of a DataIterator it does not show.
    """
    found = [each for each in datasets_of(source) if isinstance(each, RayDataset)]
    if not found or "ray.data.dataset" not in sys.modules:
        return 0
    from ray.data.dataset import MaterializedDataset

    return sum(1 for each in found if split or not isinstance(each, MaterializedDataset))


def cpus_to_read(train: Any, evaluated: Any, *, beside: bool, predicting: bool = False) -> int:
    """How many Datasets are read at a time: a training step's, and beside them (``beside``) one that is evaluated.

    Each needs a CPU of its own, since a task of Ray's keeps its CPU while nobody takes its rows.
    """
    once = 1 if needs_cpus(evaluated, split=predicting) else 0
    return max(once, needs_cpus(train) + once * beside)


def validates_within(fit: FitConfig) -> bool:
    """Whether training's Datasets may still have rows when a validation begins."""
    # A whole number counts batches: 1 is one of them, 1.0 all.
    return any(isinstance(each, int) or each < 1.0 for each in (fit.val_check_interval, fit.train_batch_limit))


def problem(count: int, cpus: ClusterCpus | None) -> str | None:
    """Say why so many Datasets cannot be read at a time beside the workers; None where they can, or nobody knows."""
    if not count or cpus is None:
        return None
    taken = cpus.workers * cpus.each
    free = cpus.total - taken
    if free >= count - 1e-6:
        return None
    plural = count != 1
    return (
        f"reading {count} ray.data.Dataset{'s' * plural} at a time takes {count} CPU{'s' * plural} beside the workers, "
        f"and the run would wait for ever: the cluster has {cpus.total:g} CPU{'s' * (cpus.total != 1)}, "
        f"{cpus.workers} worker{'s' * (cpus.workers != 1)} x {cpus.each:g} take {taken:g}, which leaves {free:g}. Give "
        'the workers less (fewer of them, or resources_per_worker={"CPU": 0.5}), or make the rows before the run: '
        "dataset.materialize()"
    )


def check_cpus(count: int, cpus: ClusterCpus | None) -> None:
    """Raise ``ResourceError`` where ``problem`` finds one."""
    text = problem(count, cpus)
    if text is not None:
        raise ResourceError(text)
