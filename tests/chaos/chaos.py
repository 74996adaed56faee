"""The chaos test: ``python -m tests.chaos.chaos --seed 7 --runs 20``. Each run meets one fault, and must lose nothing.

A run is a script of its own on a cluster of three hosts, which all runs share; where a host was lost, another one joins
before the next run. What comes of a run is compared with the same run on two processes that nothing happens to. Exit
code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.feather
import torch

from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store
from tests.chaos.faults import EPOCHS, Kind, Run, drawn, leave, wait_for
from tests.chaos.train import SAMPLES, WORKERS, Net, keeping, loaders, settings
from tests.cluster.hosts import ALERT, Cluster, environment_of, may_hide_folders
from tests.two_process.harness import Processes, here_on_path, run_here

MEMBERS = 2  # beside the head
DISK = "4m"  # of a run that fills it
_HANGS_S = 900.0


@dataclass(frozen=True)
class Reference:
    """What a run comes to that nothing happens to."""

    weights: dict[str, Any]
    history: pyarrow.Table
    steps: int
    kept: list[str]  # names of the checkpoints at its end


@dataclass
class Outcome:
    """What came of a run; ``problems``: empty where nothing was lost."""

    run: Run
    problems: list[str] = field(default_factory=list)
    twice: int = 0  # samples that an epoch saw more than once, over all epochs
    never: int = 0
    to_go_on_s: float | None = None  # from the fault to the end of the first step after it
    took_s: float = 0.0


# -- the undisturbed run ---------------------------------------------------------------------------------------------
def _undisturbed(rank: int, world_size: int, run: Run, folder: Path) -> Reference:
    train, validate = loaders()
    ran = run_here(
        Net(run, folder, undisturbed=True), train, val=validate, rank=rank, world_size=world_size, order_seed=run.seed,
        callbacks=[keeping(run)], storage=str(folder / "disk" / "run"), **settings(run),
    )  # fmt: skip
    return Reference(ran.weights, ran.trainer.history, ran.outcome.state.global_step, _kept(folder))


def undisturbed(run: Run, two: Processes, folder: Path) -> Reference:
    """The run on two processes, without a fault and without Ray."""
    folder.mkdir()
    reference: Reference = two(_undisturbed, run, folder)[0]
    assert samples(folder) == (0, 0), "the undisturbed run does not see each sample once: the test itself is wrong"
    return reference


# -- the run ---------------------------------------------------------------------------------------------------------
def disturbed(run: Run, cluster: Cluster, folder: Path, reference: Reference) -> Outcome:
    """The run on the cluster, with its fault; compares it with the reference."""
    began = time.monotonic()
    (folder / "disk").mkdir(parents=True)
    run.write(folder)
    outcome = Outcome(run)
    own = {**cluster.driver_environment, "PYTHONUNBUFFERED": "1"}
    with small_disk(folder / "disk") if run.fault.kind is Kind.DISK else contextlib.nullcontext():
        with open(folder / "output.txt", "w") as output, subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.train", str(folder)], env=own, cwd=folder, stdout=output,
            stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            try:
                _from_outside(run, cluster, folder, lambda: process.poll() is not None)
                process.wait(_HANGS_S)
            except (TimeoutError, subprocess.TimeoutExpired) as error:
                outcome.problems.append(f"it hangs: {error}")
            finally:
                process.kill()
        if process.returncode != 0:
            outcome.problems.append(f"the fit did not finish:\n{told(folder)[-3000:]}")
        else:
            outcome.problems += differences(run, folder, reference)
            outcome.twice, outcome.never = samples(folder)
    if outcome.twice or outcome.never:
        outcome.problems.append(f"samples seen twice: {outcome.twice}, never: {outcome.never}")
    struck, first = note(folder, "fault"), note(folder, "first-0-1")
    if struck is None or first is None:
        outcome.problems.append("the fault never came, or the run never went on")
    else:
        outcome.to_go_on_s = first["time"] - struck["time"]
    outcome.took_s = time.monotonic() - began
    return outcome


def _from_outside(run: Run, cluster: Cluster, folder: Path, over: Callable[[], bool]) -> None:
    """The part of a fault that a worker cannot do to itself. ``over``: the run has ended."""

    def reached(*names: str) -> bool:
        wait_for(lambda: over() or all((folder / name).exists() for name in names), f"{names} of {run.fault}")
        return not over()

    if run.fault.kind is Kind.NODE and reached("reached"):
        member = _lost(run, cluster, folder)[0]
        leave(folder, "fault")
        cluster.lose(member)
        leave(folder, "struck")
    elif run.fault.kind is Kind.DRAIN and reached("reached-0", "reached-1"):
        member, node = _lost(run, cluster, folder)
        raylet = cluster.drain(member, node, run.fault.notice_s)
        leave(folder, "drained")
        wait_for(lambda: "will be taken away" in told(folder) or _ended(raylet) or over(), "the notice is heard")
        leave(folder, "heard")
        wait_for(lambda: _ended(raylet) or over(), "the node is taken away")
        leave(folder, "fault")
        leave(folder, "struck")


def _ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def _lost(run: Run, cluster: Cluster, folder: Path) -> tuple[str, str]:
    """The member that is lost, by its address, and Ray's id of it: that of the drawn rank, unless it is on the head."""
    places = [note(folder, f"start-{rank}-0") for rank in (run.fault.rank, 1 - run.fault.rank)]
    return next((each["address"], each["node"]) for each in places if each and each["address"] in cluster.members)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of its own at a folder; takes the right to mount."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# -- what must hold --------------------------------------------------------------------------------------------------
