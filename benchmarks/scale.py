"""How start-up, reporting and validation grow with the number of workers, on one machine. CPU, one thread a process.

    python benchmarks/scale.py                                       1, 2, 4, 8, 16 and 32 workers
    python benchmarks/scale.py --workers 1 2 4 --rounds 3            medians of three fits each
    python benchmarks/scale.py --plot scale.png                      and a picture (pip install 'raylit[plots]')
    python benchmarks/scale.py --json scale.json                     and the numbers; --from scale.json draws them again

How it is measured. For each number of workers one fit of a tiny MLP (32-64-10, batch 8 for each worker, SGD) over three
epochs of 45 batches, with ten metrics logged by epochs, a progress bar and a validation of 10 batches a worker after
each epoch; then ``validate`` twice. The workers ask for a small part of a CPU each, so that any number of them fits:
they share the cores that are there, and every time below is one of a machine on which N processes want to run at once.
What grows although no core is short is told by docs/scale.md, from ``benchmarks/scale_parts.py``. Ray runs before the
first fit, and a first fit of one worker, which fills the file cache, does not count. The clock is ``time.monotonic``,
which all processes of a machine share.

    start       from the call of ``fit`` to the beginning of rank 0's first ``training_step``
    step        median time from one ``training_step`` of rank 0 to the next, within an epoch
    first end   the reduction of ten metrics at the end of the first epoch, when the ranks agree on the keys; rank 0.
                A message of all ranks before it makes them begin together: no rank's lag is in it
    epoch end   the same of the last two epochs, the mean
    validation  ``on_validation_start`` to ``on_validation_end`` of rank 0: 10 batches and the reduction of ten metrics;
                the median of those in the fit
    return      from the end of rank 0's last step to the return of ``fit``: the last epoch's end, its validation, the
                model's way home, the end of Ray Train's processes
    validate    a call of ``validate`` after the fit, which starts raylit's own actors; and the next one, which has them
    messages    what the driver's channel received in the fit: messages, their bytes, and both over the seconds from the
                first message to the last
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; a Ray worker inherits it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from quiet import quiet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit

EPOCHS, VALIDATED, KEYS, BATCH = 3, 10, 10, 8
# Batches of each worker in an epoch. Not 60: the question whether to stop, asked every 20, would be in an epoch's end;
# not 50: the ranks would agree on the keys at the first log row.
STEPS = 45
WARM_UP = 10  # steps of an epoch that do not count


class Timed(raylit.Callback):
    """Notes when an epoch's metrics are reduced: between its hooks, all ranks beginning together."""

    def __init__(self) -> None:
        self.ends: list[float] = []  # seconds, each epoch's reduction
        self.validations: list[float] = []
        self.began = 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == STEPS:
            module.all_gather(torch.zeros(()))
            self.began = time.monotonic()

    def on_train_epoch_settled(self, trainer: Any, module: Any) -> None:
        self.ends.append(time.monotonic() - self.began)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.began = time.monotonic()

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validations.append(time.monotonic() - self.began)
        self.began = time.monotonic()  # the last batch's validation comes before the epoch's end


class Task(raylit.Module):
    """``began`` and ``ended`` come home with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        self.began: list[list[float]] = []  # of each epoch: the beginning of each step
        self.ended = 0.0  # the last step

    def loss(self, batch: list[Tensor], name: str) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        for key in range(KEYS):
            self.log(f"{name}_{key}", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_start(self) -> None:
        self.began.append([])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.began[-1].append(time.monotonic())
        return self.loss(batch, "train")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ended = time.monotonic()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.loss(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@dataclass
class Found:
    """One fit's numbers: seconds, messages and bytes."""

    start: float
    step: float
    first_end: float
    epoch_end: float
    validation: float
    back: float
    validate: float
    validate_again: float
    messages: float
    size: float
    seconds: float  # from the first message to the last


class Counted:
    """Counts what arrives at the driver's channel while it is entered."""

    def __init__(self) -> None:
        self.messages, self.size, self.times, self._lock = 0, 0, [0.0, 0.0], threading.Lock()

    def __enter__(self) -> Counted:
        from raylit.worker import messages

        self._module, self._receive = messages, messages.receive
        messages.receive = self.receive
        return self

    def __exit__(self, *raised: object) -> None:
        self._module.receive = self._receive

    def receive(self, connection: Any) -> list[dict[str, Any]]:
        events = self._receive(connection)
        size = 4 + len(json.dumps(events).encode())  # as it was sent: four bytes of length, and the list
        with self._lock:
            self.times = [self.times[0] or time.monotonic(), time.monotonic()]
            self.messages, self.size = self.messages + 1, self.size + size
        return events


def loader(workers: int, batches: int) -> DataLoader[Any]:
    count = workers * batches * BATCH
    return DataLoader(TensorDataset(torch.randn(count, 32), torch.randint(10, (count,))), batch_size=BATCH)


def measured(workers: int, cpus: float) -> Found:
    """One fit and two validations on so many workers."""
    from raylit.driver.pool import release

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, Counted() as counted:
        task, timed = Task(), Timed()
        trainer = raylit.Trainer(
            num_workers=workers, use_gpu=False, resources_per_worker={"CPU": cpus}, max_epochs=EPOCHS, logger=False,
            storage_path=folder, enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
            callbacks=[timed],
        )  # fmt: skip
        training, validation = loader(workers, STEPS), loader(workers, VALIDATED)
        called = time.monotonic()
        trainer.fit(task, training, validation)
        returned = time.monotonic()
        messages, size, seconds = counted.messages, counted.size, counted.times[1] - counted.times[0]
        # What the callback measured in the fit, before the next stages add to it.
        ends, validations = list(timed.ends), list(timed.validations)
        calls = [time.monotonic()]
        for _ in range(2):
            trainer.validate(task, validation)
            calls.append(time.monotonic())
        release()
    steps = [after - before for epoch in task.began for before, after in zip(epoch[WARM_UP:], epoch[WARM_UP + 1 :])]
    return Found(
        start=task.began[0][0] - called, step=statistics.median(steps), first_end=ends[0],
        epoch_end=statistics.mean(ends[1:]), validation=statistics.median(validations), back=returned - task.ended,
        validate=calls[1] - calls[0], validate_again=calls[2] - calls[1], messages=messages, size=size, seconds=seconds,
    )  # fmt: skip


