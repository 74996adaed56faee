"""What a training step costs: raylit against a hand-written loop, Fabric, Accelerate and Lightning. One thread, CPU.

    python benchmarks/step_overhead.py                                 tiny MLP and small transformer, raylit and hand
    python benchmarks/step_overhead.py --peers fabric,accelerate,lightning    needs pip install 'raylit[peers]'
    python benchmarks/step_overhead.py --log 3                         three self.log calls a step, step and epoch
    python benchmarks/step_overhead.py --where worker                  both loops inside one Ray worker
    python benchmarks/step_overhead.py --memory                        peak memory, a process each

How it is measured. Each contestant runs the same model class, optimizer and list of prebuilt batches, each in a thread
of its own, and they take turns: ``training_step`` hands over to the next contestant after every block of steps, so that
whatever else the machine does meets them all alike. The clock is read inside ``training_step``, a few steps after a
turn began and at its last step: start-up, the end and the hand-over do not count, everything between two steps does.
The table holds the median seconds of a step, and of each block's ratio to the hand-written loop's block beside it the
median and the quartiles.
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
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; a Ray worker inherits it

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Contestant = Callable[["Case", str], Any]  # the case, and an empty folder; the turns hold what was measured

BLOCK = {"mlp": 50, "transformer": 5}  # steps in a turn
SETTLE = {"mlp": 5, "transformer": 1}  # steps at its beginning that are not timed: the caches are another's
WARMUP_TURNS = 4


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


class Turns:
    """Lets one of several threads run at a time, and keeps what each block of steps took."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.seconds: dict[str, list[float]] = {name: [] for name in names}  # a step, one entry a block
        self.failure: BaseException | None = None
        self._gates = {name: threading.Semaphore(0) for name in names}
        self._gates[names[0]].release()

    def wait(self, name: str) -> None:
        """Wait until it is this contestant's turn."""
        self._gates[name].acquire()
        if self.failure is not None:
            self._gates[name].release()
            raise RuntimeError("another contestant failed") from self.failure

    def pass_on(self, name: str) -> None:
        """Give the turn to the next contestant."""
        self._gates[self.names[(self.names.index(name) + 1) % len(self.names)]].release()

    def stop(self, error: BaseException) -> None:
        """Wake everyone up to end with ``error``."""
        self.failure = self.failure or error
        for gate in self._gates.values():
            gate.release()


class Case:
    """One model, its batches and how many steps are run."""

    def __init__(self, model: str, blocks: int, log: int = 0, optimizer: str = "adamw") -> None:
        self.model, self.blocks, self.log, self.optimizer = model, blocks, log, optimizer
        self.block, self.settle = BLOCK[model], SETTLE[model]
        self.steps = self.block * (WARMUP_TURNS + blocks) + 1  # the last one ends the last block
        self.turns: Turns | None = None
        draw = torch.Generator().manual_seed(0)
        if model == "mlp":
            few = [(torch.randn(32, 32, generator=draw), torch.randint(10, (32,), generator=draw)) for _ in range(64)]
        else:
            few = [
                (torch.randint(256, (16, 64), generator=draw), torch.randint(10, (16,), generator=draw))
                for _ in range(8)
            ]
        self.batches: list[Batch] = [few[i % len(few)] for i in range(self.steps)]

    def net(self) -> nn.Module:
        if self.model == "mlp":
            return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        return Transformer()

    def module(self, base: type[nn.Module], name: str, log: int = 0) -> Any:
        """Build the contestants' common model on ``base``: nn.Module, or a library's Module."""
        torch.manual_seed(0)
        module = task_class(base)(self.net(), self.block, self.settle, log, self.optimizer)
        module.__dict__["turns"], module.__dict__["name"] = self.turns, name  # past nn.Module: plain attributes
        return module


