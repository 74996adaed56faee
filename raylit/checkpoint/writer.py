"""Checkpoints are written beside training: one thread a save, one save at a time. Floor 2, worker side.

A snapshot is a copy that nobody else changes, so training goes on while it is written. Each rank writes its own part
straight to the storage, and beside it a small note with the part's checksum. Rank 0 waits for the notes of the others
by looking at the storage, no longer than ``PEERS_S``, then writes the manifest, then deletes what is no longer wanted.
At any moment one copy of the state is held beside the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from raylit.checkpoint.content import FILE_NAME, weights_of
from raylit.checkpoint.folder import Clock, Written
from raylit.checkpoint.ranks import file_name
from raylit.checkpoint.store import Manifest, Store
from raylit.errors import CheckpointError
from raylit.ports import RunSnapshot

PEERS_S = 300.0  # how long rank 0 waits for the other ranks' files
_FIRST_LOOK_S, _LAST_LOOK_S = 0.02, 1.0
_NICE = 10  # added to the process's: what training leaves of the cores is enough for a writer


@dataclass(frozen=True)
class Job:
    """One checkpoint to be written. The other ranks need no more of ``manifest`` than its name."""

    store: Store
    manifest: Manifest  # without its files
    obsolete: tuple[str, ...] = ()  # deleted once this one is whole

    @property
    def key(self) -> tuple[str, str]:
        """Its place, the same on every rank."""
        return (self.store.folder.path, self.manifest.name)


@dataclass
class Outcome:
    """What became of one job, on this rank."""

    job: Job
    error: str | None = None  # None: it is written (on rank 0: whole)
    deleted: list[str] = field(default_factory=list)  # of the obsolete ones
    left_over: list[str] = field(default_factory=list)  # those that could not be deleted, and why


class Writer:
    """Writes snapshots in a thread. ``save``, ``wait``; the thread itself raises nothing."""

    def __init__(self, rank: int, world_size: int, *, peers_s: float = PEERS_S, clock: Clock | None = None) -> None:
        self._rank, self._world_size, self._peers_s = rank, world_size, peers_s
        self._clock = clock or Clock()
        self.attempt = ""  # the same on all ranks, and another after a restart: what a killed rank left is not read
        self._thread: threading.Thread | None = None
        self._outcomes: list[Outcome] = []
        # On rank 0, of the save in flight: jobs that another rank said it failed in, by their keys, and why. For what
        # is told otherwise than through the storage; the thread looks at it while it waits.
        self.lost: dict[tuple[str, str], str] = {}
        self.failed: Outcome | None = None  # of the save in flight; read without a lock

    @property
    def busy(self) -> bool:
        """A save is in flight, or its outcome was not asked for yet."""
        return self._thread is not None

    def save(self, jobs: Sequence[Job], snapshot: RunSnapshot) -> None:
        """Begin to write one snapshot as each of ``jobs``. The save before it must have been waited for."""
        if self._thread is not None:
            raise CheckpointError("a save is in flight: wait() for it first")
        pending = [snapshot]  # handed over: the copy goes when it is written
        self._outcomes, self.failed, self.lost = [], None, {}
        # A daemon: a process that is told to end does not wait for a storage that is away.
        self._thread = threading.Thread(target=self._run, args=(tuple(jobs), pending), name="raylit-checkpoint",
                                        daemon=True)  # fmt: skip
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> list[Outcome]:
        """Wait for the save in flight and return what became of it; nothing where there is none, or after the time."""
        if self._thread is None:
            return []
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return []
        self._thread, outcomes, self._outcomes, self.failed = None, self._outcomes, [], None
        return outcomes

    # -- in the thread -------------------------------------------------------------------------------------------
    def _run(self, jobs: tuple[Job, ...], pending: list[RunSnapshot]) -> None:
        _step_back()
        snapshot = pending.pop()
        for job in jobs:
            outcome = Outcome(job)
            try:
                self._write(job, snapshot)
            except Exception as error:  # training goes on; whoever waits is told
                outcome.error = _worded(error)
                self._clean_up(job, outcome.error)
            else:
                if self._rank == 0:
                    _delete(outcome)
            self._outcomes.append(outcome)
            if outcome.error is not None:
                self.failed = outcome

    def _write(self, job: Job, snapshot: RunSnapshot) -> None:
        store, name = job.store, job.manifest.name
        files: dict[str, Written] = {}
        if self._rank == 0:
            light = job.manifest.weights_only
            files[FILE_NAME] = store.write_part(
                name, FILE_NAME, weights_of(snapshot.common) if light else snapshot.common
            )
        if not job.manifest.weights_only:
            mine = file_name(self._rank)
            files[mine] = store.write_part(name, mine, snapshot.own)
            if self._rank != 0:
                self._leave_note(job, asdict(files[mine]))
            elif self._world_size > 1:
                files |= self._notes(job)
        if self._rank == 0:
            store.publish(replace(job.manifest, files=files))
            if not job.manifest.weights_only:
                for rank in range(1, self._world_size):
                    _tried(partial(store.folder.delete_file, self._note(job, rank)))

    def _leave_note(self, job: Job, content: dict[str, object]) -> None:
        job.store.folder.write_small(self._note(job, self._rank), json.dumps(content).encode())

    def _notes(self, job: Job) -> dict[str, Written]:
        """Wait until every other rank has left its note."""
        files: dict[str, Written] = {}
        until, pause_s = self._clock.now() + self._peers_s, _FIRST_LOOK_S
        missing = list(range(1, self._world_size))
        while missing:
            for rank in tuple(missing):
                data = job.store.folder.read(self._note(job, rank))
                if data is None:
                    continue
                note = json.loads(data)
                if "error" in note:
                    raise CheckpointError(f"rank {rank}: {note['error']}")
                files[file_name(rank)] = Written(**note)
                missing.remove(rank)
            if missing:
                if job.key in self.lost:
                    raise CheckpointError(self.lost[job.key])
                if self._clock.now() >= until:
                    ranks = ", ".join(map(str, missing))
                    raise CheckpointError(f"the part of rank {ranks} did not come within {self._peers_s:g} s")
                self._clock.sleep(pause_s)
                pause_s = min(2 * pause_s, _LAST_LOOK_S)
        return files

    def _note(self, job: Job, rank: int) -> str:
        return f"{job.manifest.name}/{file_name(rank)}.{self.attempt}.json"

    def _clean_up(self, job: Job, reason: str) -> None:
        """Leave nothing half-written, as far as the storage lets: rank 0 deletes, the others tell it why."""
        if self._rank == 0:
            _tried(lambda: job.store.folder.delete_folder(job.manifest.name))
        elif not job.manifest.weights_only:
            _tried(lambda: self._leave_note(job, {"error": reason}))


def _step_back() -> None:
    """Let training have the CPU first. Linux alone gives each thread a priority of its own.

    Serialising and hashing take the CPU that a plain ``torch.save`` takes; without this a step waits for its share of
    it wherever every core is at work. While training waits for the writer, the writer has the core for itself.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICE)


def _delete(outcome: Outcome) -> None:
    """Delete what the checkpoint makes obsolete; what cannot be deleted stays, and is named."""
    store = outcome.job.store
    for name in outcome.job.obsolete:
        try:
            store.delete(name)
            outcome.deleted.append(name)
        except OSError as error:
            outcome.left_over.append(f"{store.path_of(name)}: {_worded(error)}")


def _tried(action: Callable[[], object]) -> None:
    try:
        action()
    except OSError:  # what it would put right was told already; the store lets such leftovers be
        pass


def _worded(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    return line if isinstance(error, CheckpointError) else f"{type(error).__name__}: {line}" if line else repr(error)
