"""From made-up facts of nodes to verdicts: each check with a node that is right, and with ones that are wrong."""

from __future__ import annotations

from typing import Any

import pytest

from raylit.doctor import judge
from raylit.doctor.report import CLUSTER, Row, Verdict

GREEN, YELLOW, RED = Verdict.GREEN, Verdict.YELLOW, Verdict.RED
GB, MB = 10**9, 10**6


def of_versions(**versions: str) -> dict[str, Any]:
    same = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0+cpu", "raylit": "0.1.0"}
    return {"versions": {**same, **versions}}


def row_of(rows: list[Row], check: str) -> Row:
    (found,) = [row for row in rows if row.check == check]
    return found


# -- versions --------------------------------------------------------------------------------------------------------


def test_the_same_versions_everywhere_are_green() -> None:
    rows = judge.versions({"a": of_versions(), "b": of_versions()}, of_versions()["versions"])
    assert [(row.check, row.node, row.value, row.verdict) for row in rows] == [
        ("python version", CLUSTER, "3.11.7", GREEN),
        ("ray version", CLUSTER, "2.60.0", GREEN),
        ("torch version", CLUSTER, "2.13.0+cpu", GREEN),
        ("raylit version", CLUSTER, "0.1.0", GREEN),
    ]


@pytest.mark.parametrize("package", ["python", "ray", "torch", "raylit"])
def test_another_version_on_one_node_names_both_sides(package: str) -> None:
    facts = {"a": of_versions(), "b": of_versions(**{package: "1.2.3"}), "c": of_versions()}
    rows = judge.versions(facts, None)
    row = row_of(rows, f"{package} version")
    assert row.verdict is RED and row.value == f"{of_versions()['versions'][package]}: a, c; 1.2.3: b" and row.remedy
    assert [each.verdict for each in rows if each is not row] == [GREEN] * 3


def test_the_caller_is_a_party_of_its_own() -> None:
    rows = judge.versions({"a": of_versions()}, of_versions(raylit="0.2.0")["versions"])
    assert row_of(rows, "raylit version").value == "0.1.0: a; 0.2.0: this process"
    assert row_of(rows, "raylit version").verdict is RED


def test_another_build_of_torch_is_yellow() -> None:
    """A head without GPUs has the CPU build, and that is right."""
    row = row_of(judge.versions({"a": of_versions(), "b": of_versions(torch="2.13.0+cu130")}, None), "torch version")
    assert row.verdict is YELLOW and row.value == "2.13.0+cpu: a; 2.13.0+cu130: b"


@pytest.mark.parametrize("says", ["not installed", "cannot be imported: libcudart.so.13 is missing"])
def test_a_missing_package_is_red_also_where_all_lack_it(says: str) -> None:
    for names in (("a",), ("a", "b")):
        row = row_of(judge.versions({name: of_versions(torch=says) for name in names}, None), "torch version")
        assert row.verdict is RED and says in row.value and "install" in row.remedy


def test_many_nodes_are_counted() -> None:
    facts = {f"n{i}": of_versions() for i in range(10)} | {"other": of_versions(ray="2.61.0")}
    value = row_of(judge.versions(facts, None), "ray version").value
    assert value == "2.60.0: n0, n1, n2, n3 and 6 more; 2.61.0: other"


# -- clock -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead_s", "verdict", "value"),
    [(0.0, GREEN, "+0.000 s"), (-2.0, GREEN, "-2.000 s"), (2.1, YELLOW, "+2.100 s"), (-30.0, YELLOW, "-30.000 s"),
     (30.1, RED, "+30.100 s"), (-3600.0, RED, "-3600.000 s")],
)  # fmt: skip
def test_clock(ahead_s: float, verdict: Verdict, value: str) -> None:
    row = judge.clock("a", ahead_s)
    assert (row.verdict, row.value, row.node) == (verdict, value, "a")
    assert ("NTP" in row.remedy) == (verdict is not GREEN)


