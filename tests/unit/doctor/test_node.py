"""What a node does when it is examined: its facts, and connections to real listeners of this process."""

from __future__ import annotations

import http.server
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import raylit
from raylit.doctor import judge, node
from raylit.driver.each_node import shipped


def test_the_facts_of_this_process_can_be_judged() -> None:
    found = node.facts({}, "/nowhere/yet", [])
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["raylit"] == raylit.__version__
    assert found["versions"] == node.versions()
    assert found["temp"]["path"] == "/" and 0 < found["temp"]["free"] <= found["temp"]["total"]
    rows = [
        judge.cpus("a", 1.0, found["cpus"]), judge.memory("a", found["memory"], 0.0), judge.swap("a", found["memory"]),
        judge.open_files("a", found["limits"]), judge.processes("a", found["limits"]),
        judge.gpus("a", found["gpus"]["torch"], found["gpus"]), judge.shared_memory("a", found["shm"], 1.0),
    ]  # fmt: skip
    assert all(row.value for row in rows)
    if sys.platform == "linux":
        assert found["cpus"]["count"] == len(os.sched_getaffinity(0)) and found["memory"]["total"] > 0
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert found["limits"]["files"] == (None if soft == resource.RLIM_INFINITY else soft)


def test_a_package_that_is_missing_or_broken_is_told(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "ray.py").write_text("raise RuntimeError('no such processor')\n")
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "ray" or name.startswith("ray.")}
    try:
        assert node.versions()["ray"] == "cannot be imported: no such processor"
    finally:
        sys.modules.pop("ray", None)
        sys.modules.update(kept)


@contextmanager
def dashboard(code: int) -> Iterator[int]:
    """An HTTP server that answers every request with this code."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_who_reaches_whom() -> None:
    kept: dict = {}
    port = node.listen(kept, b"a" * 16, "127.0.0.1")
    try:
        gone = closed_port()
        targets = {"right": (port, b"a" * 16), "any": (port, None), "other": (port, b"b" * 16), "gone": (gone, None)}
        found = node.reach({}, {name: ("127.0.0.1", *target) for name, target in targets.items()})
    finally:
        kept["listener"].close()
    assert found == {"other": "something else answers there", "gone": "connection refused"}


@pytest.mark.parametrize(("code", "outcome"), [(200, "serves"), (401, "asks"), (403, "asks"), (404, "open")])
def test_what_a_dashboard_does_with_a_stranger(code: int, outcome: str) -> None:
    with dashboard(code) as port:
        tried = node.get_in({}, [("dashboard", "127.0.0.1", port), ("GCS", "127.0.0.1", port),
                                 ("dashboard", "127.0.0.1", closed_port())])  # fmt: skip
    assert tried == [outcome, "open", "closed"]


@pytest.mark.skipif(sys.platform != "linux", reason="listeners are read from /proc")
def test_only_listeners_of_this_cluster_are_listed() -> None:
    assert node.listening(["no process has this on its command line"]) == []


def test_what_is_shipped_needs_no_raylit(tmp_path) -> None:
    """A node on which raylit is missing, or another one, is a node to tell about: no name is looked up there."""
    import subprocess

    payload = tmp_path / "payload"
    payload.write_bytes(shipped(node.facts, node.MODULES))
    (tmp_path / "raylit.py").write_text("raise ImportError('broken')\n")
    code = (
        "import sys; from ray import cloudpickle\n"
        f"found = cloudpickle.loads(open({str(payload)!r}, 'rb').read())({{}}, '/', [])\n"
        "print(found['versions']['raylit'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.stdout == "cannot be imported: broken\n", done.stderr
