"""The driver's connection to Ray: starting or joining, what the cluster has, a quiet terminal for one run.

Runs on the driver. Ray is imported inside functions only. Nothing here is undone by force: what a person set
(an environment variable, an own ``ray.init``) always wins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raylit.errors import ResourceError
from raylit.wire import ClusterCpus

# Ray Train's public settings for one run. The driver hands them on to the controller and the workers.
_RUN_ENVIRONMENT = {
    # How often the controller asks the workers how they are: the end of a run, or a failure, is seen after this
    # long. The default of 2 s is pure waiting; a poll costs about a millisecond a worker.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # Workers stay in the caller's directory instead of a folder below the Ray session.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Ray doubles each print into a log record; prints travel through raylit's channel.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Ray 2.60 announces a coming change of default on stderr in every process without this.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# A process of its own that polls for announced node losses: of no use where the only node is the driver's own.
_SINGLE_NODE_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def connect(runtime_env: Mapping[str, Any] | None = None) -> bool:
    """Join the cluster that ``RAY_ADDRESS`` or a running ``ray start`` names, else start Ray on this machine.

    Does nothing where Ray is initialised already. Returns True where this call made the connection.

    Code on workers: on the driver's own machine they get the caller's working directory and ``sys.path`` (see
    ``raylit.worker.entry``), so nothing is shipped. On a cluster (an address is given) the folder of the running
    script is shipped as Ray's ``working_dir``, unless ``runtime_env`` or the job's own runtime environment
    (``ray job submit --working-dir``) names one. In a notebook, where there is no script, nothing is shipped.
    """
    import ray

    if ray.is_initialized():
        return False
    environment = dict(runtime_env or {})
    joins = bool(os.environ.get("RAY_ADDRESS")) and os.environ["RAY_ADDRESS"] != "local"
    if joins and not _job_has_working_dir() and "working_dir" not in environment:
        folder = script_folder()
        if folder is not None:
            environment["working_dir"] = folder
    with warnings.catch_warnings(), _importable_raylit():
        warnings.simplefilter("ignore", FutureWarning)
        ray.init(
            runtime_env=environment or None,
            # Prints come through the channel; Ray's forwarding would show them again, with its own log lines.
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Ignored when joining. Saves the dashboard's processes on a machine that is only ours for this script.
            include_dashboard=False,
        )
    return True


@contextlib.contextmanager
def _importable_raylit() -> Iterator[None]:
    """Let a Ray that is started here inherit an import path on which raylit itself is found.

    Needed where raylit runs from a checkout and is not installed; the controller unpickles raylit's types before any
    worker sets its own path. On other machines raylit must be installed.
    """
    before = os.environ.get("PYTHONPATH")
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = root if not before else f"{before}{os.pathsep}{root}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def script_folder() -> str | None:
    """The folder of the script that is running, or None (interactive, ``-c``, an installed command)."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main is None:
        return None
    folder = Path(main).resolve().parent
    return None if folder == Path(sys.executable).parent else str(folder)


def _job_has_working_dir() -> bool:
    # `ray job submit` hands its runtime environment to the driver's process in this documented variable.
    return "working_dir" in os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")


def connected() -> bool:
    """Whether Ray is initialised in this process. Does not import it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def available() -> dict[str, float]:
    """What the cluster has in all, used or free: ``{"CPU": 8.0, "GPU": 1.0, "memory": bytes, ...}``."""
    import ray

    return {str(k): float(v) for k, v in ray.cluster_resources().items()}


def per_worker(resources: Mapping[str, float] | None, use_gpu: bool) -> dict[str, float]:
    """What one worker asks for, with Ray Train's defaults: one CPU, or with ``use_gpu`` one CPU and one GPU."""
    asked = {str(k): float(v) for k, v in (resources or {}).items()}
    if not asked:
        asked["CPU"] = 1.0
    if use_gpu:
        asked.setdefault("GPU", 1.0)
    return {k: v for k, v in asked.items() if v > 0}


def with_gpus(resources: Mapping[str, float] | None, gpus: int) -> Mapping[str, float] | None:
    """What a worker asks for, with as many GPUs as share a batch in it; one is what it asks for anyway."""
    if gpus < 2 or "GPU" in (resources or {}):
        return resources
    return {**(resources or {}), "GPU": float(gpus)}


def check_fits(num_workers: int, resources_per_worker: Mapping[str, float] | None, use_gpu: bool) -> None:
    """Raise :class:`ResourceError` with the arithmetic where the cluster can never give what is asked.

    A cluster that may grow (:func:`may_grow`) is not refused: Ray would add nodes. Resources that other jobs hold at
    the moment count as there; the run then waits for them.
    """
    import ray

    nodes = [
        (str(n["NodeManagerAddress"]), {str(k): float(v) for k, v in n["Resources"].items()})
        for n in ray.nodes()
        if n["Alive"]
    ]
    problem = misfit(num_workers, per_worker(resources_per_worker, use_gpu), nodes)
    if problem is not None and not may_grow():
        raise ResourceError(problem)


