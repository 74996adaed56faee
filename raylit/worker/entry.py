"""The function that Ray Train runs on each worker. Runs on the worker; imports Ray inside functions only.

It puts the process in the caller's place (working directory, import path), opens the channel, calls ``worker_main``
and brings its bytes, or its exception, back.
"""

from __future__ import annotations

import dataclasses
import filecmp
import functools
import importlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, cast

from raylit.wire import Job, World
from raylit.worker.channel import WorkerChannel, redirected
from raylit.worker.failure import WorkerFailed, is_consequence, pack

# The variable by which a worker learns which folder of the caller's was shipped, in each spelling of its path.
PROJECT = "RAYLIT_PROJECT"

WorkerMain = Callable[[Job, World, "WorkerChannel | None"], bytes]

# A collective that broke because a peer died is reported late: Ray must see the peer's own failure first.
# Ray notices a killed process in under one second; the controller ends this worker as soon as it has.
_CONSEQUENCE_DELAY_S = 3.0
# Outcomes above this go through the run's storage: Ray would copy them through the controller's memory.
LARGE_OUTCOME_BYTES = 200 * 1024 * 1024


def train_loop(config: dict[str, Any]) -> dict[str, Any] | None:
    """Run ``config["worker_main"]`` ("module:function") on ``config["job"]``; rank 0's outcome is returned.

    The value is ``{"bytes": ...}`` or ``{"path": ...}``, the latter for an outcome over 200 MB, written to
    ``config["outcome_path"]`` on the run's storage. Raises :class:`WorkerFailed` for any exception.
    """
    world = world_from_ray(config.get("run_folder"))
    outcome = run_job(config["job"], world, config["worker_main"])
    if world.global_rank != 0:
        return None
    if len(outcome) <= config.get("large_outcome_bytes", LARGE_OUTCOME_BYTES):
        return {"bytes": outcome}
    _write(config["outcome_path"], config.get("storage_filesystem"), outcome)
    return {"path": config["outcome_path"]}


def run_job(job: Job, world: World, worker_main: str) -> bytes:
    """What every kind of worker does: take the caller's place, run, flush the prints, pack what is raised."""
    take_callers_place(job)
    channel = WorkerChannel(job.channel, world, os.getpid()) if job.channel is not None else None
    try:
        with redirected(channel, world.global_rank):
            # As in the caller's own process, where records below WARNING are not printed either; Ray sets INFO.
            logging.getLogger().setLevel(logging.WARNING)
            return load(worker_main)(with_payload(job), world, channel)
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: a silent end would read as success
        failure = pack(error, world)
        if is_consequence(failure):
            time.sleep(_CONSEQUENCE_DELAY_S)
        raise WorkerFailed(failure) from None
    finally:
        if channel is not None:
            channel.close()


def take_callers_place(job: Job) -> None:
    """Working directory and import path of the caller, as far as they exist on this host.

    What lies in a project that was shipped is looked for in its copy here, unless the caller's own folder is there
    with the same code: on the caller's machine, or a shared disk. An old copy under the same name is not taken.
    """
    if job.working_dir is not None:
        # Files that are no code are often ignored by git, so not shipped, and on a shared disk: its folder comes first.
        place = next(filter(os.path.isdir, (job.working_dir, _here(job.working_dir))), None)
        if place is not None:
            os.chdir(place)
    known = [entry for entry in dict.fromkeys(map(_here, job.sys_path)) if os.path.exists(entry or ".")]
    sys.path[:] = known + [entry for entry in sys.path if entry not in known]
    if job.argv:
        sys.argv[:] = job.argv


def _here(path: str) -> str:
    """Where a path of the caller's is on this host."""
    # Ray has the folder that it unpacked first on the import path, under a name that says its content.
    on_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    copy = next((each for each in on_path if os.path.basename(each).startswith("_ray_pkg_")), None)
    if copy is None:
        return path
    for project in filter(None, os.environ.get(PROJECT, "").split(os.pathsep)):
        if path == project or path.startswith(project + os.sep):
            return path if _holds_all_of(project, copy) else copy + path[len(project) :]
    names = path.split(os.sep)
    if os.path.exists(path) or os.path.basename(copy) not in names:
        return path
    # A job's working_dir: each host has it below its own folder for Ray.
    return os.path.join(copy, *names[names.index(os.path.basename(copy)) + 1 :])


@functools.lru_cache(maxsize=8)
def _holds_all_of(folder: str, copy: str) -> bool:
    """Whether every Python file of ``copy`` is in ``folder`` too, with the same content."""
    if os.path.realpath(folder) == os.path.realpath(copy):
        return True
    for place, _, names in os.walk(copy):
        for name in names:
            own = os.path.join(place, name)
            if name.endswith(".py"):
                try:
                    if not filecmp.cmp(own, folder + own[len(copy) :], shallow=False):
                        return False
                except OSError:
                    return False
    return os.path.isdir(folder)


def with_payload(job: Job) -> Job:
    """The job with its payload fetched from Ray's object store, where it was put there."""
    if job.payload_ref is None:
        return job
    import ray

    return dataclasses.replace(job, payload=ray.get(job.payload_ref), payload_ref=None)


def load(path: str) -> WorkerMain:
    """Import ``"module:function"``."""
    module, _, name = path.partition(":")
    return cast(WorkerMain, getattr(importlib.import_module(module), name))


def world_from_ray(run_folder: str | None) -> World:
    """This worker's place as Ray Train assigned it."""
    import ray.train

    context = ray.train.get_context()
    return World(
        global_rank=context.get_world_rank(),
        local_rank=context.get_local_rank(),
        node_rank=context.get_node_rank(),
        world_size=context.get_world_size(),
        local_world_size=context.get_local_world_size(),
        node_name=node_name(),
        storage_path=run_folder,
    )


def node_name() -> str:
    """Host name and address as messages show them."""
    import ray.util

    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


def _write(path: str, filesystem: Any, data: bytes) -> None:
    import pyarrow.fs

    target = path
    if filesystem is None:
        filesystem, target = pyarrow.fs.FileSystem.from_uri(path)
    with filesystem.open_output_stream(target) as stream:
        stream.write(data)
