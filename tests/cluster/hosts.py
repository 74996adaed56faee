"""Clusters of several hosts for tests: raylets of one machine, with addresses, a token and a folder of their own."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")
# Ray's own settings: a lost host is noticed after some 3 s instead of 15, and an announced loss is looked for oftener.
ALERT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
}


def may_hide_folders() -> bool:
    """Whether this process may make a mount namespace, and a tmpfs in it."""
    tool = shutil.which("unshare")
    command = [str(tool), "-m", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return tool is not None and subprocess.run(command, capture_output=True).returncode == 0


@contextlib.contextmanager
def environment_of(**more: str) -> Iterator[dict[str, str]]:
    """The environment of a cluster that nobody else on this machine meets, and of its driver."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        # A head that finds a token on the machine asks everyone for it; this cluster has one of its own.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **more,
    }
    environment.pop("RAY_ADDRESS", None)
    # A folder of its own for Ray, with a short name (sockets lie in it): what this cluster leaves would otherwise
    # be taken for a running one by everyone who starts Ray on this machine afterwards.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield {**environment, "RAY_TMPDIR": folder}


class Cluster:
    """A head on 127.0.0.1 and members on 127.0.0.2 and so on, of one CPU each; leaving it ends them all.

    ``dashboard``: the head has one, and takes jobs at ``jobs``; it is another few processes to start.
    """

    def __init__(self, environment: dict[str, str], dashboard: bool = False) -> None:
        self._environment, self._addresses = environment, itertools.count(2)
        self._running: list[subprocess.Popen[str]] = []
        self.members: dict[str, subprocess.Popen[str]] = {}  # those that were not lost, by their own address
        port, jobs, agent = _free_ports(3)
        self.address, self.jobs = f"127.0.0.1:{port}", f"http://127.0.0.1:{jobs}"
        self._head = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1",
                      f"--include-dashboard={str(dashboard).lower()}"]  # fmt: skip
        if dashboard:
            self._head += [f"--dashboard-port={jobs}", f"--dashboard-agent-listen-port={agent}"]

    def __enter__(self) -> Cluster:
        try:
            self._start(self._head)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    @property
    def driver_environment(self) -> dict[str, str]:
        """The environment of a script that is to run here."""
        return {**self._environment, "RAY_ADDRESS": self.address}

    def join(self, hidden: Path | None = None) -> str:
        """Start one more member and return its own address; it has the folder ``hidden`` empty, if one is given.

        Hiding takes a mount namespace: see ``may_hide_folders``.
        """
        own = f"127.0.0.{next(self._addresses)}"
        # A folder of its own, as every host has: nodes that share one unpack a shipped project over and over in each
        # other's working directories.
        folder = f"{self._environment['RAY_TMPDIR']}/{own.rpartition('.')[2]}"
        options = [f"--address={self.address}", f"--node-ip-address={own}", f"--temp-dir={folder}"]
        hide = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$1" && shift && exec "$@"', "sh", str(hidden)]
        self.members[own] = self._start(options, () if hidden is None else hide)
        return own

    def lose(self, member: str) -> None:
        """Kill a member's raylet, and what else runs on this host, without notice."""
        _end(self.members.pop(member))

    def raylet(self, member: str) -> psutil.Process:
        """The process that is this node to Ray."""
        there = psutil.Process(self.members[member].pid).children(recursive=True)
        return next(each for each in there if each.name() == "raylet")

    def drain(self, member: str, node: str, notice_s: float) -> psutil.Process:
        """Announce to Ray that a member will be taken away, as a cloud does; it ends then. ``node``: Ray's id of it.

        Return the process that is this node.
        """
        raylet = self.raylet(member)
        command = [str(RAY), "drain-node", "--address", self.address, "--node-id", node,
                   "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                   "--deadline-remaining-seconds", f"{notice_s:g}"]  # fmt: skip
        subprocess.run(command, env=self._environment, check=True, capture_output=True, timeout=120)
        del self.members[member]
        return raylet

    def close(self) -> None:
        """End every host, at once: to be asked to end takes a head half a minute."""
        for process in self._running:
            _end(process)

    def _start(self, options: Sequence[str], inside: Sequence[str] = ()) -> subprocess.Popen[str]:
        own = ["--num-cpus=1", "--object-store-memory=100000000", "--block"]
        process = subprocess.Popen(
            [*inside, str(RAY), "start", *options, *own], env=self._environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd="/",
        )  # fmt: skip
        self._running.append(process)
        assert process.stdout is not None
        told: list[str] = []
        for line in process.stdout:  # ends if the process does
            told.append(line)
            if "Ray runtime started" in line:
                return process
        raise RuntimeError("a host did not start:\n" + "".join(told))


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _end(host: subprocess.Popen[str]) -> None:
    """Kill a host's first process and all that came of it."""
    if host.poll() is None:
        first = psutil.Process(host.pid)
        for each in [first, *first.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        host.wait()
    if host.stdout is not None:
        host.stdout.close()


@contextlib.contextmanager
def hosts(environment: dict[str, str], members: Sequence[Path | None]) -> Iterator[str]:
    """Start a head and a member for each of ``members``; yield the cluster's address.

    A member that is a path has this folder empty.
    """
    with Cluster(environment) as cluster:
        for hidden in members:
            cluster.join(hidden)
        yield cluster.address
