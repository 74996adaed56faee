"""What a person sees of a search: a table while it runs, lines for a log, the summary at its end. Floor 6; no Ray.

Pure functions of plain rows, so that they can be read and tested without a search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from raylit.hparams import flat
from raylit.plain import plain_entries

_MOST_ROWS = 16
_MOST_COLUMNS = 8  # of hyperparameters
_MOST_METRICS = 4  # the one that is compared by, and others


@dataclass
class Row:
    """One trial as far as it is known."""

    trial: str
    config: dict[str, Any]
    status: str = "pending"  # or "running", "paused", "done", "stopped", "failed"
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""  # of a failure, one line


@dataclass(frozen=True)
class Goal:
    """What is looked for; ``metric`` None: nothing is compared."""

    metric: str | None = None
    mode: str = "min"

    def value(self, row: Row) -> float | None:
        """The row's last value of the metric; None where there is none, or it is no number."""
        value = None if self.metric is None else row.metrics.get(self.metric)
        return None if value is None or math.isnan(value) else value

    def best(self, rows: Sequence[Row]) -> Row | None:
        """The row with the best last value, of those that did not fail; of equal ones the first."""
        known = [None if row.status == "failed" else self.value(row) for row in rows]
        ranked = [(value if self.mode == "min" else -value, index) for index, value in enumerate(known)
                  if value is not None]  # fmt: skip
        return rows[min(ranked)[1]] if ranked else None


def number(value: Any) -> str:
    """A hyperparameter or metric as tables show it: four digits that count."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def varied(rows: Sequence[Row]) -> list[str]:
    """The keys that differ between trials, in the order of the space; all of them for a single trial."""
    keys = list(dict.fromkeys(key for row in rows for key in flat(row.config)))
    seen = {key: {repr(flat(row.config).get(key)) for row in rows} for key in keys}
    differ = [key for key in keys if len(seen[key]) > 1]
    return differ if len(rows) > 1 else keys


def eta_s(rows: Sequence[Row], total: int | None) -> float | None:
    """Seconds until the search ends, from what finished trials took; None while nothing is known."""
    ended = [row for row in rows if row.status in ("done", "stopped", "failed")]
    if not ended or total is None:
        return None
    at_once = max(1, sum(row.status == "running" for row in rows))
    mean = sum(row.seconds for row in ended) / len(ended)
    left = sum(max(mean - row.seconds, 0.0) for row in rows if row.status in ("running", "paused"))
    left += mean * max(total - len(rows) + sum(row.status == "pending" for row in rows), 0)
    return left / at_once


def clock(seconds: float) -> str:
    """A duration as people write it."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def title(rows: Sequence[Row], goal: Goal, total: int | None) -> str:
    """How far the search is, in one line."""
    counts = {status: sum(row.status == status for row in rows)
              for status in ("running", "paused", "done", "stopped", "failed")}  # fmt: skip
    of = f" of {total}" if total is not None else ""
    parts = [f"{counts['done'] + counts['stopped'] + counts['failed']}{of} trials ended"]
    parts += [f"{count} {status}" for status, count in counts.items() if count and status != "done"]
    best = goal.best(rows)
    if best is not None:
        parts.append(f"best {goal.metric} {number(goal.value(best))} ({best.trial})")
    left = eta_s(rows, total)
    if left is not None and counts["running"]:
        parts.append(f"about {clock(left)} left")
    return ", ".join(parts)


def shown_metrics(rows: Sequence[Row], goal: Goal, others: Sequence[str] = ()) -> list[str]:
    """Columns of metrics: the one that is compared by, ``others``, then those that trials log, validation's first."""
    logged = dict.fromkeys(name for row in rows for name in row.metrics if not name.endswith(("_step", "_epoch")))
    rest = sorted(logged, key=lambda name: not name.startswith("val"))
    return [name for name in dict.fromkeys([goal.metric, *others, *rest]) if name is not None][:_MOST_METRICS]


def table(rows: Sequence[Row], goal: Goal, total: int | None, others: Sequence[str] = ()) -> Group:
    """How far the search is, and the trials: those that run, then the best. ``others``: metrics to show first."""
    shown = Table(box=None, pad_edge=False)
    keys = varied(rows)[:_MOST_COLUMNS]
    metrics = shown_metrics(rows, goal, others)
    for name in ("trial", "status", *keys, "epoch", *metrics, "time"):
        shown.add_column(name, justify="left" if name in ("trial", "status") else "right", no_wrap=True)
    best = goal.best(rows)
    for row in ordered(rows, goal)[:_MOST_ROWS]:
        config = flat(row.config)
        values = [number(config[key]) if key in config else "" for key in keys]
        numbers = [number(row.metrics[name]) if name in row.metrics else "" for name in metrics]
        style = "bold green" if row is best else "red" if row.status == "failed" else ""
        shown.add_row(row.trial, row.status, *values, str(row.epoch), *numbers, clock(row.seconds), style=style)
    return Group(Text(title(rows, goal, total), no_wrap=True, overflow="ellipsis"), shown)


def ordered(rows: Sequence[Row], goal: Goal) -> list[Row]:
    """Those that run first, then by their last value, the failed ones last."""

    def key(row: Row) -> tuple[int, float]:
        value = goal.value(row)
        rank = 0 if row.status == "running" else 2 if row.status == "failed" else 1
        return rank, math.inf if value is None else value if goal.mode == "min" else -value

    return sorted(rows, key=key)


def line(row: Row, goal: Goal, keys: Sequence[str]) -> str:
    """A trial that has ended, in one line."""
    config = flat(row.config)
    given = "  ".join(f"{key}={number(config[key])}" for key in keys if key in config)
    value = goal.value(row)
    told = row.reason if row.status == "failed" else f"{goal.metric} {number(value)}" if value is not None else ""
    return "  ".join(part for part in (f"trial {row.trial} {row.status}", given, f"epoch {row.epoch}", told,
                                       clock(row.seconds)) if part)  # fmt: skip


def summary(rows: Sequence[Row], goal: Goal, module: str, path: str) -> str:
    """What came of the search: the best trial's hyperparameters ready to paste, and what failed."""
    lines = []
    best = goal.best(rows)
    failed = [row for row in rows if row.status == "failed"]
    if best is not None:
        config = {**best.config, **plain_entries(best.config)[0]}  # searchers draw NumPy's numbers
        own = {key: value for key, value in config.items() if "." not in key}
        others = {key: value for key, value in config.items() if "." in key}
        lines.append(f"best of {len(rows)} trials: {best.trial}, {goal.metric} {number(goal.value(best))} "
                     f"after {best.epoch} epoch{'s' * (best.epoch != 1)}")  # fmt: skip
        lines.append(f"  {module}({', '.join(f'{key}={value!r}' for key, value in own.items())})")
        lines += [f"  {key}={value!r}" for key, value in others.items()]
    if failed:
        lines.append(f"{len(failed)} trial{'s' * (len(failed) != 1)} failed:")
        lines += [f"  {row.trial}: {row.reason}" for row in failed[:5]]
        if len(failed) > 5:
            lines.append(f"  and {len(failed) - 5} more")
    lines.append(f"search folder: {path}")
    return "\n".join(lines)
