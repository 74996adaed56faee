"""Where in a loop a log call is made, and what may be logged there. Plain values; the engine assigns them.

The engine writes ``store.place = BATCH_TRAIN`` (or another of the constants) where a phase of the loop begins, never
once a hook: the whole of a batch is one place.
"""

from __future__ import annotations

from dataclasses import dataclass


# Compared by identity (eq=False): the comparison is on the path of every log call.
@dataclass(frozen=True, eq=False)
class Place:
    """One phase of a run.

    ``label`` is read in error messages. ``on_step`` and ``on_epoch`` are the defaults; ``step_allowed`` and
    ``epoch_allowed`` say what may be asked for. ``in_batch`` is true where a batch is current, so that its size is a
    weight. ``split`` is true within truncated BPTT, where several calls make up one value.
    """

    label: str
    on_step: bool
    on_epoch: bool
    step_allowed: bool
    epoch_allowed: bool
    in_batch: bool
    split: bool = False


BATCH_TRAIN = Place("a hook of a training batch", True, False, True, True, True)
SPLIT_TRAIN = Place("a split of a training batch", True, False, True, True, True, split=True)
EPOCH_TRAIN = Place("an epoch hook of training", False, True, False, True, False)
BATCH_EVAL = Place("a hook of an evaluation batch", False, True, True, True, True)
EPOCH_EVAL = Place("an epoch hook of evaluation", False, True, False, True, False)
NO_EPOCH = Place("a hook outside any epoch", False, True, False, False, False)
