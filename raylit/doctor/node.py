"""What each node does when a cluster is examined: say what it has, listen, reach the others, all-reduce. On the node.

Shipped as it is here (``raylit/driver/each_node.py``), to nodes on which raylit may be missing or another one: nothing
of raylit's is imported there, but to ask for its version. All answers are plain values.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raylit.worker.interface import VARIABLE, interface_for_gloo, name_interface

MODULES = (interface_for_gloo.__module__,)  # what has to be shipped along with ``facts`` and ``all_reduce``
SMALL_BYTES, LARGE_BYTES = 4, 25 * 1000 * 1000  # a flag, and the bucket that torch's DDP sends at once (25 MB)
_SMALL_ROUNDS, _LARGE_ROUNDS, _WARM_ROUNDS = 50, 3, 3
_REACH_S = 3.0  # for one connection: a packet that a firewall drops is never answered
_GREETING = 16  # bytes that a listener of ours sends to whoever connects


# -- what the node has -----------------------------------------------------------------------------------------------


def facts(kept: dict[str, Any], temp_folder: str, marks: Sequence[str]) -> dict[str, Any]:
    """Return what this node has. A part that cannot be found out is None, and judged as such.

    ``marks``: a process with one of these on its command line belongs to this cluster; a machine may run several.
    """
    torch, torch_says = _torch()
    return {
        "versions": {
            "python": platform.python_version(),
            "ray": _version("ray"),
            "torch": torch_says,
            "raylit": _version("raylit"),
        },
        "temp": _disk(temp_folder or "/tmp"),
        "shm": _disk("/dev/shm") if os.path.isdir("/dev/shm") else None,
        "gpus": _gpus(torch),
        "limits": _limits(),
        "memory": _memory(),
        "cpus": _cpus(),
        "auth_mode": os.environ.get("RAY_AUTH_MODE", ""),
        "listening": listening(marks),
        "resolves_to": _own_name_resolves_to(),
        # What a run has here too: named by whoever started Ray, or by raylit where the host's own name misleads.
        "gloo_interface": os.environ.get(VARIABLE) or interface_for_gloo() or "",
    }


def versions() -> dict[str, str]:
    """Return the versions in this process, as ``facts`` does."""
    return {"python": platform.python_version(), "ray": _version("ray"), "torch": _version("torch"),
            "raylit": _version("raylit")}  # fmt: skip


def _version(name: str) -> str:
    """The version that an import here gets, or why there is none."""
    try:
        return str(importlib.import_module(name).__version__)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"cannot be imported: {error}"
    except Exception as error:  # a broken installation raises anything
        return f"cannot be imported: {(str(error).splitlines() or [type(error).__name__])[0]}"


def _torch() -> tuple[Any, str]:
    says = _version("torch")
    with contextlib.suppress(Exception):  # told by the version
        return importlib.import_module("torch"), says
    return None, says


def _disk(path: str) -> dict[str, Any] | None:
    while path and not os.path.isdir(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    # As Ray reckons: what a user may still have, of all there is.
    return {"path": path, "free": usage.free, "total": usage.total}


def _gpus(torch: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": 0, "built_for": None, "driver": None, "driver_cuda": None, "smi": None,
                             "names": []}  # fmt: skip
    if torch is not None:
        found["built_for"] = torch.version.cuda
        with contextlib.suppress(Exception):  # a driver that is too old raises; then torch can use none
            found["torch"] = int(torch.cuda.device_count()) if torch.cuda.is_available() else 0
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return found
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
        rows = [line.rsplit(",", 1) for line in told.stdout.splitlines() if line.count(",")]
        found["smi"] = len(rows) if told.returncode == 0 else 0
        if told.returncode == 0 and rows:
            found["names"], found["driver"] = [row[0].strip() for row in rows], rows[0][1].strip()
            head = subprocess.run([tool], capture_output=True, text=True, timeout=10, check=False).stdout
            cuda = re.search(r"CUDA(?: UMD)? Version:\s*([\d.]+)", head)
            found["driver_cuda"] = cuda.group(1) if cuda else None
    return found


def _limits() -> dict[str, Any]:
    import resource

    def soft(which: int) -> int | None:
        value = resource.getrlimit(which)[0]
        return None if value == resource.RLIM_INFINITY else int(value)

    return {"files": soft(resource.RLIMIT_NOFILE), "processes": soft(resource.RLIMIT_NPROC),
            "pids": _cgroup_number("pids.max", "pids/pids.max")}  # fmt: skip


def _memory() -> dict[str, Any]:
    table: dict[str, int] = {}
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            table[name] = int(rest.split()[0]) * 1024
    limit = _cgroup_number("memory.max", "memory/memory.limit_in_bytes")
    used = _cgroup_number("memory.current", "memory/memory.usage_in_bytes")
    stat = (_cgroup_text("memory.stat") or _read("/sys/fs/cgroup/memory/memory.stat") or "").splitlines()
    cached = [int(line.split()[1]) for line in stat if line.startswith(("inactive_file ", "total_inactive_file "))]
    if used is not None and cached:  # pages of files, which go when memory is needed
        used -= max(cached)
    return {
        "total": table.get("MemTotal"), "available": table.get("MemAvailable"),
        "swap_total": table.get("SwapTotal"), "swap_free": table.get("SwapFree"),
        # A limit above what the machine has is none.
        "limit": limit if limit is not None and limit < table.get("MemTotal", limit + 1) else None, "used": used,
    }  # fmt: skip


def _cpus() -> dict[str, Any]:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = None
    for text in (_cgroup_text("cpu.max"), _cgroup_v1_quota()):
        parts = (text or "").split()
        if len(parts) == 2 and parts[0] not in ("max", "-1"):
            quota = int(parts[0]) / int(parts[1])
    return {"count": count, "quota": quota}


def _cgroup_v1_quota() -> str | None:
    quota, period = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    return f"{quota} {period}" if quota and period else None


def _cgroup_text(name: str) -> str | None:
    """A file of this process's own cgroup (version 2); in a container that is the root of what it sees."""
    own = (_read("/proc/self/cgroup") or "").splitlines()
    path = next((line[3:] for line in own if line.startswith("0::")), "/")
    return _read(f"/sys/fs/cgroup{path.rstrip('/')}/{name}") or _read(f"/sys/fs/cgroup/{name}")