def note(folder: Path, name: str) -> dict[str, Any] | None:
    """What a process of the run left under this name; None where it did not."""
    file = folder / name
    found: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
    return found


def told(folder: Path) -> str:
    """What the run has printed."""
    return (folder / "output.txt").read_text()


def samples(folder: Path) -> tuple[int, int]:
    """(seen more than once, never seen) in one epoch, over all epochs."""
    twice = never = 0
    for epoch in range(EPOCHS):
        seen: Counter[int] = Counter()
        for rank in range(WORKERS):
            ids = note(folder, f"ids-{epoch}-{rank}")
            seen.update(ids["ids"] if ids else [])
        twice += sum(count > 1 for count in seen.values())
        never += sum(each not in seen for each in range(SAMPLES))
    return twice, never


def differences(run: Run, folder: Path, reference: Reference) -> list[str]:
    """In what a finished run is another than the undisturbed one."""
    found = []
    weights = torch.load(folder / "weights.pt", weights_only=True)
    same = weights.keys() == reference.weights.keys()
    if not same or not all(torch.equal(tensor, reference.weights[name]) for name, tensor in weights.items()):
        found.append("other weights")
    if not pyarrow.feather.read_table(folder / "history.arrow").equals(reference.history):
        found.append("another history")
    facts = note(folder, "facts") or {}
    if facts["steps"] != reference.steps:
        found.append(f"{facts['steps']} steps, not {reference.steps}")
    if run.fault.kind is Kind.DISK and "could not be written" not in told(folder):
        found.append("the disk was never found full: the test itself is wrong")
    damaged = note(folder, "damaged") or {}
    again = note(folder, "start-0-1") or {}
    if damaged and again["step"] != damaged["before"]:
        found.append(f"it went on from step {again['step']}, and not from {damaged['before']}, before the damaged one")
    if not damaged and run.fault.kind is not Kind.DISK and _kept(folder) != reference.kept:
        found.append(f"checkpoints {_kept(folder)}, not {reference.kept}")
    store = _store(folder)
    for each in store.survey():
        faults = store.faults(each.manifest) if each.manifest else each.faults
        if faults and (each.name != damaged.get("name") or each.name in facts["kept"]):
            found.append(f"the checkpoint {each.name}: {'; '.join(faults)}")
    return found


def _store(folder: Path) -> Store:
    return Store(Folder(str(folder / "disk" / "run" / "checkpoints")))


def _kept(folder: Path) -> list[str]:
    return sorted(each.name for each in _store(folder).survey())


# -- many runs -------------------------------------------------------------------------------------------------------
def table(outcomes: list[Outcome]) -> str:
    """The figures by kinds of fault, as Markdown."""
    lines = ["| fault | runs | lost | samples seen twice | never | to go on: median | worst |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for kind in [*Kind, None]:
        these = [each for each in outcomes if kind is None or each.run.fault.kind is kind]
        if not these:
            continue
        times = [each.to_go_on_s for each in these if each.to_go_on_s is not None]
        cells = [kind.value if kind else "all", len(these), sum(bool(each.problems) for each in these),
                 sum(each.twice for each in these), sum(each.never for each in these)]  # fmt: skip
        shown = [f"{number:.1f} s" for number in (statistics.median(times), max(times))] if times else ["-", "-"]
        lines.append(f"| {' | '.join(map(str, [*cells, *shown]))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="the faults and their moments are drawn from it")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--only", type=int, help="only the run of this number, from 0")
    parser.add_argument("--mounts", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.mounts and may_hide_folders():
        # In a mount namespace of its own: the small disks go with it, whatever ends this process.
        os.execvp("unshare", ["unshare", "-m", sys.executable, "-m", "tests.chaos.chaos", *sys.argv[1:], "--mounts"])
    here_on_path()
    numbers = range(given.runs) if given.only is None else [given.only]
    outcomes, two = [], Processes(WORKERS)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"seed {given.seed}, {len(numbers)} runs, in {folder}", flush=True)
    try:
        with environment_of(**ALERT) as environment, Cluster(environment) as cluster:
            for number in numbers:
                run = drawn(given.seed, number)
                rhythm = f"checkpoints every {run.every_n_steps} steps"
                what = f"run {number}: {run.fault.kind.value} ({run.fault.moment}; {rhythm})"
                if run.fault.kind is Kind.DISK and not given.mounts:
                    print(f"{what}: skipped, it takes Linux and the right to mount a tmpfs", flush=True)
                    continue
                while len(cluster.members) < MEMBERS:
                    cluster.join()
                reference = undisturbed(run, two, folder / f"{number}-undisturbed")
                outcome = disturbed(run, cluster, folder / str(number), reference)
                outcomes.append(outcome)
                verdict = "; ".join(outcome.problems) or "nothing lost"
                went_on = "" if outcome.to_go_on_s is None else f", went on after {outcome.to_go_on_s:.1f} s"
                print(f"{what}: {verdict}{went_on}; {outcome.took_s:.0f} s in all", flush=True)
    finally:
        two.close()
    print(f"\n{table(outcomes)}")
    if any(each.problems for each in outcomes):
        print(f"\nwhat the runs left is in {folder}; --only NUMBER repeats one")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
