"""clusters/spot_notice.py against metadata servers that answer as the clouds do; what it asks of Ray is noted."""

from __future__ import annotations

import http.server
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.clusters.pins import CLUSTERS

SCRIPT = CLUSTERS / "spot_notice.py"


class Metadata(http.server.ThreadingHTTPServer):
    """What each path answers, and what it wants to be asked with; a path that is not there is a 404."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.answers: dict[str, tuple[str, dict[str, str]]] = {}
        self.asked = threading.Semaphore(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Metadata

    def do_GET(self) -> None:
        text, headers = self.server.answers.get(self.path.split("?")[0], ("", {}))
        known = bool(text) and all(self.headers.get(name) == value for name, value in headers.items())
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(text.encode() if known else b"")
        self.server.asked.release()

    do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def host(tmp_path: Path) -> dict[str, str]:
    """An environment whose `ray` notes what it was called with."""
    ray = tmp_path / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text('#!/bin/sh\necho "$RAY_AUTH_MODE $*" >>"$HOME/called"\n')
    ray.chmod(stat.S_IRWXU)
    return {**os.environ, "HOME": str(tmp_path), "PATH": f"{ray.parent}:{os.environ['PATH']}"}


def start(cloud: str, metadata: Metadata, host: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), cloud, "--metadata", metadata.url]
    return subprocess.Popen(command, env=host, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def called(host: dict[str, str]) -> list[str]:
    return (Path(host["HOME"]) / "called").read_text().split()


def on_aws(left_s: int) -> dict[str, tuple[str, dict[str, str]]]:
    end = (datetime.now(timezone.utc) + timedelta(seconds=left_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
    notice = json.dumps({"action": "terminate", "time": end})
    return {
        "/latest/api/token": ("the-token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}),
        "/latest/meta-data/spot/instance-action": (notice, {"X-aws-ec2-metadata-token": "the-token"}),
    }


PREEMPT = {"Events": [{"EventType": "Preempt", "Resources": ["worker-1"]}]}
FOR_ANOTHER = {
    "Events": [{"EventType": "Preempt", "Resources": ["worker-2"]}, {"EventType": "Reboot", "Resources": ["worker-1"]}]
}
NAME = {"/metadata/instance/compute/name": ("worker-1", {"Metadata": "true"})}
ANNOUNCED: dict[str, dict[str, tuple[str, dict[str, str]]]] = {
    "aws": on_aws(120),
    "gcp": {"/computeMetadata/v1/instance/preempted": ("TRUE", {"Metadata-Flavor": "Google"})},
    "azure": {**NAME, "/metadata/scheduledevents": (json.dumps(PREEMPT), {"Metadata": "true"})},
}
QUIET: dict[str, dict[str, tuple[str, dict[str, str]]]] = {
    "aws": {"/latest/api/token": on_aws(0)["/latest/api/token"]},
    "gcp": {"/computeMetadata/v1/instance/preempted": ("FALSE", {"Metadata-Flavor": "Google"})},
    "azure": {**NAME, "/metadata/scheduledevents": (json.dumps(FOR_ANOTHER), {"Metadata": "true"})},
}


@pytest.mark.parametrize("cloud", ANNOUNCED)
def test_ray_is_told_once_it_is_announced(cloud: str, metadata: Metadata, host: dict[str, str]) -> None:
    metadata.answers = QUIET[cloud]
    watching = start(cloud, metadata, host)
    for _ in QUIET[cloud]:
        assert metadata.asked.acquire(timeout=60)
    assert not (Path(host["HOME"]) / "called").exists()
    metadata.answers = on_aws(120) if cloud == "aws" else ANNOUNCED[cloud]
    output, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0, output
    mode, command, *options, left_s = called(host)
    assert (mode, command) == ("token", "drain-node")
    assert options == [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
        "--deadline-remaining-seconds",
    ]
    assert 60 <= int(left_s) <= 120 if cloud == "aws" else int(left_s) == 30
    assert output == f"the cloud takes this host away in {left_s} s\n"


def test_metadata_that_do_not_answer_are_said_once_and_asked_again(metadata: Metadata, host: dict[str, str]) -> None:
    metadata.answers = {}  # no token: 404 there, too
    watching = start("aws", metadata, host)
    for _ in range(2):
        assert metadata.asked.acquire(timeout=60)
    metadata.answers = on_aws(100)
    output, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0
    assert output.count("the metadata do not answer") == 1 and "in " in output.splitlines()[-1]


def test_a_newer_one_ends_the_one_before(metadata: Metadata, host: dict[str, str]) -> None:
    metadata.answers = QUIET["gcp"]
    first = start("gcp", metadata, host)
    assert metadata.asked.acquire(timeout=60)
    second = start("gcp", metadata, host)
    assert first.wait(timeout=60) != 0 and first.stdout is not None
    first.stdout.close()
    assert psutil.pid_exists(second.pid)
    metadata.answers = ANNOUNCED["gcp"]
    second.communicate(timeout=60)
    assert second.returncode == 0 and called(host)[1] == "drain-node"