def task_class(base: type[nn.Module]) -> type[nn.Module]:
    class Task(base):  # type: ignore[misc, valid-type]
        turns: Turns | None = None
        name = ""

        def __init__(self, net: nn.Module, block: int, settle: int, log: int, optimizer: str) -> None:
            super().__init__()
            self.net = net
            self.block, self.settle, self.optimizer_name = block, settle, optimizer
            self.names = [f"metric_{i}" for i in range(log)]
            self.__dict__["began"] = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            in_block = batch_idx % self.block
            if in_block == 0:
                self.next_turn(batch_idx)
            elif in_block == self.settle:
                self.__dict__["began"] = time.perf_counter()
            x, y = batch
            loss = F.cross_entropy(self(x), y)
            for name in self.names:
                self.log(name, loss, on_step=True, on_epoch=True)
            return loss

        def next_turn(self, batch_idx: int) -> None:
            """End the block that ran, let the others run theirs, and begin the next one."""
            if self.turns is None:
                return
            if batch_idx:
                took = (time.perf_counter() - self.began) / (self.block - self.settle)
                if batch_idx > WARMUP_TURNS * self.block:
                    self.turns.seconds[self.name].append(took)
                self.turns.pass_on(self.name)
            self.turns.wait(self.name)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            if self.optimizer_name == "adamw":
                return torch.optim.AdamW(self.parameters(), lr=1e-3)
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Task


# --- the contestants ------------------------------------------------------------------------------------------------


def hand(case: Case, folder: str) -> None:
    module = case.module(nn.Module, "hand")
    optimizer = module.configure_optimizers()
    for batch_idx, batch in enumerate(case.batches):
        loss = module.training_step(batch, batch_idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def raylit_off(case: Case, folder: str) -> None:
    import raylit

    raylit.Trainer(
        num_workers=0, max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, storage_path=folder,
    ).fit(case.module(raylit.Module, "raylit", case.log), train_dataloaders=case.batches)  # fmt: skip


def raylit_on(case: Case, folder: str) -> None:
    import raylit

    module = case.module(raylit.Module, "raylit_on", case.log)
    raylit.Trainer(num_workers=0, max_epochs=1, storage_path=folder).fit(module, train_dataloaders=case.batches)


def fabric(case: Case, folder: str) -> None:
    from lightning.fabric import Fabric

    run = Fabric(accelerator="cpu", devices=1)
    task = case.module(nn.Module, "fabric")
    module, optimizer = run.setup(task, task.configure_optimizers())
    for batch_idx, batch in enumerate(case.batches):
        loss = module.training_step(batch, batch_idx)
        run.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def accelerate(case: Case, folder: str) -> None:
    from accelerate import Accelerator

    run = Accelerator(cpu=True)
    task = case.module(nn.Module, "accelerate")
    module, optimizer = run.prepare(task, task.configure_optimizers())
    for batch_idx, batch in enumerate(case.batches):
        loss = module.training_step(batch, batch_idx)
        run.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


class Loader:
    """Lightning takes a list for several loaders, so it gets the same batches in this."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def lightning_off(case: Case, folder: str) -> None:
    import lightning

    module = case.module(lightning.LightningModule, "lightning", case.log)
    lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    ).fit(module, Loader(case.batches))  # fmt: skip


def lightning_on(case: Case, folder: str) -> None:
    import lightning

    module = case.module(lightning.LightningModule, "lightning_on", case.log)
    lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, default_root_dir=folder).fit(
        module, Loader(case.batches)
    )


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


# --- turns ----------------------------------------------------------------------------------------------------------


def turns_here(case: Case, names: list[str]) -> dict[str, list[float]]:
    """Run every contestant in a thread of this process, by turns; return seconds a step, one entry a block."""
    turns = case.turns = Turns(names)
    with quiet() as folder:
        threads = [threading.Thread(target=contestant, args=(case, name, folder), daemon=True) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if turns.failure is not None:
        raise turns.failure
    return turns.seconds


def contestant(case: Case, name: str, folder: str) -> None:
    assert case.turns is not None
    own = os.path.join(folder, name)
    os.mkdir(own)
    try:
        CONTESTANTS[name][1](case, own)
    except BaseException as error:
        case.turns.stop(error)
    else:
        case.turns.pass_on(name)


def worker_task(case: Case) -> Any:
    """A Module whose epoch runs the hand-written loop in a second thread, turn by turn with raylit's own."""
    import raylit

    class Both(task_class(raylit.Module)):  # type: ignore[misc]
        measured: dict[str, list[float]] | None = None

        def on_train_epoch_start(self) -> None:
            turns = case.turns = Turns(["hand", "raylit"])
            self.__dict__["turns"], self.__dict__["name"] = turns, "raylit"
            self.__dict__["thread"] = threading.Thread(
                target=contestant, args=(case, "hand", tempfile.mkdtemp()), daemon=True
            )
            self.__dict__["thread"].start()

        def on_train_epoch_end(self) -> None:
            turns = self.__dict__.pop("turns")
            turns.pass_on("raylit")
            self.__dict__.pop("thread").join()
            case.turns = None
            if turns.failure is not None:
                raise turns.failure
            self.measured = turns.seconds

    torch.manual_seed(0)
    return Both(case.net(), case.block, case.settle, case.log, case.optimizer)


def turns_in_worker(case: Case) -> dict[str, list[float]]:
    """The same inside one Ray worker; the figures come back as an attribute of the model."""
    import raylit

    module = worker_task(case)
    with quiet() as folder:
        raylit.Trainer(
            num_workers=1, max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, storage_path=folder,
        ).fit(module, train_dataloaders=case.batches)  # fmt: skip
    assert module.measured is not None
    return module.measured


def print_table(title: str, seconds: dict[str, list[float]]) -> None:
    base = seconds["hand"]
    print(f"\n{title}")
    print(f"| {'':26} | us a step | x hand | quartiles of x | us over hand |")
    print(f"| {'---':26} | --------: | -----: | -------------: | -----------: |")
    for name, values in seconds.items():
        ratios = [value / other for value, other in zip(values, base)]
        over = statistics.median(value - other for value, other in zip(values, base))
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"| {CONTESTANTS[name][0]:26} | {statistics.median(values) * 1e6:9.1f} | {middle:6.3f} "
            f"|  {low:6.3f}-{high:6.3f} | {over * 1e6:12.1f} |",
            flush=True,
        )


