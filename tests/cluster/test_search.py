"""Searches on a cluster of three hosts: trials on all of them, and workers, hosts and drivers that die in mid-search.

What comes of a trial is compared with a fit of its configuration that nothing happens to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chaos.faults import wait_for
from tests.cluster.hosts import ALERT, RAY, Cluster, environment_of, may_hide_folders
from tests.cluster.searched import BATCHES, EPOCHS, Search, alone

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),  # several raylets start and stop, on few cores
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs several loopback addresses"),
]

_LONG_S = 400  # nothing takes this long, but on a machine with other work Ray may need minutes
NEWEST = BATCHES + BATCHES // 2  # steps at the newest checkpoint of a trial that is held: after half an epoch
STEPS = EPOCHS * BATCHES


class Hosts:
    """A head that takes jobs, and two members; they see the folder ``hidden`` empty, where that can be had."""

    def __init__(self, cluster: Cluster, hidden: Path) -> None:
        self.cluster, self.hidden = cluster, hidden

    def complete(self) -> None:
        while len(self.cluster.members) < 2:
            self.cluster.join(self.hidden if may_hide_folders() else None)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    hidden = tmp_path_factory.mktemp("caller")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # jobs call their python by name
    with environment_of(**ALERT, PATH=path) as environment, Cluster(environment, dashboard=True) as cluster:
        yield Hosts(cluster, hidden)


@pytest.fixture
def hosts(started: Hosts) -> Hosts:
    """All three; a test may lose one, and another one has joined before the next test."""
    started.complete()
    return started


class Driver:
    """A search's script that runs."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self.folder = process, folder

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for it; an end of the script meanwhile is an error."""
        wait_for(lambda: self._process.poll() is not None or condition(), what)
        assert self._process.poll() is None, self.output

    def held(self, *rates: float) -> None:
        """Wait until trials wait."""
        for rate in rates:
            self.until(lambda rate=rate: (self.folder / "notes" / f"held-{rate}-0").exists(), f"trial {rate} is held")

    def go(self) -> None:
        """Let those that wait go on."""
        (self.folder / "notes" / "go").touch()

    def ends(self) -> int:
        return self._process.wait(_LONG_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def results(self) -> dict[float, dict[str, Any]]:
        """Wait for the script's end; what the search gave, by learning rate."""
        assert self.ends() == 0, self.output
        return dict(json.loads((self.folder / "results.json").read_text())["rows"])

    @property
    def best(self) -> float:
        return float(json.loads((self.folder / "results.json").read_text())["best"])

    def starts(self, rate: float, rank: int = 0) -> list[dict[str, Any]]:
        """What a trial's worker has said at each of its starts."""
        return [json.loads(file.read_text()) for file in sorted((self.folder / "notes").glob(f"start-{rate}-{rank}-*"))]


@contextlib.contextmanager
def running(search: Search, hosts: Hosts, folder: Path) -> Iterator[Driver]:
    """The search's script, on the cluster; killed if it still runs at the end."""
    search.write(folder)
    environment = {**hosts.cluster.driver_environment, "PYTHONUNBUFFERED": "1"}
    with open(folder / "output.txt", "w") as output, subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.searched", str(folder)], env=environment, cwd=folder, stdout=output,
        stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            yield Driver(process, folder)
        finally:
            process.kill()


