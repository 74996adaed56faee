"""What a checkpoint costs a training: the stall of the loop, all that is lost, and memory. CPU, one thread a process.

    python benchmarks/checkpoint.py --checkpoints 60                 in process, against torch.save in the loop
    python benchmarks/checkpoint.py --peers                          and torch.distributed.checkpoint.async_save
    python benchmarks/checkpoint.py --workers 2                      on two Ray workers
    python benchmarks/checkpoint.py --memory                         peak memory, a process each

How it is measured. One Module of 8.4 million parameters with Adam, 101 MB of state, is fitted by raylit once for each
way of saving: not at all; ``ModelCheckpoint(every_n_train_steps=20)``; ``torch.save`` in ``on_train_batch_end``, all on
the same disk. The clock is read at the beginning of each ``training_step``. A period is 20 steps, the first of which
begins after the save: the one interval that has the save in it counts with the steps behind it.

    stall    the interval with the save in it, less the median of the five intervals before it
    all-in   a period, less the period of the fit that saves nothing beside it

Both are divided by what one ``torch.save`` of the same state took (median). In process the fits are threads that hand
over to each other after every period, so that whatever else the machine does meets them alike; of all periods the
median counts, and its standard error stands beside it. The first two periods of a fit do not count. ``--workers``: one
fit after another, rank 0's clock; ``torch.save`` is rank 0's, as its users do it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; a Ray worker inherits it

import torch
from torch import Tensor, nn

import raylit
from raylit.callbacks import ModelCheckpoint

EVERY = 20  # steps between two checkpoints
WARM_UP = 2  # periods at the beginning that do not count
BEFORE = 5  # intervals before a save that say what a plain step takes
WIDTH, LAYERS, BATCH = 1024, 8, 64
WAYS = {
    "none": "no checkpoints",
    "raylit": "raylit, ModelCheckpoint",
    "save": "torch.save in the loop",
    "async": "torch.distributed.checkpoint.async_save",
}


class Task(raylit.Module):
    """``how`` says who saves every 20 steps; ``began`` and ``saves`` come home with the model."""

    def __init__(self, how: str, folder: str, turns: Turns | None = None) -> None:
        super().__init__()
        self.turns, self.waited = turns, 0.0  # seconds, for the others
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
        self.how, self.folder = how, folder
        self.began: list[float] = []  # seconds, the beginning of each step
        self.saves: list[float] = []  # seconds, each torch.save
        self.pending: Any = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.turns is not None and batch_idx % EVERY == 0:
            self.waited += self.turns.hand_over(self.how)
        self.began.append(time.perf_counter() - self.waited)
        return self.net(batch).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if self.how in ("none", "raylit") or self.global_step % EVERY:
            return
        state = {"model": self.state_dict(), "optimizer": self.optimizers().state_dict()}
        if self.how == "async":
            self.save_beside(state)
        elif self.global_rank == 0:
            began = time.perf_counter()
            torch.save(state, os.path.join(self.folder, f"{self.global_step % (2 * EVERY)}.pt"))
            self.saves.append(time.perf_counter() - began)

    def save_beside(self, state: dict[str, Any]) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint import FileSystemWriter, async_save

        if not dist.is_initialized():  # it asks for one, also of a single process
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if self.pending is not None:
            self.pending.result()
        at = os.path.join(self.folder, str(self.global_step % (2 * EVERY)))
        self.pending = async_save(state, storage_writer=FileSystemWriter(at, overwrite=True))

    def on_train_end(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None


class Turns:
    """Threads that run one at a time, each until it hands over to the next in the order of their names."""

    def __init__(self, names: list[str]) -> None:
        self._names, self._at, self._changed = list(names), 0, threading.Condition()

    def hand_over(self, name: str) -> float:
        """Let the next one run, and wait for this one's turn; return the seconds waited."""
        began = time.perf_counter()
        with self._changed:
            if self._names[self._at] == name:
                self._at = (self._at + 1) % len(self._names)
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._names[self._at] == name)
        return time.perf_counter() - began

    def leave(self, name: str) -> None:
        """This one has ended."""
        with self._changed:
            after = self._names[(self._names.index(name) + 1) % len(self._names)]
            self._names.remove(name)
            self._at = self._names.index(after) if self._names and after != name else 0
            self._changed.notify_all()


def together(ways: list[str], periods: int) -> dict[str, Task]:
    """A fit for each way, turn by turn."""
    turns, tasks = Turns(ways), dict[str, Task]()

    def run(way: str) -> None:
        try:
            tasks[way] = fit(way, periods, 0, turns)
        finally:
            turns.leave(way)

    with quiet():
        threads = [threading.Thread(target=run, args=(way,)) for way in ways]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return tasks


def fit(how: str, periods: int, workers: int, turns: Turns | None = None) -> Task:
    """One fit; returns its Module with what it measured."""
    steps = EVERY * (WARM_UP + periods) + 1  # the last one ends the last interval
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as folder:
        torch.manual_seed(0)
        task = Task(how, folder, turns)
        saver = ModelCheckpoint(every_n_train_steps=EVERY)
        raylit.Trainer(
            num_workers=workers, use_gpu=False, max_steps=steps, max_epochs=1, logger=False, storage_path=folder,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            enable_checkpointing=how == "raylit", callbacks=[saver] if how == "raylit" else None,
        ).fit(task, train_dataloaders=[torch.randn(BATCH, WIDTH)] * steps)  # fmt: skip
        task.turns = None
        os.sync()  # what this fit left to be written is not the next one's
    return task


