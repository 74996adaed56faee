"""What the facts of nodes mean: pure functions, from plain values to rows. Floor 6; standard library only.

``facts`` is what ``node.facts`` returned, by the node's name. Each limit has its reason beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raylit.doctor.report import CLUSTER, Row, green, red, yellow

Facts = Mapping[str, Any]
HERE = "this process"  # the caller's own, among the nodes

GB = 1_000_000_000
_CLOCK_YELLOW_S, _CLOCK_RED_S = 2.0, 30.0  # logs in the wrong order; tokens and signatures of clouds that are refused
_DISK_YELLOW_BYTES, _DISK_RED_BYTES = 10 * GB, GB  # some checkpoints of a middling model; not even one
_DISK_RED_USED = 0.95  # Ray writes no more objects to a disk that is fuller
_SHM_RED_BYTES = 256 * 1024 * 1024  # a container's default is 64 MB: workers of a DataLoader end with a bus error
_FILES_YELLOW, _FILES_RED = 4096, 1024  # Ray warns below the first; a raylet of a small cluster needs the second
_PROCESSES_YELLOW, _PROCESSES_RED = 4096, 1024  # threads count, and a worker has some hundred
_MEMORY_YELLOW, _MEMORY_RED = 0.15, 0.05  # free, of all; below the second Ray ends workers
_SWAP_YELLOW_BYTES = GB


def versions(facts: Mapping[str, Facts], here: Mapping[str, str] | None) -> list[Row]:
    """A row for each of Python, Ray, torch and raylit. ``here``: the caller's versions."""
    rows = []
    for package in ("python", "ray", "torch", "raylit"):
        by_version: dict[str, list[str]] = {}
        for name, each in facts.items():
            by_version.setdefault(str(each["versions"][package]), []).append(name)
        if here is not None:
            by_version.setdefault(here[package], []).append(HERE)
        rows.append(_version_row(f"{package} version", package, by_version))
    return rows


def _version_row(check: str, package: str, by_version: Mapping[str, list[str]]) -> Row:
    missing = [version for version in by_version if version.startswith(("not installed", "cannot be imported"))]
    if len(by_version) == 1 and not missing:
        return green(check, CLUSTER, next(iter(by_version)))
    value = "; ".join(f"{version}: {_names(names)}" for version, names in by_version.items())
    if missing:
        return red(check, CLUSTER, value, f"install the same {package} on every node, in the Python that Ray runs in")
    if package == "torch" and len({version.partition("+")[0] for version in by_version}) == 1:
        return yellow(
            check, CLUSTER, value, "builds of one version: right where some nodes have GPUs and others do not"
        )
    return red(
        check, CLUSTER, value, f"install one version of {package} everywhere; ray start again on what you change"
    )


def clock(node: str, ahead_s: float) -> Row:
    """How far a node's clock is from the caller's."""
    value = f"{ahead_s:+.3f} s"
    remedy = "let an NTP client (chrony, systemd-timesyncd) set this node's clock"
    if abs(ahead_s) > _CLOCK_RED_S:
        return red("clock", node, value, remedy)
    return yellow("clock", node, value, remedy) if abs(ahead_s) > _CLOCK_YELLOW_S else green("clock", node, value)


def temp_disk(node: str, disk: Facts | None) -> Row:
    """The disk of Ray's temp folder."""
    check = "temp disk"
    if disk is None:
        return yellow(check, node, "unknown", "look at Ray's temp folder on this node: it cannot be read")
    value = f"{size(disk['free'])} free of {size(disk['total'])}"
    remedy = f"free some space below {disk['path']}, or ray start --temp-dir on a larger disk"
    if disk["free"] < (1 - _DISK_RED_USED) * disk["total"]:
        return red(check, node, value, f"{remedy}: above {_DISK_RED_USED:.0%} Ray writes no more objects to it")
    return _by_free(check, node, value, disk["free"], remedy)


def storage_disk(node: str, free_bytes: int | None) -> Row | None:
    """The disk of the storage as this node sees it; None for a storage that is no disk."""
    if free_bytes is None:
        return None
    remedy = "free some space, or give a storage with more"
    return _by_free("storage disk", node, f"{size(free_bytes)} free", free_bytes, remedy)


def _by_free(check: str, node: str, value: str, free: int, remedy: str) -> Row:
    if free < _DISK_RED_BYTES:
        return red(check, node, value, remedy)
    return yellow(check, node, value, remedy) if free < _DISK_YELLOW_BYTES else green(check, node, value)


def shared_memory(node: str, shm: Facts | None, object_store_bytes: float) -> Row:
    """``/dev/shm`` against Ray's object store, which lies in it, and what DataLoaders' workers need of it."""
    check = "shared memory"
    if shm is None:
        return green(check, node, "no /dev/shm on this system")
    value = f"{size(shm['total'])} in /dev/shm, object store {size(object_store_bytes)}"
    remedy = "a larger /dev/shm (docker run --shm-size=8g, an emptyDir in memory), or ray start --object-store-memory"
    if shm["total"] < _SHM_RED_BYTES:
        return red(check, node, value, f"{remedy}; as it is, workers of a DataLoader end with a bus error")
    if shm["total"] < object_store_bytes:
        return yellow(check, node, value, f"{remedy}; as it is, objects go through the disk, which is slow")
    return green(check, node, value)


