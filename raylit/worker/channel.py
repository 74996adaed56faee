"""Live events from a worker to the driver. Runs on the worker; standard library only.

A worker must never wait for a terminal: events go through a bounded queue to a daemon thread, which connects, batches
and sends. Where the driver cannot be reached the run goes on without a live display. Messages are JSON lists of
events, never pickle: the listener only proves who holds the key, it does not make the sender's bytes trustworthy.
"""

from __future__ import annotations

import contextlib
import io
import json
import queue
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection
from typing import Any, TextIO

from raylit.wire import ChannelAddress, World

_QUEUE_EVENTS = 4096  # a burst of prints between two sends; beyond it display-only events are dropped
_BATCH_EVENTS = 256
_CLOSE_TIMEOUT_S = 5.0  # how long a finished worker waits for a slow driver before it gives up on the display


class WorkerChannel:
    """One worker's sending end. ``send`` never raises; ``close`` flushes for a few seconds at most."""

    def __init__(self, address: ChannelAddress, world: World, pid: int = 0) -> None:
        self._address = address
        self._hello = {"kind": "hello", "rank": world.global_rank, "node": world.node_name, "pid": pid}
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=_QUEUE_EVENTS)
        self._dead = threading.Event()
        self._fallback = sys.__stderr__
        # The thread also connects: a firewall that swallows packets must not hold up the first step.
        self._thread = threading.Thread(target=self._run, name="raylit-channel", daemon=True)
        self._thread.start()

    @property
    def dead(self) -> bool:
        """True once the driver cannot be reached; events are dropped from then on."""
        return self._dead.is_set()

    def send(self, event: dict[str, Any], *, must_arrive: bool = False) -> None:
        """Queue one event (JSON values; not to be changed afterwards).

        When the queue is full it is dropped, or with ``must_arrive`` only after one second.
        """
        if self._dead.is_set():
            return
        with contextlib.suppress(queue.Full):
            self._queue.put(event, block=must_arrive, timeout=1.0 if must_arrive else None)

    def close(self) -> None:
        """Send what is queued and end the thread, waiting five seconds at most."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=1.0)
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        self._dead.set()

    def _run(self) -> None:
        try:
            with Client((self._address.host, self._address.port), authkey=self._address.key) as connection:
                _send(connection, [self._hello])
                while True:
                    batch, last = self._next_batch()
                    if batch:
                        _send(connection, batch)
                    if last:
                        return
        except Exception:
            # Whatever went wrong (refused, reset, wrong key), the display is lost and the training is not.
            self._dead.set()
            self._drain_to_log()

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

    def _drain_to_log(self) -> None:
        """Give prints that were queued before the connection failed to the process's own stream, so none is lost."""
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._queue.get_nowait()
                if event is not None and event.get("kind") == "print" and self._fallback is not None:
                    self._fallback.write(f"{event['text']}\n")


def _send(connection: Connection[Any, Any], events: list[dict[str, Any]]) -> None:
    connection.send_bytes(json.dumps(events, default=str, skipkeys=True).encode())


class StreamToChannel(io.TextIOBase):
    """Stands in for ``sys.stdout`` or ``sys.stderr`` on a worker: each finished line becomes one print event.

    A line that is overwritten with carriage returns (a progress bar) is sent in its last state only. When the
    channel is dead, text goes to the stream that was there before.
    """

    def __init__(self, channel: WorkerChannel, rank: int, name: str, original: TextIO) -> None:
        self._channel = channel
        self._rank = rank
        self._name = name
        self._original = original
        self._pending = ""
        self._lock = threading.Lock()  # data loader threads print too

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
