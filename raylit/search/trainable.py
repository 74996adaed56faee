"""A trial as Ray Tune runs it: a class trainable around ``TrialRun``. Floor 6; in Tune's actors.

A trial of one worker runs in Tune's own actor. One of several workers has an actor for each, in the placement group
that Tune has reserved for the trial: all of it is there before the trial begins, so that no trial waits for another.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle

from raylit.search.trial import Report, Saved, TrialRun, TrialSpec
from raylit.wire import Job, World
from raylit.worker.entry import take_callers_place

REPORTS_FILE = "reports.json"  # in a checkpoint: how many reports there were; of the last one the step, and if it ended


class TrialSteps:
    """What Tune calls of a trainable. The actor is used for one trial after the other."""

    logdir: str  # Tune's: on this machine, called as the trial's folder in the search's

    def setup(self, config: dict[str, Any], payload: bytes, place: Job, storage: str) -> None:
        """``payload``: a ``TrialSpec``. ``place``: of the caller's process. ``storage``: the search's folder."""
        take_callers_place(place)
        self._spec: TrialSpec = cloudpickle.loads(payload)
        self._place, self._folder = place, storage
        self._group: Any = None
        self._before: Any = None  # the run of the trial before, as long as it has not ended
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self._config = dict(config)
        self._saved: Saved | None = None
        self._run: Any = None
        self._reports, self._step = 0, 0
        self._ended = False  # the last report was that of the fit's end

    def step(self) -> dict[str, Any]:
        """Train to the next report: its numbers, ``epoch`` (finished ones), ``step`` (of optimizers), ``finished``."""
        if self._run is None:
            self._run = self._started()
        report: Report = self._run.next()
        # A fit that goes on from its end is there at once, and tells again what was counted: a driver was killed before
        # Tune had written the end down.
        again = self._ended and report.done and report.step == self._step
        self._reports, self._step, self._ended = self._reports + (not again), report.step, report.done
        ends = {"done": report.done, "finished": report.done}  # Tune sets the first itself where it stops a trial
        told = {"epoch": report.epoch, "step": report.step, "training_iteration": self._reports}
        return {**report.metrics, **told, **ends}

    @property
    def _folder_name(self) -> str:
        """The trial's folder: its id, or another name where Tune has found that taken. This is so where a driver was
        killed when the trial had begun and Tune had not yet written that down: it begins again, in a new folder."""
        return os.path.basename(self.logdir)

    def _started(self) -> Any:
        self._end_the_one_before()
        folder = f"{self._folder.rstrip('/')}/{self._folder_name}"
        if self._spec.workers == 1:
            return TrialRun(self._spec, self._config, World(), folder, self._saved)
        from ray.exceptions import RayActorError

        from raylit.search.group import TrialGroup

        for again in (False, True):
            if self._group is None or not self._group.alive:
                self._group = TrialGroup(self._spec, self._place)
            try:
                self._group.begin(self._config, folder, self._saved)
                break
            except RayActorError:  # one has died since the trial before, which this one has not to answer for
                self._group.kill()
                if again:
                    raise
        return self._group

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the state at the last report."""
        if self._run is not None:
            self._run.save(checkpoint_dir)
        elif self._saved is not None:  # cloned or restored, and not gone on yet
            TrialRun(self._spec, self._config, saved=self._saved).save(checkpoint_dir)
        else:
            return
        told = {"reports": self._reports, "step": self._step, "ended": int(self._ended)}
        Path(checkpoint_dir, REPORTS_FILE).write_text(json.dumps(told))

    def load_checkpoint(self, checkpoint: str) -> None:
        """Go on from a checkpoint's folder, with this trial's own configuration."""
        self._end()
        self._saved = Saved.of(checkpoint) if os.listdir(checkpoint) else None
        told = _reports_of(checkpoint) if self._saved is not None else {"reports": 0, "step": 0}
        self._reports, self._step, self._ended = told["reports"], told["step"], bool(told.get("ended"))

    def restore(self, checkpoint_path: Any) -> None:
        """What Tune calls, with what ``save`` returned; it calls ``load_checkpoint``.

        There may be a newer one, and this one gone: Tune removes a trial's last checkpoint when it has the next, writes
        down afterwards which one is there, and may be killed in between.
        """
        checkpoint = getattr(checkpoint_path, "checkpoint", checkpoint_path)
        if not isinstance(checkpoint, str):
            own = os.path.basename(os.path.dirname(checkpoint.path)) == self._folder_name  # and not a donor's
            if own or not _exists(checkpoint):
                checkpoint_path = next(_newer(checkpoint, self._spec.workers), checkpoint_path)
        super().restore(checkpoint_path)  # type: ignore[misc]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, in the process of the one before.

        That one ends when this one takes its first step, which its end may delay, and its process with it. Tune counts
        a step that fails as one of the failures that a trial may have; after a failure here it tries no more.
        """
        self._before, self._run = self._run or self._before, None
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """End the fit; its loggers are closed."""
        self._end()
        self._end_the_one_before()
        if self._group is not None:
            self._group.kill()

    def _end_the_one_before(self) -> None:
        if self._before is not None:
            self._before.stop()
            self._before = None

    def _end(self) -> None:
        if self._run is not None:
            self._run.stop()
            self._run = None


def _reports_of(folder: str) -> dict[str, int]:
    return {name: int(value) for name, value in json.loads(Path(folder, REPORTS_FILE).read_text()).items()}


def _exists(checkpoint: Any) -> bool:
    import pyarrow.fs

    there: bool = checkpoint.filesystem.get_file_info(checkpoint.path).type is not pyarrow.fs.FileType.NotFound
    return there


def _newer(known: Any, workers: int) -> Iterator[Any]:
    """The whole checkpoints beside a known one that are newer, or all where it is gone; the newest first."""
    import pyarrow.fs
    from ray import tune

    folder, name = os.path.split(known.path)
    least = name if _exists(known) else ""
    beside = known.filesystem.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True))
    names = (info.base_name for info in beside if info.base_name.startswith("checkpoint_"))
    for each in sorted((name for name in names if name > least), reverse=True):
        found = tune.Checkpoint(f"{folder}/{each}", known.filesystem)
        with contextlib.suppress(Exception), found.as_directory() as there:  # whatever a half-written file makes of it
            if _is_whole(there, workers):
                yield found


def _is_whole(folder: str, workers: int) -> bool:
    """Tell whether all files of a checkpoint are there, and of the same step: Tune may have been killed while it wrote
    them one by one, in the place of another checkpoint's. Raises what cannot be read."""
    saved, step = Saved.of(folder), _reports_of(folder)["step"]
    steps = {saved.common["global_step"], *(own.get("step") for own in saved.own.values())}
    return len(saved.own) == workers and steps == {step}


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
