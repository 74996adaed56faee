"""How a Job gets onto Ray Train workers and its outcome back to the caller. Runs on the driver.

Ray is imported inside functions only. An exception of a worker leaves :func:`launch` as its own type, without
traceback, cause or context; whoever passes it on should do so as ``raise bare(error)`` from a shallow place.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raylit.driver import cluster, waiting
from raylit.driver.channel import DriverChannel
from raylit.driver.verdict import as_callers_error, stalled_error
from raylit.errors import WorkerLostError
from raylit.wire import Job
from raylit.worker.failure import bare
from raylit.worker.ray_data import check_cpus
from raylit.worker.report import MOST_WORKERS_AT_A_BARRIER

if TYPE_CHECKING:
    import ray.train

OnEvent = Callable[[dict[str, Any]], None]
_LARGE_PAYLOAD_BYTES = 1024 * 1024
DEFAULT_WORKER_MAIN = "raylit.assemble:worker_main"


@dataclasses.dataclass(frozen=True)
class Launched:
    """A run that succeeded: rank 0's bytes, and what Ray Train says (None where the run did not go through it)."""

    outcome: bytes
    result: ray.train.Result | None


def launch(
    job: Job,
    *,
    num_workers: int | tuple[int, int] = 1,
    use_gpu: bool = False,
    resources_per_worker: Mapping[str, float] | None = None,
    placement_strategy: str | None = None,
    scaling_config: ray.train.ScalingConfig | None = None,
    run_config: ray.train.RunConfig | None = None,
    failure_config: ray.train.FailureConfig | None = None,
    name: str | None = None,
    storage_path: str | None = None,
    storage_filesystem: Any = None,
    max_failures: int | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    worker_main: str = DEFAULT_WORKER_MAIN,
    on_event: OnEvent | None = None,
    again: bool = False,
    ray_data: int = 0,
    say: Callable[[str], None] = lambda text: None,
    start_timeout_s: float | None = None,
) -> Launched:
    """Run ``worker_main`` on ``num_workers`` Ray Train workers and return rank 0's outcome.

    ``scaling_config``, ``run_config`` and ``failure_config`` are Ray's own; the shorthands that are given fill them
    in. ``on_event`` gets the workers' live events (dicts; prints are ``{"kind": "print", ...}``) in a thread of this
    process. ``again``: a restart, which waits for a cluster that has lost a node. ``ray_data``: Datasets that are read
    at a time beside the workers. ``say`` gets a line now and then while there is no room; after ``start_timeout_s``
    that is a ResourceError. Raises what the worker raised,
    :class:`WorkerLostError` where a worker process died,
    :class:`ResourceError` where the cluster cannot give what is asked, KeyboardInterrupt after Ctrl-C.
    """
    from raylit.driver.pool import release  # the pool builds on this module

    cluster.connect(runtime_env)
    release()  # workers that an evaluation left hold resources that this run needs
    scaling = merge_scaling(scaling_config, num_workers, use_gpu, resources_per_worker, placement_strategy)
    if not again:
        asked = (scaling.min_workers, scaling.resources_per_worker, bool(scaling.use_gpu))
        cluster.check_fits(*asked)
        job = dataclasses.replace(job, cpus=cluster.cpus_beside(*asked))
        check_cpus(ray_data, job.cpus)
    if scaling.max_workers > MOST_WORKERS_AT_A_BARRIER:
        say(f"more than {MOST_WORKERS_AT_A_BARRIER:,} workers: they will not hear of nodes that are to be taken away")
    if isinstance(scaling.num_workers, int):  # an elastic run has looked for its room already
        _wait_for_room(scaling, say, start_timeout_s)
    run = merge_run(run_config, failure_config, name, storage_path, max_failures, runtime_env, storage_filesystem)
    error: BaseException
    with open_channel(on_event) as channel, cluster.run_settings(scaling.max_workers):
        sent = dataclasses.replace(job, channel=channel.address if channel else None)
        try:
            with waiting.start(scaling.max_workers, lambda: channel is None or channel.workers, say):
                result = _fit(stored(sent), scaling, run, worker_main)
            return Launched(outcome=_outcome(result, run), result=result)
        except KeyboardInterrupt:
            error = KeyboardInterrupt()
        except Exception as raised:
            error = as_callers_error(raised, channel.workers if channel else {})
            if isinstance(error, WorkerLostError) and channel and channel.stalled:
                error = stalled_error(channel.stalled, channel.workers)
    raise bare(error)


def _wait_for_room(scaling: ray.train.ScalingConfig, say: Callable[[str], None], timeout_s: float | None) -> None:
    if scaling.use_tpu or scaling.label_selector:  # Ray lays these out by rules of its own
        return
    bundle = cluster.per_worker(scaling.resources_per_worker, bool(scaling.use_gpu))
    if scaling.accelerator_type:
        bundle[f"accelerator_type:{scaling.accelerator_type}"] = 0.001
    with waiting.room(waiting.Asked(int(scaling.num_workers), bundle, scaling.placement_strategy), say, timeout_s):
        pass  # it is there; Ray Train takes it in a moment