def cpus_beside(
    num_workers: int, resources_per_worker: Mapping[str, float] | None, use_gpu: bool
) -> ClusterCpus | None:
    """The cluster's CPUs and what the workers take of them; None for a cluster that may grow."""
    if may_grow():
        return None
    each = per_worker(resources_per_worker, use_gpu).get("CPU", 0.0)
    return ClusterCpus(available().get("CPU", 0.0), num_workers, each)


def misfit(num_workers: int, asked: Mapping[str, float], nodes: list[tuple[str, dict[str, float]]]) -> str | None:
    """Why ``num_workers`` bundles of ``asked`` cannot lie on ``nodes`` (address, resources), or None where they can.

    A bundle lies on one node. All bundles are alike, so filling each node in turn is exact, not an approximation.
    """
    room = [_bundles(asked, has) for _, has in nodes]
    if sum(room) >= num_workers:
        return None
    each = ", ".join(f"{_number(v)} {k}" for k, v in asked.items())
    total = ", ".join(f"{_number(v * num_workers)} {k}" for k, v in asked.items())
    has_in_all = ", ".join(f"{_number(sum(has.get(k, 0.0) for _, has in nodes))} {k}" for k in asked)
    lines = [
        f"num_workers={num_workers} needs {num_workers} x ({each}) = {total}; the cluster has {has_in_all} "
        f"on {len(nodes)} node{'s' * (len(nodes) != 1)}, room for {sum(room)} such worker{'s' * (sum(room) != 1)}.",
    ]
    for (address, has), count in list(zip(nodes, room, strict=True))[:8]:
        listed = ", ".join(f"{_number(has.get(k, 0.0))} {k}" for k in asked)
        lines.append(f"  node {address}: {listed} -> {count}")
    hint = f"Use num_workers={sum(room)} or fewer" if sum(room) else "Ask for less per worker"
    if asked.get("GPU") and not any(has.get("GPU") for _, has in nodes):
        hint = "use_gpu=False trains on the CPUs"
    lines.append(f"{hint}, or lower resources_per_worker, or join a larger cluster (RAY_ADDRESS).")
    return "\n".join(lines)


def _bundles(asked: Mapping[str, float], has: Mapping[str, float]) -> int:
    # A small tolerance: 0.1 of a CPU, ten times, is one CPU.
    counts = [int(has.get(k, 0.0) / v + 1e-9) for k, v in asked.items()]
    return min(counts) if counts else sys.maxsize


def _number(value: float) -> str:
    return f"{value:g}"


def may_grow() -> bool:
    """Whether something could add nodes. Ray has no public question for it, so any sign counts as yes.

    The signs: a node that an autoscaler placed (Ray's label ``ray.io/node-group``), KubeRay's environment, or the
    file that ``ray up`` leaves on a head node. A Ray that was started on this machine alone shows none of them.
    """
    import ray

    if any("ray.io/node-group" in n.get("Labels", {}) for n in ray.nodes() if n["Alive"]):
        return True
    if os.environ.get("KUBERAY_GEN_RAY_START_CMD") or os.environ.get("RAY_CLUSTER_NAME"):
        return True
    return Path("~/ray_bootstrap_config.yaml").expanduser().exists()


def single_node() -> bool:
    """Whether this machine is the whole cluster."""
    import ray

    return sum(1 for n in ray.nodes() if n["Alive"]) == 1


def driver_host() -> str:
    """The address at which workers reach this process: loopback where there is no other node."""
    if single_node() and not may_grow():
        return "127.0.0.1"
    import ray.util

    return str(ray.util.get_node_ip_address())


@contextlib.contextmanager
def run_settings() -> Iterator[None]:
    """Ray Train's settings and a quiet ``ray.train`` logger in this process for one run; everything is put back.

    A variable that is set already is the user's and stays.
    """
    wanted = {**_RUN_ENVIRONMENT, **(_SINGLE_NODE_ENVIRONMENT if single_node() and not may_grow() else {})}
    with quiet_settings(wanted, "ray.train", logging.ERROR):
        yield


@contextlib.contextmanager
def quiet_settings(wanted: Mapping[str, str], log: str, at: int) -> Iterator[None]:
    """Environment variables ``wanted``, and the logger ``log`` at level ``at``, for the length of the body.

    What the user has set, a variable or the logger's level, stays; the rest is put back.
    """
    added = {k: v for k, v in wanted.items() if k not in os.environ}
    logger = logging.getLogger(log)
    level = logger.level
    os.environ.update(added)
    if level == logging.NOTSET:  # set: the user wants to read it
        logger.setLevel(at)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name in added:
            os.environ.pop(name, None)
