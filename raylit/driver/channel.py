"""The driver's end of the live events. Runs on the driver; standard library only.

A TCP listener in this process rather than an actor: starting an actor costs one to two seconds of every run. Whoever
connects must prove that it holds the run's random key (the HMAC handshake of ``multiprocessing.connection``); what
it then sends is read as JSON and never unpickled.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from typing import Any

from raylit.wire import ChannelAddress

_DRAIN_TIMEOUT_S = 2.0  # after the run, for workers that were killed without closing their end


class DriverChannel:
    """Receives every worker's events and gives them to ``on_event``, one at a time, each worker's in its order.

    ``on_event`` runs in this channel's threads under a lock, so it need not be thread safe; what it raises is
    dropped (a broken display must not end a run). ``workers`` maps each rank that connected to its (node, pid).
    """

    def __init__(self, host: str, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._key = secrets.token_bytes(32)
        self._on_event = on_event
        self._lock = threading.Lock()
        self._closing = False
        self._readers: list[threading.Thread] = []
        self.workers: dict[int, tuple[str, int]] = {}
        # The wildcard address is never used: only the interface the workers come in on is opened.
        family = "AF_INET6" if ":" in host else "AF_INET"
        self._listener = Listener((host, 0), family=family, backlog=128, authkey=self._key)
        self.address = ChannelAddress(host=host, port=int(self._listener.address[1]), key=self._key)
        self._acceptor = threading.Thread(target=self._accept, name="raylit-listener", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Take in what the workers have sent, then close. Waits two seconds at most for ends that were killed."""
        self._closing = True
        for reader in list(self._readers):
            reader.join(timeout=_DRAIN_TIMEOUT_S)
        # A listener blocked in accept is not woken by closing it on Linux; a connection wakes it.
        with contextlib.suppress(OSError):
            socket.create_connection((self.address.host, self.address.port), timeout=1.0).close()
        self._listener.close()
        self._acceptor.join(timeout=_DRAIN_TIMEOUT_S)

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection = self._listener.accept()
            except Exception:
                # A stranger with a wrong key, a port scan, or our own wake-up: keep serving the workers.
                continue
            reader = threading.Thread(target=self._read, args=(connection,), name="raylit-events", daemon=True)
            self._readers.append(reader)
            reader.start()

    def _read(self, connection: Connection[Any, Any]) -> None:
        with connection, contextlib.suppress(EOFError, OSError, ValueError):
            while True:
                for event in json.loads(connection.recv_bytes()):
                    self._deliver(event)

    def _deliver(self, event: dict[str, Any]) -> None:
        with self._lock:
            if event.get("kind") == "hello":
                self.workers[int(event["rank"])] = (str(event["node"]), int(event["pid"]))
            with contextlib.suppress(Exception):
                self._on_event(event)
