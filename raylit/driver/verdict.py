"""What the caller is told of a run that failed on its workers: which of several errors, and in which words. Driver.

One fault has many faces: Ray tells of the process that died, the others of a collective that broke. Ray is imported
inside functions only.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from raylit.driver import cluster
from raylit.driver.shipping import explained
from raylit.errors import ProgressTimeoutError, ResourceError, WorkerLostError
from raylit.wire import WorkerFailure
from raylit.worker.failure import WorkerFailed, describe, first_cause, is_consequence, rebuild

_ANSWER_S = 2.0  # for a connection to a host
_GIVEN_UP_S = 60.0  # until Ray gives up a host that is silent: 6 s with the settings of clusters/, most of this without


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
        if packed and not (lost := lost_beside(packed, lost, workers)):
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


def lost_beside(
    packed: Sequence[WorkerFailure], lost: Mapping[int, BaseException], workers: Mapping[int, tuple[str, int]]
) -> dict[int, BaseException]:
    """The workers whose loss explains the others' errors, ``packed``: none where these have a cause of their own.

    ``lost``: those that Ray says are gone. Where it says nothing, those that said nothing and whose host does not
    answer any more. A host that is killed closes its connections at once, while Ray gives it up after some seconds
    only. That is waited for: whatever starts before may be put on the host that is gone.
    """
    if not all(map(is_consequence, packed)):
        return {}
    if lost:
        return dict(lost)
    said = {failure.rank for failure in packed}
    return _gone_with_their_hosts({rank: who for rank, who in workers.items() if rank not in said})


def _gone_with_their_hosts(workers: Mapping[int, tuple[str, int]]) -> dict[int, BaseException]:
    gone = {address for address, ports in cluster.raylets().items()
            if any(_is_on(address, who) for who in workers.values())
            and not any(_answers(address, port) for port in ports)}  # fmt: skip
    until = time.monotonic() + _GIVEN_UP_S
    while gone & cluster.alive() and time.monotonic() < until:
        time.sleep(0.2)
    return {rank: ConnectionError("its host does not answer") for rank, who in workers.items()
            if any(_is_on(address, who) for address in gone)}  # fmt: skip


def _is_on(address: str, worker: tuple[str, int]) -> bool:
    return f"({address})" in worker[0]


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


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
            and not any(_is_on(address, workers[rank]) for address in alive)]  # fmt: skip
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
