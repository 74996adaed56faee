"""``raylit doctor``: whether this machine or cluster can train, before a long job finds out. Floor 7."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raylit.doctor.report import Report

_WIDTH = 100  # without a terminal
_STYLES = {"green": "green", "yellow": "yellow", "red": "bold red"}


def add(parser: argparse.ArgumentParser) -> None:
    """Say this command's arguments, and what runs."""
    parser.description = (
        "Check a machine or a cluster before a long job: versions, clocks, disks, memory, GPUs, limits, the storage "
        "from every node, the network between nodes, who may get in. Takes less than a minute."
    )
    parser.epilog = "Exit code 0: nothing is red. 1: something is. 2: it cannot be examined, one line says why."
    parser.add_argument("cluster", nargs="?", metavar="CLUSTER.yaml", help="a cluster that ray up started: through a "
                        "tunnel, it runs there as a job")  # fmt: skip
    parser.add_argument("--address", help="HOST:PORT of the cluster's head, auto, or http://HOST:8265 of its "
                        "dashboard (it runs there as a job); default RAY_ADDRESS, else this machine alone")  # fmt: skip
    parser.add_argument("--token-file", metavar="FILE", help="with CLUSTER.yaml or http://...: the cluster's token; "
                        "else that of CLUSTER.yaml, else as Ray finds it")  # fmt: skip
    parser.add_argument("--storage", metavar="URI", help="where runs are to be kept: a folder or URI; default "
                        "RAYLIT_STORAGE where it runs, else ~/ray_results")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="workers that are to train: is there room, and how do "
                        "N all-reduce; default one on each node, two on a single one")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="how long a node may take to "
                        "answer at first (30)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(
        run=lambda given: run(given.address, given.storage, given.workers, given.timeout, given.json, given.cluster,
                              given.token_file)
    )  # fmt: skip


def run(
    address: str | None, storage: str | None, workers: int | None, timeout_s: float, as_json: bool,
    cluster: str | None = None, token_file: str | None = None,
) -> int:  # fmt: skip
    """Examine and print; the exit code. Raises ConfigError where it cannot be examined."""
    from raylit.errors import ConfigError

    if cluster is not None and not cluster.endswith((".yaml", ".yml")):
        raise ConfigError(f"{cluster} is no CLUSTER.yaml, a file of ray up; HOST:PORT or http://... follow --address")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: give the number of workers that are to train, 1 or more")
    if not timeout_s > 0:
        raise ConfigError(f"--timeout {timeout_s:g}: give a number of seconds above 0")
    named = address or os.environ.get("RAY_ADDRESS", "")
    try:
        if cluster is not None or named.startswith(("http://", "https://")):
            from raylit.cli.doctor_job import report_of_job

            _say("asking the cluster")
            at = address if cluster is not None else named
            report = report_of_job(at, cluster, token_file, _again(storage, workers, timeout_s))
        elif token_file is not None:
            raise ConfigError(
                "--token-file is for CLUSTER.yaml and http://...; here export RAY_AUTH_MODE=token "
                f"RAY_AUTH_TOKEN_PATH={shlex.quote(token_file)}"
            )
        else:
            report = _examined(address, storage, workers, timeout_s)
    except KeyboardInterrupt:
        print("raylit doctor: interrupted", file=sys.stderr)
        return 130
    finally:
        _say("")
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        show(report)
    return report.exit_code


def _examined(address: str | None, storage: str | None, workers: int | None, timeout_s: float) -> Report:
    """Join and examine; Ray is left again."""
    import ray

    from raylit.doctor.examine import examine
    from raylit.doctor.joining import join
    from raylit.errors import ConfigError

    try:
        return examine(storage, workers, joined=join(address), answer_s=timeout_s, say=_say)
    except ray.exceptions.RayError as error:
        raise ConfigError(f"the cluster went away: {(str(error).splitlines() or ['no reason given'])[0]}") from None
    finally:
        ray.shutdown()


def _again(storage: str | None, workers: int | None, timeout_s: float) -> list[str]:
    """The arguments once more, for the same command elsewhere."""
    given = ["--timeout", f"{timeout_s:g}"]
    given += ["--storage", storage] if storage is not None else []
    return given + (["--workers", str(workers)] if workers is not None else [])


def _say(text: str) -> None:
    """What is being done, on a line that goes again; for a person at a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def show(report: Report) -> None:
    """Print the table, its remedies below what was found, and the summary."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("node", overflow="fold", max_width=24)
    table.add_column("found", overflow="fold")
    for row in report.folded():
        found = Text(row.value)  # names and values are no markup
        if row.remedy:
            found.append(f"\n-> {row.remedy}", style="italic")
        verdict = row.verdict.value
        table.add_row(Text(verdict, style=_STYLES[verdict]), row.check, Text(row.node), found)
    console.print(table)
    console.print(Text(report.summary, style=_STYLES[report.worst.value]))
