"""Evaluation on plain Ray actors that are kept for the next one. Runs on the driver; imports Ray inside functions only.

Ray Train starts six processes for each run and ends them after it. An evaluation needs neither its controller nor its
checkpoints, and a script that fits, tests and predicts should not pay for them three times. The actors go when another
shape of workers is asked for, after a minute unused, before the next fit, after any failure, and with the driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from raylit.driver import cluster
from raylit.driver.launch import DEFAULT_WORKER_MAIN, Launched, OnEvent, open_channel, stored
from raylit.driver.shipping import explained
from raylit.driver.verdict import lost_beside, lost_error, stalled_error
from raylit.driver.waiting import Asked, wait_for
from raylit.errors import WorkerLostError
from raylit.wire import Job, World
from raylit.worker.failure import WorkerFailed, bare, first_cause, rebuild
from raylit.worker.ray_data import check_cpus

IDLE_RELEASE_S = 60.0


@dataclasses.dataclass(frozen=True)
class _Pool:
    key: tuple[Any, ...]
    group: Any  # ray PlacementGroup
    actors: tuple[Any, ...]  # in order of rank
    worlds: tuple[World, ...]


_lock = threading.RLock()
_kept: list[_Pool] = []
_timer: list[threading.Timer] = []


def launch_pooled(
    job: Job,
    *,
    num_workers: int = 1,
    use_gpu: bool = False,
    resources_per_worker: Mapping[str, float] | None = None,
    placement_strategy: str = "PACK",
    runtime_env: Mapping[str, Any] | None = None,
    worker_main: str = DEFAULT_WORKER_MAIN,
    on_event: OnEvent | None = None,
    ray_data: int = 0,
    say: Callable[[str], None] = lambda text: None,
    start_timeout_s: float | None = None,
) -> Launched:
    """As :func:`raylit.driver.launch.launch`, without Ray Train: ``result`` is None. Same errors, prints, Ctrl-C."""
    cluster.connect(runtime_env)
    asked = cluster.per_worker(resources_per_worker, use_gpu)
    job = dataclasses.replace(job, cpus=cluster.cpus_beside(num_workers, resources_per_worker, use_gpu))
    check_cpus(ray_data, job.cpus)
    key = (num_workers, tuple(sorted(asked.items())), placement_strategy, repr(runtime_env), job.working_dir)
    error: BaseException
    with _lock, open_channel(on_event) as channel:
        _stop_timer()
        sent = dataclasses.replace(job, channel=channel.address if channel else None)
        try:
            pool = _ready(key, asked, runtime_env, say, start_timeout_s)
            sent = stored(sent, calls=num_workers)
            refs = [
                actor.run.remote(sent, world, worker_main)
                for actor, world in zip(pool.actors, pool.worlds, strict=True)
            ]
            outcome = _await(refs)
            _start_timer()
            return Launched(outcome=outcome, result=None)
        except BaseException as raised:
            # The process group is broken or half way through a collective: these workers cannot be used again.
            release()
            if isinstance(raised, _Failed):
                _look_at(raised.pending)
            error = KeyboardInterrupt() if isinstance(raised, KeyboardInterrupt) else raised
            if isinstance(raised, _Failed):
                error = _callers_error(raised.errors, channel.workers if channel else {})
                if isinstance(error, WorkerLostError) and channel and channel.stalled:
                    error = stalled_error(channel.stalled, channel.workers)
    raise bare(error)


def release() -> None:
    """End the kept workers and give their resources back; nothing where there are none."""
    import ray
    from ray.util import remove_placement_group

    with _lock:
        _stop_timer()
        while _kept:
            pool = _kept.pop()
            # The connection may be gone already (ray.shutdown): then so are the workers.
            with contextlib.suppress(Exception):
                for actor in pool.actors:
                    ray.kill(actor)
                remove_placement_group(pool.group)


def _ready(
    key: tuple[Any, ...], asked: dict[str, float], runtime_env: Mapping[str, Any] | None, say: Callable[[str], None],
    timeout_s: float | None,
) -> _Pool:  # fmt: skip
    """The kept pool where it has the same shape and is alive, else a new one."""
    import ray

    if _kept and _kept[0].key == key:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get([actor.place.remote() for actor in _kept[0].actors])
            return _kept[0]
    release()
    cluster.check_fits(key[0], asked, use_gpu=False)
    return _start(key, asked, runtime_env, say, timeout_s)


def _start(
    key: tuple[Any, ...], asked: dict[str, float], runtime_env: Mapping[str, Any] | None, say: Callable[[str], None],
    timeout_s: float | None,
) -> _Pool:  # fmt: skip
    import ray
    from ray.util import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from raylit.worker.pooled import PooledWorker

    group = placement_group([dict(asked)] * key[0], strategy=key[2])
    try:
        # In pieces, so that Ctrl-C is heard while others hold the resources.
        wait_for(lambda: bool(group.wait(timeout_seconds=0.5)), Asked(key[0], asked, key[2]), say, timeout_s)
        named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        options: dict[str, Any] = {"num_cpus": 0, **{named[k]: v for k, v in asked.items() if k in named}}
        options["resources"] = {k: v for k, v in asked.items() if k not in named}
        if runtime_env:
            options["runtime_env"] = dict(runtime_env)
        actors = [
            ray.remote(PooledWorker)
            .options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, index), **options)
            .remote()
            for index in range(key[0])
        ]
        actors, worlds, host = ranked(actors, ray.get([actor.place.remote() for actor in actors]))
        _kept.append(_Pool(key, group, tuple(actors), tuple(worlds)))
        master = (host, ray.get(actors[0].free_port.remote()))
        backend = "nccl" if asked.get("GPU") else "gloo"
        ray.get([a.join.remote(w, master, backend) for a, w in zip(actors, worlds, strict=True)])
        return _kept[-1]
    except BaseException:
        if not _kept:
            ray.util.remove_placement_group(group)
        raise


def ranked(actors: list[Any], places: list[tuple[str, str, str]]) -> tuple[list[Any], list[World], str]:
    """Ranks node by node, in the order in which the nodes first appear; also the address of rank 0."""
    nodes = list(dict.fromkeys(node for node, _, _ in places))
    order = sorted(range(len(actors)), key=lambda i: nodes.index(places[i][0]))
    sizes, used = Counter(node for node, _, _ in places), Counter[str]()
    worlds = []
    for rank, index in enumerate(order):
        node, name, _ = places[index]
        worlds.append(World(rank, used[node], nodes.index(node), len(actors), sizes[node], name))
        used[node] += 1
    return [actors[i] for i in order], worlds, places[order[0]][2]


class _Failed(Exception):
    """Some workers failed: rank -> what Ray raised for it."""

    def __init__(self, errors: dict[int, BaseException], pending: list[Any]) -> None:
        super().__init__("workers failed")
        self.errors, self.pending = errors, pending


def _await(refs: list[Any]) -> bytes:
    """Rank 0's bytes once all are done; at the first failure stop waiting for the others."""
    import ray

    pending, errors = list(refs), dict[int, BaseException]()
    while pending and not errors:
        done, pending = ray.wait(pending, num_returns=1, timeout=1.0)
        # Of many workers most end at the same time: one look for each of 1,000 takes as long as a second.
        also, pending = ray.wait(pending, num_returns=len(pending), timeout=0) if done and pending else ([], pending)
        for ref in done + also:
            try:
                ray.get(ref)
            except Exception as raised:
                errors[refs.index(ref)] = raised
    if errors:
        raise _Failed(errors, pending)
    return bytes(ray.get(refs[0]))


def _look_at(refs: list[Any]) -> None:
    """Take note of the other workers' ends, or Ray prints each as an unhandled error; they have been killed."""
    import ray

    ended, _ = ray.wait(refs, num_returns=len(refs), timeout=5.0) if refs else ([], [])
    for ref in ended:
        with contextlib.suppress(Exception):
            ray.get(ref)


def _callers_error(errors: Mapping[int, BaseException], workers: Mapping[int, tuple[str, int]]) -> BaseException:
    causes = {rank: getattr(e, "cause", None) or e for rank, e in errors.items()}
    packed = [c.failure for c in causes.values() if isinstance(c, WorkerFailed)]
    lost = {rank: c for rank, c in causes.items() if not isinstance(c, WorkerFailed)}
    if packed and not (lost := lost_beside(packed, lost, workers)):
        return explained(rebuild(first_cause(packed)), cluster.shipped())
    return lost_error(lost, workers, cluster.alive())


def _start_timer() -> None:
    timer = threading.Timer(IDLE_RELEASE_S, release)
    timer.daemon = True
    timer.start()
    _timer.append(timer)


def _stop_timer() -> None:
    while _timer:
        _timer.pop().cancel()
