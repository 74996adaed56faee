"""A search's table in the terminal, kept up to date by what Tune calls. Floor 6, on the driver."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import cloudpickle
from rich.console import Console
from rich.live import Live

from raylit.driver import cluster
from raylit.driver.shipping import lacking
from raylit.driver.verdict import account_of
from raylit.goal import BESIDE_METRICS
from raylit.search.listening import Listener
from raylit.search.table import Goal, Row, line, table, varied


class SearchDisplay(Listener):
    """Rows of all trials; a live table where somebody looks at a terminal, else a line for each trial that ends."""

    def __init__(self, goal: Goal, total: int | None, others: tuple[str, ...] = (), enabled: bool = True) -> None:
        self.goal, self.total = goal, total
        self.rows: dict[str, Row] = {}
        self._others, self._enabled = others, enabled
        self._live: Live | None = None
        self._began: dict[str, float] = {}

    def __enter__(self) -> SearchDisplay:
        super().__enter__()
        if self._enabled and sys.stderr.isatty():
            self._live = Live(console=Console(stderr=True), refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        if self._live is not None:
            self._live.stop()
            self._live = None

    # -- called by Tune ------------------------------------------------------------------------------------------
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._take_up(trials)
        self._row(trial).status = "running"
        self._began.setdefault(trial.trial_id, time.monotonic())
        self._draw()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        row = self._row(trial)
        row.status = "running"
        _fill(row, result)
        self._draw()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self._row(trial)
        row.status = "done" if (trial.last_result or {}).get("finished") else "stopped"
        self._ended(row)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self._row(trial)
        row.status, row.reason = "failed", reason_of(trial)
        self._ended(row)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self._take_up(trials)  # where nothing was left to do

    # -- showing -------------------------------------------------------------------------------------------------
    def _take_up(self, trials: list[Any]) -> None:
        """Rows of trials that had ended before this process took the search up."""
        for trial in trials:
            if trial.trial_id in self.rows or trial.status not in ("TERMINATED", "ERROR"):
                continue
            row, last = self._row(trial), trial.last_result or {}
            _fill(row, last)
            row.status = "failed" if trial.status == "ERROR" else "done" if last.get("finished") else "stopped"
            row.reason = reason_of(trial) if row.status == "failed" else ""

    def _row(self, trial: Any) -> Row:
        row = self.rows.setdefault(trial.trial_id, Row(trial.trial_id, dict(trial.config)))
        row.config = dict(trial.config)  # PBT changes it
        return row

    def _ended(self, row: Row) -> None:
        if self._enabled and self._live is None:
            print(line(row, self.goal, varied(list(self.rows.values()))), flush=True)
        self._draw()

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(table(list(self.rows.values()), self.goal, self.total, self._others))


def _fill(row: Row, result: Mapping[str, Any]) -> None:
    """A row's numbers from a report."""
    row.epoch = int(result.get("epoch", row.epoch))
    row.metrics = {name: float(value) for name, value in result.items()
                   if isinstance(value, (int, float)) and name not in BESIDE_METRICS}  # fmt: skip
    row.seconds = float(result.get("time_total_s", row.seconds))


def reason_of(trial: Any) -> str:
    """Why a trial failed: the exception's type and first line, as Tune has just written it down."""
    try:
        with open(trial.pickled_error_file, "rb") as file:
            return worded(cloudpickle.load(file), (trial.last_result or {}).get("node_ip", ""))
    except (OSError, TypeError):  # none was written: the trial's process is gone
        return "its process ended"


def worded(error: BaseException, host: str = "") -> str:
    """An exception of a trial in one line; Ray's own is taken off. ``host``: the trial's, as far as it is known."""
    from ray.exceptions import RayActorError

    cause = getattr(error, "cause", None) or error
    if isinstance(cause, RayActorError):  # the process said nothing: Ray tells what it saw of its end
        return f"its process{' on ' if host else ''}{host} was lost: {account_of(cause)}"
    told = lacking(cause, host, cluster.shipped()) or str(cause)
    lines = [line for line in told.strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