# -- disks and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "total", "verdict"),
    [(11 * GB, 100 * GB, GREEN), (9 * GB, 100 * GB, YELLOW), (int(0.9 * GB), 10 * GB, RED),
     (40 * GB, 1000 * GB, RED)],  # 96 % full: Ray writes no more objects, however much that is
)  # fmt: skip
def test_temp_disk(free: int, total: int, verdict: Verdict) -> None:
    row = judge.temp_disk("a", {"path": "/tmp/ray", "free": free, "total": total})
    assert row.verdict is verdict and row.value == f"{judge.size(free)} free of {judge.size(total)}"
    assert ("/tmp/ray" in row.remedy) == (verdict is not GREEN)


def test_a_temp_disk_that_cannot_be_read_is_yellow() -> None:
    assert judge.temp_disk("a", None).verdict is YELLOW


def test_storage_disk() -> None:
    verdicts = [judge.storage_disk("a", free) for free in (11 * GB, 9 * GB, GB // 2)]
    assert [row.verdict for row in verdicts if row] == [GREEN, YELLOW, RED]
    assert judge.storage_disk("a", None) is None


@pytest.mark.parametrize(
    ("shm", "store", "verdict"),
    [(8 * GB, 2 * GB, GREEN), (GB, 2 * GB, YELLOW), (64 * MB, 2 * GB, RED), (64 * MB, 10 * MB, RED)],
)
def test_shared_memory(shm: int, store: int, verdict: Verdict) -> None:
    row = judge.shared_memory("a", {"free": shm, "total": shm}, store)
    assert row.verdict is verdict and judge.size(shm) in row.value and judge.size(store) in row.value
    assert ("--shm-size" in row.remedy) == (verdict is not GREEN)


def test_a_system_without_dev_shm_is_green() -> None:
    assert judge.shared_memory("a", None, GB).verdict is GREEN


def of_memory(
    available: int, total: int = 100 * GB, limit: int | None = None, used: int | None = None
) -> dict[str, Any]:
    return {"total": total, "available": available, "limit": limit, "used": used, "swap_total": 0, "swap_free": 0}


@pytest.mark.parametrize(
    ("found", "verdict", "value"),
    [
        (of_memory(50 * GB), GREEN, "50.0 GB free of 100.0 GB"),
        (of_memory(14 * GB), YELLOW, "14.0 GB free of 100.0 GB"),
        (of_memory(4 * GB), RED, "4.0 GB free of 100.0 GB"),
        (of_memory(90 * GB, limit=20 * GB, used=2 * GB), GREEN, "18.0 GB free of 20.0 GB (the container)"),
        (of_memory(90 * GB, limit=20 * GB, used=20 * GB), RED, "0.0 B free of 20.0 GB (the container)"),
        (of_memory(1 * GB, limit=20 * GB, used=2 * GB), YELLOW, "1.0 GB free of 20.0 GB (the container)"),
    ],
)
def test_memory(found: dict[str, Any], verdict: Verdict, value: str) -> None:
    row = judge.memory("a", found, 10 * GB)
    assert (row.verdict, row.value.replace("0 B free", "0.0 B free")) == (verdict, value)


def test_ray_that_gives_out_more_memory_than_the_container_has() -> None:
    row = judge.memory("a", of_memory(90 * GB, limit=20 * GB, used=GB), 60 * GB)
    assert row.verdict is YELLOW and "Ray gives out 60.0 GB" in row.value and "--memory" in row.remedy


@pytest.mark.parametrize(
    ("total", "free", "verdict"),
    [(0, 0, GREEN), (8 * GB, 8 * GB, GREEN), (8 * GB, 5 * GB, YELLOW), (None, None, GREEN)],
)
def test_swap(total: int | None, free: int | None, verdict: Verdict) -> None:
    assert judge.swap("a", {"swap_total": total, "swap_free": free}).verdict is verdict


@pytest.mark.parametrize(
    ("ray_cpus", "count", "quota", "verdict"),
    [(8.0, 8, None, GREEN), (0.0, 8, None, GREEN), (4.0, 64, 4.0, GREEN), (64.0, 64, 4.0, YELLOW),
     (16.0, 8, None, YELLOW), (1.0, 64, 0.5, YELLOW)],
)  # fmt: skip
def test_cpus(ray_cpus: float, count: int, quota: float | None, verdict: Verdict) -> None:
    row = judge.cpus("a", ray_cpus, {"count": count, "quota": quota})
    assert row.verdict is verdict
    if verdict is YELLOW:
        assert f"--num-cpus={max(int(quota or count), 1)}" in row.remedy


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "verdict"), [(None, GREEN), (4096, GREEN), (4095, YELLOW), (1024, YELLOW), (1023, RED), (256, RED)]
)
def test_open_files(files: int | None, verdict: Verdict) -> None:
    row = judge.open_files("a", {"files": files, "processes": None, "pids": None})
    assert row.verdict is verdict and ("ulimit -n" in row.remedy) == (verdict is not GREEN)


