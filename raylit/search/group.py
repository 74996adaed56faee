"""A trial of several workers: an actor for each, in the resources that Tune holds for the trial. Floor 6.

``TrialGroup`` is to Tune's actor what a ``TrialRun`` is: ``next``, ``save``, ``stop``. All workers come to the same
reports, since they meet at the same safe points.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from raylit.driver.pool import ranked
from raylit.driver.verdict import account_of, lost_beside
from raylit.errors import WorkerLostError
from raylit.search.trial import Report, Saved, TrialRun, TrialSpec
from raylit.wire import Job, World
from raylit.worker.entry import take_callers_place
from raylit.worker.failure import WorkerFailed, bare, first_cause, pack, rebuild
from raylit.worker.pooled import PooledWorker

_STOP_S = 30.0  # for loggers to close; then the actors are killed


class TrialWorker(PooledWorker):
    """One worker of a trial. Its process group is made at the first trial and kept for the next ones."""

    def begin(self, spec: TrialSpec, place: Job, config: dict[str, Any], world: World, folder: str | None,
              saved: Saved | None) -> None:  # fmt: skip
        """Become worker ``world`` of a trial; nothing is trained yet."""
        take_callers_place(place)
        self._world, self._trial = world, TrialRun(spec, config, world, folder, saved)

    def next(self) -> Report:
        """As ``TrialRun.next``; a collective of all workers. Raises ``WorkerFailed``."""
        try:
            return self._trial.next()
        except BaseException as error:
            raise WorkerFailed(pack(error, self._world)) from None

    def save(self) -> dict[str, bytes]:
        """This worker's files of a checkpoint, by name."""
        with tempfile.TemporaryDirectory(prefix="raylit-") as folder:
            self._trial.save(folder)
            files = {}
            for name in os.listdir(folder):
                with open(os.path.join(folder, name), "rb") as file:
                    files[name] = file.read()
            return files

    def stop(self) -> None:
        """As ``TrialRun.stop``."""
        self._trial.stop()


class TrialGroup:
    """All workers of a trial, seen from Tune's actor; one trial after the other. ``place``: the caller's."""

    def __init__(self, spec: TrialSpec, place: Job) -> None:
        import ray
        import ray.util
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._spec, self._place = spec, place
        group = ray.util.get_current_placement_group()
        bundle = dict(spec.bundle)
        named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        options: dict[str, Any] = {"num_cpus": 0, **{named[k]: v for k, v in bundle.items() if k in named}}
        options["resources"] = {k: v for k, v in bundle.items() if k not in named}
        actors = [
            ray.remote(TrialWorker)
            .options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, index), **options)
            .remote()
            for index in range(spec.workers)
        ]
        self._actors = actors
        try:
            self._actors, self._worlds, host = ranked(actors, ray.get([actor.place.remote() for actor in actors]))
            master = (host, ray.get(self._actors[0].free_port.remote()))
            backend = "nccl" if bundle.get("GPU") else "gloo"
            pairs = zip(self._actors, self._worlds, strict=True)
            ray.get([actor.join.remote(world, master, backend) for actor, world in pairs])
        except BaseException:
            self.kill()
            raise

    def begin(self, config: Mapping[str, Any], folder: str | None, saved: Saved | None) -> None:
        """Become a trial's workers; the other arguments are those of ``TrialRun``."""
        import ray

        spec, shared, pairs = ray.put(self._spec), ray.put(saved), zip(self._actors, self._worlds, strict=True)
        ray.get([a.begin.remote(spec, self._place, dict(config), world, folder, shared) for a, world in pairs])

    @property
    def alive(self) -> bool:
        """False once a worker has failed: all of them are gone then."""
        return bool(self._actors)

    def next(self) -> Report:
        """The next report, rank 0's. Raises what a worker raised; WorkerLostError where a worker died."""
        import ray

        refs = [actor.next.remote() for actor in self._actors]
        pending, failed = list(refs), dict[int, BaseException]()
        while pending and not failed:
            done, pending = ray.wait(pending, num_returns=1)
            for ref in done:
                try:
                    ray.get(ref)
                except Exception as error:
                    failed[refs.index(ref)] = getattr(error, "cause", None) or error
        if not failed:
            report: Report = ray.get(refs[0])
            return report
        more, _ = ray.wait(pending, num_returns=len(pending), timeout=3.0) if pending else ([], [])
        for ref in more:  # the others' errors tell whose came first
            with contextlib.suppress(Exception):
                try:
                    ray.get(ref)
                except Exception as error:
                    failed[refs.index(ref)] = getattr(error, "cause", None) or error
        self.kill()
        packed = [error.failure for error in failed.values() if isinstance(error, WorkerFailed)]
        lost = {rank: error for rank, error in failed.items() if not isinstance(error, WorkerFailed)}
        workers = {rank: (world.node_name, 0) for rank, world in enumerate(self._worlds)}
        if packed and not (lost := lost_beside(packed, lost, workers)):
            raise bare(rebuild(first_cause(packed)))
        rank = min(lost)
        where = f"worker {rank} of the trial, on {self._worlds[rank].node_name},"
        raise WorkerLostError(f"{where} was lost: {account_of(lost[rank])}")

    def save(self, folder: str) -> None:
        """Write every worker's part of a checkpoint into a folder of this machine."""
        import ray

        for files in ray.get([actor.save.remote() for actor in self._actors]):
            for name, data in files.items():
                with open(os.path.join(folder, name), "wb") as file:
                    file.write(data)

    def stop(self) -> None:
        """End the fits; the processes stay for the next trial."""
        import ray

        try:
            ray.get([actor.stop.remote() for actor in self._actors], timeout=_STOP_S)
        except ray.exceptions.RayError:
            self.kill()

    def kill(self) -> None:
        """End the processes."""
        import ray

        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor)
