"""A tunnel to the dashboard of a cluster that ``ray up`` started, by Ray's own ``ray dashboard``. Floor 7.

It lives in a session of its own: Ctrl-C, which a terminal sends to all that runs in it, must not cut the connection
over which the job is to be stopped. So ssh cannot ask for a password: a key without one, or an agent, is needed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from raylit.cli.cluster_file import load, token_source
from raylit.errors import ConfigError

_OPEN_S = 60.0
_DASHBOARD_PORT = 8265
_TELLING = re.compile(r"error|exception|denied|refused|fail|could not|not found", re.IGNORECASE)
_UNKNOWN_HEAD = re.compile(r"Head node of cluster \(.*\) not found")


class Tunnel:
    """``address`` here leads to the cluster's dashboard while the body runs. ConfigError where it does not open.

    ``command``: begins the command that opens it, Ray's command line by default.
    """

    def __init__(self, file: Path, remote_port: int, command: Sequence[str] | None = None) -> None:
        self._file, self._remote_port = file, remote_port
        self._command = list(command) if command else [str(Path(sys.executable).with_name("ray"))]
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._told: Any = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Tunnel:
        self._told = tempfile.TemporaryFile()
        try:
            self._open()
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:  # fmt: skip
        self.close()

    def revive(self) -> None:
        """Open it again where its process has ended; whoever uses it finds out when it answers."""
        if self._process is not None and self._process.poll() is not None:
            self._open()

    def close(self) -> None:
        """End it, and the ssh that it runs."""
        if self._process is not None:
            for sent in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, sent)
                try:
                    self._process.wait(5)
                    break
                except subprocess.TimeoutExpired:
                    continue
            self._process = None
        if self._told is not None:
            self._told.close()
            self._told = None

    def _open(self) -> None:
        command = [*self._command, "dashboard", str(self._file), "--port", str(self._port),
                   "--remote-port", str(self._remote_port)]  # fmt: skip
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._told, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise ConfigError(f"Ray's command line cannot be run: {error}") from error

    def _wait(self) -> None:
        until = time.monotonic() + _OPEN_S
        while not _answers(self._port):
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > until:
                if _UNKNOWN_HEAD.search(self._told_so_far()):
                    raise ConfigError(_forgotten(self._file, self._remote_port))
                why = "it ended" if self._process.poll() is not None else f"no answer within {_OPEN_S:g} s"
                raise ConfigError(
                    f"no tunnel to the cluster of {self._file} ({why}{self._reason()}): ray up {self._file} starts the "
                    f"cluster; ray dashboard {self._file} shows what is wrong"
                )
            time.sleep(0.2)

    def _reason(self) -> str:
        """The most telling line of what the command printed."""
        lines = [line.strip() for line in self._told_so_far().splitlines() if line.strip()]
        telling = [line for line in lines if _TELLING.search(line)]
        return f": {(telling or lines)[-1]}" if lines else ""

    def _told_so_far(self) -> str:
        self._told.seek(0)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._told.read().decode(errors="replace"))


def _forgotten(file: Path, port: int) -> str:
    """Word that Ray's launcher here knows of no head. It may run all the same: ``ray up`` would end what runs there."""
    content = load(file)
    auth, provider = (content.get(name) or {} for name in ("auth", "provider"))
    key = f"-i {auth['ssh_private_key']} " if auth.get("ssh_private_key") else ""
    host = f"{auth.get('ssh_user') or 'USER'}@{provider.get('head_ip') or 'HEAD'}"
    token = token_source(file) or f"~/.ray/tokens/{content.get('cluster_name')}"
    return (
        f"this machine has not started the cluster of {file}, or has forgotten it (Ray keeps that in its temp folder); "
        f"if it runs: ssh -N -L {_DASHBOARD_PORT}:localhost:{port} {key}{host}, and --address "
        f"http://localhost:{_DASHBOARD_PORT} --token-file {token} in place of the file; else: ray up {file}"
    )


def dashboard_port(file: Path) -> int:
    """The port of the head's dashboard: what its start command says, else Ray's own 8265."""
    commands = load(file).get("head_start_ray_commands") or []
    found = re.search(r"--dashboard-port[= ](\d+)", " ".join(map(str, commands)))
    return int(found[1]) if found else _DASHBOARD_PORT


def _answers(port: int) -> bool:
    """Whether something at the other end speaks: ssh takes connections before it knows that nobody does."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as probe:
            probe.sendall(b"GET /api/version HTTP/1.0\r\nHost: localhost\r\n\r\n")
            return bool(probe.recv(1))
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
