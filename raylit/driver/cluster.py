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

import yaml

from raylit.driver import shipping
from raylit.driver.entrance import must_answer, must_let_in, running_here
from raylit.driver.fitting import beyond_growth, misfit
from raylit.driver.project import script_base
from raylit.errors import ResourceError
from raylit.wire import ClusterCpus

# How often the controller asks the workers how they are, at the least: the end of a run, or a failure, is seen after
# this long. Ray's default of 2 s is pure waiting.
_POLL_S = 0.1
# Between two polls for each worker: asking one costs the controller some 0.25 ms of its core, so a fifth of it at most.
_POLL_S_OF_WORKER = 0.001
# Ray Train's public settings for one run. The driver hands them on to the controller and the workers.
_RUN_ENVIRONMENT = {
    # Workers stay in the caller's directory instead of a folder below the Ray session.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Ray doubles each print into a log record; prints travel through raylit's channel.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Ray 2.60 announces a coming change of default on stderr in every process without this.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Of the connection that was made last: at most one.
_shipped: list[shipping.Shipped] = []
_LAUNCHERS_FILE = Path("~/ray_bootstrap_config.yaml")  # of `ray up`, on a head node
# A process of its own that polls for announced node losses: of no use where the only node is the driver's own.
_SINGLE_NODE_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def connect(runtime_env: Mapping[str, Any] | None = None) -> bool:
    """Join the cluster that ``RAY_ADDRESS`` or a running ``ray start`` names, else start Ray on this machine.

    Does nothing where Ray is initialised already. Returns True where this call made the connection.

    Code on workers: on the driver's own machine they get the caller's working directory and ``sys.path`` (see
    ``raylit.worker.entry``), so nothing is shipped. Where the cluster has other nodes, or may get some, the project of
    the running script is shipped as Ray's ``working_dir`` (see ``raylit.driver.project``), unless ``runtime_env`` or
    the job's own runtime environment (``raylit submit``, ``ray job submit --working-dir``) names one. In a notebook,
    and for a script in a home folder, nothing is shipped. ConfigError where the project is too large for it,
    and where nobody answers at an address or the head refuses our token.
    """
    with _quiet_of_lost_nodes():
        import ray

    if ray.is_initialized():
        return False
    named = os.environ.get("RAY_ADDRESS", "")
    if ":" in named and "://" not in named:
        must_answer(named)
        must_let_in(named)
    elif named in ("", "auto") and (here := running_here()) is not None:
        must_let_in(here, found=True)
    given = dict(runtime_env or {})
    _init(given)
    in_job = "working_dir" in shipping.job_environment()
    how: Any = "argument" if "working_dir" in given else "job" if in_job else "alone"
    folder = None
    if how == "alone" and _has_other_nodes():
        folder = shipping.project_folder()
        how = "project" if folder else "home" if script_base() else "interactive"
    if folder is not None:
        # Only who is connected can tell whether there is anyone to ship to, and a connection is told at its beginning.
        ray.shutdown()
        with shipping.environment_with(folder, given) as environment:
            _init(environment)
    _shipped[:] = [shipping.Shipped(_job_id(), how, folder)]
    return True


def shipped() -> shipping.Shipped | None:
    """What the present connection carries to other nodes; None where raylit did not make it."""
    return _shipped[0] if _shipped and connected() and _shipped[0].job_id == _job_id() else None


def _init(environment: Mapping[str, Any]) -> None:
    import ray

    with warnings.catch_warnings(), _importable_raylit():
        warnings.simplefilter("ignore", FutureWarning)
        ray.init(
            runtime_env=dict(environment) or None,
            # Prints come through the channel; Ray's forwarding would show them again, with its own log lines.
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Ignored when joining. Saves the dashboard's processes on a machine that is only ours for this script.
            include_dashboard=False,
        )


def _job_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_job_id())


def _has_other_nodes() -> bool:
    """Whether workers may come to lie on another machine than this process; through Ray Client they always do."""
    return os.environ.get("RAY_ADDRESS", "").startswith("ray://") or not single_node() or may_grow()


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


@contextlib.contextmanager
def _quiet_of_lost_nodes() -> Iterator[None]:
    """Keep Ray from printing a page for each node that is lost; raylit has a line for it.

    Ray reads the variable when it is imported: in a script that imports it before there is no help.
    """
    name = "RAY_DEDUP_LOGS_SKIP_REGEX"
    if "ray" in sys.modules or name in os.environ:
        yield
        return
    os.environ[name] = "^(The node with node id: \\w+ and address: .* has been marked dead|Raylet is terminated)"
    try:
        yield
    finally:
        del os.environ[name]


def alive() -> set[str]:
    """The addresses of the nodes that Ray hears of."""
    return {address for address, ports in raylets().items() if ports}


def raylets() -> dict[str, list[int]]:
    """The ports on which Ray's node managers listen, by address; none for an address that Ray has given up."""
    import ray

    ports: dict[str, list[int]] = {}
    for node in ray.nodes():
        there = ports.setdefault(str(node["NodeManagerAddress"]), [])
        if node["Alive"]:
            there.append(int(node["NodeManagerPort"]))
    return ports


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

    A cluster that may grow (:func:`may_grow`) is refused only where its file says that it cannot grow so far.
    Resources that other jobs hold at the moment count as there; the run then waits for them.
    """
    problem = problem_of(num_workers, per_worker(resources_per_worker, use_gpu))
    if problem is not None:
        raise ResourceError(problem)


def problem_of(num_workers: int, bundle: Mapping[str, float]) -> str | None:
    """Why the cluster can never give ``num_workers`` times ``bundle``, with the arithmetic; None where it may."""
    import ray

    nodes = [
        (str(n["NodeManagerAddress"]), {str(k): float(v) for k, v in n["Resources"].items()})
        for n in ray.nodes()
        if n["Alive"]
    ]
    problem = misfit(num_workers, bundle, nodes)
    if problem is None or not may_grow():
        return problem
    return beyond_growth(problem, num_workers, bundle, nodes, _launchers_file())


def _launchers_file() -> dict[str, Any]:
    """The file that ``ray up`` leaves on its head; empty elsewhere."""
    try:
        loaded = yaml.safe_load(_LAUNCHERS_FILE.expanduser().read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def cpus_beside(
    num_workers: int, resources_per_worker: Mapping[str, float] | None, use_gpu: bool
) -> ClusterCpus | None:
    """The cluster's CPUs and what the workers take of them; None for a cluster that may grow."""
    if may_grow():
        return None
    each = per_worker(resources_per_worker, use_gpu).get("CPU", 0.0)
    return ClusterCpus(available().get("CPU", 0.0), num_workers, each)


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
    return _LAUNCHERS_FILE.expanduser().exists()


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


def poll_interval_s(num_workers: int) -> float:
    """Seconds that Ray Train's controller leaves between two polls of so many workers: 0.1 up to 100, then 1 ms each.

    It is also how long a poll may take before a worker counts as one that did not answer this time.
    """
    return max(_POLL_S, num_workers * _POLL_S_OF_WORKER)


@contextlib.contextmanager
def run_settings(num_workers: int) -> Iterator[None]:
    """Ray Train's settings and a quiet ``ray.train`` logger in this process for one run; everything is put back.

    A variable that is set already is the user's and stays.
    """
    wanted = {**_RUN_ENVIRONMENT, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{poll_interval_s(num_workers):g}"}
    if single_node() and not may_grow():
        wanted |= _SINGLE_NODE_ENVIRONMENT
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
