"""``clusters/slurm.sbatch`` on a real Slurm: a login node and three compute nodes that share the person's home.

What a lost node costs is printed at the end (``pytest -s``); docs/clusters.md has the figures.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from functools import partial

import pytest

from tests.hosts.going_on import EVERY_N_STEPS
from tests.hosts.machines import HOME
from tests.hosts.slurm import NODE_TIMEOUT_S, Job, Slurm, lacking, slurm

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # Ray starts and stops on several hosts, on few cores
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
]

FIGURES: list[str] = []


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    """Slurm runs, and the person has the environment and the token."""
    with slurm(3) as made:
        made.run("raylit token raylit-slurm")
        (made.home / "going").mkdir()
        yield made
    print("", *FIGURES, sep="\n")


def nothing_is_left(cluster: Slurm, job: Job) -> None:
    """After a job's end: the nodes are free, and nothing of the job runs on them."""
    job.until(lambda: not cluster.processes(), f"nothing is left on the nodes, but {cluster.processes()}", 15)
    assert set(cluster.states()) == {"idle"}


def test_without_a_script_the_job_says_how_it_is_started(cluster: Slurm) -> None:
    job = cluster.batch("")
    assert job.over()["ExitCode"] == "2:0"
    assert job.log == "give the script: sbatch clusters/slurm.sbatch main.py --flags\n"


def test_the_example_is_trained_on_two_nodes(cluster: Slurm) -> None:
    job = cluster.batch("examples/01_digits/main.py --num-workers 2 --max-epochs 3")
    shown = job.over()
    assert (shown["JobState"], shown["ExitCode"], shown["NodeList"]) == ("COMPLETED", "0:0", "node-[1-2]"), job.log
    nothing_is_left(cluster, job)
    head = cluster.nodes[0]
    assert job.log.startswith(f"Ray's head: {head.name} ({head.address}:{20000 + job.number}), 2 nodes\n"), job.log
    assert "fit on 2 workers" in job.log
    accuracy = re.search(r"test accuracy: (0\.\d+)", job.log)
    assert accuracy and float(accuracy[1]) > 0.9, job.log
    folder = re.search(rf"run folder: ({HOME}/raylit-runs/\S+)", job.log)
    assert folder, job.log
    assert (
        "63" in cluster.run(f"raylit checkpoints --verify {folder[1]}").stdout
    )  # 1297 samples, 2 x 32 a step, 3 epochs
    assert (cluster.home / ".ray/tokens/raylit-slurm").read_text().strip() not in job.log


def test_ranks_are_those_of_the_nodes_and_the_scripts_exit_code_is_the_jobs(cluster: Slurm) -> None:
    (cluster.home / "ranks").mkdir()
    (cluster.home / "fails.py").write_text("""
import subprocess, sys
subprocess.run([sys.executable, "tests/hosts/ranks.py", *sys.argv[1:3]], check=True)
print("words:", sys.argv[3:])
sys.exit(3)
""")
    job = cluster.batch(f"{HOME}/fails.py {HOME}/ranks 3 'two words'", nodes=3)
    shown = job.over()
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "3:0"), job.log
    nothing_is_left(cluster, job)
    assert "words: ['two words']" in job.log and "Command failed with return code 3" in job.log, job.log
    said = [json.loads((cluster.home / f"ranks/{rank}.json").read_text()) for rank in range(3)]
    assert {each["host"] for each in said} == {"node-1", "node-2", "node-3"}
    assert [(each["local"], each["node"], each["of"]) for each in said] == [(0, rank, 3) for rank in range(3)]


# From here on one run, of tests/hosts/going_on.py, in several jobs.
FOLDER = f"{HOME}/going"


def steps(cluster: Slurm) -> list[tuple[float, int, int]]:
    """The steps that were done: when, which, and on how many workers."""
    file = cluster.home / "going/steps"
    rows = [row.split() for row in file.read_text().splitlines()] if file.exists() else []
    return [(float(at), int(number), int(workers)) for at, number, workers in rows]


