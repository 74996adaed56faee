"""What a training step costs: raylit against a hand-written loop, Fabric, Accelerate and Lightning. One thread, CPU.

    python benchmarks/step_overhead.py                                 tiny MLP and small transformer, raylit and hand
    python benchmarks/step_overhead.py --peers fabric,accelerate,lightning    needs pip install 'raylit[peers]'
    python benchmarks/step_overhead.py --log 3                         three self.log calls a step, step and epoch
    python benchmarks/step_overhead.py --where worker                  both loops inside one Ray worker
    python benchmarks/step_overhead.py --memory                        peak memory, a process each

How it is measured. Each contestant runs the same model class, optimizer and list of prebuilt batches. The clock is
read inside ``training_step``, at the first step after the warm-up and at the last one, so neither start-up nor the
end counts and everything between two steps does. A round runs every contestant once; the order turns by one each
round. The table holds the median over rounds, the ratio of the medians, the ratio of the best rounds, and the range
of the ratios of single rounds: where that is wide, the machine was busy with something else.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; a Ray worker inherits it

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Contestant = Callable[["Case"], float]  # returns seconds a step

WARMUP_SHARE = 0.1


class Transformer(nn.Module):
    """Two encoder layers of width 128 over 64 tokens; about 30 ms a training step at batch 16."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class Case:
    """One model, its batches and how many steps are run."""

    def __init__(self, model: str, steps: int, log: int = 0, optimizer: str = "adamw") -> None:
        self.model, self.steps, self.log, self.optimizer = model, steps, log, optimizer
        self.first = max(1, int(steps * WARMUP_SHARE))  # the clock starts here, counted from 0
        draw = torch.Generator().manual_seed(0)
        if model == "mlp":
            few = [(torch.randn(32, 32, generator=draw), torch.randint(10, (32,), generator=draw)) for _ in range(64)]
        else:
            few = [
                (torch.randint(256, (16, 64), generator=draw), torch.randint(10, (16,), generator=draw))
                for _ in range(8)
            ]
        self.batches: list[Batch] = [few[i % len(few)] for i in range(steps)]

    def net(self) -> nn.Module:
        if self.model == "mlp":
            return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        return Transformer()

    def module(self, base: type[nn.Module], log: int = 0) -> Any:
        """Build the contestants' common model on ``base``: nn.Module, or a library's Module."""
        torch.manual_seed(0)
        return task_class(base)(self.net(), self.first, self.steps - 1, log, self.optimizer)


