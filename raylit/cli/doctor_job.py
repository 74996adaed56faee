"""``raylit doctor --address http://...`` or ``CLUSTER.yaml``: as a job, for who is not on the network. Floor 7."""

from __future__ import annotations

import contextlib
import json
import secrets
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from raylit.cli import jobs
from raylit.cli.target import Ended, ended_by_signals, target_of
from raylit.doctor.report import Report
from raylit.errors import ConfigError

_RUN = "import sys; from raylit.cli import main; sys.exit(main(sys.argv[1:]))"
_PREFIX = "raylit doctor: "


def report_of_job(
    address: str | None, file: str | None, token_file: str | None, arguments: Sequence[str]
) -> Report:  # fmt: skip
    """Run ``raylit doctor --json`` with ``arguments`` on a cluster, and return its report.

    ``address``: of its dashboard; or ``file``: of ``ray up``, for a tunnel. ConfigError or ConnectionError, with one
    line, where the cluster cannot be reached, refuses us, or has no report to give: raylit is missing there, or what
    the command said there.
    """
    import ray

    cluster = None if file is None else Path(file)
    with ended_by_signals(), target_of(address, token_file, cluster, _say, "raylit doctor CLUSTER.yaml") as target:
        there = jobs.version_at(target.address, target.headers, target.token_from)
        jobs.check_versions(ray.__version__, there, True, _say)
        client = jobs.client_at(target.address, target.headers)
        job, log = f"raylit-doctor-{secrets.token_hex(4)}", list[str]()
        command = shlex.join(["python", "-c", _RUN, "doctor", "--json", *arguments])
        jobs.submit(client, entrypoint=command, submission_id=job)
        _say(f"it runs on the cluster as job {job}")
        revive = target.tunnel.revive if target.tunnel else lambda: None
        try:
            jobs.Follower(client, job, log.append, _say, revive).until_end()
        except (KeyboardInterrupt, Ended):
            with contextlib.suppress(OSError, RuntimeError):  # it ends by itself within a minute or two
                client.stop_job(job)
            raise
    return report_in("".join(log))


def report_in(log: str) -> Report:
    """The report in a job's log, into which Ray and the job's stderr write too."""
    at = f"\n{log}".rfind("\n{\n")
    with contextlib.suppress(ValueError, KeyError, TypeError):  # half a report, or something else
        if at >= 0:
            return Report.from_json(json.JSONDecoder().raw_decode(log[at:])[0])
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith(_PREFIX)), (lines or ["it said nothing"])[-1])
    raise ConfigError(f"no report came from the cluster: {said.removeprefix(_PREFIX)}")


def _say(text: str, *more: str) -> None:
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # doctor.py's line that goes again
    print("\n".join([f"{clear}{_PREFIX}{text}", *more]), file=sys.stderr, flush=True)