def since(cluster: Slurm, at: float, workers: int, count: int) -> list[tuple[float, int, int]]:
    """The steps that so many workers did since a moment, once there are so many of them."""
    found = [step for step in steps(cluster) if step[0] > at and step[2] == workers]
    return found if len(found) >= count else []


def begin(cluster: Slurm) -> Job:
    """Submit the script, and wait until two workers train and have a checkpoint behind them."""
    at = time.time()
    job = cluster.batch(f"tests/hosts/going_on.py {FOLDER}")
    job.until(partial(since, cluster, at, 2, EVERY_N_STEPS + 15), "two workers train")
    return job


def test_scancel_ends_all_of_it_and_the_same_line_goes_on(cluster: Slurm) -> None:
    job = begin(cluster)
    at = time.time()
    cluster.run(f"scancel {job.number}")
    shown = job.over()
    assert shown["JobState"] == "CANCELLED", job.log
    nothing_is_left(cluster, job)
    FIGURES.append(f"scancel: nothing is left after {time.time() - at:.1f} s")
    verified = cluster.run(f"raylit checkpoints --verify {FOLDER}/runs/going-on").stdout
    at, before = time.time(), steps(cluster)[-1][1]
    job = begin(cluster)
    first = since(cluster, at, 2, 1)[0][1]
    assert f"goes on after step {first - 1}" in job.log, job.log
    assert (first - 1) % EVERY_N_STEPS == 0 and 0 <= before - (first - 1) <= EVERY_N_STEPS + 10, verified
    assert str(first - 1) in verified, verified
    (cluster.home / "going/job").write_text(str(job.number))


def test_a_lost_node_requeues_the_job_which_goes_on_with_another(cluster: Slurm) -> None:
    job = Job(cluster, int((cluster.home / "going/job").read_text()))
    lost = cluster.nodes[1]
    job.until(lambda: steps(cluster)[-1][1] % EVERY_N_STEPS == 15, "a checkpoint lies some steps back")
    at = time.time()
    lost.kill()
    # raylit is the first to see it: until Slurm does, the other worker goes on alone. What the line says of the cause
    # depends on who sees it first, Ray or gloo.
    said = rf"^.*({lost.name}|{re.escape(lost.address)}).*starting again \(restart 1\)$"
    line = job.until(lambda: re.search(said, job.log, re.MULTILINE), "raylit sees the loss")[0]
    FIGURES.append(f"node lost: raylit says so after {time.time() - at:.1f} s:\n        {line}")
    alone = job.until(partial(since, cluster, at, 1, 1), "one worker goes on")[0]
    FIGURES.append(f"    one worker goes on after {alone[0] - at:.1f} s")
    # Slurm waits for SlurmdTimeout, ends the job on the nodes that are left, and puts it into the queue again.
    job.until(lambda: job.show()["Restarts"] == "1", "Slurm requeues the job")
    ended, before = time.time(), steps(cluster)[-1]
    FIGURES.append(
        f"    Slurm (SlurmdTimeout={NODE_TIMEOUT_S}) requeues after {ended - at:.1f} s; it said:\n"
        + "\n".join(f"        {line}" for line in job.log.splitlines() if "NODE FAIL" in line or "srun:" in line)
    )
    job.until(lambda: job.show()["JobState"] == "RUNNING", "the job begins again")
    FIGURES.append(f"    the job begins again after {time.time() - at:.1f} s")
    on = job.until(partial(since, cluster, ended, 2, 3), "two workers train again")[0]
    FIGURES.append(f"    two workers train again after {on[0] - at:.1f} s, {before[1] - (on[1] - 1)} steps done twice")
    assert job.show()["NodeList"] == "node-[1,3]"
    assert 0 <= before[1] - (on[1] - 1) <= EVERY_N_STEPS + 10, job.log
    # Appended: the log tells of both.
    assert job.log.count("Ray's head: ") == 2 and line in job.log
    lost.boot()
    cluster.begin(lost)
    (cluster.home / "going/end").touch()
    shown = job.over()
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), job.log
    nothing_is_left(cluster, job)
    numbers = {number for _, number, _ in steps(cluster)}
    assert numbers == set(range(1, max(numbers) + 1))  # no step was left out
