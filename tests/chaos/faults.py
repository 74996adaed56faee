"""The faults of the chaos test: how one is drawn, and what a worker does to itself at its moment.

What takes a hand from outside, the loss of a node and its announcement, is in ``chaos.py``: the worker says when the
moment has come, and waits for it.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store

EPOCHS, BATCHES, VALIDATION_BATCHES = 3, 24, 4  # batches of each rank
STEPS = EPOCHS * BATCHES
VALIDATED_EVERY = BATCHES // 2
_LONG_S = 240.0  # nothing takes this long, but on a machine with other work Ray may need minutes


class Kind(str, enum.Enum):
    """What happens to a run."""

    TRAINING = "worker killed in training"
    VALIDATION = "worker killed in validation"
    WRITING = "worker killed while writing"
    NODE = "node lost"
    DRAIN = "node lost with notice"
    DAMAGE = "newest checkpoint damaged"
    DISK = "disk full"


@dataclass(frozen=True)
class Fault:
    """One fault and its moment. Steps are those done before it; counts start at 0."""

    kind: Kind
    rank: int = 0  # the worker that is killed, or whose node is lost
    step: int = 10
    batch: int = 0  # VALIDATION: of the validation
    operation: int = 0  # WRITING: so many changes to the storage are done before
    notice_s: float = 0.0  # DRAIN: from the announcement to the node's end
    more_steps: int = 0  # DRAIN: trained after the notice was heard
    file: str = ""  # DAMAGE: of the checkpoint
    damage: str = ""  # DAMAGE: what becomes of this file
    free_step: int = 0  # DISK: there is room again
    kill_step: int = 0  # DISK: then the worker is killed

    @property
    def moment(self) -> str:
        """When, and to whom."""
        extra = {
            Kind.VALIDATION: f", the validation after it, batch {self.batch}",
            Kind.WRITING: f", the save after it, operation {self.operation}",
            Kind.DRAIN: f", {self.notice_s:g} s before",
            Kind.DAMAGE: f", {self.file} {self.damage}",
            Kind.DISK: f" to {self.free_step}, killed at {self.kill_step}",
        }
        return f"rank {self.rank}, step {self.step}{extra.get(self.kind, '')}"


@dataclass(frozen=True)
class Run:
    """One run of the chaos test: what is trained, and its fault."""

    seed: int  # of the training
    every_n_steps: int  # checkpoints
    fault: Fault

    def write(self, folder: Path) -> None:
        """Leave it for the run's processes."""
        (folder / "run.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read what ``write`` left."""
        plain = json.loads((folder / "run.json").read_text())
        fault = plain.pop("fault")
        return cls(fault=Fault(Kind(fault.pop("kind")), **fault), **plain)


def drawn(seed: int, number: int, kinds: tuple[Kind, ...] = tuple(Kind)) -> Run:
    """Draw run ``number``, from 0, of the chaos test of a seed: each so many runs in a row meet every kind."""
    order = random.Random(f"{seed} {number // len(kinds)}").sample(kinds, len(kinds))
    draw = random.Random(f"{seed} run {number}")
    every, kind, rank = draw.randint(3, 9), order[number % len(kinds)], draw.randrange(2)
    training_seed = draw.randrange(1000)
    if kind is Kind.VALIDATION:
        fault = Fault(kind, rank, draw.randrange(1, STEPS), batch=draw.randrange(VALIDATION_BATCHES))
    elif kind is Kind.WRITING:  # early enough for a save after it
        fault = Fault(kind, rank, draw.randrange(STEPS - 3 * every), operation=draw.randrange(10 if rank == 0 else 4))
    elif kind is Kind.DRAIN:  # early enough for the notice to be heard
        fault = Fault(kind, rank, draw.randrange(1, STEPS // 2), notice_s=draw.randint(8, 15),
                      more_steps=draw.randrange(6))  # fmt: skip
    elif kind is Kind.DAMAGE:  # late enough for two checkpoints that were ranked
        file = draw.choice(["model.ckpt", "rank_00000.ckpt", "rank_00001.ckpt", "manifest.json"])
        fault = Fault(kind, rank, draw.randrange(2 * VALIDATED_EVERY + 1, STEPS), file=file,
                      damage=draw.choice(["truncated", "altered", "removed"]))  # fmt: skip
    elif kind is Kind.DISK:
        full = draw.randrange(every + 1, STEPS // 2)
        free = full + draw.randint(2 * every, 3 * every)  # at least two checkpoints were due
        fault = Fault(kind, rank, full, free_step=free, kill_step=min(free + draw.randint(1, 2 * every), STEPS - 1))
    else:
        fault = Fault(kind, rank, draw.randrange(1, STEPS))
    return Run(training_seed, every, fault)


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = _LONG_S) -> Any:
    """Return what ``condition`` gives once it is true."""
    until = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > until:
            raise TimeoutError(f"in vain for {timeout_s:g} s: {what}")
        threading.Event().wait(0.01)
    return found


def leave(folder: Path, note: str, **facts: Any) -> None:
    """Put a note with the time into the run's folder: there at once, or not."""
    (folder / "new").mkdir(exist_ok=True)
    new = folder / "new" / f"{note}-{os.getpid()}"
    new.write_text(json.dumps({"time": time.time(), **facts}))
    new.rename(folder / note)


class Disturber:
    """Brings the fault about from within a worker: its first attempt has one, and asks it at every step."""

    def __init__(self, run: Run, folder: Path, rank: int) -> None:
        self._fault, self._folder, self._rank = run.fault, folder, rank
        self._here = rank == run.fault.rank
        self._store = Store(Folder(str(folder / "disk" / "run" / "checkpoints")))
        self._heard = 0  # steps since the notice was heard
        self._watching = False

    def before_step(self, step: int) -> None:
        """Training goes on with a step; ``step``: how many are done."""
        fault = self._fault
        if fault.kind is Kind.TRAINING and self._here and step == fault.step:
            self._die(step)
        elif fault.kind is Kind.WRITING and self._here and step >= fault.step and not self._watching:
            self._watching = True
            sys.addaudithook(_Watch(str(self._store.folder.path), fault.operation, lambda: self._die(step)))
        elif fault.kind is Kind.NODE and self._here and step == fault.step:
            leave(self._folder, "reached")
            self._wait_for("struck")
        elif fault.kind is Kind.DRAIN and step >= fault.step:
            self._drained(step)
        elif fault.kind is Kind.DAMAGE and step == fault.step:
            if self._rank == 0:
                self._damage(step)
            self._wait_for("damaged")
            if self._here:
                self._die(step)
        elif fault.kind is Kind.DISK:
            filler = self._folder / "disk" / "filler"
            if self._rank == 0 and fault.step <= step < fault.free_step:
                _fill(filler)  # again and again: a save that failed gives its room back
            elif self._rank == 0 and step == fault.free_step:
                filler.unlink()
            if self._here and step == fault.kill_step:
                self._die(step)

    def before_validation_batch(self, step: int, batch: int) -> None:
        """A validation goes on with a batch."""
        fault = self._fault
        if fault.kind is Kind.VALIDATION and self._here and step >= fault.step and batch == fault.batch:
            self._die(step)

    def _wait_for(self, name: str) -> None:
        wait_for((self._folder / name).exists, name)

    def _die(self, step: int) -> None:
        leave(self._folder, "fault", step=step)
        os.kill(os.getpid(), signal.SIGKILL)

    def _drained(self, step: int) -> None:
        """Wait for the announcement, train until it was heard and a little longer, then until the node is lost."""
        if step == self._fault.step:
            leave(self._folder, f"reached-{self._rank}")
            self._wait_for("drained")
        elif (self._folder / "heard").exists():
            self._heard += 1
        else:
            threading.Event().wait(0.1)  # as a batch of a real model
        if self._heard > self._fault.more_steps or step == STEPS - 3:
            self._wait_for("struck")

    def _damage(self, step: int) -> None:
        """Damage the newest checkpoint, once no save is in flight: no step is done meanwhile, so none begins."""
        writing = [thread for thread in threading.enumerate() if thread.name == "raylit-checkpoint"]
        for thread in writing:
            thread.join()
        there = self._store.manifests()
        if len(there) < 2:
            raise RuntimeError(f"there are no two checkpoints at step {step}: {there}")
        newest, fault = there[-1], self._fault
        if self._store.faults(newest):
            raise RuntimeError(f"{newest.name} is damaged already")
        damage(Path(self._store.path_of(newest.name), fault.file), fault.damage)
        leave(self._folder, "damaged", name=newest.name, before=there[-2].step)


def damage(file: Path, how: str) -> None:
    """Do to a file what a bad disk does."""
    data = file.read_bytes()
    if how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif how == "altered":
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :])
    else:
        file.unlink()


def _fill(filler: Path) -> None:
    """Take all the room that is left on a disk."""
    with open(filler, "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


class _Watch:
    """Python's audit hook: counts a process's changes to a folder, and calls ``strike`` in the midst of one of them.

    A file that is opened for writing is struck when some of it is there; a rename or a deletion just before it.
    """

    def __init__(self, folder: str, operation: int, strike: Callable[[], None]) -> None:
        self._folder, self._left, self._strike = folder, operation, strike

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "shutil.rmtree") or self._left < 0:
            return
        path = arguments[0]
        if not isinstance(path, str) or not path.startswith(self._folder):
            return
        if event == "open" and "w" not in (arguments[1] or ""):
            return
        self._left -= 1
        if self._left >= 0:
            return
        if event == "open":
            threading.Thread(target=self._strike_at, args=(path,), daemon=True).start()
        else:
            self._strike()

    def _strike_at(self, path: str) -> None:
        target = path.removesuffix(".partial")
        while not os.path.exists(target):  # too late for half a file, and still a fault
            with contextlib.suppress(FileNotFoundError):
                if os.path.getsize(path) > 0:
                    break
        self._strike()
