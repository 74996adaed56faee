"""A trial as Ray Tune runs it: a class trainable around ``TrialRun``. Floor 6; in Tune's actors.

A trial of one worker runs in Tune's own actor. One of several workers has an actor for each, in the placement group
that Tune has reserved for the trial: all of it is there before the trial begins, so that no trial waits for another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import cloudpickle

from raylit.search.trial import Report, Saved, TrialRun, TrialSpec
from raylit.wire import Job, World
from raylit.worker.entry import take_callers_place


class TrialSteps:
    """What Tune calls of a trainable. The actor is used for one trial after the other."""

    trial_id: str  # Tune's

    def setup(self, config: dict[str, Any], payload: bytes, place: Job, storage: str) -> None:
        """``payload``: a ``TrialSpec``. ``place``: of the caller's process. ``storage``: the search's folder."""
        take_callers_place(place)
        self._spec: TrialSpec = cloudpickle.loads(payload)
        self._place, self._folder = place, storage
        self._group: Any = None
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self._config = dict(config)
        self._saved: Saved | None = None
        self._run: Any = None

    def step(self) -> dict[str, Any]:
        """Train to the next report: its numbers, ``epoch`` (finished ones), ``step`` (of optimizers), ``finished``."""
        if self._run is None:
            self._run = self._started()
        report: Report = self._run.next()
        ends = {"done": report.done, "finished": report.done}  # Tune sets the first itself where it stops a trial
        return {**report.metrics, "epoch": report.epoch, "step": report.step, **ends}

    def _started(self) -> Any:
        folder = f"{self._folder.rstrip('/')}/{self.trial_id}"
        if self._spec.workers == 1:
            return TrialRun(self._spec, self._config, World(), folder, self._saved)
        from raylit.search.group import TrialGroup

        if self._group is None or not self._group.alive:
            self._group = TrialGroup(self._spec, self._place)
        self._group.begin(self._config, folder, self._saved)
        return self._group

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the state at the last report."""
        if self._run is not None:
            self._run.save(checkpoint_dir)
        elif self._saved is not None:  # cloned or restored, and not gone on yet
            TrialRun(self._spec, self._config, saved=self._saved).save(checkpoint_dir)

    def load_checkpoint(self, checkpoint: str) -> None:
        """Go on from a checkpoint's folder, with this trial's own configuration."""
        self._end()
        self._saved = Saved.of(checkpoint) if os.listdir(checkpoint) else None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, in the process of the one before."""
        self._end()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """End the fit; its loggers are closed."""
        self._end()
        if self._group is not None:
            self._group.kill()

    def _end(self) -> None:
        if self._run is not None:
            self._run.stop()
            self._run = None


def trainable(asked: Mapping[str, float], workers: int, **given: Any) -> Any:
    """Tune's trainable, with what a trial takes and what every ``setup`` is ``given``."""
    from ray import tune

    made = type("RaylitTrial", (TrialSteps, tune.Trainable), {"__doc__": TrialSteps.__doc__})
    return tune.with_resources(tune.with_parameters(made, **given), resources(asked, workers))


def resources(asked: Mapping[str, float], workers: int) -> Any:
    """What a trial takes: of several workers a bundle for each, and none for Tune's own actor."""
    from ray import tune

    if workers <= 1:
        return dict(asked)
    return tune.PlacementGroupFactory([{}, *[dict(asked)] * workers], strategy="PACK")
