"""Tells Ray that the cloud is about to take this host away, which Ray does not look for itself.

    python clusters/spot_notice.py aws        on a worker, beside Ray; also gcp and azure

The announcement comes two minutes before the end on AWS, half a minute on the others. Told of it, Ray places nothing
more on this host, and raylit's ranks take a checkpoint of that very moment: nothing is done twice. Without it a run
goes on from its last checkpoint, as after any other loss. One copy runs on a host: a newer one ends the one before
it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

INTERVAL_S = 5  # each cloud wants its metadata asked no oftener than that
GCP_NOTICE_S = AZURE_NOTICE_S = 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", choices=sorted(CLOUDS))
    parser.add_argument("--metadata", help="where the cloud's metadata is asked for; else where the cloud has it")
    given = parser.parse_args()
    _end_the_one_before()
    asks, metadata = CLOUDS[given.cloud]
    left_s = wait(lambda: asks(given.metadata or metadata))
    print(f"the cloud takes this host away in {left_s} s", flush=True)
    # The node's id is this host's where none is given. The command is hidden from Ray's help, but is Ray's own.
    return subprocess.run(
        [
            "ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
            "--deadline-remaining-seconds", str(left_s),
        ],
        env={**os.environ, "RAY_AUTH_MODE": "token"},
    ).returncode  # fmt: skip


def wait(notice: Callable[[], int | None]) -> int:
    """Ask until there is a notice; the seconds that are left then. Metadata that does not answer is asked again."""
    told = ""
    while True:
        try:
            left_s = notice()
            if left_s is not None:
                return left_s
            told = ""
        except (OSError, ValueError) as error:  # no answer, or none that can be read
            if str(error) != told:
                told = str(error)
                print(f"the metadata do not answer, asked again every {INTERVAL_S} s: {told}", flush=True)
        time.sleep(INTERVAL_S)


def aws(metadata: str) -> int | None:
    token = _get(f"{metadata}/latest/api/token", "PUT", **{"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    try:
        found = _get(f"{metadata}/latest/meta-data/spot/instance-action", **{"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:  # as long as nothing is announced
            return None
        raise
    # {"action": "terminate", "time": "2026-11-27T08:22:00Z"}
    end = datetime.strptime(json.loads(found)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    return max(0, int((end - datetime.now(timezone.utc)).total_seconds()))


def gcp(metadata: str) -> int | None:
    found = _get(f"{metadata}/computeMetadata/v1/instance/preempted", **{"Metadata-Flavor": "Google"})
    return GCP_NOTICE_S if found.strip() == "TRUE" else None


def azure(metadata: str) -> int | None:
    name = _get(f"{metadata}/metadata/instance/compute/name?api-version=2021-02-01&format=text", Metadata="true")
    found = _get(f"{metadata}/metadata/scheduledevents?api-version=2020-07-01", Metadata="true")
    for event in json.loads(found)["Events"]:
        if event["EventType"] == "Preempt" and name.strip() in event["Resources"]:
            return AZURE_NOTICE_S
    return None


CLOUDS: dict[str, tuple[Callable[[str], int | None], str]] = {
    "aws": (aws, "http://169.254.169.254"),
    "azure": (azure, "http://169.254.169.254"),
    "gcp": (gcp, "http://metadata.google.internal"),
}


def _get(url: str, method: str = "GET", **headers: str) -> str:
    # No proxy: it would not know this host's metadata, or give another one's.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, method=method, headers=headers), timeout=3) as answer:
        return str(answer.read().decode())


def _end_the_one_before() -> None:
    """`ray up` starts this again on a host that it finds running."""
    note = Path.home() / ".raylit" / "spot_notice.pid"
    note.parent.mkdir(exist_ok=True)
    with contextlib.suppress(OSError, ValueError):  # no note, or its process is gone
        before = int(note.read_text())
        if b"spot_notice" in Path(f"/proc/{before}/cmdline").read_bytes():
            os.kill(before, signal.SIGTERM)
    note.write_text(str(os.getpid()))


if __name__ == "__main__":
    sys.exit(main())
