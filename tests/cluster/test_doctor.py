"""``raylit doctor`` on real clusters, with nodes made wrong on purpose."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.cluster.apart import may_make_networks, network
from tests.cluster.hosts import ALERT, ROOT, environment_of, may_hide_folders
from tests.cluster.wrong import Rows, WrongCluster, cluster_of, doctor, fake_nvidia_smi, pythonpath

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),  # several raylets start, on few cores
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs several loopback addresses and mount namespaces"),
]

_WRONG = """
mount -t tmpfs none "$1"
mount -t tmpfs -o size=64m none /dev/shm
mkdir -p "$2" && mount -t tmpfs -o size=500m none "$2"
shift 2
ulimit -n 900
exec "$@"
"""


class Examined:
    """A head, a good member and one on which much is wrong, and what the doctor said of them."""

    def __init__(self, cluster: WrongCluster, storage: Path, good: str, wrong: str) -> None:
        self.cluster, self.storage, self.good, self.wrong = cluster, storage, good, wrong
        self.rows = Rows(cluster.doctor("--json", "--storage", str(storage)))
        self.head = self.rows.report["nodes"][0].rpartition("(")[2].rstrip(")")


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Examined]:
    if not may_hide_folders():
        pytest.skip("needs the right to make mount namespaces")
    folder = tmp_path_factory.mktemp("wrong")
    storage = folder / "runs"
    storage.mkdir()
    with cluster_of() as cluster:
        good = cluster.join()
        path = pythonpath(folder / "path", version="0.0.9", clock_s=40.0)
        temp = cluster.folder("127.0.0.3")
        wrong = cluster.join_inside(
            ["unshare", "-m", "env", f"PYTHONPATH={path}", "sh", "-ec", _WRONG, "sh", str(storage), str(temp)]
        )
        assert wrong == "127.0.0.3"
        yield Examined(cluster, storage, good, wrong)


@pytest.mark.parametrize("check", ["storage", "open files", "shared memory", "temp disk", "clock"])
def test_what_is_wrong_with_one_node_is_said_of_that_node(examined: Examined, check: str) -> None:
    assert examined.rows.verdicts(check) == {examined.head: "green", examined.good: "green", examined.wrong: "red"}
    row = examined.rows.of(check, examined.wrong)
    assert row["remedy"]
    says = {
        "storage": f"{examined.storage}: does not see what",
        "open files": "900",
        "shared memory": "67.1 MB in /dev/shm, object store 100.0 MB",
        "temp disk": "free of 524.3 MB",
        "clock": "+40.0",
    }
    assert says[check] in row["value"]
    if check == "storage":
        assert examined.head in row["value"] and examined.good in row["value"]


def test_another_version_is_named_with_both_sides(examined: Examined) -> None:
    row = examined.rows.of("raylit version")
    assert row["verdict"] == "red"
    ours, theirs = row["value"].split("; ")
    assert examined.good in ours and examined.head in ours and "this process" in ours and examined.wrong not in ours
    assert theirs.startswith("0.0.9: ") and theirs.endswith(f"({examined.wrong})")
    assert [examined.rows.of(f"{name} version")["verdict"] for name in ("python", "ray", "torch")] == ["green"] * 3


def test_what_is_right_is_green_and_measured(examined: Examined) -> None:
    for check in ("answers", "cpus", "swap", "memory", "processes", "gpus", "storage disk"):
        assert set(examined.rows.verdicts(check)) == {examined.head, examined.good, examined.wrong}
    assert set(examined.rows.verdicts("connections").values()) == {"green"}
    assert examined.rows.of("authentication")["verdict"] == "green"
    assert set(examined.rows.verdicts("open ports").values()) == {"green"}
    figures = examined.rows.report["figures"]
    assert figures["all_reduce_workers"] == 3
    assert figures["all_reduce_latency_us"] > 0 and figures["all_reduce_mb_per_s"] > 0
    assert examined.rows.of("all-reduce bandwidth")["value"].startswith(f"{figures['all_reduce_mb_per_s']:.0f} MB/s")
    assert examined.rows.code == 1 and examined.rows.report["ok"] is False


def test_nothing_of_the_check_stays_in_the_storage(examined: Examined) -> None:
    assert list(examined.storage.iterdir()) == []


def test_the_table_can_be_read_without_a_terminal(examined: Examined) -> None:
    done = examined.cluster.doctor("--storage", str(examined.storage), "--workers", "5")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.rstrip().splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1].startswith("3 nodes, ") and "put the red rows right first" in lines[-1]
    assert any(line.split()[:2] == ["red", "storage"] for line in lines)
    assert any(line.split()[:2] == ["red", "room"] and "num_workers=5 needs" in line for line in lines)


def test_a_run_can_ask_for_the_storage_before_it_starts(examined: Examined) -> None:
    code = (
        "import sys, ray; from raylit.driver.storage_check import require_shared_storage\n"
        "from raylit.errors import ConfigError\n"
        "ray.init(log_to_driver=False)\n"
        "try: require_shared_storage(sys.argv[1], within_s=60)\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(examined.storage)], cwd="/tmp", text=True, timeout=200,
                          env=examined.cluster.driver_environment, capture_output=True, check=True)  # fmt: skip
    first, middle, *_, last = done.stdout.splitlines()
    assert first == f"storage_path='{examined.storage}' cannot be used from every node:"
    assert f"({examined.wrong}) does not see what was written on" in middle
    assert "NFS" in last
    assert list(examined.storage.iterdir()) == []


def test_a_wrong_token_and_none_are_told_in_one_line(examined: Examined) -> None:
    for token, words in (("x" * 64, "the token here is another one"), (None, "there is no token here")):
        environment = {"RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled", "HOME": "/nonexistent"}
        done = examined.cluster.doctor("--json", "--address", examined.cluster.address, **environment)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("raylit doctor: ")
        assert f"{examined.cluster.address} refuses this machine" in done.stderr and words in done.stderr


def test_another_ray_here_than_there_is_told_in_one_line(examined: Examined, tmp_path: Path) -> None:
    """Ray refuses such a connection, so nothing can be examined from here; both sides are named."""
    (tmp_path / "sitecustomize.py").write_text("import ray\nray.__version__ = '2.59.9'\n")
    done = examined.cluster.doctor("--json", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "version mismatch" in done.stderr and "2.59.9" in done.stderr and ray.__version__ in done.stderr


@pytest.mark.long
def test_a_cluster_that_is_open_and_has_a_silent_node(tmp_path: Path) -> None:
    """No token, a dashboard for everybody, drivers that differ, a storage that cannot be written; then a node hangs."""
    if not may_hide_folders():
        pytest.skip("needs the right to make mount namespaces")
    storage = tmp_path / "runs"
    storage.mkdir()
    with cluster_of(token=False, open_dashboard=True) as cluster:
        first, second = (
            cluster.join_inside(
                ["unshare", "-m", "env", f"PATH={fake_nvidia_smi(tmp_path / driver, driver)}:{os.environ['PATH']}",
                 "sh", "-ec", script, "sh", str(storage)],
                more=["--num-gpus=1"] if driver.startswith("5") else [],
            )
            for driver, script in (
                ("470.1", 'shift; exec "$@"'),
                ("550.2", 'mount -t tmpfs -o ro none "$1"; shift; exec "$@"'),
            )
        )  # fmt: skip
        rows = Rows(cluster.doctor("--json", "--storage", str(storage)))
        head = rows.report["nodes"][0].rpartition("(")[2].rstrip(")")
        assert rows.of("authentication")["verdict"] == "red"
        ports = {row["value"].split(" on ")[0]: row for row in rows.report["checks"] if row["check"] == "open ports"}
        assert {name: row["verdict"] for name, row in ports.items()} == {
            "GCS": "red", "client server": "red", "dashboard": "red"}  # fmt: skip
        assert "open to 2 other nodes, asks for nothing" in ports["dashboard"]["value"]
        assert "--dashboard-host=127.0.0.1" in ports["dashboard"]["remedy"]
        assert rows.verdicts("gpus") == {head: "green", first: "yellow", second: "red"}
        assert "build without CUDA" in rows.of("gpus", second)["remedy"]
        drivers = rows.of("gpu driver")
        assert drivers["verdict"] == "yellow" and "470.1: " in drivers["value"] and "550.2: " in drivers["value"]
        assert rows.verdicts("storage") == {head: "green", first: "green", second: "red"}
        assert "Read-only file system" in rows.of("storage", second)["value"]
        assert "measured with gloo" in rows.of("all-reduce latency")["remedy"]

        raylet = cluster.raylet(second)
        raylet.send_signal(signal.SIGSTOP)
        try:
            rows = Rows(cluster.doctor("--json", "--storage", str(storage), "--timeout", "20"))
        finally:
            raylet.send_signal(signal.SIGCONT)
        answers = rows.verdicts("answers")
        assert answers.pop(second, "red") == "red"  # or Ray has given it up meanwhile, and does not list it
        assert answers == {head: "green", first: "green"}
        assert rows.verdicts("storage") == {head: "green", first: "green"}
        assert rows.report["figures"]["all_reduce_workers"] == 2


@pytest.mark.long
def test_hosts_that_do_not_reach_each_other(tmp_path: Path) -> None:
    """Three hosts with networks of their own: all is well; two that lose each other's packets; a wrong interface."""
    if not may_make_networks():
        pytest.skip("needs root, for network namespaces")
    storage = tmp_path / "runs"
    storage.mkdir()
    with network(2) as wire, environment_of(**ALERT) as environment:
        head, one, other = wire.addresses
        # To these hosts the machine's own name is loopback, or an address that they have not got.
        with WrongCluster({**environment, "GLOO_SOCKET_IFNAME": ""}, at=head) as cluster:
            for host in (one, other):
                cluster.join_inside(wire.inside(host), address=host)
            rows = Rows(cluster.doctor("--json", "--storage", str(storage)))
            assert rows.verdicts("connections") == {head: "green", one: "green", other: "green"}
            assert rows.report["figures"]["all_reduce_workers"] == 3
            # Another host tries the head's ports over the wire, without the token.
            assert set(rows.verdicts("open ports").values()) == {"green"}

            wire.cut(one, other)
            rows = Rows(cluster.doctor("--json", "--storage", str(storage)))
            assert rows.verdicts("connections") == {head: "green", one: "red", other: "red"}
            for here, there in ((one, other), (other, one)):
                value = rows.of("connections", here)["value"]
                assert f"({there}) at {there}:" in value and "(no answer within 3 s)" in value
            failed = rows.of("all-reduce")
            assert failed["verdict"] == "red" and "rank " in failed["value"] and "firewall" in failed["remedy"]
            assert f"({other}) at {other}:" in failed["value"]
            assert rows.report["seconds"] < 120 and rows.code == 1
            wire.mend(one, other)

            for host in (one, other):
                cluster.lose(host)
            for host in (one, other):
                cluster.join_inside([*wire.inside(host), "env", "GLOO_SOCKET_IFNAME=lo"], address=host)
            cluster.wait_for_nodes(3)
            rows = Rows(cluster.doctor("--json", "--storage", str(storage)))
            assert set(rows.verdicts("connections").values()) == {"green"}
            failed = rows.of("all-reduce")
            assert failed["verdict"] == "red" and "GLOO_SOCKET_IFNAME" in failed["remedy"]


