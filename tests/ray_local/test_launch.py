"""The launch floor on a real, small Ray: outcomes, failures, prints, Ctrl-C.

The functions that workers run are in this file; workers import it by name through ``Job.sys_path``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import raylit
from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store
from raylit.errors import ResourceError, WorkerLostError
from raylit.wire import Job, World

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODULE = Path(__file__).stem


# What the workers run -------------------------------------------------------------------------------------------


def main_ranks(job: Job, world: World, channel: Any) -> bytes:
    import torch
    import torch.distributed as dist

    ranks = torch.zeros(world.world_size)
    ranks[world.global_rank] = world.global_rank + 1
    if world.world_size > 1:
        dist.all_reduce(ranks)
    return f"{ranks.tolist()} {world.global_rank} {world.local_rank} {world.local_world_size}".encode() + job.payload


def main_raises(job: Job, world: World, channel: Any) -> bytes:
    import torch.distributed as dist

    if world.global_rank == 1:
        _user_step(3)
    dist.barrier()
    return b"not reached"


def _user_step(batch_idx: int) -> None:
    error = ValueError("a batch of the wrong shape")
    error.raylit_where = {"stage": "fit", "epoch": 2, "batch_idx": batch_idx}  # type: ignore[attr-defined]
    raise error


class Unpicklable(Exception):
    """Cannot be pickled in any form: its type is made where it is raised."""


def main_unpicklable(job: Job, world: World, channel: Any) -> bytes:
    class Local(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("no")

        def __new__(cls, *args: Any) -> Any:
            if sys.argv and getattr(sys, "_raylit_made", False):
                raise TypeError("not twice")
            sys._raylit_made = True  # type: ignore[attr-defined]
            return super().__new__(cls, *args)

    raise Local("held a lock")


class TwoArguments(Exception):
    """Pickles but does not unpickle by itself: ``args`` are not what ``__init__`` takes."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


def main_two_arguments(job: Job, world: World, channel: Any) -> bytes:
    raise TwoArguments(7, "seven")


def main_killed(job: Job, world: World, channel: Any) -> bytes:
    import torch.distributed as dist

    if world.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return b"not reached"


def main_prints(job: Job, world: World, channel: Any) -> bytes:
    import logging

    print(f"out {world.global_rank}")
    print(f"err {world.global_rank}", file=sys.stderr)
    print("no newline", end="")
    logging.warning("a warning")
    logging.info("not shown in process either")
    channel.send({"kind": "metrics", "epoch": 1})
    return b""


def main_place(job: Job, world: World, channel: Any) -> bytes:
    import a_local_module  # type: ignore[import-not-found]

    return f"{os.getcwd()}|{Path('relative.txt').read_text()}|{a_local_module.VALUE}".encode()


def main_large(job: Job, world: World, channel: Any) -> bytes:
    return b"x" * (210 * 1024 * 1024)


# The tests ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for this file's tests, started the way raylit starts it."""
    import ray

    from raylit.driver import cluster

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = cluster.connect()
    yield
    if began:
        ray.shutdown()


@pytest.fixture
def run(ray_session: None, tmp_path: Path) -> Callable[..., Any]:
    """``run(main, ...)``: launch one of this file's functions."""
    from raylit.driver.launch import launch

    def call(main: Callable[..., bytes], *, payload: bytes = b"", **options: Any) -> Any:
        job = Job(
            stage="fit",
            payload=payload,
            sys_path=(str(HERE), str(ROOT), *options.pop("sys_path", ())),
            working_dir=str(options.pop("working_dir", tmp_path)),
        )
        options.setdefault("storage_path", str(tmp_path / "runs"))
        return launch(job, worker_main=f"{MODULE}:{main.__name__}", **options)

    return call


def rendered(error: BaseException) -> list[str]:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__)).splitlines()


def test_outcome_of_rank_zero_and_ranks(run: Callable[..., Any]) -> None:
    launched = run(main_ranks, num_workers=2, payload=b"!")
    assert launched.outcome == b"[1.0, 2.0] 0 0 2!"
    assert launched.result.error is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S" not in os.environ


