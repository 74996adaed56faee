"""Live events from a worker to the driver. Runs on the worker; standard library only.

A worker must never wait for a terminal: events go through a bounded queue to a daemon thread, which connects, batches
and sends. Where the driver cannot be reached the run goes on without a live display. Messages are JSON lists of
events, never pickle: the listener only proves who holds the key, it does not make the sender's bytes trustworthy.

A forked process (a data loader's) has a copy of all this but not the thread, and whatever lock was held at the fork
stays held in it. It therefore starts afresh, with a connection of its own from its first event on.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing.util
import os
import queue
import socket
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol, TextIO

from raylit.wire import ChannelAddress, World
from raylit.worker import messages

_QUEUE_EVENTS = 4096  # a burst of prints between two sends; beyond it display-only events are dropped
_BATCH_EVENTS = 256
_CONNECT_TIMEOUT_S = 10.0  # a driver that imports torch meanwhile may be slow to answer
_CLOSE_TIMEOUT_S = 5.0  # how long a finished worker waits for a slow driver before it gives up on the display


class _Forkable(Protocol):
    def after_fork(self) -> None: ...


_forkable: weakref.WeakSet[_Forkable] = weakref.WeakSet()


def _after_fork() -> None:
    for each in list(_forkable):
        each.after_fork()


os.register_at_fork(after_in_child=_after_fork)


class WorkerChannel:
    """One worker's sending end. ``send`` never raises; ``close`` flushes for a few seconds at most."""

    def __init__(self, address: ChannelAddress, world: World, pid: int = 0) -> None:
        self._address = address
        self._hello = {"kind": "hello", "rank": world.global_rank, "node": world.node_name, "pid": pid}
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=_QUEUE_EVENTS)
        self._dead = threading.Event()
        self._fallback = sys.__stderr__
        self._connection: socket.socket | None = None
        self._fork_lock: threading.Lock | None = None  # set in a forked process only
        _forkable.add(self)
        # The thread also connects: a firewall that swallows packets must not hold up the first step.
        self._thread = threading.Thread(target=self._run, name="raylit-channel", daemon=True)
        self._thread.start()

    @property
    def dead(self) -> bool:
        """True once the driver cannot be reached; events are dropped from then on, and prints go to the log."""
        return self._dead.is_set()

    def send(self, event: dict[str, Any], *, must_arrive: bool = False) -> None:
        """Queue one event (JSON values; not to be changed afterwards).

        When the queue is full it is dropped, or with ``must_arrive`` only after one second.
        """
        if self._fork_lock is not None:
            self._send_from_fork(event, self._fork_lock)
            return
        if self._dead.is_set():
            self._log([event])
            return
        with contextlib.suppress(queue.Full):
            self._queue.put(event, block=must_arrive, timeout=1.0 if must_arrive else None)
        if self._dead.is_set():  # meanwhile, so nobody takes it from the queue any more
            self._drain_to_log()

    def close(self) -> None:
        """Send what is queued and end the thread, waiting five seconds at most; at once where the channel is dead."""
        if self._fork_lock is not None:
            self._dead.set()
            self._disconnect()
            return
        if not self._dead.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=1.0)
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        self._dead.set()
        self._drain_to_log()
        connection = self._connection
        if self._thread.is_alive():  # given up: end it where it is, in the middle of a message or for want of one
            if connection is not None:
                messages.hang_up(connection)
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)

    def after_fork(self) -> None:
        """Called in a forked process, before anything else runs in it: nothing that a lock protects is used again."""
        was_dead = self._dead.is_set()
        self._dead = threading.Event()
        if was_dead:
            self._dead.set()
        self._fork_lock = threading.Lock()
        self._disconnect()

    def _send_from_fork(self, event: dict[str, Any], lock: threading.Lock) -> None:
        """Send at once: a data loader's process may end without a chance to flush a queue."""
        with lock:
            if self._dead.is_set():
                self._log([event])
                return
            try:
                if self._connection is None:
                    self._connection = messages.connect(self._address, _CONNECT_TIMEOUT_S)
                    messages.send(self._connection, [{"kind": "aside"}])
                messages.send(self._connection, [event])
            except Exception:
                self._dead.set()
                self._disconnect()
                self._log([event])

    def _run(self) -> None:
        batch: list[dict[str, Any]] = []
        last = False
        try:
            self._connection = messages.connect(self._address, _CONNECT_TIMEOUT_S)
            self._connection.settimeout(None)  # a driver that was stopped with Ctrl-Z comes back
            messages.send(self._connection, [self._hello])
            while not last:
                batch, last = self._next_batch()
                if batch:
                    messages.send(self._connection, batch)
                    batch = []
            # A process that was forked meanwhile holds a copy, so closing alone would not tell the driver.
            self._connection.shutdown(socket.SHUT_WR)
        except Exception:
            # Whatever went wrong (refused, reset, wrong key), the display is lost and the training is not.
            self._dead.set()
            self._log(batch)
            self._drain_to_log()
        finally:
            self._disconnect()

    def _next_batch(self) -> tuple[list[dict[str, Any]], bool]:
        """Wait for one event, then take what else is there. The second value is True at the end of the stream."""
        event = self._queue.get()
        batch: list[dict[str, Any]] = []
        while event is not None:
            batch.append(event)
            if len(batch) == _BATCH_EVENTS:
                return batch, False
            try:
                event = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _drain_to_log(self) -> None:
        """Give prints that were queued before the connection failed to the process's own stream, so none is lost."""
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._queue.get_nowait()
                if event is not None:
                    self._log([event])

    def _log(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event.get("kind") == "print" and self._fallback is not None:
                with contextlib.suppress(OSError, ValueError):
                    self._fallback.write(f"{event['text']}\n")


class StreamToChannel(io.TextIOBase):
    """Stands in for ``sys.stdout`` or ``sys.stderr`` on a worker: each finished line becomes one print event.

    A line that is overwritten with carriage returns (a progress bar) is sent in its last state only. When the
    channel is dead, text goes to the stream that was there before. A forked process sends its own lines.
    """

    def __init__(self, channel: WorkerChannel, rank: int, name: str, original: TextIO) -> None:
        self._channel = channel
        self._rank = rank
        self._name = name
        self._original = original
        self._pending = ""
        self._lock = threading.Lock()  # data loader threads print too
        self._finish_at_exit = False  # True in a forked process until its first text
        _forkable.add(self)

    def after_fork(self) -> None:
        """Called in a forked process: the lock may be held in it for ever, and a begun line is the parent's to end."""
        self._lock = threading.Lock()
        self._pending = ""
        self._finish_at_exit = True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._original.fileno()

    def write(self, text: str) -> int:
        if self._channel.dead:
            return self._original.write(text)
        with self._lock:
            if self._finish_at_exit:
                self._finish_at_exit = False
                multiprocessing.util.Finalize(None, self.finish, exitpriority=10)
            *lines, rest = (self._pending + text).split("\n")
            # Without this a bar that never prints a newline would grow without bound.
            self._pending = rest[rest.rfind("\r", 0, -1) + 1 :] if len(rest) > 1 else rest
            for line in lines:
                self._emit(line)
        return len(text)

    def flush(self) -> None:
        if self._channel.dead:
            self._original.flush()

    def finish(self) -> None:
        """Send a last line that has no newline."""
        with self._lock:
            if self._pending:
                self._emit(self._pending)
                self._pending = ""

    def _emit(self, line: str) -> None:
        text = line.rstrip("\r").rsplit("\r", 1)[-1]
        self._channel.send({"kind": "print", "rank": self._rank, "text": text, "stream": self._name})


@contextlib.contextmanager
def redirected(channel: WorkerChannel | None, rank: int) -> Iterator[None]:
    """Send this process's Python-level prints through ``channel`` for the duration; without one change nothing."""
    if channel is None:
        yield
        return
    before = sys.stdout, sys.stderr
    streams = (
        StreamToChannel(channel, rank, "stdout", before[0]),
        StreamToChannel(channel, rank, "stderr", before[1]),
    )
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.finish()
