"""One line at the bottom of a terminal that is drawn again and again, while other output scrolls by above it.

Runs where a person looks: on the driver, or in the local process. Everything written to this process's ``sys.stdout``
and ``sys.stderr`` meanwhile goes above the line. rich styles the line (see ``bar``); the cursor is moved here, because
rich's own ``Live`` breaks long lines of the person's output, and puts a newline after a prompt.

The cursor stays visible and the terminal's settings are not touched, so a killed run leaves nothing to repair.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, TextIO

_CLEAR = "\r\x1b[2K"  # to the first column, and erase the line


class LiveLine:
    """The line, and the redirection of this process's output around it. Every method may be called by any thread.

    ``lock`` must be re-entrant.
    """

    def __init__(self, stream: TextIO, lock: AbstractContextManager[Any] | None = None) -> None:
        self._stream = stream
        self.lock: AbstractContextManager[Any] = threading.RLock() if lock is None else lock
        self._pid = os.getpid()
        self._line = ""
        self._drawn = False  # the line is on the screen now
        self._partial = False  # the person's output stands at the bottom, without a newline
        self._proxies: list[tuple[str, _Above]] = []
        self._started = False

    def start(self) -> None:
        """Redirect ``sys.stdout`` and ``sys.stderr`` where they are the terminal; nothing is drawn yet."""
        with self.lock:
            if self._started:
                return
            self._started = True
            # The display's stream may be one of another place (a test, a second terminal): then nothing is redirected.
            ours = self._stream in (sys.stdout, sys.stderr)
            for name in ("stdout", "stderr"):
                target = getattr(sys, name)
                if ours and is_terminal(target):
                    proxy = _Above(self, target)
                    self._proxies.append((name, proxy))
                    setattr(sys, name, proxy)

    def stop(self) -> None:
        """Erase the line and give ``sys.stdout`` and ``sys.stderr`` back. OSError where the stream is broken."""
        with self.lock:
            if not self._started:
                return
            try:
                for _, proxy in self._proxies:
                    proxy.flush()
                self._erase()
                self._finish_partial()
                self._stream.flush()
            finally:
                self._started = False
                for name, proxy in self._proxies:
                    proxy.retire()
                    if getattr(sys, name) is proxy:  # else somebody redirected it after us: that is theirs to undo
                        setattr(sys, name, proxy.target)
                self._proxies.clear()
                self._line, self._drawn, self._partial = "", False, False

    def draw(self, line: str) -> None:
        """Show ``line`` (one row of the terminal, ANSI styles allowed) in the place of the one before."""
        with self.lock:
            self._line = line
            if self._started and not self._partial:
                self._stream.write(_CLEAR + line)
                self._stream.flush()
                self._drawn = bool(line)

    def above(self, text: str, target: TextIO | None = None, *, fresh: bool = True) -> None:
        """Write ``text`` as it is above the line.

        Without a newline at its end it stays at the bottom, and the line comes back after the newline. ``fresh``:
        begin on a line of its own, where another text has not ended its own yet.
        """
        if not text:
            return
        with self.lock:
            if fresh:
                self._finish_partial()
            self._partial = not text.endswith("\n")
            back = "" if self._partial or not self._started else self._line
            if target is None or target is self._stream:
                # One write a change: the line does not flicker.
                self._stream.write((_CLEAR if self._drawn else "") + text + back)
            else:
                self._erase()
                self._stream.flush()
                target.write(text)
                target.flush()
                self._stream.write(back)
            self._stream.flush()
            self._drawn = bool(back)

    def is_foreign(self) -> bool:
        """True in a child process (a loader's worker): it must not draw, and its copy of the lock may be held."""
        return os.getpid() != self._pid

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(_CLEAR)
            self._drawn = False

    def _finish_partial(self) -> None:
        if self._partial:
            self._stream.write("\n")
            self._partial = False


class _Above(io.TextIOBase):
    """Stands in for ``sys.stdout`` or ``sys.stderr``: whole lines go above the live line, a rest waits for flush."""

    def __init__(self, live: LiveLine, target: TextIO) -> None:
        self._live = live
        self.target = target
        self._rest = ""
        self._retired = False

    def write(self, text: str) -> int:
        if self._is_direct():
            return self.target.write(text)
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        with self._live.lock:
            lines, newline, self._rest = (self._rest + text).rpartition("\n")
            self._live.above(lines + newline, self.target, fresh=False)
        return len(text)

    def writelines(self, lines: Iterable[Any], /) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._is_direct():
            self.target.flush()
            return
        with self._live.lock:
            rest, self._rest = self._rest, ""
            self._live.above(rest, self.target, fresh=False)

    def retire(self) -> None:
        """Pass everything through from now on: a logging handler may keep this object for good."""
        self._retired = True

    def _is_direct(self) -> bool:
        return self._retired or self._live.is_foreign()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    # io.TextIOBase defines the rest itself, so __getattr__ is not asked for it.
    def fileno(self) -> int:
        return self.target.fileno()

    def isatty(self) -> bool:
        return self.target.isatty()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.target.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.target.errors

    def close(self) -> None:
        """Do nothing: the stream is not ours to close, and the garbage collector calls this."""


def is_terminal(stream: Any) -> bool:
    """True for an open terminal; False for a file, a pipe, a closed stream, or None (a program without a console)."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False