def task_class(base: type[nn.Module]) -> type[nn.Module]:
    class Task(base):  # type: ignore[misc, valid-type]
        def __init__(self, net: nn.Module, first: int, last: int, log: int, optimizer: str) -> None:
            super().__init__()
            self.net = net
            self.first, self.last, self.optimizer_name = first, last, optimizer
            self.names = [f"metric_{i}" for i in range(log)]
            self.stamps: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if batch_idx == self.first or batch_idx == self.last:
                self.stamps.append(time.perf_counter())
            x, y = batch
            loss = F.cross_entropy(self(x), y)
            for name in self.names:
                self.log(name, loss, on_step=True, on_epoch=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            if self.optimizer_name == "adamw":
                return torch.optim.AdamW(self.parameters(), lr=1e-3)
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Task


def seconds_a_step(module: Any) -> float:
    start, end = module.stamps[-2:]
    return (end - start) / (module.last - module.first)


# --- the contestants ------------------------------------------------------------------------------------------------


def hand_epoch(module: Any, batches: list[Batch], optimizer: torch.optim.Optimizer) -> None:
    for batch_idx, batch in enumerate(batches):
        loss = module.training_step(batch, batch_idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def hand(case: Case) -> float:
    module = case.module(nn.Module)
    hand_epoch(module, case.batches, module.configure_optimizers())
    return seconds_a_step(module)


def raylit_off(case: Case) -> float:
    import raylit

    module = case.module(raylit.Module, case.log)
    with quiet() as folder:
        raylit.Trainer(
            num_workers=0, max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, storage_path=folder,
        ).fit(module, train_dataloaders=case.batches)  # fmt: skip
    return seconds_a_step(module)


def raylit_on(case: Case) -> float:
    import raylit

    module = case.module(raylit.Module, case.log)
    with quiet() as folder:
        raylit.Trainer(num_workers=0, max_epochs=1, storage_path=folder).fit(module, train_dataloaders=case.batches)
    return seconds_a_step(module)


def fabric(case: Case) -> float:
    from lightning.fabric import Fabric

    run = Fabric(accelerator="cpu", devices=1)
    task = case.module(nn.Module)
    module, optimizer = run.setup(task, task.configure_optimizers())
    for batch_idx, batch in enumerate(case.batches):
        loss = module.training_step(batch, batch_idx)
        run.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return seconds_a_step(task)


def accelerate(case: Case) -> float:
    from accelerate import Accelerator

    run = Accelerator(cpu=True)
    task = case.module(nn.Module)
    module, optimizer = run.prepare(task, task.configure_optimizers())
    for batch_idx, batch in enumerate(case.batches):
        loss = module.training_step(batch, batch_idx)
        run.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return seconds_a_step(task)


class Loader:
    """Lightning takes a list for several loaders, so it gets the same batches in this."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def lightning_off(case: Case) -> float:
    import lightning

    module = case.module(lightning.LightningModule, case.log)
    with quiet():
        lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        ).fit(module, Loader(case.batches))  # fmt: skip
    return seconds_a_step(module)


def lightning_on(case: Case) -> float:
    import lightning

    module = case.module(lightning.LightningModule, case.log)
    with quiet() as folder:
        lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, default_root_dir=folder).fit(
            module, Loader(case.batches)
        )
    return seconds_a_step(module)


CONTESTANTS: dict[str, tuple[str, Contestant]] = {
    "hand": ("hand-written loop", hand),
    "raylit": ("raylit, everything off", raylit_off),
    "raylit_on": ("raylit, defaults", raylit_on),
    "fabric": ("Fabric", fabric),
    "accelerate": ("Accelerate", accelerate),
    "lightning": ("Lightning, everything off", lightning_off),
    "lightning_on": ("Lightning, defaults", lightning_on),
}
PEERS = {"fabric": ["fabric"], "accelerate": ["accelerate"], "lightning": ["lightning", "lightning_on"]}
PACKAGES = {"fabric": "lightning", "accelerate": "accelerate", "lightning": "lightning"}


@contextlib.contextmanager
def quiet() -> Iterator[str]:
    """Send what a library prints nowhere, and give it a folder that is removed afterwards."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # Lightning sets the levels of its own loggers when it is imported
        try:
            yield folder
        finally:
            logging.disable(logging.NOTSET)


# --- rounds ---------------------------------------------------------------------------------------------------------


def rounds_here(case: Case, names: list[str], rounds: int) -> dict[str, list[float]]:
    """Run every contestant once a round in this process; the order turns by one each round."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            seconds[name].append(CONTESTANTS[name][1](case))
    return seconds


def worker_task(case: Case) -> Any:
    """A Module whose every epoch is one round: the hand-written loop in ``on_train_epoch_start``, then raylit's own."""
    import raylit

    class Both(task_class(raylit.Module)):  # type: ignore[misc]
        hand_seconds: tuple[float, ...] = ()
        raylit_seconds: tuple[float, ...] = ()

        def on_train_epoch_start(self) -> None:
            gc.collect()
            self.hand_seconds += (hand(case),)
            gc.collect()

        def on_train_epoch_end(self) -> None:
            self.raylit_seconds += (seconds_a_step(self),)

    torch.manual_seed(0)
    return Both(case.net(), case.first, case.steps - 1, case.log, case.optimizer)


def rounds_in_worker(case: Case, rounds: int) -> dict[str, list[float]]:
    """The same inside one Ray worker; the figures come back as attributes of the model."""
    import raylit

    module = worker_task(case)
    with quiet() as folder:
        raylit.Trainer(
            num_workers=1, max_epochs=rounds, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, storage_path=folder,
        ).fit(module, train_dataloaders=case.batches)  # fmt: skip
    return {"hand": list(module.hand_seconds), "raylit": list(module.raylit_seconds)}


def print_table(title: str, seconds: dict[str, list[float]]) -> None:
    base = seconds["hand"]
    print(f"\n{title}")
    print(f"| {'':26} | us a step | x hand | us over hand | best round | single rounds |")
    print(f"| {'---':26} | --------: | -----: | -----------: | ---------: | ------------: |")
    for name, values in seconds.items():
        middle, middle_base = statistics.median(values), statistics.median(base)
        ratios = [value / other for value, other in zip(values, base)]
        print(
            f"| {CONTESTANTS[name][0]:26} | {middle * 1e6:9.1f} | {middle / middle_base:6.3f} "
            f"| {(middle - middle_base) * 1e6:12.1f} | {min(values) / min(base):10.3f} "
            f"| {min(ratios):6.3f}-{max(ratios):.3f} |",
            flush=True,
        )


def memory(case: Case, names: list[str], rounds: int) -> None:
    """Peak resident memory, each contestant in fresh processes of its own."""
    print(f"\nPeak memory, {case.model}, {case.steps} steps, median of {rounds} processes")
    print(f"| {'':26} |   MiB | x hand |\n| {'---':26} | ----: | -----: |")
    base = 0.0
    for name in names:
        command = [sys.executable, __file__, "--child", name, "--models", case.model, "--steps", str(case.steps)]
        command += ["--log", str(case.log), "--optimizer", case.optimizer]
        peaks = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
                 for _ in range(rounds)]  # fmt: skip
        middle = statistics.median(peaks)
        base = base or middle
        print(f"| {CONTESTANTS[name][0]:26} | {middle:5.0f} | {middle / base:6.3f} |", flush=True)


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, Linux KiB


def installed(peers: list[str]) -> list[str]:
    """Return the contestants of the peers that can be imported; say why the others are left out."""
    import importlib.util

    names = []
    for peer in peers:
        if importlib.util.find_spec(PACKAGES[peer]) is None:
            print(f"{peer} is left out: {PACKAGES[peer]} is not installed (pip install 'raylit[peers]')")
        else:
            names += PEERS[peer]
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of the MLP; the transformer runs a twentieth")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", default="", help="of fabric,accelerate,lightning; several with commas")
    parser.add_argument("--models", default="mlp,transformer")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw", help="sgd: a step half as long")
    parser.add_argument("--log", type=int, default=0, metavar="N", help="self.log calls a step")
    parser.add_argument("--where", choices=["process", "worker"], default="process")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    peers = [peer for peer in args.peers.split(",") if peer]
    models = args.models.split(",")
    if unknown := (set(peers) - set(PEERS)) | (set(models) - {"mlp", "transformer"}):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; peers are {', '.join(PEERS)}; models mlp, transformer")

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"lightning|accelerate")
    if args.child:
        CONTESTANTS[args.child][1](Case(models[0], args.steps, args.log, args.optimizer))
        print(peak_mib())
        return

    names = ["hand", "raylit", "raylit_on", *installed(peers)]
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, one thread")
    for model in models:
        case = Case(model, args.steps if model == "mlp" else max(20, args.steps // 20), args.log, args.optimizer)
        title = f"{model}, {args.optimizer}, {case.steps} steps, {args.rounds} rounds, {args.log} metrics logged a step"
        if args.memory:
            memory(case, [name for name in names if not name.endswith("_on")], min(args.rounds, 3))
        elif args.where == "worker":
            print_table(f"{title}, inside one Ray worker", rounds_in_worker(case, args.rounds))
        else:
            print_table(f"{title}, in process", rounds_here(case, names, args.rounds))


if __name__ == "__main__":
    main()