def stored(job: Job, calls: int = 1) -> Job:
    """Put a large payload into Ray's object store, once; a small one travels with each of so many calls."""
    if calls * len(job.payload) <= _LARGE_PAYLOAD_BYTES:
        return job
    import ray

    return dataclasses.replace(job, payload=b"", payload_ref=ray.put(job.payload))


def merge_scaling(
    given: ray.train.ScalingConfig | None,
    num_workers: int | tuple[int, int],
    use_gpu: bool,
    resources_per_worker: Mapping[str, float] | None,
    placement_strategy: str | None,
) -> ray.train.ScalingConfig:
    """Ray's ScalingConfig with the shorthands filled in where it has its default."""
    import ray.train

    resources = dict(resources_per_worker) if resources_per_worker else None
    if given is None:
        return ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            placement_strategy=placement_strategy or "PACK",
        )
    changes: dict[str, Any] = {}
    if given.num_workers == 1 or isinstance(given.num_workers, tuple):  # of an elastic run: as many as there are now
        changes["num_workers"] = num_workers
    if use_gpu and not given.use_gpu:
        changes["use_gpu"] = True
    if resources and given.resources_per_worker is None:
        changes["resources_per_worker"] = resources
    if placement_strategy and given.placement_strategy == "PACK":
        changes["placement_strategy"] = placement_strategy
    return dataclasses.replace(given, **changes)


def merge_run(
    given: ray.train.RunConfig | None,
    failure_config: ray.train.FailureConfig | None,
    name: str | None,
    storage_path: str | None,
    max_failures: int | None,
    runtime_env: Mapping[str, Any] | None,
    storage_filesystem: Any = None,
) -> ray.train.RunConfig:
    """Ray's RunConfig with the shorthands filled in, always as a new object, with Ray Train's own log kept quiet.

    A logging_config that is not Ray's default is the user's and stays.
    """
    import ray.train

    changes: dict[str, Any] = {}
    failure = failure_config or (given.failure_config if given else None)
    if max_failures is not None:
        failure = dataclasses.replace(failure or ray.train.FailureConfig(), max_failures=max_failures)
    if failure is not None:
        changes["failure_config"] = failure
    own = {"name": name, "storage_path": storage_path, "storage_filesystem": storage_filesystem}
    changes.update({key: value for key, value in own.items() if value is not None})
    if runtime_env and not (given and given.worker_runtime_env):
        changes["worker_runtime_env"] = dict(runtime_env)
    default_logging = ray.train.LoggingConfig()
    if given is None or given.logging_config in (None, default_logging):
        # Even its ERROR records only repeat, with stacks, the exception that the caller gets.
        changes["logging_config"] = ray.train.LoggingConfig(log_level="CRITICAL")
    return ray.train.RunConfig(**changes) if given is None else dataclasses.replace(given, **changes)


@contextmanager
def open_channel(on_event: OnEvent | None) -> Iterator[DriverChannel | None]:
    """A listener for the length of one run, or None where nobody wants events."""
    if on_event is None:
        yield None
        return
    channel = DriverChannel(cluster.driver_host(), on_event)
    try:
        yield channel
    finally:
        channel.close()


def _fit(job: Job, scaling: ray.train.ScalingConfig, run: ray.train.RunConfig, worker_main: str) -> ray.train.Result:
    """Ray Train's ``fit``, with its handling of Ctrl-C turned into a KeyboardInterrupt."""
    from ray.train.torch import TorchTrainer

    from raylit.driver.process_group import torch_config
    from raylit.worker.entry import train_loop

    config = {
        "job": job,
        "worker_main": worker_main,
        "run_folder": run_folder(run),
        "outcome_path": f"{run_folder(run)}/outcome.bin",
        "storage_filesystem": run.storage_filesystem,
    }
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if in_main_thread else None
    try:
        with warnings.catch_warnings():
            # Ray 2.60 copies its own deprecated settings at each fit; none of the user's code runs in this process.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            trainer = TorchTrainer(
                train_loop, train_loop_config=config, torch_config=torch_config(), scaling_config=scaling,
                run_config=run,
            )  # fmt: skip
            return trainer.fit()
    except SystemExit:
        # On SIGINT Ray Train's handler aborts the run, waits until its workers are gone, and calls sys.exit(0):
        # a script would end as if it had succeeded, and a notebook would lose its kernel.
        raise KeyboardInterrupt from None
    finally:
        if in_main_thread:
            # Ray Train leaves its handler behind: the next Ctrl-C would speak to a controller that is gone.
            signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)


def run_folder(run: ray.train.RunConfig) -> str:
    """Where Ray Train keeps the run: a path or URI, or a path on ``run.storage_filesystem``."""
    return f"{str(run.storage_path).rstrip('/')}/{run.name}"


def _outcome(result: ray.train.Result, run: ray.train.RunConfig) -> bytes:
    """Rank 0's bytes, from Ray's result or, where they were large, from the run's storage (and then removed)."""
    value = result.return_value
    if value is None:
        raise WorkerLostError("the run ended without an outcome of worker 0")
    if "bytes" in value:
        return bytes(value["bytes"])
    import pyarrow.fs

    filesystem, path = run.storage_filesystem, str(value["path"])
    if filesystem is None:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(path)
    with filesystem.open_input_stream(path) as stream:
        data = bytes(stream.read())
    filesystem.delete_file(path)
    return data
