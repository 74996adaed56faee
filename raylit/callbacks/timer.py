"""Timer: how long the stages take, and an end to training after a given time. Floor 2, on every worker."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from raylit.callback import Callback
from raylit.config.amounts import duration as parse_duration
from raylit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from raylit.module import Module
    from raylit.view import TrainerView

_STAGES = ("train", "sanity_check", "validate", "test", "predict")


class Timer(Callback):
    """Measure each stage's time, and ask the Trainer to stop after ``duration`` of training.

    ``duration``: ``"DD:HH:MM:SS"``, a timedelta, a dict such as ``{"hours": 2}``, or None: measure alone.
    ``interval``: look at the clock after each ``"step"`` or ``"epoch"``. ``verbose``: print when the time is up.
    With several workers the first whose time is up stops all. The time survives resuming from a checkpoint; a new fit
    begins at 0. ``"train"`` includes the validations in it.
    """

    def __init__(self, duration: str | timedelta | Mapping[str, int] | None = None, interval: str = "step",
                 verbose: bool = True) -> None:  # fmt: skip
        try:
            span = parse_duration("duration", duration)
        except ConfigError as error:  # worded for an argument of the Trainer
            raise ConfigError(str(error).replace("Trainer(", "Timer(", 1)) from None
        if interval not in ("step", "epoch"):
            raise ConfigError(f"Timer(interval={interval!r}): expected 'step' or 'epoch'")
        self._duration_s = None if span is None else span.total_seconds()
        self._interval, self._verbose = interval, verbose
        self._started: dict[str, float] = {}  # of the last pass, on this process's monotonic clock
        self._ended: dict[str, float] = {}
        self._done_s: dict[str, float] = {}  # of finished passes
        self._running: set[str] = set()

    def start_time(self, stage: str = "train") -> float | None:
        """Return when the stage last began, in seconds of ``time.monotonic`` where it ran; None before."""
        return self._started.get(_known(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """Return when the stage last ended, or None."""
        return self._ended.get(_known(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """Return the seconds that the stage took so far: all its passes of this fit, and of the run it goes on from."""
        stage = _known(stage)
        running_s = time.monotonic() - self._started[stage] if stage in self._running else 0.0
        return self._done_s.get(stage, 0.0) + running_s

    def time_remaining(self, stage: str = "train") -> float | None:
        """Return the seconds left of ``duration``; None where there is none."""
        return None if self._duration_s is None else self._duration_s - self.time_elapsed(stage)

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds of each stage."""
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from a checkpoint."""
        self._done_s = dict(state.get("time_elapsed", {}))

    # -- the clock -----------------------------------------------------------------------------------------------
    def _begin(self, stage: str) -> None:
        self._started[stage] = time.monotonic()
        self._ended.pop(stage, None)
        self._running.add(stage)

    def _end(self, stage: str) -> None:
        if stage in self._running:
            self._ended[stage] = time.monotonic()
            self._done_s[stage] = self._done_s.get(stage, 0.0) + self._ended[stage] - self._started[stage]
            self._running.discard(stage)

    def _check(self, trainer: TrainerView, module: Module) -> None:
        if self._duration_s is None or trainer.should_stop or self.time_elapsed() < self._duration_s:
            return
        trainer.should_stop = True
        if self._verbose:
            limit = timedelta(seconds=self._duration_s)
            module.print(f"Timer: {limit} of training are over: asking to stop")

    def on_fit_start(self, trainer: TrainerView, module: Module) -> None:
        self._started, self._ended, self._done_s, self._running = {}, {}, {}, set()

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        self._begin("train")
        self._check(trainer, module)  # a run that goes on may have used up its time

    def on_train_end(self, trainer: TrainerView, module: Module) -> None:
        self._end("train")

    def on_train_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._interval == "step":
            self._check(trainer, module)

    def on_train_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        if self._interval == "epoch":
            self._check(trainer, module)

    def on_validation_start(self, trainer: TrainerView, module: Module) -> None:
        self._begin("sanity_check" if trainer.sanity_checking else "validate")

    def on_validation_end(self, trainer: TrainerView, module: Module) -> None:
        self._end("sanity_check" if trainer.sanity_checking else "validate")

    def on_test_start(self, trainer: TrainerView, module: Module) -> None:
        self._begin("test")

    def on_test_end(self, trainer: TrainerView, module: Module) -> None:
        self._end("test")

    def on_predict_start(self, trainer: TrainerView, module: Module) -> None:
        self._begin("predict")

    def on_predict_end(self, trainer: TrainerView, module: Module) -> None:
        self._end("predict")

    def on_exception(self, trainer: TrainerView, module: Module, exception: BaseException) -> None:
        for stage in tuple(self._running):
            self._end(stage)


def _known(stage: Any) -> str:
    name = str(getattr(stage, "value", stage))
    if name not in _STAGES:
        raise ConfigError(f"Timer knows no stage {name!r}.{nearest(name, _STAGES)} Stages are: {', '.join(_STAGES)}")
    return name
