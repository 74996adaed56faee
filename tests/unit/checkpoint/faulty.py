"""A storage in memory whose every operation can fail, and a clock that nobody waits for."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from raylit.checkpoint.folder import Clock, Folder
from raylit.checkpoint.store import Manifest, Store

_CHANGES = ("create_dir", "delete_dir", "delete_file", "move", "open_output_stream")
_READS = ("get_file_info", "get_file_info_selector", "open_input_stream", "open_input_file")


class Killed(BaseException):
    """The process is gone: nothing after this runs in it."""


class Handler(FSSpecHandler):  # type: ignore[misc]
    """Asks ``fault(operation)`` before each operation, and before each write to a stream; it may raise."""

    def __init__(self, fs: Any, fault: Callable[[str], None]) -> None:
        super().__init__(fs)
        self.fault = fault

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in (*_CHANGES, *_READS):
            return found

        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.fault(name)
            opened = found(*args, **kwargs)
            return opened if name != "open_output_stream" else pyarrow.PythonFile(_Stream(opened, self.fault), mode="w")

        return guarded


class _Stream:
    def __init__(self, stream: Any, fault: Callable[[str], None]) -> None:
        self._stream, self._fault = stream, fault
        self.closed = False

    def write(self, data: Any) -> int:
        self._fault("write")
        self._stream.write(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._stream.close()

    def flush(self) -> None:
        """Nothing is kept back."""

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def readable(self) -> bool:
        return False


@dataclass
class FakeClock:
    """Time passes only while somebody sleeps."""

    now_s: float = 0.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now_s, self.sleep)


@dataclass
class Memory:
    """One storage in memory; ``folder`` reaches it as a process would that meets ``fault``."""

    fs: Any = field(default_factory=lambda: type("Own", (MemoryFileSystem,), {"store": {}, "pseudo_dirs": [""],
                                                                              "cachable": False})())  # fmt: skip
    time: FakeClock = field(default_factory=FakeClock)

    def folder(self, fault: Callable[[str], None] = lambda operation: None) -> Folder:
        return Folder("/run/checkpoints", PyFileSystem(Handler(self.fs, fault)), clock=self.time.clock)

    def store(self, fault: Callable[[str], None] = lambda operation: None) -> Store:
        return Store(self.folder(fault))


def disk_full(operation: str) -> None:
    if operation in ("write", "open_output_stream"):
        raise OSError(errno.ENOSPC, "No space left on device")


def no_permission(operation: str) -> None:
    if operation in _CHANGES:
        raise PermissionError(errno.EACCES, "Permission denied")


@dataclass
class Away:
    """Not to be reached until ``back_at`` on the clock."""

    time: FakeClock
    back_at: float

    def __call__(self, operation: str) -> None:
        if self.time.now_s < self.back_at:
            raise OSError("connection timed out")


@dataclass
class Dies:
    """The process is killed at its operation number ``at``, and does nothing more."""

    at: int
    count: int = 0

    def __call__(self, operation: str) -> None:
        self.count += 1
        if self.count >= self.at:
            raise Killed


def manifest(name: str, step: int, **facts: Any) -> Manifest:
    return Manifest(name, step, step, 0, facts.pop("world_size", 1), **facts)