def gpus(node: str, ray_gpus: float, found: Facts) -> Row:
    """GPUs that Ray gives out, that torch can use, and that the driver has."""
    check, smi, usable = "gpus", found["smi"], found["torch"]
    if not ray_gpus and not usable and not smi:
        return green(check, node, "none")
    value = f"Ray {ray_gpus:g}, torch {usable}, nvidia-smi {'-' if smi is None else smi}"
    built, driver = found["built_for"], found["driver_cuda"]
    value += f"; CUDA {built} in torch, {driver} in the driver" if built and driver else ""
    if usable < ray_gpus or (smi and not usable):
        is_red = usable < ray_gpus
        remedy = "restart Ray on this node with as many as torch can use (ray start --num-gpus)"
        if built is None:
            remedy = "this torch is a build without CUDA: install one with (pytorch.org names it)"
        elif driver and _major(built) > _major(driver):
            remedy = f"this torch needs a driver for CUDA {built}: a newer driver, or torch built for CUDA {driver}"
        elif smi and not usable:
            remedy = "the driver has GPUs and torch can use none: see CUDA_VISIBLE_DEVICES and torch.cuda.init()"
        return (red if is_red else yellow)(check, node, value, remedy)
    if usable > ray_gpus:
        return yellow(
            check, node, value, "Ray gives out fewer than there are: ray start --num-gpus, if that is not wanted"
        )
    return green(check, node, f"{value}; {_names(list(dict.fromkeys(found['names'])))}" if found["names"] else value)


def gpu_drivers(facts: Mapping[str, Facts]) -> Row | None:
    """Whether the nodes have one driver version; None where there are no GPUs."""
    by_driver: dict[str, list[str]] = {}
    for name, each in facts.items():
        if each["gpus"]["driver"]:
            by_driver.setdefault(each["gpus"]["driver"], []).append(name)
    if not by_driver:
        return None
    if len(by_driver) == 1:
        return green("gpu driver", CLUSTER, next(iter(by_driver)))
    value = "; ".join(f"{driver}: {_names(names)}" for driver, names in by_driver.items())
    return yellow("gpu driver", CLUSTER, value, "install one driver version on every node: NCCL is tested with one")


def open_files(node: str, limits: Facts) -> Row:
    """The soft limit of open files."""
    return _limit("open files", node, limits["files"], _FILES_YELLOW, _FILES_RED,
                  "ulimit -n 65536 before ray start (LimitNOFILE= in systemd, --ulimit nofile= in docker)")  # fmt: skip


def processes(node: str, limits: Facts) -> Row:
    """How many processes and threads there may be: the user's limit, or the container's."""
    known = [each for each in (limits["processes"], limits["pids"]) if each is not None]
    return _limit("processes", node, min(known) if known else None, _PROCESSES_YELLOW, _PROCESSES_RED,
                  "ulimit -u before ray start; in a container docker run --pids-limit, or podPidsLimit")  # fmt: skip


def _limit(check: str, node: str, value: int | None, yellow_below: int, red_below: int, remedy: str) -> Row:
    if value is None:
        return green(check, node, "no limit")
    if value >= yellow_below:
        return green(check, node, f"{value}")
    return (red if value < red_below else yellow)(check, node, f"{value}", remedy)


def memory(node: str, found: Facts, ray_bytes: float) -> Row:
    """Free memory; and whether Ray gives out more than there is."""
    check, total, free = "memory", found["total"], found["available"]
    if total is None or free is None:
        return green(check, node, "unknown on this system")
    if found["limit"] is not None:
        total, free = found["limit"], min(free, max(found["limit"] - (found["used"] or 0), 0))
    value = f"{size(free)} free of {size(total)}{' (the container)' if found['limit'] is not None else ''}"
    remedy = "end what else uses this node's memory, or give it more"
    if free < _MEMORY_RED * total:
        return red(check, node, value, f"{remedy}: Ray ends workers when less than {_MEMORY_RED:.0%} is free")
    if ray_bytes > total:
        return yellow(check, node, f"{value}; Ray gives out {size(ray_bytes)}", "ray start --memory with what is there")
    return yellow(check, node, value, remedy) if free < _MEMORY_YELLOW * total else green(check, node, value)


def swap(node: str, found: Facts) -> Row:
    """Whether the node is swapping: a step then waits for a disk."""
    total, free = found["swap_total"], found["swap_free"]
    if not total:
        return green("swap", node, "none" if total == 0 else "unknown on this system")
    value = f"{size(total - free)} used of {size(total)}"
    if total - free > _SWAP_YELLOW_BYTES:
        return yellow(
            "swap", node, value, "memory was short, and steps wait for the disk: end what else runs here, or swapoff -a"
        )
    return green("swap", node, value)


def cpus(node: str, ray_cpus: float, found: Facts) -> Row:
    """CPUs that Ray gives out against those that its processes may use."""
    allowed = min(float(found["count"]), found["quota"] if found["quota"] is not None else float(found["count"]))
    value = f"Ray {ray_cpus:g}, usable {allowed:g}"
    if found["quota"] is not None and found["quota"] < found["count"]:
        value += f" (the container's limit; the machine has {found['count']})"
    if ray_cpus > allowed + 0.01:
        return yellow("cpus", node, value, f"ray start --num-cpus={max(int(allowed), 1)}: workers would share CPUs")
    return green("cpus", node, value)


def size(size_bytes: float) -> str:
    """``1.2 GB``: powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def _names(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _major(version: str) -> int:
    return int(version.partition(".")[0])
