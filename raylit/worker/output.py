"""Where a run's numbers go: loggers, history, run folder, display. Floor 4; on a worker or in the local process.

Rank 0 keeps and shows; the other ranks have an output too, so that the engine needs no question, but it does nothing.
Values are read off the device late: a row logged now is written when it is there (``metrics/snapshot.py``).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from raylit.metrics.history import History
from raylit.metrics.snapshot import Snapshot
from raylit.stage import Loop, Stage
from raylit.view import RunState
from raylit.worker.history_file import HistoryFile

Send = Callable[[dict[str, Any]], None]
_REFRESH_S = 0.25  # seconds between two progress events


class RunOutput:
    """Implements ``engine.parts.Output``. ``send`` takes display events; ``bar_items`` gives what the bar shows."""

    def __init__(self, state: RunState, *, send: Send | None, loggers: Sequence[Any], history: History | None,
                 show_progress: bool, bar_items: Callable[[], Mapping[str, Any]],
                 bar_every: int = 1) -> None:  # fmt: skip
        first = state.world.global_rank == 0
        self._send = send if first else None
        self._loggers = list(loggers) if first else []
        self._history = history if first else None
        self._bar_items, self._bar_every = bar_items, bar_every
        # Every rank steps through the same log points, since reducing step values is a collective.
        self.wants_steps = True
        self.refresh_s = _REFRESH_S if first and send is not None and show_progress else math.inf
        self._waiting: deque[tuple[int, Snapshot]] = deque()
        self._shown: Snapshot | None = None  # the bar's values as of the last refresh
        self._texts: dict[str, str] = {}
        self._epoch_started = time.perf_counter()
        self._file: HistoryFile | None = None
        if self._history is not None and state.log_dir is not None:
            self._file = HistoryFile(self._history, state.log_dir)

    # -- display -------------------------------------------------------------------------------------------------
    def stage_start(self, state: RunState) -> None:
        """A stage begins."""
        stage = state.stage.value if state.stage else ""
        event: dict[str, Any] = {"kind": "stage_start", "stage": stage, "num_workers": state.world.world_size}
        if state.stage is Stage.FIT:
            event["max_epochs"] = state.max_epochs
        self._event(event)

    def epoch_start(self, state: RunState, total: int | None) -> None:
        """A training epoch begins."""
        self._epoch_started = time.perf_counter()
        self._event({"kind": "epoch_start", "epoch": state.epoch, "total_batches": total})

    def progress(self, state: RunState, batches_done: int, total: int | None, loss: Tensor | None) -> None:
        """Show how far the loop is, with the values of one refresh ago: these can be read without a wait."""
        known = self._shown.read() if self._shown is not None and self._shown.ready() else {}
        if self._shown is None or known:
            self._shown = Snapshot(self._numbers())
        values = {**known, **self._texts}
        loop = state.loop.value if state.loop else "train"
        if batches_done != total:
            batches_done -= batches_done % self._bar_every
        self._event({"kind": "progress", "loop": loop, "epoch": state.epoch, "batch": batches_done, "total": total,
                     "values": _finite(values)})  # fmt: skip

    def _numbers(self) -> dict[str, Tensor | float]:
        numbers: dict[str, Tensor | float] = {}
        self._texts = {}
        for name, value in self._bar_items().items():
            if isinstance(value, Tensor) and value.numel() == 1:
                numbers[name] = value.detach().reshape(())
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers[name] = float(value)
            else:
                self._texts[name] = str(value)
        return numbers

    def loop_end(self, state: RunState, loop: Loop, metrics: Mapping[str, Tensor]) -> None:
        """A loop is done: the display's line of it."""
        if self._send is None or loop is Loop.SANITY:
            return
        values = _finite({name: float(value) for name, value in metrics.items()})
        if loop is Loop.TRAIN:
            merged = {name: float(value) for name, value in state.callback_metrics.items() if value.numel() == 1}
            shown = _once({**merged, **values})
            self._event({"kind": "epoch_end", "epoch": state.epoch, "values": _finite(shown),
                         "seconds": time.perf_counter() - self._epoch_started, "batches": state.batch_idx + 1,
                         "global_step": state.global_step})  # fmt: skip
            return
        event: dict[str, Any] = {"kind": "loop_end", "loop": loop.value, "values": values}
        inside = state.loop is Loop.TRAIN and state.batch_idx + 1 != state.num_training_batches
        if inside:
            event["batch"] = state.batch_idx + 1
        if state.loop is not Loop.TRAIN or inside:
            self._event(event)

    def print(self, text: str) -> None:
        """The person's own words, from rank 0."""
        if self._send is None:
            print(text, end="")
        else:
            self._event({"kind": "print", "rank": 0, "text": text.removesuffix("\n"), "stream": "stdout"})

    def note(self, text: str) -> None:
        """One line of information."""
        self._event({"kind": "note", "text": text})

    def _event(self, event: dict[str, Any]) -> None:
        if self._send is not None:
            self._send(event)

    # -- loggers and history -------------------------------------------------------------------------------------
    def step_metrics(self, state: RunState, metrics: Mapping[str, Tensor]) -> None:
        """Keep the step's values."""
        self._keep(state, metrics)

    def epoch_metrics(self, state: RunState, metrics: Mapping[str, Tensor], bar: Mapping[str, Tensor]) -> None:
        """Keep an epoch's values, and write everything that waits."""
        self._keep(state, metrics)
        self._drain(wait=True)
        for logger in self._loggers:
            logger.save()

    def _keep(self, state: RunState, metrics: Mapping[str, Tensor]) -> None:
        if not metrics or state.world.global_rank != 0:
            return
        snapshot = Snapshot(metrics)
        if self._history is not None:
            self._history.append(state.epoch, state.global_step, snapshot)
            if self._file is not None:
                self._file.follow()
        if self._loggers:
            self._waiting.append((state.global_step, snapshot))
            self._drain(wait=False)

    def _drain(self, wait: bool) -> None:
        # One row is left waiting while training goes on: on a GPU its values are not there yet.
        while self._waiting and (wait or (len(self._waiting) > 1 and self._waiting[0][1].ready())):
            step, snapshot = self._waiting.popleft()
            values = snapshot.read()
            for logger in self._loggers:
                logger.log_metrics(values, step)

    def flush(self) -> None:
        """Write what waits; at the end of a stage, also after an exception."""
        try:
            self._drain(wait=True)
            for logger in self._loggers:
                logger.save()
        finally:  # whatever a logger's library or server does
            if self._file is not None:
                self._file.close()

    def finalize(self, status: str) -> None:
        """Close the loggers."""
        for logger in self._loggers:
            logger.finalize(status)


def _once(values: Mapping[str, float]) -> dict[str, float]:
    """Leave out a key's other names: logged both ways, ``loss`` is also ``loss_epoch`` and ``loss_step``."""
    return {
        name: value
        for name, value in values.items()
        if not any(name.endswith(end) and name.removesuffix(end) in values for end in ("_epoch", "_step"))
    }


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no nan and no inf: they travel as text."""
    return {
        name: value if not isinstance(value, float) or math.isfinite(value) else str(value)
        for name, value in values.items()
    }