def _cgroup_number(v2: str, v1: str) -> int | None:
    text = _cgroup_text(v2) or _read(f"/sys/fs/cgroup/{v1}")
    return int(text) if text and text.isdigit() else None


def _read(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None


def listening(marks: Sequence[str]) -> list[dict[str, Any]] | None:
    """Return the cluster's listeners that matter for who may get in; None where that is not to be seen (not Linux).

    Each: ``{"service": "GCS" | "dashboard" | "client server", "host": "0.0.0.0", "port": 6379}``.
    """
    if not os.path.isdir("/proc/net"):
        return None
    sockets: dict[str, tuple[str, int]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in (_read(table) or "").splitlines()[1:]:
            part = line.split()
            if part[3] == "0A":  # TCP_LISTEN
                sockets[part[9]] = _address(part[1])
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        command = (_read(f"/proc/{pid}/cmdline") or "").split("\0")
        service = _service(command)
        if service is None or not any(mark in " ".join(command) for mark in marks):
            continue
        with contextlib.suppress(OSError):  # gone, or another user's
            for handle in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(f"/proc/{pid}/fd/{handle}")
                    if target.startswith("socket:[") and target[8:-1] in sockets:
                        host, port = sockets[target[8:-1]]
                        if service != "dashboard" or f"--port={port}" in command:
                            found.append({"service": service, "host": host, "port": port})
    return found


def _service(command: Sequence[str]) -> str | None:
    if any(part.endswith("/gcs_server") for part in command[:1]):
        return "GCS"
    if "ray.util.client.server" in command:
        return "client server"
    return "dashboard" if any(part.endswith("/dashboard/dashboard.py") for part in command) else None


def _address(text: str) -> tuple[str, int]:
    """An address of ``/proc/net/tcp`` or ``tcp6``: groups of 32 bits, each in this machine's byte order."""
    raw, _, port = text.partition(":")
    words = b"".join(bytes.fromhex(raw[i : i + 8])[::-1] for i in range(0, len(raw), 8))
    if len(words) == 4:
        return socket.inet_ntop(socket.AF_INET, words), int(port, 16)
    host = socket.inet_ntop(socket.AF_INET6, words)
    return host.removeprefix("::ffff:") if "." in host else host, int(port, 16)


def _own_name_resolves_to() -> str | None:
    """Where gloo listens, unless an interface is named: at the address of this host's own name."""
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return None


# -- who reaches whom ------------------------------------------------------------------------------------------------


def listen(kept: dict[str, Any], greeting: bytes, address: str) -> int:
    """Listen on a free port, as torch will, and greet whoever connects; return the port. Ends with the actor."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server(("", 0), family=family, backlog=128)

    def greet() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.sendall(greeting)

    threading.Thread(target=greet, name="raylit-doctor-listener", daemon=True).start()
    kept["listener"] = listener
    return int(listener.getsockname()[1])


def reach(kept: dict[str, Any], targets: Mapping[str, tuple[str, int, bytes | None]]) -> dict[str, str]:
    """Connect to each target (host, port, what it says first); return for each that failed what went wrong.

    What it says first: None where any 16 bytes will do.
    """
    with ThreadPoolExecutor(min(32, len(targets) or 1)) as pool:
        results = pool.map(lambda item: (item[0], _connect(*item[1])), targets.items())
        return {name: fault for name, fault in results if fault is not None}


def _connect(host: str, port: int, greeting: bytes | None) -> str | None:
    try:
        with socket.create_connection((host, port), timeout=_REACH_S) as connection:
            found = b""
            while len(found) < _GREETING:
                more = connection.recv(_GREETING - len(found))
                if not more:
                    return "closed at once"
                found += more
            return None if greeting is None or found == greeting else "something else answers there"
    except TimeoutError:
        return f"no answer within {_REACH_S:g} s"
    except OSError as error:
        return (error.strerror or str(error)).lower()


def get_in(kept: dict[str, Any], services: Sequence[tuple[str, str, int]]) -> list[str]:
    """Try Ray's own services (service, host, port) from here, without a token; return for each what came of it.

    ``"closed"``: not to be reached. ``"open"``: to be reached. ``"asks"``, ``"serves"``: the dashboard, which refuses
    a stranger, or does what he wants.
    """
    with ThreadPoolExecutor(min(32, len(services) or 1)) as pool:
        return list(pool.map(lambda each: _try(*each), services))


def _try(service: str, host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), timeout=_REACH_S).close()
    except OSError:
        return "closed"
    if service != "dashboard":
        return "open"
    # The list of jobs: whoever is given it may also send one.
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/api/jobs/"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is none of this cluster's
    try:
        with opener.open(url, timeout=_REACH_S):
            return "serves"
    except urllib.error.HTTPError as error:
        return "asks" if error.code in (401, 403) else "open"
    except OSError:
        return "open"


# -- all-reduce ------------------------------------------------------------------------------------------------------


def free_port(kept: dict[str, Any], address: str) -> int:
    """A port that is free on this node now: for rank 0's rendezvous."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def ready(kept: dict[str, Any], with_gpu: bool) -> bool:
    """Answer once torch is loaded: whether this process can take part, on the GPU that it reserved if ``with_gpu``."""
    torch = _torch()[0]
    return torch is not None and (not with_gpu or bool(torch.cuda.is_available()))


def stage(kept: dict[str, Any]) -> str:
    """How far this rank's all-reduce has come."""
    return str(kept.get("stage", "not begun"))


def all_reduce(
    kept: dict[str, Any], host: str, port: int, world_size: int, apart: bool, backend: str, timeout_s: float, rank: int
) -> dict[str, float]:
    """Join a process group and time its all-reduce; return median seconds ``{"small_s": ..., "large_s": ...}``.

    ``apart``: the ranks are on several nodes. Raises what torch raises, and ValueError where a sum is wrong.
    """
    kept["stage"] = f"meeting rank 0 at {host}:{port}"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=host, MASTER_PORT=str(port))
    name_interface(apart)  # as a run's workers do
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    url = f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
    dist.init_process_group(
        backend, init_method=url, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=timeout_s)
    )
    try:
        times = {}
        for name, size, rounds in (("small_s", SMALL_BYTES, _SMALL_ROUNDS), ("large_s", LARGE_BYTES, _LARGE_ROUNDS)):
            kept["stage"] = f"all-reduce of {size} bytes"
            tensor = torch.empty(size // 4, dtype=torch.float32, device=device)
            finish: Callable[[], None] = torch.cuda.synchronize if backend == "nccl" else lambda: None
            taken = []
            for _ in range(_WARM_ROUNDS + rounds):
                tensor.fill_(rank + 1)
                finish()
                began = time.perf_counter()
                dist.all_reduce(tensor)
                finish()
                taken.append(time.perf_counter() - began)
            expected = world_size * (world_size + 1) / 2
            if not bool((tensor == expected).all()):
                raise ValueError(f"an all-reduce of {size} bytes gave {tensor[0].item():g} instead of {expected:g}")
            times[name] = statistics.median(taken[_WARM_ROUNDS:])
        kept["stage"] = "done"
        return times
    finally:
        dist.destroy_process_group()
