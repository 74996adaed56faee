"""``raylit doctor --address http://...``: as a job on the cluster, for who is not on its network. Floor 7."""

from __future__ import annotations

import contextlib
import json
import secrets
import shlex
import sys
from collections.abc import Sequence

from raylit.cli import jobs
from raylit.cli.submit import token_of
from raylit.doctor.report import Report
from raylit.errors import ConfigError

_RUN = "import sys; from raylit.cli import main; sys.exit(main(sys.argv[1:]))"
_PREFIX = "raylit doctor: "


def report_of_job(address: str, arguments: Sequence[str]) -> Report:
    """Run ``raylit doctor --json`` with ``arguments`` on the cluster whose dashboard is at ``address``; its report.

    ConfigError or ConnectionError, with one line, where the cluster cannot be reached, refuses us, or has no report to
    give: raylit is missing there, or what the command said there.
    """
    import ray

    address = jobs.address_of(address)
    token, token_from = token_of(None, None)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    there = jobs.version_at(address, headers, token_from)
    jobs.check_versions(ray.__version__, there, True, _say)
    client = jobs.client_at(address, headers)
    job, log = f"raylit-doctor-{secrets.token_hex(4)}", list[str]()
    command = shlex.join(["python", "-c", _RUN, "doctor", "--json", *arguments])
    jobs.submit(client, entrypoint=command, submission_id=job)
    try:
        jobs.Follower(client, job, log.append, _say, poll_s=1.0).until_end()
    except KeyboardInterrupt:
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
    print("\n".join([f"{_PREFIX}{text}", *more]), file=sys.stderr, flush=True)
