"""Hosts that have something wrong with them on purpose, and what ``raylit doctor`` says of them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.hosts import ROOT, Cluster, environment_of

RAYLIT = Path(sys.executable).with_name("raylit")


class WrongCluster(Cluster):
    """A cluster whose members may be started inside something: ``env``, ``unshare``, ``ip netns exec``.

    ``open_dashboard``: whether the head's dashboard listens on every address. ``at``: the head's own address.
    """

    def __init__(
        self,
        environment: dict[str, str],
        *,
        dashboard: bool = False,
        open_dashboard: bool = False,
        at: str | None = None,
    ) -> None:
        super().__init__(environment, dashboard=dashboard or open_dashboard)
        if open_dashboard:
            self._head.append("--dashboard-host=0.0.0.0")
        if at is not None:
            self.address = f"{at}:{self.address.rpartition(':')[2]}"
            self._head.append(f"--node-ip-address={at}")  # the last one counts

    def join_inside(self, inside: Sequence[str], *, address: str | None = None, more: Sequence[str] = ()) -> str:
        """Start a member inside ``inside``, at an address of its own; return the address."""
        own = address or f"127.0.0.{next(self._addresses)}"
        options = [f"--address={self.address}", f"--node-ip-address={own}", f"--temp-dir={self.folder(own)}", *more]
        self.members[own] = self._start(options, inside)
        return own

    def wait_for_nodes(self, count: int) -> None:
        """Wait until Ray lists so many nodes as alive: it takes some seconds to notice that one is lost."""
        code = (
            "import ray, sys, time; ray.init(log_to_driver=False); until = time.monotonic() + 120\n"
            "while sum(n['Alive'] for n in ray.nodes()) != int(sys.argv[1]):\n"
            "    assert time.monotonic() < until, ray.nodes(); time.sleep(0.2)\n"
        )
        command = [sys.executable, "-c", code, str(count)]
        subprocess.run(command, env=self.driver_environment, cwd="/tmp", check=True, capture_output=True, timeout=200)

    def folder(self, member: str) -> Path:
        """A member's temp folder for Ray."""
        return Path(self._environment["RAY_TMPDIR"]) / member.rpartition(".")[2]

    def doctor(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run ``raylit doctor`` as a person would, on this cluster; the deadlines are those of a loaded machine."""
        return doctor({**self.driver_environment, **environment}, "--timeout", "120", *arguments)


def doctor(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``raylit doctor`` and wait for it."""
    return subprocess.run([str(RAYLIT), "doctor", *arguments], env=dict(environment), cwd="/tmp", capture_output=True,
                          text=True, timeout=280, check=False)  # fmt: skip


class Rows:
    """The rows of ``--json``. What was written beside it is shown where it does not parse."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        try:
            self.report: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            raise AssertionError(f"no JSON (exit code {done.returncode}):\n{done.stdout}\n{done.stderr}") from None
        self.code = done.returncode

    def of(self, check: str, address: str = "cluster") -> dict[str, str]:
        """The row of a check on the node at ``address``; there is exactly one."""
        found = [row for row in self.report["checks"] if row["check"] == check and _is(row["node"], address)]
        assert len(found) == 1, f"{check} on {address}: {found} of {self.report['checks']}"
        return found[0]

    def verdicts(self, check: str) -> dict[str, str]:
        """A check's verdict on each node, by its address."""
        rows = [row for row in self.report["checks"] if row["check"] == check]
        return {row["node"].rpartition("(")[2].rstrip(")"): row["verdict"] for row in rows}


def _is(node: str, address: str) -> bool:
    return node == address or node.endswith(f"({address})")


@contextlib.contextmanager
def cluster_of(*, token: bool = True, **arguments: Any) -> Iterator[WrongCluster]:
    """A cluster with a token, or, to be seen as what it is, without one."""
    with environment_of() as environment:
        if not token:
            environment = {k: v for k, v in environment.items() if not k.startswith("RAY_AUTH")}
            environment["HOME"] = environment["RAY_TMPDIR"]  # a token in ~/.ray would switch it on
        with WrongCluster(environment, **arguments) as cluster:
            yield cluster


def pythonpath(folder: Path, *, version: str | None = None, clock_s: float = 0.0) -> str:
    """Make an import path with another raylit on it, and a clock that is ``clock_s`` ahead of this machine's."""
    folder.mkdir(parents=True)
    if version is not None:
        (folder / "raylit").mkdir()
        (folder / "raylit" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    if clock_s:
        (folder / "sitecustomize.py").write_text(
            f"import time\n_now = time.time\ntime.time = lambda: _now() + {clock_s}\n"
        )
    return f"{folder}:{ROOT}"


def fake_nvidia_smi(folder: Path, driver: str, gpus: int = 1) -> str:
    """Make a folder for PATH with an ``nvidia-smi`` of this driver version."""
    folder.mkdir(parents=True)
    tool, rows = folder / "nvidia-smi", "\n".join(["NVIDIA Test, " + driver] * gpus)
    tool.write_text(f"#!/bin/sh\n[ $# -gt 0 ] && echo '{rows}' || echo '| CUDA Version: 12.4 |'\n")
    tool.chmod(0o755)
    return str(folder)
