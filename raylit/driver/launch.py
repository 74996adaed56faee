"""How a Job gets onto Ray Train workers and its outcome back to the caller. Runs on the driver.

Ray is imported inside functions only. An exception of a worker leaves :func:`launch` as its own type, without
traceback, cause or context; whoever passes it on should do so as ``raise bare(error)`` from a shallow place.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raylit.driver import cluster, waiting
from raylit.driver.channel import DriverChannel
from raylit.driver.shipping import explained
from raylit.errors import ProgressTimeoutError, ResourceError, WorkerLostError
from raylit.wire import Job, WorkerFailure
from raylit.worker.failure import WorkerFailed, bare, describe, first_cause, is_consequence, rebuild
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


def as_callers_error(raised: BaseException, workers: Mapping[int, tuple[str, int]]) -> BaseException:
    """What the caller should see instead of Ray Train's error. ``workers``: rank -> (node, pid) where known."""
    import ray.train
    from ray.exceptions import RayTaskError
    from ray.train import ControllerError, WorkerGroupError

    announced = getattr(ray.train, "PreemptionError", None)  # newer than the oldest Ray that raylit runs with
    if announced is not None and isinstance(raised, announced):
        gone = ", ".join(map(str, sorted(raised.preemption_info.preempted_ranks)))
        return _preempted(WorkerLostError(f"the node of worker {gone} was taken away, as had been announced"))
    if isinstance(raised, WorkerGroupError):
        failed = raised.worker_failures
        packed = [e.failure for e in failed.values() if isinstance(e, WorkerFailed)]
        lost = {rank: e for rank, e in failed.items() if _death(e) is not None}
        if packed and not (lost and all(map(is_consequence, packed))):
            return explained(rebuild(first_cause(packed)), cluster.shipped())
        if not lost:
            other: BaseException = next(iter(failed.values()), raised)
            return other
        taken = any(getattr(_death(e), "preempted", False) for e in lost.values())
        error = lost_error(lost, workers, cluster.alive())
        return _preempted(error) if taken else error
    cause: BaseException = raised.controller_failure if isinstance(raised, ControllerError) else raised
    if isinstance(cause, RayTaskError) and isinstance(cause.cause, BaseException):
        cause = cause.cause
    if type(cause).__name__ == "InsufficientClusterResourcesError":
        return ResourceError(str(cause))
    if type(cause).__name__ in ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError"):
        unplaced = ResourceError(f"the workers could not be started: {(str(cause).splitlines() or [''])[0]}")
        unplaced.__dict__["raylit_unplaced"] = True
        return unplaced
    return cause


def _preempted(error: WorkerLostError) -> WorkerLostError:
    """Say on the error that the loss had been announced."""
    error.__dict__["raylit_preempted"] = True
    return error


def _death(error: BaseException) -> BaseException | None:
    """Ray's account of a worker process that is gone, or None where ``error`` is something else."""
    from ray.exceptions import RayActorError

    # Ray Train wraps the actor's death in a type that is not public; its attribute leads to Ray core's public one.
    inner = getattr(error, "health_check_failure", error)
    if isinstance(inner, RayActorError) or type(error).__name__ == "WorkerHealthCheckTimeoutError":
        return inner if isinstance(inner, BaseException) else error
    return None


def account_of(death: BaseException) -> str:
    """Of Ray's account of how a process came to its end the line that says most."""
    lines = [line.strip() for line in str(death).splitlines() if line.strip()]
    telling = (line for line in lines if any(word in line.lower() for word in ("exit", "memory", "node has died")))
    return next(telling, lines[0] if lines else "")[:400]


def stalled_error(
    stalled: Mapping[int, dict[str, Any]], workers: Mapping[int, tuple[str, int]]
) -> ProgressTimeoutError:
    """Word the end of a run that stood still: the rank that the others waited for, where it was, and its stack.

    That is the first that waits for nobody; where all that spoke wait, one that did not speak (its process is stopped,
    or in native code that lets no other thread run), else the one that is furthest behind.
    """
    busy = sorted(rank for rank, said in stalled.items() if not said["waiting"])
    silent = sorted(rank for rank in workers if rank not in stalled)
    behind = sorted(stalled, key=lambda rank: (stalled[rank]["where"].get("global_step", 0),
                                               stalled[rank]["where"].get("batch_idx", 0), rank))  # fmt: skip
    rank = (busy or silent or behind)[0]
    some = next(iter(stalled.values()))
    if rank not in stalled:
        node, process = workers[rank]
        text = f"worker {rank} on node {node} (process {process}) made no progress for {some['timeout_s']:g} s"
        error = ProgressTimeoutError(
            f"{text}, and the other workers waited for it. It could not say where it stands: its process is stopped, "
            "or in native code that lets no Python thread run."
        )
    else:
        said = stalled[rank]
        failure = WorkerFailure(
            rank=rank, node_name=said["node"], type_name="", message="", pickled=None,
            frames=tuple((str(f), int(n), str(function), str(line)) for f, n, function, line in said["frames"]),
            where=said["where"],
        )  # fmt: skip
        place = describe(failure).replace("raised on", "it stands in", 1)
        note = " Every worker waits for the others: do all of them call the same collectives?" if not busy else ""
        error = ProgressTimeoutError(
            f"worker {rank} made no progress for {said['timeout_s']:g} s and was ended.{note} "
            f"progress_timeout=None waits for ever.\n{place}"
        )
    error.__dict__.update(raylit_rank=rank, raylit_node=workers[rank][0] if rank in workers else None)
    return error


def lost_error(
    lost: Mapping[int, BaseException], workers: Mapping[int, tuple[str, int]], alive: Collection[str] | None = None
) -> WorkerLostError:
    """Word the death of worker processes: rank, node and process where known, and Ray's reason in one line.

    ``alive``: the addresses of all nodes that Ray hears of, or None. A worker whose node is none of them was lost with
    it; what Ray says of the process then depends on which of its calls was under way.
    """
    gone = [rank for rank in lost if rank in workers and alive is not None
            and not any(f"({address})" in workers[rank][0] for address in alive)]  # fmt: skip
    rank = min(gone or lost)
    who = f"worker {rank}"
    if rank in workers:
        who += f" on node {workers[rank][0]} (process {workers[rank][1]})"
    others = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
    if gone:
        what = "was lost with its node, which Ray hears nothing of any more\nThe machine is off, or its network. "
    else:
        what = (f"died without an exception: {account_of(_death(lost[rank]) or lost[rank])}\n"
                "Killed by the system (out of memory?), by a signal, or its node was lost. ")  # fmt: skip
    error = WorkerLostError(f"{who}{others} {what}max_failures=N starts such a run again, from its newest checkpoint.")
    error.__dict__.update(raylit_rank=rank, raylit_node=workers[rank][0] if rank in workers else None)
    return error
