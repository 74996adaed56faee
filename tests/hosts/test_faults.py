"""Hosts are lost under an elastic run, come back, and are lost in other ways: each time training goes on by itself.

What each fault costs is printed at the end (``pytest -s``); the table in docs/clusters.md is made of it.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts.going_on import EVERY_N_STEPS
from tests.hosts.machines import ROOT, SHARED, Host, missing, wait_for
from tests.hosts.onprem import OnPrem, onprem, redis

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.timeout(1500),  # hosts come and go, and Ray starts on them again, on few cores
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

LONG_S = 400.0  # nothing takes this long, but on a machine with other work


@dataclass(frozen=True)
class Step:
    """One optimizer step, as rank 0 noted it at its end."""

    at: float
    number: int
    workers: int


class Run:
    """The script on the head, and what it says, line by line, with the time."""

    def __init__(self, cluster: OnPrem, folder: Path) -> None:
        self.folder, self.lines = folder, list[tuple[float, str]]()
        script = f"{ROOT}/tests/hosts/going_on.py {SHARED}/going-on"
        self._process = cluster.head.start(f"RAY_AUTH_MODE=token python {script}")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append((time.time(), line.rstrip()))

    @property
    def text(self) -> str:
        return "\n".join(f"{time.strftime('%X', time.localtime(at))} {line}" for at, line in list(self.lines))

    def steps(self) -> list[Step]:
        file = self.folder / "steps"
        rows = [row.split() for row in file.read_text().splitlines()] if file.exists() else []
        return [Step(float(at), int(number), int(workers)) for at, number, workers in rows]

    def after(self, at: float, workers: int) -> list[Step]:
        """The steps that so many workers did since."""
        return [step for step in self.steps() if step.at > at and step.workers == workers]

    def going(self, workers: int, since: float, count: int = 3) -> Step:
        """Wait until so many workers have done some steps since a moment; the first of them."""

        def there() -> bool:
            assert self._process.poll() is None, self.text
            return len(self.after(since, workers)) >= count

        try:
            wait_for(there, f"{workers} workers train", LONG_S)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.text}") from None
        return self.after(since, workers)[0]

    def said(self, pattern: str, since: float) -> tuple[float, str]:
        """The first line since a moment that a pattern is found in."""

        def found() -> tuple[float, str] | None:
            return next((each for each in list(self.lines) if each[0] > since and re.search(pattern, each[1])), None)

        try:
            seen: tuple[float, str] = wait_for(found, pattern, LONG_S)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.text}") from None
        return seen

    def end(self) -> int:
        """Let it come to its end; its exit status."""
        (self.folder / "end").touch()
        code = self._process.wait(LONG_S)
        self.close()
        return code

    def gone(self) -> None:
        """Its host was lost, and it with it."""
        self._process.wait(30)
        self.close()

    def close(self) -> None:
        """End what is left of it, so that nothing is found open later, in another test."""
        self._process.kill()
        self._process.wait(30)
        self._reader.join(10)  # longer only where a test has failed, and the script holds the pipe until its host goes
        if not self._reader.is_alive() and self._process.stdout is not None:
            self._process.stdout.close()


FIGURES: list[str] = []


def note(what: str, run: Run, at: float, seen: tuple[float, str], on: Step) -> None:
    """Keep what a fault at a moment cost; ``on``: the first step after it."""
    before = max(step.number for step in run.steps() if step.at < on.at)
    FIGURES.append(f"{what}: seen after {seen[0] - at:.1f} s, goes on after {on.at - at:.1f} s, "
                   f"{before - (on.number - 1)} steps done twice\n    {seen[1]}")  # fmt: skip


def back(what: str, run: Run, at: float) -> None:
    """Wait until both hosts train again, and keep how long that took since a moment."""
    FIGURES.append(f"{what}: two workers again after {run.going(2, at).at - at:.1f} s")


@pytest.fixture(scope="module")
def cluster() -> Iterator[OnPrem]:
    with onprem([1, 1], redis_behind=True) as made, redis(made.laptop):
        made.up()
        yield made


@pytest.fixture(scope="module")
def run(cluster: OnPrem) -> Iterator[list[Run]]:
    """The run that goes on over all tests of this file: the newest start of its script is the last."""
    folder = cluster.lab.shared / "going-on"
    folder.mkdir()
    runs = [Run(cluster, folder)]
    yield runs
    for each in runs:
        each.close()
    print("", *FIGURES, sep="\n")


def both(run: Run) -> None:
    """Two workers train, and a checkpoint lies behind them that they wrote."""
    since = time.time()
    first = run.going(2, since)
    wait_for(lambda: run.after(since, 2)[-1].number >= first.number + EVERY_N_STEPS + 5, "a checkpoint", LONG_S)


def address_of(run: Run, host: Host) -> str:
    return rf"(\b{re.escape(host.name)}\b|{re.escape(host.address)}\b)"


def lost(what: str, run: Run, host: Host, at: float) -> Step:
    """After a loss: one line names the host, the other worker goes on, from the newest checkpoint."""
    seen = run.said(rf"WorkerLostError: .*{address_of(run, host)}", at)
    on = run.going(1, at)
    before = max(step.number for step in run.steps() if step.at < on.at)
    assert 0 <= before - (on.number - 1) <= EVERY_N_STEPS + 10, run.text  # one checkpoint's worth, and one in flight
    note(what, run, at, seen, on)
    return on


def test_a_worker_host_is_killed_and_booted_again(cluster: OnPrem, run: list[Run]) -> None:
    host = cluster.workers[1]
    both(run[-1])
    at = time.time()
    host.kill()
    lost("worker host killed", run[-1], host, at)
    at = time.time()
    host.boot()
    back("killed host booted", run[-1], at)


def test_the_network_of_a_host_is_cut_and_healed(cluster: OnPrem, run: list[Run]) -> None:
    host = cluster.workers[0]
    both(run[-1])
    at = time.time()
    host.cut()
    lost("network cut", run[-1], host, at)
    at = time.time()
    host.heal()
    back("network healed", run[-1], at)


def test_a_spot_host_is_announced_as_lost(cluster: OnPrem, run: list[Run]) -> None:
    host = cluster.workers[1]
    both(run[-1])
    listed = cluster.head.run("RAY_AUTH_MODE=token ray list nodes --format json --filter state=ALIVE").stdout
    nodes = json.loads(listed[listed.index("[") : listed.rindex("]") + 1])
    node = next(each["node_id"] for each in nodes if each["node_ip"] == host.address)
    at = time.time()
    cluster.head.run(
        f"RAY_AUTH_MODE=token ray drain-node --address {cluster.head.address}:6379 --node-id {node} "
        "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds 60"
    )
    seen = run[-1].said(rf"will be taken away.*{address_of(run[-1], host)}|{address_of(run[-1], host)}.*taken away", at)
    on = run[-1].going(1, at)
    host.kill()
    before = max(step.number for step in run[-1].steps() if step.at < on.at)
    assert on.number == before + 1, run[-1].text  # nothing was done twice
    note("spot notice", run[-1], at, seen, on)
    at = time.time()
    host.boot()
    # The head had begun to start Ray there again; where that failed it never tries again. So the file's own command:
    start = "ray exec FILE 'python ~/raylit/clusters/onprem_workers.py start'"
    assert "Ray runs on 2 of 2 hosts" in cluster.ray(start).stdout
    back("spot host replaced, `onprem_workers.py start`", run[-1], at)


def test_the_head_is_lost_with_redis_behind_it(cluster: OnPrem, run: list[Run]) -> None:
    """The script ran on the head and is gone with it. Ray's state is not: the same script, once more, goes on."""
    both(run[-1])
    at = time.time()
    cluster.head.kill()
    run[-1].gone()
    before = run[-1].steps()[-1].number
    cluster.head.boot()
    cluster.up()
    up = time.time()
    run.append(Run(cluster, run[-1].folder))
    on = run[-1].going(2, up)
    assert 0 <= before - (on.number - 1) <= EVERY_N_STEPS + 10, run[-1].text
    FIGURES.append(f"head lost: `ray up` was done after {up - at:.1f} s, the script, started again, goes on after "
                   f"{on.at - at:.1f} s, {before - (on.number - 1)} steps done twice")  # fmt: skip


def test_the_run_comes_to_its_end(cluster: OnPrem, run: list[Run]) -> None:
    assert run[-1].end() == 0, run[-1].text
    assert f"run folder: {SHARED}/going-on/runs/going-on" in run[-1].text, run[-1].text
    numbers = [step.number for step in run[-1].steps()]
    assert set(range(1, numbers[-1] + 1)) == set(numbers)  # no step was left out
