"""``raylit doctor`` of a cluster that is reached through its dashboard: as a job, with a token, through a tunnel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raylit.cli import main
from raylit.doctor.report import Report, green
from tests.unit.cli.jobs_server import JobsServer
from tests.unit.cli.test_submit import ROOT, TOKEN, all_gone, cluster_file, head, place, tunnels

__all__ = ["head", "place", "tunnels"]  # fixtures
REPORT = Report((green("answers", "a", "yes"),), ("a",), 3.0)


@pytest.fixture
def asking(head: JobsServer, place: Path) -> Path:
    """The file of the token that the head asks for; its jobs say ``REPORT``."""
    head.token, head.log = TOKEN, json.dumps(REPORT.as_json(), indent=2)
    file = place.parent / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    return file


def test_the_token_is_named_and_the_job_told_at_once(
    head: JobsServer, asking: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--address", head.url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"raylit doctor: {head.url} asks for a token: give --token-file FILE")
    told: list[str] = []
    head.on_tail = lambda: told.append(capsys.readouterr().err)  # while the job runs
    assert main(["doctor", "--address", head.url, "--token-file", str(asking), "--workers", "3"]) == 0
    assert told == [f"raylit doctor: it runs on the cluster as job {head.job['submission_id']}\n"]
    assert head.job["entrypoint"].endswith("doctor --json --timeout 30 --workers 3")
    out = capsys.readouterr()
    assert out.err == "" and "can train" in out.out


def test_by_a_clusters_file(
    head: JobsServer, place: Path, tunnels: Path, asking: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = cluster_file(place, head.port, f"file_mounts: {{/home/ubuntu/.ray/auth_token: {asking}}}")
    assert main(["doctor", str(file), "--json"]) == 0
    out = capsys.readouterr()
    assert Report.from_json(json.loads(out.out)) == REPORT
    assert f"opening a tunnel to the cluster of {file}" in out.err and TOKEN not in out.err
    assert all_gone(tunnels)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lab.json"], "lab.json is no CLUSTER.yaml"),
        (["nowhere.yaml"], "there is no file nowhere.yaml"),
        (["lab.yaml", "--address", "http://127.0.0.1:1"], "either --address or a cluster's file"),
        (["--address", "head:6379", "--token-file", "x y"], "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH='x y'"),
        (["--address", "http://127.0.0.1:1", "--token-file", "nowhere"], "there is no token nowhere"),
    ],
)
def test_refused(place: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    cluster_file(place, 8265)
    assert main(["doctor", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("raylit doctor: ") and says in line


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_a_signal_stops_the_job(head: JobsServer, asking: Path, sent: signal.Signals, code: int) -> None:
    head.running.set()
    seen = threading.Event()
    head.on_tail = seen.set
    run = "import sys; from raylit.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", run, "doctor", "--address", head.url, "--token-file", str(asking)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert seen.wait(60)
    process.send_signal(sent)
    _, told = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in told
    assert head.stopped == [head.job["submission_id"]]
