"""The terminal: a bar and lines where a person looks, plain lines elsewhere. Driver or local process.

It draws and nothing else, and what goes wrong here never reaches the run: a broken stream (the reader of a pipe has
gone) ends the drawing, an event that cannot be shown is left out, a bar that cannot be drawn gives way to plain lines.
The reason is logged at debug level.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from raylit.display import text
from raylit.display.bar import BarPainter, BarState
from raylit.display.live import LiveLine, is_terminal

_REDRAW_S = 0.1  # at most ten rows a second; one costs about 0.1 ms of this process
_QUIET_START_S = 1.0  # a sanity check shorter than this has no bar: loading rich would hold up the first step
_log = logging.getLogger(__name__)


class TerminalDisplay:
    """A ``ports.Display`` for a terminal, a file or a pipe; ``event`` may be called by any thread.

    In a terminal: one live bar at the bottom, and above it everything else, this process's own prints too. Elsewhere:
    one plain line an epoch. ``enabled=False`` leaves out the bar and the lines on epochs and results; a person's
    prints, warnings, notes and the summary still come. ``stream`` is ``sys.stdout``, as it is when a run starts,
    unless another is given; then everything goes there.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._enabled = enabled
        self._given = stream
        self._lock = threading.RLock()
        self._dead = False
        self._live: LiveLine | None = None
        self._drawers: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "fit_start": self._start, "stage_start": self._start, "summary": self._note, "note": self._note,
            "epoch_start": self._epoch_start, "progress": self._progress, "epoch_end": self._epoch_end,
            "loop_end": self._loop_end, "print": self._print, "warning": self._warning, "end": self._end,
        }  # fmt: skip
        self._begin(sys.stdout if stream is None else stream)

    def event(self, event: Mapping[str, Any]) -> None:
        """Show one event; a kind that is not known is left out. Never raises."""
        if self._dead:
            return
        with self._lock:
            try:
                drawer = self._drawers.get(event["kind"])
                if drawer is not None:
                    drawer(event)
            except Exception as error:
                if isinstance(error, OSError) or getattr(self._stream, "closed", False):
                    self._give_up(error)
                else:
                    _log.debug("event %r could not be shown: %r", event, error)

    def close(self) -> None:
        """Take the bar away and give the process's streams back; the next event starts anew."""
        with self._lock:
            live, self._live = self._live, None
            if live is None:
                return
            atexit.unregister(self.close)
            try:
                live.stop()
            except Exception as error:
                self._give_up(error)

    # -- the events ----------------------------------------------------------------------------------------------
    def _begin(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar = self._enabled and is_terminal(stream) and os.environ.get("TERM") != "dumb"
        self._painter: BarPainter | None = None
        self._stage = "fit"
        self._max_epochs: int | None = None
        self._epoch: int | None = None
        self._epoch_batches: int | None = None
        self._train = BarState("train", None, 0, None, None)
        self._began_at = time.monotonic()
        self._drawn_at = 0.0
        self._meter: tuple[str, int, float] | None = None  # loop, batch and time since when the rate is measured
        self._seen_batches: dict[str, int] = {}
        self._warned: set[str] = set()

    def _start(self, event: Mapping[str, Any]) -> None:
        self.close()
        self._begin(sys.stdout if self._given is None else self._given)
        self._stage = str(event.get("stage", "fit"))
        self._max_epochs = event.get("max_epochs")
        workers = event.get("num_workers") or 0
        if self._enabled and workers > 1:
            self._say(f"{self._stage} on {text.count(workers, 'worker')}")

    def _note(self, event: Mapping[str, Any]) -> None:
        self._say(event["text"])

    def _epoch_start(self, event: Mapping[str, Any]) -> None:
        self._epoch, self._epoch_batches = event["epoch"], event.get("total_batches")
        self._meter = None
        self._train = BarState("train", self._epoch_name(), 0, self._epoch_batches, None, self._train.values)

    def _progress(self, event: Mapping[str, Any]) -> None:
        loop, batch = event["loop"], event["batch"]
        self._seen_batches[loop] = batch
        if self._epoch is None and self._stage == "fit":
            self._epoch = event["epoch"]
        total, now = event.get("total"), time.monotonic()
        state = BarState(
            loop, self._epoch_name(), batch, total, self._rate(event, now), dict(event.get("values") or {})
        )
        if loop == "train":
            self._train, self._epoch = state, event["epoch"]
        elif self._stage == "fit" and not state.values:
            state = BarState(loop, state.epoch_name, batch, total, state.rate, self._train.values)
        if loop == "sanity" and self._live is None and now - self._began_at < _QUIET_START_S:
            return
        if now - self._drawn_at >= _REDRAW_S or batch == total:
            self._draw(state, now)

    def _epoch_end(self, event: Mapping[str, Any]) -> None:
        self._epoch = event["epoch"]
        batches = event.get("batches", self._seen_batches.get("train", self._epoch_batches))
        self._result([
            text.epoch_name(event["epoch"], self._max_epochs),
            "" if batches is None else text.count(batches, "step"),
            text.format_values(event.get("values") or {}),
            text.format_seconds(event["seconds"]),
        ])  # fmt: skip

    def _loop_end(self, event: Mapping[str, Any]) -> None:
        loop, values = event["loop"], text.format_values(event.get("values") or {})
        batches = self._seen_batches.pop(loop, None)
        if self._stage != "fit":
            if values or batches is not None:  # a bare "predict" says nothing
                self._result([loop, "" if batches is None else text.count(batches, "batch", "batches"), values])
        elif loop == "validation" and event.get("batch") is not None and values:
            self._result([self._epoch_name() or "", f"step {event['batch']}", values])
        self._meter = None
        if self._live is not None and self._stage == "fit":
            self._draw(self._train, time.monotonic())

    def _print(self, event: Mapping[str, Any]) -> None:
        self._say(text.tag(_without_newline(event["text"]), event.get("rank") or 0), self._target(event.get("stream")))

    def _warning(self, event: Mapping[str, Any]) -> None:
        words = _without_newline(event["text"])
        if words not in self._warned:
            self._warned.add(words)
            self._say(text.tag(f"warning: {words}", event.get("rank") or 0), self._target("stderr"))

    def _end(self, event: Mapping[str, Any]) -> None:
        self.close()

    # -- drawing -------------------------------------------------------------------------------------------------
    def _epoch_name(self) -> str | None:
        if self._stage != "fit" or self._epoch is None:
            return None
        return text.epoch_name(self._epoch, self._max_epochs)

    def _rate(self, event: Mapping[str, Any], now: float) -> float | None:
        """Batches a second: as given, else measured since this loop's first event (validation stops the clock)."""
        if event.get("steps_per_second"):
            return float(event["steps_per_second"])
        loop, batch = event["loop"], event["batch"]
        if self._meter is None or self._meter[0] != loop or self._meter[1] > batch:
            self._meter = (loop, batch, now)
        _, first, since = self._meter
        return (batch - first) / (now - since) if batch > first and now > since else None

    def _draw(self, state: BarState, now: float) -> None:
        if not self._bar:
            return
        self._drawn_at = now
        try:
            if self._painter is None:
                self._painter = BarPainter(self._stream)
            row = self._painter.paint(state)
        except Exception as error:  # rich is missing, or does not know this terminal
            self._bar = False
            _log.debug("no progress bar: %r", error)
            self.close()
            return
        if self._live is None:
            self._live = LiveLine(self._stream, self._lock)
            self._live.start()
            # A script that ends without an "end" event (sys.exit in a hook) leaves a clean last line all the same.
            atexit.register(self.close)
        self._live.draw(row)

    def _result(self, parts: list[str]) -> None:
        if self._enabled:
            self._say("  ".join(part for part in parts if part))

    def _say(self, words: str, target: TextIO | None = None) -> None:
        target = self._stream if target is None else target
        words = _encodable(words, target)
        if self._live is not None:
            self._live.above(words + "\n", target)
        else:
            target.write(words + "\n")
            target.flush()

    def _target(self, name: str | None) -> TextIO:
        """Return where a person's output to ``name`` goes; under a bar, the stream behind our stand-in."""
        if self._given is not None or name != "stderr":
            return self._stream
        stream = sys.stderr
        return getattr(stream, "target", stream) if self._live is not None else stream

    def _give_up(self, error: Exception) -> None:
        self._dead = True
        _log.debug("the terminal display stopped: %s: %s", type(error).__name__, error)
        self.close()


def _encodable(words: str, target: TextIO) -> str:
    """Return the words with what the target cannot write (an "é" where LANG=C) as backslash escapes."""
    encoding = getattr(target, "encoding", None) or "utf-8"
    return words.encode(encoding, "backslashreplace").decode(encoding)


def _without_newline(words: Any) -> str:
    return str(words).removesuffix("\n")