def median(found: list[Found]) -> Found:
    return Found(*(statistics.median(getattr(each, field.name) for each in found) for field in fields(Found)))


# -- showing ---------------------------------------------------------------------------------------------------------
HEAD = ("workers", "start s", "step ms", "first end ms", "epoch end ms", "validation ms", "return s", "validate s",
        "again s", "messages", "KB", "a second")  # fmt: skip


def cells(workers: int, found: Found) -> tuple[str, ...]:
    rate = f"{found.messages / found.seconds:.1f}, {found.size / found.seconds / 1e3:.2f} KB"
    return (
        str(workers), f"{found.start:.1f}", f"{found.step * 1e3:.1f}", f"{found.first_end * 1e3:.1f}",
        f"{found.epoch_end * 1e3:.1f}", f"{found.validation * 1e3:.1f}", f"{found.back:.2f}", f"{found.validate:.1f}",
        f"{found.validate_again:.2f}", f"{found.messages:.0f}", f"{found.size / 1e3:.1f}", rate,
    )  # fmt: skip


def line(texts: tuple[str, ...]) -> str:
    return "| " + " | ".join(f"{text:>{max(len(name), 8)}}" for text, name in zip(texts, HEAD)) + " |"


def picture(found: dict[int, Found], path: str) -> None:
    """Six panels over the number of workers, both axes in powers of ten or two; written as a PNG file."""
    try:
        from raylit.plots.figure import BEST, POINT, house_style, new_figure, png
    except ImportError:
        raise SystemExit("--plot draws with matplotlib: pip install 'raylit[plots]'") from None
    panels = (
        ("from fit() to the first step", "seconds", {"": "start"}, 1),
        ("a step", "milliseconds", {"": "step"}, 1e3),
        ("an epoch's end: 10 metrics", "milliseconds", {"first": "first_end", "later": "epoch_end"}, 1e3),
        ("from the last step to fit()'s return", "seconds", {"": "back"}, 1),
        ("a validation", "seconds", {"in the fit": "validation", "validate(), again": "validate_again"}, 1),
        ("what the driver receives in a fit", "messages", {"": "messages"}, 1),
    )
    counts = sorted(found)
    with house_style():
        figure = new_figure(10.5, 6.0)
        for axes, (title, unit, values, times) in zip(figure.subplots(2, 3).flat, panels):
            for colour, (label, name) in zip((POINT, BEST), values.items()):
                heights = [getattr(found[count], name) * times for count in counts]
                axes.plot(counts, heights, marker="o", markersize=4, color=colour, label=label or None)
            axes.set_title(title)
            axes.set_ylabel(unit)
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.set_ylim(bottom=0)
            if any(values):
                axes.legend()
        figure.supxlabel("workers, which share the cores of one machine", fontsize=9)
        Path(path).write_bytes(png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=1, help="fits of each number of workers; medians")
    parser.add_argument("--cpus", type=float, default=0.05, help="that each worker asks Ray for")
    parser.add_argument("--plot", metavar="PNG", help="draw a picture")
    parser.add_argument("--json", metavar="FILE", help="keep the numbers")
    parser.add_argument("--from", metavar="FILE", dest="kept", help="show what --json kept, and measure nothing")
    args = parser.parse_args()
    if args.kept:
        found = {int(count): Found(**each) for count, each in json.loads(Path(args.kept).read_text()).items()}
    else:
        found = measure(sorted(set(args.workers)), args.rounds, args.cpus)
    print(line(HEAD))
    print("| " + " | ".join("---:".rjust(max(len(name), 8)) for name in HEAD) + " |")
    for count, each in found.items():
        print(line(cells(count, each)))
    if args.json:
        Path(args.json).write_text(json.dumps({count: asdict(each) for count, each in found.items()}, indent=1))
    if args.plot:
        picture(found, args.plot)


def measure(counts: list[int], rounds: int, cpus: float) -> dict[int, Found]:
    import ray

    torch.set_num_threads(1)
    cores = os.cpu_count() or 1
    print(f"Python {platform.python_version()}, torch {torch.__version__}, Ray {ray.__version__}, {cores} cores")
    found: dict[int, list[Found]] = {count: [] for count in counts}
    # A Ray of this program alone, in a folder of its own, whatever else runs on the machine.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        root = str(Path(__file__).resolve().parents[1])
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        ray.init(address="local", num_cpus=max(cores, int(max(counts) * cpus + 1)), include_dashboard=False,
                 log_to_driver=False, logging_level=logging.ERROR)  # fmt: skip
        try:
            with quiet():
                measured(1, cpus)
            for number in range(rounds):
                for count in counts if number % 2 == 0 else reversed(counts):
                    with quiet():
                        found[count].append(measured(count, cpus))
                    print(f"{count} workers: {found[count][-1].start:.1f} s to the first step", file=sys.stderr)
        finally:
            ray.shutdown()
    return {count: median(each) for count, each in found.items()}


if __name__ == "__main__":
    main()
