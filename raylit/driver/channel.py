"""The driver's end of the live events. Runs on the driver; standard library only.

A TCP listener in this process rather than an actor: starting an actor costs one to two seconds of every run. Whoever
connects must prove that it holds the run's random key (``raylit.worker.messages``); what it then sends is read as
JSON and never unpickled.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from raylit.wire import ChannelAddress
from raylit.worker import messages

_DRAIN_TIMEOUT_S = 2.0  # after the run, for all workers together that were killed without closing their end
_HANDSHAKE_TIMEOUT_S = 10.0  # a worker that imports torch meanwhile may be slow to answer
_MAX_PENDING = 128  # connections that have not shown the key yet; beyond it the oldest is turned away
_PENDING_GRACE_S = 1.0  # but not before this age: a thousand workers may come at the same moment


class _End:
    """One connection: its socket and thread, and how far it has come."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.since = time.monotonic()
        self.is_aside = False  # a forked process of a worker, which may live on after the run: not to be waited for
        self.thread: threading.Thread | None = None


class DriverChannel:
    """Receives every worker's events and gives them to ``on_event``, one at a time, each worker's in its order.

    ``on_event`` runs in this channel's threads under a lock, so it need not be thread safe; what it raises is
    dropped (a broken display must not end a run). ``workers`` maps each rank that connected to its (node, pid), and
    ``stalled`` each rank whose watch (``raylit/worker/watch.py``) spoke to what it said.
    """

    def __init__(self, host: str, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._key = secrets.token_bytes(32)
        self._on_event = on_event
        self._lock = threading.Lock()  # held while an event is shown
        self._closed = False
        # Guards the two below, and tells the acceptor when a place is free. Connections are in one of the two.
        self._changed = threading.Condition()
        self._closing = False
        self._pending: list[_End] = []  # oldest first; not known yet
        self._known: list[_End] = []
        self.workers: dict[int, tuple[str, int]] = {}
        self.stalled: dict[int, dict[str, Any]] = {}  # what each rank said that makes no progress
        # The wildcard address is never used: only the interface the workers come in on is opened.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self.address = ChannelAddress(host=host, port=int(self._listener.getsockname()[1]), key=self._key)
        self._acceptor = threading.Thread(target=self._accept, name="raylit-listener", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Take in what the workers have sent, then close. Waits two seconds at most for ends that were killed."""
        deadline = time.monotonic() + _DRAIN_TIMEOUT_S
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            for end in self._pending:
                messages.hang_up(end.connection)
            known = list(self._known)
        for end in known:
            if not end.is_aside:
                _join(end.thread, deadline)
        for end in known:  # what has come in already is still read
            with contextlib.suppress(OSError):
                end.connection.shutdown(socket.SHUT_RD)
        for end in known:
            _join(end.thread, deadline)
        self._closed = True
        for end in known:
            messages.hang_up(end.connection)
        with contextlib.suppress(OSError):  # wakes the acceptor on Linux, and also closes copies in forked processes
            self._listener.shutdown(socket.SHUT_RDWR)
        # Elsewhere a listener that is blocked in accept is woken by a connection only.
        with contextlib.suppress(OSError):
            socket.create_connection((self.address.host, self.address.port), timeout=1.0).close()
        self._acceptor.join(timeout=_DRAIN_TIMEOUT_S)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                # Closing, or no file descriptors left: keep serving the workers, but do not spin.
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, timeout=0.1)
                continue
            end = _End(connection)
            end.thread = threading.Thread(target=self._read, args=(end,), name="raylit-events", daemon=True)
            with self._changed:
                self._make_room()
                if self._closing:
                    connection.close()
                    return
                self._pending.append(end)
            try:
                end.thread.start()
            except RuntimeError:  # no thread to be had: this one is lost, the run is not
                self._forget(end)

    def _make_room(self) -> None:
        """Wait for a place among the pending, and turn the oldest away once it has had its time."""
        while len(self._pending) >= _MAX_PENDING and not self._closing:
            oldest = self._pending[0]
            left = oldest.since + _PENDING_GRACE_S - time.monotonic()
            if left > 0:
                self._changed.wait(timeout=left)
            else:
                self._pending.remove(oldest)
                messages.hang_up(oldest.connection)  # its thread closes it

    def _read(self, end: _End) -> None:
        # A wrong key, a port scan, a worker that was killed, nonsense: this connection ends, the others do not.
        with contextlib.suppress(Exception):
            messages.admit(end.connection, self._key, _HANDSHAKE_TIMEOUT_S, lambda: self._enter(end))
            while True:
                for event in messages.receive(end.connection):
                    self._deliver(end, event)
        self._forget(end)

    def _enter(self, end: _End) -> None:
        with self._changed:
            if self._closing:
                raise EOFError
            self._pending.remove(end)  # ValueError: turned away for its age
            self._known.append(end)
            self._changed.notify_all()

    def _forget(self, end: _End) -> None:
        with self._changed:
            for ends in (self._pending, self._known):
                if end in ends:
                    ends.remove(end)
            self._changed.notify_all()
        end.connection.close()

    def _deliver(self, end: _End, event: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(Exception):
            if self._closed:
                return
            if event.get("kind") == "aside":
                end.is_aside = True
                return
            if event.get("kind") == "hello":
                self.workers[int(event["rank"])] = (str(event["node"]), int(event["pid"]))
            if event.get("kind") == "stalled":
                self.stalled[int(event["rank"])] = event
            self._on_event(event)


def _join(thread: threading.Thread | None, deadline: float) -> None:
    if thread is not None:
        thread.join(timeout=max(deadline - time.monotonic(), 0.0))