def test_an_exception_arrives_as_itself_while_others_wait(run: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="wrong shape") as caught:
        run(main_raises, num_workers=2)
    lines = rendered(caught.value)
    text = "\n".join(lines)
    note = "\n".join(getattr(caught.value, "__notes__", []))
    assert "worker 1" in note and "fit, epoch 2, batch 3" in note
    assert "_user_step" in note and f"{MODULE}.py" in note
    assert "/ray/" not in text and "During handling" not in text
    assert caught.value.raylit_failure.rank == 1  # type: ignore[attr-defined]


def test_an_exception_that_does_not_pickle(run: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="Local.*held a lock"):
        run(main_unpicklable)


def test_an_exception_with_other_arguments(run: Callable[..., Any]) -> None:
    sys.path.insert(0, str(HERE))
    with pytest.raises(Exception, match="7: seven") as caught:
        run(main_two_arguments)
    assert type(caught.value).__name__ == "TwoArguments"
    assert caught.value.code == 7  # type: ignore[attr-defined]


def test_a_killed_worker(run: Callable[..., Any]) -> None:
    events: list[dict[str, Any]] = []
    with pytest.raises(WorkerLostError, match="worker 1 on node") as caught:
        run(main_killed, num_workers=2, on_event=events.append)
    assert len(rendered(caught.value)) < 40
    assert caught.value.raylit_rank == 1  # type: ignore[attr-defined]


