"""The socket under the live events: who is at the other end, and messages on it. Both ends; standard library only.

Before the handshake is over an end reads a fixed number of bytes and no more, each part within one deadline, so a
stranger can neither fill the memory nor hold a thread. The handshake is mutual: each end shows that it holds the run's
key, for this connection and for its own role. Afterwards a message is four bytes of length and a JSON list of events.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from raylit.wire import ChannelAddress

_NONCE = 32
_DIGEST = hashlib.sha256().digest_size
_LENGTH = struct.Struct("!I")


class StrangerError(Exception):
    """The other end does not hold the run's key."""


def connect(address: ChannelAddress, timeout: float) -> socket.socket:
    """A worker's connection, both ends known to each other. Raises ``OSError``, ``EOFError`` or ``StrangerError``.

    ``timeout`` is for all of it, and is left on the socket.
    """
    deadline = time.monotonic() + timeout
    connection = socket.create_connection((address.host, address.port), timeout=timeout)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        theirs = _read(connection, _NONCE, deadline)
        mine = os.urandom(_NONCE)
        connection.sendall(mine + _proof(address.key, b"worker", theirs, mine))
        if not hmac.compare_digest(_read(connection, _DIGEST, deadline), _proof(address.key, b"driver", theirs, mine)):
            raise StrangerError
        connection.settimeout(timeout)
    except BaseException:
        connection.close()
        raise
    return connection


def admit(connection: socket.socket, key: bytes, timeout: float, enter: Callable[[], None] = lambda: None) -> None:
    """The driver's half of the handshake. Raises ``OSError``, ``EOFError`` or ``StrangerError``.

    ``enter`` is called once the worker is known, and before the worker knows that it is: what it sends from then on
    must not be lost, however soon the run ends. What ``enter`` raises turns the worker away.
    """
    deadline = time.monotonic() + timeout
    mine = os.urandom(_NONCE)
    connection.settimeout(timeout)
    connection.sendall(mine)
    answer = _read(connection, _NONCE + _DIGEST, deadline)
    theirs, proof = answer[:_NONCE], answer[_NONCE:]
    if not hmac.compare_digest(proof, _proof(key, b"worker", mine, theirs)):
        raise StrangerError
    enter()
    connection.sendall(_proof(key, b"driver", mine, theirs))
    connection.settimeout(None)


def send(connection: socket.socket, events: list[dict[str, Any]]) -> None:
    """One message. Raises ``OSError``, or ``EOFError`` where the driver has closed its end."""
    data = json.dumps(events, default=str, skipkeys=True).encode()
    if _is_closed(connection):
        raise EOFError
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> list[dict[str, Any]]:
    """The next message, however long it takes to come. Raises ``EOFError`` at the end of the stream."""
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    events = json.loads(_read(connection, length))
    return [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []


def hang_up(connection: socket.socket) -> None:
    """End the connection at once, whoever waits on it: closing alone ends nothing while a fork holds a copy."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other end was faster


def _is_closed(connection: socket.socket) -> bool:
    """True once the driver has ended the connection. It says nothing after the handshake, so whatever can be read
    is the end; without this look the first message after it would vanish without an error."""
    timeout = connection.gettimeout()
    connection.setblocking(False)
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    finally:
        connection.settimeout(timeout)


def _proof(key: bytes, role: bytes, drivers: bytes, workers: bytes) -> bytes:
    return hmac.new(key, role + drivers + workers, hashlib.sha256).digest()


def _read(connection: socket.socket, size: int, deadline: float | None = None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            # Never 0, which would mean "do not wait": what is there already is taken however late this thread runs.
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
        part = connection.recv(min(size - len(data), 1 << 16))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