@pytest.mark.parametrize(
    ("user", "container", "verdict", "value"),
    [(None, None, GREEN, "no limit"), (None, 1000, RED, "1000"), (2000, None, YELLOW, "2000"),
     (60_000, 3000, YELLOW, "3000"), (60_000, 30_000, GREEN, "30000")],
)  # fmt: skip
def test_processes(user: int | None, container: int | None, verdict: Verdict, value: str) -> None:
    row = judge.processes("a", {"files": None, "processes": user, "pids": container})
    assert (row.verdict, row.value) == (verdict, value)


# -- GPUs ------------------------------------------------------------------------------------------------------------


def of_gpus(
    torch: int, smi: int | None, built: str | None = "12.8", driver_cuda: str | None = "12.8"
) -> dict[str, Any]:
    return {"torch": torch, "smi": smi, "built_for": built, "driver_cuda": driver_cuda if smi else None,
            "driver": "570.1" if smi else None, "names": ["NVIDIA H100"] * (smi or 0)}  # fmt: skip


@pytest.mark.parametrize(
    ("ray_gpus", "found", "verdict", "words"),
    [
        (0, of_gpus(0, None, built=None), GREEN, ""),
        (8, of_gpus(8, 8), GREEN, ""),
        (4, of_gpus(4, 8), GREEN, ""),  # the others were hidden from it
        (8, of_gpus(0, 8, built=None), RED, "build without CUDA"),
        (0, of_gpus(0, 8, built=None), YELLOW, "build without CUDA"),
        (8, of_gpus(0, 8, built="13.0", driver_cuda="12.4"), RED, "a newer driver, or torch built for CUDA 12.4"),
        (8, of_gpus(0, 8), RED, "CUDA_VISIBLE_DEVICES"),
        (8, of_gpus(7, 7), RED, "ray start --num-gpus"),  # one fell off the bus since Ray was started
        (2, of_gpus(8, 8), YELLOW, "Ray gives out fewer"),
    ],
)
def test_gpus(ray_gpus: float, found: dict[str, Any], verdict: Verdict, words: str) -> None:
    row = judge.gpus("a", ray_gpus, found)
    assert row.verdict is verdict and words in row.remedy
    if found["smi"] and verdict is GREEN:
        assert row.value.endswith("NVIDIA H100")


def test_drivers_that_differ() -> None:
    def of_driver(version: str | None) -> dict[str, Any]:
        return {"gpus": {"driver": version}}

    assert judge.gpu_drivers({"a": of_driver(None)}) is None
    same = judge.gpu_drivers({"a": of_driver("550.1"), "b": of_driver("550.1"), "head": of_driver(None)})
    assert same is not None and (same.verdict, same.value) == (GREEN, "550.1")
    other = judge.gpu_drivers({"a": of_driver("550.1"), "b": of_driver("535.2"), "head": of_driver(None)})
    assert other is not None and (other.verdict, other.value) == (YELLOW, "550.1: a; 535.2: b")