def periods_of(task: Task) -> list[list[float]]:
    """The intervals between steps, by periods; each begins with the one that has the save in it."""
    intervals = [after - before for before, after in zip(task.began, task.began[1:])]
    starts = range(WARM_UP * EVERY - 1, len(intervals) - EVERY + 1, EVERY)
    return [intervals[start : start + EVERY] for start in starts]


def stalls_of(task: Task) -> list[float]:
    intervals = [after - before for before, after in zip(task.began, task.began[1:])]
    return [
        intervals[at] - statistics.median(intervals[at - BEFORE : at])
        for at in range(WARM_UP * EVERY - 1, len(intervals), EVERY)
    ]


def rounds(ways: list[str], count: int, periods: int, workers: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}  # stall and all-in, x torch.save
    units, steps = [], []
    for each in range(count):
        turn = ways[each % len(ways) :] + ways[: each % len(ways)]
        with quiet():
            tasks = {way: fit(way, periods, workers) for way in turn}
        unit = statistics.median(tasks["save"].saves[WARM_UP - 1 :])
        plain = statistics.median(sum(period) for period in periods_of(tasks["none"]))
        units.append(unit)
        steps.append(plain / EVERY)
        for way, task in tasks.items():
            all_in = statistics.median(sum(period) - plain for period in periods_of(task))
            found[way].append((statistics.median(stalls_of(task)) / unit, all_in / unit))
    print(f"torch.save {statistics.median(units) * 1e3:.0f} ms, a plain step {statistics.median(steps) * 1e3:.0f} ms")
    print(f"| {'x torch.save: median (least-most) of the rounds':47} | {'stall':>18} | {'all-in':>18} |")
    print(f"| {'---':47} | {'---:':>18} | {'---:':>18} |")
    for way in ways:
        cells = [spread([pair[at] for pair in found[way]]) for at in (0, 1)]
        print(f"| {WAYS[way]:47} | {cells[0]:>18} | {cells[1]:>18} |", flush=True)


def in_turns(ways: list[str], periods: int) -> None:
    tasks = together(ways, periods)
    unit = statistics.median(tasks["save"].saves[WARM_UP - 1 :])
    plain = [sum(period) for period in periods_of(tasks["none"])]
    step = statistics.median(plain) / EVERY
    print(f"torch.save {unit * 1e3:.0f} ms, a plain step {step * 1e3:.0f} ms, {periods} saves")
    print(f"| {'x torch.save: median (its standard error)':47} | {'stall':>18} | {'all-in':>18} |")
    print(f"| {'---':47} | {'---:':>18} | {'---:':>18} |")
    for way in ways:
        stalls = [stall / unit for stall in stalls_of(tasks[way])]
        all_in = [(sum(mine) - other) / unit for mine, other in zip(periods_of(tasks[way]), plain)]
        print(f"| {WAYS[way]:47} | {sure(stalls):>18} | {sure(all_in):>18} |", flush=True)


def sure(values: list[float]) -> str:
    """The median and its standard error, from the quartiles: 1.25 times that of a mean of normal values."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.2f} ({1.25 * (high - low) / 1.35 / len(values) ** 0.5:.2f})"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def memory(ways: list[str], count: int) -> None:
    """Peak resident memory above the fit that saves nothing, each in fresh processes of its own."""
    parameters = sum(each.numel() for each in Task("none", "").parameters())
    state_mib = 3 * 4 * parameters / 2**20
    print(f"Peak memory, median of {count} processes; the state is {state_mib:.0f} MiB")
    print(f"| {'':39} |   MiB | copies of the state |\n| {'---':39} | ----: | ------------------: |")
    base = 0.0
    for way in ways:
        command = [sys.executable, __file__, "--child", way]
        peaks = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
                 for _ in range(count)]  # fmt: skip
        middle = statistics.median(peaks)
        base = base or middle
        print(f"| {WAYS[way]:39} | {middle:5.0f} | {(middle - base) / state_mib:19.2f} |", flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what a library prints nowhere."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="with --workers or --memory")
    parser.add_argument("--checkpoints", type=int, default=6, help="of a fit that count; in process, 60 are few")
    parser.add_argument("--workers", type=int, default=0, help="0: in this process")
    parser.add_argument("--peers", action="store_true", help="torch.distributed.checkpoint as well")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--child", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        with quiet():
            fit(args.child, 3, 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)  # macOS counts bytes, Linux KiB
        return
    ways = ["none", "raylit", "save"] + (["async"] if args.peers else [])
    where = f"{args.workers} Ray workers" if args.workers else "in process"
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, one thread, {where}")
    if args.memory:
        memory(ways, args.rounds)
    elif not args.workers:
        in_turns(ways, args.checkpoints)
    else:
        rounds(ways, args.rounds, args.checkpoints, args.workers)


if __name__ == "__main__":
    main()