def memory(case: Case, names: list[str], rounds: int) -> None:
    """Peak resident memory, each contestant in fresh processes of its own."""
    print(f"\nPeak memory, {case.model}, {case.steps} steps, median of {rounds} processes")
    print(f"| {'':26} |   MiB | x hand |\n| {'---':26} | ----: | -----: |")
    base = 0.0
    for name in names:
        command = [sys.executable, __file__, "--child", name, "--models", case.model, "--blocks", str(case.blocks)]
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
    parser.add_argument("--blocks", type=int, default=200, help="timed blocks of 50 steps (transformer: 5 steps)")
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
        with quiet() as folder:
            CONTESTANTS[args.child][1](Case(models[0], args.blocks, args.log, args.optimizer), folder)
        print(peak_mib())
        return

    names = ["hand", "raylit", "raylit_on", *installed(peers)]
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, one thread")
    for model in models:
        case = Case(model, args.blocks, args.log, args.optimizer)
        size = f"{args.blocks} blocks of {case.block} steps"
        title = f"{model}, {args.optimizer}, {size}, {args.log} metrics logged a step"
        if args.memory:
            memory(case, [name for name in names if not name.endswith("_on")], 3)
        elif args.where == "worker":
            print_table(f"{title}, inside one Ray worker", turns_in_worker(case))
        else:
            print_table(f"{title}, in process", turns_here(case, names))


if __name__ == "__main__":
    main()
