"""The names of what a run is doing. Floor 0: standard library only."""

from __future__ import annotations

from enum import Enum


class Stage(str, Enum):
    """The four entry points. The value is what ``setup(stage)`` and ``teardown(stage)`` receive."""

    FIT = "fit"
    VALIDATE = "validate"
    TEST = "test"
    PREDICT = "predict"

    def __str__(self) -> str:
        return self.value


class Loop(str, Enum):
    """The loop that runs now; a fit goes through several. The value is the middle of the hooks' names."""

    TRAIN = "train"
    SANITY = "sanity"
    VALIDATION = "validation"
    TEST = "test"
    PREDICT = "predict"

    def __str__(self) -> str:
        return self.value


class Status(str, Enum):
    """Where a run stands; read it as ``trainer.state``."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"

    def __str__(self) -> str:
        return self.value


class SafePoint(str, Enum):
    """Where a fit's whole state is at hand, so that a checkpoint of it goes on exactly."""

    BATCH = "batch"  # a training batch and all that follows it is done; no validation was due
    VALIDATION = "validation"  # the same, after a validation within the epoch or at its end
    EPOCH = "epoch"  # an epoch and its hooks are done
    END = "end"  # training is over, on_train_end has run
    INTERRUPT = "interrupt"  # training was interrupted between two batches
    PREEMPTION = "preemption"  # a node will be taken away; between two batches, of a validation too. Training goes on

    def __str__(self) -> str:
        return self.value
