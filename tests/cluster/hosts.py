"""Clusters of several hosts for tests: raylets of one machine, with addresses, a token and a folder of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")


def may_hide_folders() -> bool:
    """Whether this process may make mount namespaces."""
    tool = shutil.which("unshare")
    return tool is not None and subprocess.run([tool, "-m", "true"], capture_output=True).returncode == 0


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


@contextlib.contextmanager
def hosts(environment: dict[str, str], members: Sequence[Path | None]) -> Iterator[str]:
    """Start a head and a raylet for each of ``members``, of one CPU each; yield the cluster's address.

    A member that is a path has this folder empty, in a mount namespace of its own. The head is 127.0.0.1, the members
    127.0.0.2 and so on.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    own = ["--num-cpus=1", "--object-store-memory=100000000", "--block"]
    head = [str(RAY), "start", "--head", f"--port={port}", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    commands = [[*head, *own]]
    hide = 'mount -t tmpfs none "$1" && shift && exec "$@"'
    for number, hidden in enumerate(members, start=2):
        member = [str(RAY), "start", f"--address={address}", f"--node-ip-address=127.0.0.{number}", *own]
        commands.append(member if hidden is None else ["unshare", "-m", "sh", "-c", hide, "sh", str(hidden), *member])
    running: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
            )
            running.append(process)
            assert process.stdout is not None
            told: list[str] = []
            for line in process.stdout:  # ends if the process does
                told.append(line)
                if "Ray runtime started" in line:
                    break
            else:
                pytest.fail("a host did not start:\n" + "".join(told))
        yield address
    finally:
        for process in reversed(running):
            process.terminate()  # ray start --block ends what it has started
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=30)
            if process.poll() is None:
                process.kill()
                process.communicate()