def test_prints_arrive_once_and_tagged(run: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    events: list[dict[str, Any]] = []
    run(main_prints, num_workers=2, on_event=events.append)
    prints = [(e["rank"], e["stream"], e["text"]) for e in events if e["kind"] == "print"]
    for rank in (0, 1):
        assert [t for r, s, t in prints if r == rank and s == "stdout"] == [f"out {rank}", "no newline"]
        assert [t for r, s, t in prints if r == rank and s == "stderr"] == [f"err {rank}", "a warning"]
    assert [e for e in events if e["kind"] == "metrics"] == [{"kind": "metrics", "epoch": 1}] * 2
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_the_callers_directory_and_modules(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a_local_module.py").write_text("VALUE = 42\n")
    (tmp_path / "relative.txt").write_text("read")
    launched = run(main_place, sys_path=(str(tmp_path),))
    assert launched.outcome.decode() == f"{tmp_path}|read|42"


def test_a_large_outcome_goes_through_storage(run: Callable[..., Any], tmp_path: Path) -> None:
    launched = run(main_large, name="large")
    assert len(launched.outcome) == 210 * 1024 * 1024
    assert not (tmp_path / "runs" / "large" / "outcome.bin").exists()


def test_more_workers_than_the_cluster_can_give(run: Callable[..., Any]) -> None:
    with pytest.raises(ResourceError, match="num_workers=999 needs 999 x \\(1 CPU\\) = 999 CPU; the cluster has"):
        run(main_ranks, num_workers=999)
    with pytest.raises(ResourceError, match="GPU"):
        run(main_ranks, use_gpu=True)


SCRIPT = """
import sys, time, os
sys.path[:0] = [{root!r}, {here!r}]
from raylit.wire import Job
from raylit.driver.launch import launch

def shown(event):
    if event["kind"] == "hello":
        print("hello", event["pid"], flush=True)

def main():
    job = Job("fit", b"", sys_path=({here!r}, {root!r}), working_dir=os.getcwd())
    launch(job, num_workers=2, worker_main="{module}:{main}", storage_path={storage!r}, on_event=shown)

try:
    main()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


TRAINING = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
import raylit
from raylit.callbacks import ModelCheckpoint
from {module} import Waits, batches

try:
    raylit.Trainer(
        num_workers=2, use_gpu=False, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, storage_path={storage!r}, name="run",
        callbacks=[ModelCheckpoint(every_n_train_steps=2)],
    ).fit(Waits({storage!r}), batches())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def batches() -> Any:
    import torch

    return [torch.ones(1, 1)] * 12


class Waits(raylit.Module):
    """On two workers the fifth step has no end: rank 0 is held in a collective, rank 1 in the system."""

    def __init__(self, storage: str) -> None:
        import torch

        super().__init__()
        self.layer, self.storage = torch.nn.Linear(1, 1), storage

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.world_size == 2 and self.global_step == 4:
            while not list(Path(self.storage).glob("run/checkpoints/*-step=4/manifest.json")):
                signal.sigtimedwait([], 0.05)  # it is written beside training
            print("hello", flush=True)
            if self.global_rank == 1:
                signal.pause()
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        import torch

        return torch.optim.SGD(self.parameters(), 0.1)


def script(tmp_path: Path, text: str, main: str = "") -> list[str]:
    path = tmp_path / "script.py"
    path.write_text(
        textwrap.dedent(text).format(
            root=str(ROOT), here=str(HERE), module=MODULE, main=main, storage=str(tmp_path / "runs")
        )
    )
    return [sys.executable, str(path)]


def processes_with(mark: str) -> list[int]:
    """Ids of the processes that carry ``mark`` in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "environ").read_bytes() and b"Z" not in _state(folder):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def _state(folder: Path) -> bytes:
    return (folder / "stat").read_bytes().rpartition(b")")[2].split()[0]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_ctrl_c_leaves_no_process_and_the_last_checkpoint(tmp_path: Path) -> None:
    mark = f"RAYLIT_TEST_MARK={tmp_path}"
    environment = {**os.environ, "RAYLIT_TEST_MARK": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        script(tmp_path, TRAINING),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        said: list[str] = []
        while sum("hello" in line for line in said) < 2:
            said.append(process.stdout.readline())
            if not said[-1]:
                process.kill()
                pytest.fail(f"the script said {said}, and: {process.communicate()}")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole foreground group gets it
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    run = tmp_path / "runs" / "run"
    assert (out, process.returncode) == ("interrupted\n", 0)
    assert err == f"interrupted after 0 epochs and 0 steps done; the run folder is {run}\n"
    # The raylet outlives its driver by a moment while it goes down in order.
    for _ in range(600):
        if not processes_with(mark):
            break
        signal.sigtimedwait([], 0.1)
    assert processes_with(mark) == []
    store = Store(Folder(str(run / "checkpoints")))
    assert [(each.step, store.faults(each)) for each in store.manifests()] == [(4, ())]
    trainer = raylit.Trainer(
        num_workers=0, max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        storage_path=str(run.parent), name="run", resume="auto",
    )  # fmt: skip
    trainer.fit(Waits(str(run.parent)), batches())
    assert trainer.global_step == 8  # four of two workers, and the four batches that were left


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes are part of the message before 3.11")
def test_an_uncaught_exception_is_at_most_15_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        script(tmp_path, SCRIPT, "main_raises"), capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert "ValueError: a batch of the wrong shape" in lines
    assert len(lines) <= 15, done.stderr
    assert "/ray/" not in done.stderr


# The pool -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pooled(ray_session: None, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    from raylit.driver.pool import launch_pooled, release

    def call(main: Callable[..., bytes], **options: Any) -> Any:
        job = Job("test", b"", sys_path=(str(HERE), str(ROOT)), working_dir=str(tmp_path))
        return launch_pooled(job, worker_main=f"{MODULE}:{main.__name__}", **options)

    yield call
    release()


def main_pid(job: Job, world: World, channel: Any) -> bytes:
    return str(os.getpid()).encode()


def test_pooled_workers_are_kept_and_replaced_after_a_failure(pooled: Callable[..., Any]) -> None:
    events: list[dict[str, Any]] = []
    assert pooled(main_ranks, num_workers=2).outcome == b"[1.0, 2.0] 0 0 2"
    first = pooled(main_pid, num_workers=2, on_event=events.append).outcome
    assert pooled(main_pid, num_workers=2).outcome == first
    assert sorted(e["rank"] for e in events if e["kind"] == "hello") == [0, 1]
    with pytest.raises(ValueError, match="wrong shape") as caught:
        pooled(main_raises, num_workers=2)
    assert "worker 1" in caught.value.__dict__["__notes__"][0] if sys.version_info >= (3, 11) else True
    with pytest.raises(WorkerLostError, match="worker 1"):
        pooled(main_killed, num_workers=2)
    assert pooled(main_pid, num_workers=2).outcome != first
