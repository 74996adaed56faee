"""The progress bar's one line, from what is known of the run to a string for the terminal. Runs where a person looks.

rich is imported here, and only when a bar is first drawn: that is after the first step.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from raylit.display.text import format_clock, format_rate, format_value

_BAR_CELLS = 24
_NAMES = {"validation": "validation", "test": "test", "predict": "predict", "sanity": "sanity check"}


@dataclass(frozen=True)
class BarState:
    """What the bar shows: one loop that runs."""

    loop: str
    epoch_name: str | None  # "epoch 3/10"; None outside fit
    batch: int
    total: int | None
    rate: float | None  # batches a second
    values: Mapping[str, Any] = field(default_factory=dict)


class BarPainter:
    """Turns a BarState into one styled row, never wider than the terminal."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._stream = stream
        # rich decides on colours here (NO_COLOR, TERM); the width is read at each draw, since it changes. It is not
        # given the stream: on a broken pipe it would end the process.
        self._console = Console(file=io.StringIO(), force_terminal=True, legacy_windows=False, highlight=False)
        encoding = (getattr(stream, "encoding", None) or "ascii").lower()
        self._full, self._empty = ("━", "─") if encoding.startswith("utf") else ("#", ".")

    def paint(self, state: BarState) -> str:
        """Return the row with its styles. The last column stays free: a full row makes some terminals wrap."""
        from rich.text import Text

        width = max(self._width() - 1, 1)
        row = Text(no_wrap=True, end="")
        name = _NAMES.get(state.loop)
        for part in (state.epoch_name, name):
            if part:
                row.append(part + "  ", style="bold" if part is state.epoch_name or not state.epoch_name else "cyan")
        if state.total:
            cells = min(_BAR_CELLS, max(width // 5, 4))
            done = min(cells * state.batch // state.total, cells)
            row.append(self._full * done, style="cyan" if name and state.epoch_name else "green")
            row.append(self._empty * (cells - done), style="bright_black")
            row.append(f"  {state.batch}/{state.total}")
        else:
            row.append(f"{state.batch} batches")
        if state.rate:
            row.append(f"  {format_rate(state.rate)}", style="bright_black")
            if state.total and state.total > state.batch:
                row.append(f"  {format_clock((state.total - state.batch) / state.rate)} left", style="bright_black")
        for key, value in state.values.items():
            row.append(f"  {key} ", style="bright_black")
            row.append(format_value(value))
        row.truncate(width, overflow="ellipsis" if self._full != "#" else "crop")
        with self._console.capture() as captured:
            self._console.print(row, end="", soft_wrap=True)
        return captured.get()

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError, AttributeError):
            return self._console.width