def assert_undisturbed(row: dict[str, Any], metrics: dict[str, Any], weights: dict[str, Any]) -> None:
    """A trial's numbers and weights are, to the bit, those of a fit alone."""
    assert row["error"] is None
    assert {name: row["metrics"][name] for name in metrics} == metrics
    assert (row["metrics"]["epoch"], row["metrics"]["step"]) == (EPOCHS, STEPS)
    # Two reports an epoch, the last of them with the end's checkpoint; what was done twice does not count twice.
    assert row["metrics"]["training_iteration"] == 2 * EPOCHS
    saved = torch.load(Path(row["checkpoint"]) / "model.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())
    assert (Path(row["path"]) / "hparams.yaml").exists() and (Path(row["path"]) / "history.parquet").exists()


Fits = Callable[[float], tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    """``alone``, in this process."""
    folder = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda rate: alone(rate, storage_path=str(folder)))


def test_trials_run_on_all_hosts_and_give_what_fits_in_one_place_give(hosts: Hosts, tmp_path: Path, fits: Fits) -> None:
    rates = [0.08, 0.05, 0.01, 1e-6]
    with running(Search(rates, held=tuple(rates[:3])), hosts, tmp_path) as driver:
        driver.held(*rates[:3])  # all three at once, and one CPU on each host
        driver.go()
        rows = driver.results()
    assert len({start["node"] for rate in rates[:3] for start in driver.starts(rate)}) == 3
    for rate in rates:
        assert_undisturbed(rows[rate], *fits(rate))
        assert [start["step"] for start in driver.starts(rate)] == [0]
    assert driver.best == min(rates, key=lambda rate: fits(rate)[0]["val_loss"])
    assert driver.output.count(" done ") == 4 and "best of 4 trials" in driver.output


@pytest.mark.long
def test_a_lost_host_costs_its_trial_a_row(hosts: Hosts, tmp_path: Path, fits: Fits) -> None:
    rates = [0.08, 0.05, 0.01, 0.03]
    with running(Search(rates, held=tuple(rates[:3])), hosts, tmp_path) as driver:
        lost = loses_a_member(driver, hosts, rates[:3])
        driver.go()
        rows = driver.results()
    ((start,), row) = driver.starts(lost), rows[lost]
    assert "actor" in row["error"] and row["metrics"]["step"] == NEWEST  # its last report
    (line,) = (line for line in driver.output.splitlines() if " failed " in line)
    assert f"lr={lost}" in line and f"its process on {start['address']} was lost: " in line
    for rate in set(rates) - {lost}:
        assert_undisturbed(rows[rate], *fits(rate))


def test_a_trial_of_a_lost_host_goes_on_elsewhere_to_the_bit(hosts: Hosts, tmp_path: Path, fits: Fits) -> None:
    rates = [0.08, 0.05, 0.01, 0.03]
    with running(Search(rates, max_failures=2, held=tuple(rates[:3])), hosts, tmp_path) as driver:
        lost = loses_a_member(driver, hosts, rates[:3])
        driver.go()
        rows = driver.results()
    first, second = driver.starts(lost)
    assert first["node"] != second["node"] and (first["step"], second["step"]) == (0, NEWEST)
    for rate in rates:
        assert_undisturbed(rows[rate], *fits(rate))
        assert len(driver.starts(rate)) == (2 if rate == lost else 1)


def loses_a_member(driver: Driver, hosts: Hosts, rates: list[float]) -> float:
    """Kill a member once all these trials wait; the trial that ran there."""
    driver.held(*rates)
    lost = next(rate for rate in rates if driver.starts(rate)[0]["address"] in hosts.cluster.members)
    hosts.cluster.lose(driver.starts(lost)[0]["address"])
    return lost


@pytest.mark.long
def test_trials_of_two_workers_on_three_hosts(hosts: Hosts, tmp_path: Path) -> None:
    """Of three, one at a time has room. One loses a worker, one a host; all come to what a fit on two workers does."""
    rates = [0.08, 0.05, 0.01]
    search = Search(rates, workers=2, max_failures=2, held=(0.05,), worker_dies=0.08)
    with running(search, hosts, tmp_path) as driver:
        driver.held(0.05)
        places = [driver.starts(0.05, rank)[0]["address"] for rank in (0, 1)]
        hosts.cluster.lose(next(place for place in places if place in hosts.cluster.members))
        driver.go()
        rows = driver.results()
    fits = fits_on_two(rates, hosts, tmp_path)
    for rate in rates:
        starts = [driver.starts(rate, rank) for rank in (0, 1)]
        assert all(len({rank["node"] for rank in attempt}) == 2 for attempt in zip(*starts, strict=True))
        expected = [0] if rate == 0.01 else [0, NEWEST]
        assert [[start["step"] for start in rank] for rank in starts] == [expected, expected]
        assert_undisturbed(rows[rate], *fits[rate])


def fits_on_two(rates: list[float], hosts: Hosts, folder: Path) -> dict[float, tuple[dict[str, Any], dict[str, Any]]]:
    """``alone`` for each rate, on two workers of the cluster."""
    code = """if True:
        import sys, torch
        from tests.cluster.searched import alone
        storage, end, *rates = sys.argv[1:]
        torch.save({float(rate): alone(float(rate), 2, storage_path=storage) for rate in rates}, end)
    """
    command = [sys.executable, "-c", code, str(folder / "alone"), str(folder / "alone.pt"), *map(str, rates)]
    done = subprocess.run(command, cwd=folder, timeout=_LONG_S, env=hosts.cluster.driver_environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    fits: dict[float, tuple[dict[str, Any], dict[str, Any]]] = torch.load(folder / "alone.pt", weights_only=True)
    return fits


@pytest.mark.parametrize("moment", [pytest.param("waiting", marks=pytest.mark.long), "worst"])
def test_a_search_is_taken_up_after_its_driver_was_killed(
    hosts: Hosts, tmp_path: Path, fits: Fits, moment: str
) -> None:
    """The worst moment: a trial's checkpoint that Tune has written down is gone, and the next one it has not."""
    rates, held = [0.08, 0.05, 0.01, 0.03, 0.02], (0.05, 0.01, 0.03)
    waits = moment == "waiting"
    search = Search(rates, at_once=3, held=held if waits else (), driver_dies=None if waits else 0.03)
    with running(search, hosts, tmp_path) as driver:
        if waits:
            driver.held(*held)  # one is done, and the last one not begun
            driver.kill()
        else:
            assert driver.ends() == -signal.SIGKILL
    ended = {rate for rate in rates if f" done  lr={rate} " in driver.output}
    assert ended == {0.08} if waits else ended and 0.03 not in ended
    with running(dataclasses.replace(search, restored=True), hosts, tmp_path) as driver:
        rows = driver.results()
    steps = {rate: [start["step"] for start in driver.starts(rate)] for rate in rates}
    if waits:
        assert steps == {rate: [0, NEWEST] if rate in held else [0] for rate in rates}
    assert waits or steps[0.03] == [0, BATCHES]
    assert all(steps[rate] == [0] for rate in ended)
    for rate in rates:
        assert_undisturbed(rows[rate], *fits(rate))
    assert driver.best == min(rates, key=lambda rate: fits(rate)[0]["val_loss"])
    assert "best of 5 trials" in driver.output
    if not waits:
        return
    for state in (tmp_path / "results" / "search").glob("experiment_state-*.json"):  # as the kill of one who writes it
        state.write_bytes(state.read_bytes()[:1000])
    with running(dataclasses.replace(search, restored=True), hosts, tmp_path) as driver:
        assert driver.results().keys() == rows.keys()
    assert steps == {rate: [start["step"] for start in driver.starts(rate)] for rate in rates}  # nothing ran again


SUBMITTED = """
    import json
    import sys

    import torch
    from ray import tune

    import raylit
    from model import Net

    if __name__ == "__main__":
        what, folder = sys.argv[1:]
        given = {"max_epochs": 1, "logger": False, "enable_model_summary": False, "storage_path": folder, "name": what}
        if what == "fit":
            trainer = raylit.Trainer(num_workers=2, placement_strategy="STRICT_SPREAD", **given)
            trainer.fit(Net())
            print("trained", trainer.global_step, "steps, seen", trainer.callback_metrics["seen"].item())
            sys.exit(3)
        space = {"lr": tune.grid_search([0.01, 0.02, 0.03]), "folder": folder}
        results = raylit.Tuner(Net, param_space=space, trainer=raylit.Trainer(**given), dry_run=False).fit()
        assert not results.errors, results.errors
"""
MODEL = """
    import json
    from pathlib import Path

    import ray
    import torch

    import neighbour
    import raylit

    class Net(raylit.Module):
        def __init__(self, lr=0.03, folder=""):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(1, 1)

        def on_fit_start(self):
            if self.hparams.folder:
                note = Path(self.hparams.folder) / f"start-{self.hparams.lr}"
                note.write_text(json.dumps([ray.get_runtime_context().get_node_id(), neighbour.__file__]))
                neighbour.wait_for_all(Path(self.hparams.folder), 3)

        def training_step(self, batch, batch_idx):
            self.log("seen", float(len(batch)), on_epoch=True, reduce_fx="sum")
            return neighbour.loss(self.layer(batch))

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
"""
NEIGHBOUR = """
    import threading
    import time

    def loss(output):
        return (output**2).mean()

    def wait_for_all(folder, count):
        until = time.monotonic() + 240
        while len(list(folder.glob("start-*"))) < count:
            assert time.monotonic() < until, "the others did not start"
            threading.Event().wait(0.05)
"""


@pytest.fixture
def project(hosts: Hosts) -> Path:
    """A project of three files, which the members of the cluster have not."""
    folder = hosts.hidden / "project"
    folder.mkdir(exist_ok=True)
    for name, text in (("search", SUBMITTED), ("model", MODEL), ("neighbour", NEIGHBOUR)):
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return folder


def submitted(hosts: Hosts, project: Path, *script: str) -> subprocess.CompletedProcess[str]:
    """Send a script with its project to the cluster, from another folder."""
    command = [str(RAY), "job", "submit", "--address", hosts.cluster.jobs, "--working-dir", str(project), "--"]
    return subprocess.run([*command, "python", *script], env=hosts.cluster.driver_environment, cwd="/",
                          capture_output=True, text=True, timeout=_LONG_S)  # fmt: skip


def test_a_search_is_sent_as_a_job_with_the_modules_beside_it(hosts: Hosts, project: Path, tmp_path: Path) -> None:
    done = submitted(hosts, project, "search.py", "search", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    notes = [json.loads(note.read_text()) for note in tmp_path.glob("start-*")]
    assert len({node for node, _ in notes}) == 3
    assert not any(file.startswith(str(project)) for _, file in notes)  # it came with the job
    assert done.stdout.count(" done ") == 3


@pytest.mark.long
def test_a_fit_is_sent_as_a_job_and_its_exit_code_comes_back(hosts: Hosts, project: Path, tmp_path: Path) -> None:
    done = submitted(hosts, project, "search.py", "fit", str(tmp_path))
    assert "trained 2 steps, seen 8" in done.stdout, done.stdout + done.stderr
    assert done.returncode != 0 and "exit code 3" in done.stdout
