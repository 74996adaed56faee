"""The words of the terminal: how values, times and lines read. Pure functions; no terminal, no rich."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def format_value(value: Any) -> str:
    """Return a number in four significant digits (``0.1234``, ``12.35``, ``1.2e-05``); anything else as ``str``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-3:
        return f"{value:.3g}"
    if size >= 1000:
        return f"{value:.1f}"
    short = f"{value:.4g}"
    return short if "." in short else short + ".0"


def format_values(values: Mapping[str, Any]) -> str:
    """Return ``loss 0.12  val_acc 0.95``."""
    return "  ".join(f"{name} {format_value(value)}" for name, value in values.items())


def format_seconds(seconds: float) -> str:
    """Return ``4.2 s`` below a minute, else ``1:02`` or ``1:02:03``."""
    return f"{seconds:.1f} s" if seconds < 59.95 else format_clock(seconds)


def format_clock(seconds: float) -> str:
    """Return ``0:07``, ``1:02`` or ``1:02:03``."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_rate(per_second: float) -> str:
    """Return ``45.3 it/s``, or ``2.50 s/it`` below one a second."""
    if per_second >= 1:
        return f"{per_second:.0f} it/s" if per_second >= 100 else f"{per_second:.1f} it/s"
    return f"{1 / per_second:.2f} s/it"


def epoch_name(epoch: int, max_epochs: int | None) -> str:
    """Return ``epoch 3/10`` for epoch 2 (counted from 0) of 10, ``epoch 3`` where there is no limit."""
    return f"epoch {epoch + 1}/{max_epochs}" if max_epochs is not None and max_epochs > 0 else f"epoch {epoch + 1}"


def count(number: int, noun: str, several: str | None = None) -> str:
    """Return ``1 step``, ``2 steps``; ``several`` for nouns that take more than an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {several or noun + 's'}"


def tag(text: str, rank: int) -> str:
    """Return rank 0's text as it is, another rank's with ``[rank 1]`` before each line."""
    if rank == 0:
        return text
    return "\n".join(f"[rank {rank}] {line}" for line in text.split("\n"))