@pytest.mark.long
def test_from_elsewhere_it_runs_as_a_job(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a job's interpreter is the host's python
    with environment_of(PATH=path) as environment, WrongCluster(environment, dashboard=True) as cluster:
        member = cluster.join()
        arguments = ["--address", cluster.jobs, "--storage", str(tmp_path), "--timeout", "120"]
        rows = Rows(doctor(environment, "--json", *arguments))
        assert rows.code == 0 and rows.of("answers", member)["verdict"] == "green"
        assert rows.report["figures"]["all_reduce_workers"] == 2
        done = doctor({**environment, "RAY_AUTH_TOKEN": "x" * 64}, "--json", *arguments)
        assert done.returncode == 2 and done.stdout == "" and "refuses the token of RAY_AUTH_TOKEN" in done.stderr


def test_this_machine_alone(tmp_path: Path) -> None:
    with environment_of() as environment:
        environment |= {"RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
        rows = Rows(doctor(environment, "--json", "--timeout", "120"))
    assert len(rows.report["nodes"]) == 1
    reds = [row for row in rows.report["checks"] if row["verdict"] == "red"]
    assert (rows.code, rows.report["ok"]) == ((1, False) if reds else (0, True))
    own = rows.report["nodes"][0].rpartition("(")[2].rstrip(")")
    assert rows.of("answers", own)["verdict"] == "green"
    assert rows.of("storage", own)["value"] == f"{tmp_path}/ray_results: written and read"
    # A Ray of one's own machine listens on all of its addresses too.
    assert rows.of("authentication")["verdict"] == "yellow" and "ports" in rows.of("authentication")["value"]
    assert rows.of("open ports")["verdict"] == "yellow" and rows.of("open ports")["value"].startswith("GCS on ")
    assert rows.report["figures"]["all_reduce_workers"] == 2
    assert not (tmp_path / "ray_results").exists()


def test_something_else_that_listens_there_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, environment_of() as environment:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        done = doctor(environment, "--json", "--address", address)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"what answers at {address} is no head of Ray" in done.stderr


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "nobody answers at 127.0.0.1:1 (Connection refused)"),
        ("somewhere", "give HOST:PORT"),
        ("ray://127.0.0.1:10001", "does not reach the nodes themselves"),
        ("auto", "auto"),
    ],
)
def test_an_address_that_leads_nowhere_is_told_in_one_line(address: str, words: str, tmp_path: Path) -> None:
    with environment_of() as environment:
        done = doctor(environment, "--json", "--address", address)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("raylit doctor: ") and words in done.stderr
