"""What a checkpoint costs a training: the stall of the loop, all that is lost, and memory. CPU, one thread a process.

    python benchmarks/checkpoint.py                                  in process, against torch.save in the loop
    python benchmarks/checkpoint.py --peers                          and torch.distributed.checkpoint.async_save
    python benchmarks/checkpoint.py --workers 2                      on two Ray workers
    python benchmarks/checkpoint.py --workers 2 --wait-ms 60         whose steps wait, as for a GPU, without the CPU
    python benchmarks/checkpoint.py --memory                         peak memory, a process each

How it is measured. One Module of 8.4 million parameters with Adam, 101 MB of state, is fitted by raylit once for each
way of saving: ``ModelCheckpoint(every_n_train_steps=40)``; ``torch.save`` in ``on_train_batch_end``, on the same disk.
The clock is read at the beginning of each ``training_step``. A period is 20 steps, and every second one begins with the
interval that has a save in it; the ones between have none. So a fit is compared with itself: where its tensors lie in
memory makes more difference between two fits than a save does.

    stall    the interval with the save in it, less the median of the five intervals before it
    all-in   a period with a save, less the mean of the periods before and behind it

Both are divided by what one ``torch.save`` of the same state took (median of the round); of all saves the median
counts, and its standard error stands beside it. The first two periods of a fit do not count. ``--workers``: rank 0's
clock; ``torch.save`` is rank 0's, as its users do it.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; a Ray worker inherits it

import torch
from quiet import quiet
from torch import Tensor, nn

import raylit
from raylit.callbacks import ModelCheckpoint

PERIOD = 20  # steps; a checkpoint in every second one
EVERY = 2 * PERIOD
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
    """``how`` says who saves every 40 steps; ``began`` and ``saves`` come home with the model."""

    def __init__(self, how: str, folder: str, wait_s: float = 0.0) -> None:
        super().__init__()
        self.wait_s = wait_s
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
        self.how, self.folder = how, folder
        self.began: list[float] = []  # seconds, the beginning of each step
        self.saves: list[float] = []  # seconds, each torch.save
        self.pending: Any = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.began.append(time.perf_counter())
        time.sleep(self.wait_s)
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


def fit(how: str, saves: int, workers: int, wait_s: float = 0.0) -> Task:
    """One fit; returns its Module with what it measured."""
    steps = PERIOD * (WARM_UP + 2 * saves + 1) + 1  # the last one ends the last interval
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as folder:
        torch.manual_seed(0)
        task = Task(how, folder, wait_s)
        saver = ModelCheckpoint(every_n_train_steps=EVERY)
        raylit.Trainer(
            num_workers=workers, use_gpu=False, max_steps=steps, max_epochs=1, logger=False, storage_path=folder,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            enable_checkpointing=how == "raylit", callbacks=[saver] if how == "raylit" else None,
        ).fit(task, train_dataloaders=[torch.randn(BATCH, WIDTH)] * steps)  # fmt: skip
        os.sync()  # what this fit left to be written is not the next one's
    return task


def measured(task: Task) -> tuple[list[float], list[float]]:
    """Seconds: the stall of each save, and all that it cost."""
    intervals = [after - before for before, after in zip(task.began, task.began[1:])]
    periods = [sum(intervals[start : start + PERIOD]) for start in range(PERIOD - 1, len(intervals), PERIOD)]
    saves = range(WARM_UP + WARM_UP % 2 + 1, len(periods) - 1, 2)  # period 0 begins with the end of step 20
    stalls = [intervals[at] - statistics.median(intervals[at - BEFORE : at])
              for at in ((period + 1) * PERIOD - 1 for period in saves)]  # fmt: skip
    return stalls, [periods[at] - (periods[at - 1] + periods[at + 1]) / 2 for at in saves]


def rounds(ways: list[str], count: int, saves: int, workers: int, wait_s: float) -> None:
    found: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in ways}  # x torch.save
    units = []
    for each in range(count):
        turn = ways[each % len(ways) :] + ways[: each % len(ways)]
        with quiet():
            tasks = {way: fit(way, saves, workers, wait_s) for way in turn}
        units.append(statistics.median(tasks["save"].saves[1:]))
        for way, task in tasks.items():
            for values, seconds in zip(found[way], measured(task)):
                values += [each / units[-1] for each in seconds]
    print(f"torch.save {statistics.median(units) * 1e3:.0f} ms, {len(found['save'][0])} saves")
    print(f"| {'x torch.save: median (its standard error)':47} | {'stall':>12} | {'all-in':>12} |")
    print(f"| {'---':47} | {'---:':>12} | {'---:':>12} |")
    for way in ways:
        stall, all_in = map(sure, found[way])
        print(f"| {WAYS[way]:47} | {stall:>12} | {all_in:>12} |", flush=True)


def sure(values: list[float]) -> str:
    """The median and its standard error, from the quartiles: 1.25 times that of a mean of normal values."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.2f} ({1.25 * (high - low) / 1.35 / len(values) ** 0.5:.2f})"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoints", type=int, default=12, help="of a fit")
    parser.add_argument("--workers", type=int, default=0, help="0: in this process")
    parser.add_argument("--wait-ms", type=float, default=0.0, help="that each step waits, without the CPU")
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
    ways = [*(["none"] if args.memory else []), "raylit", "save", *(["async"] if args.peers else [])]
    where = f"{args.workers} Ray workers" if args.workers else "in process"
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, one thread, {where}")
    if args.memory:
        memory(ways, args.rounds)
    else:
        rounds(ways, args.rounds, args.checkpoints, args.workers, args.wait_ms / 1e3)


if __name__ == "__main__":
    main()
