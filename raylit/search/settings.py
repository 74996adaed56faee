"""What a search tells Ray Tune beside the space: name, storage, failures, which checkpoints stay. Floor 6, driver.

Ray's own ``RunConfig`` wins where it says something; then what the Trainer says of the same; then raylit's defaults.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

from raylit.callback import Callback
from raylit.callbacks import EarlyStopping, ModelCheckpoint
from raylit.config.placement import PlacementConfig
from raylit.driver import folder as folders
from raylit.search.table import Goal


def goal_of(tune_config: Any) -> Goal:
    """What trials are compared by: ``TuneConfig``'s metric, else the search algorithm's where it has one alone.

    A scheduler tells its metric and not which way is better: nothing is compared by that.
    """
    for each in (tune_config, getattr(tune_config, "search_alg", None)):
        metric, mode = getattr(each, "metric", None), getattr(each, "mode", None)
        if isinstance(metric, str) and mode in ("min", "max"):
            return Goal(metric, mode)
    return Goal()


def watched(tune_config: Any, callbacks: Iterable[Callback]) -> tuple[str, ...]:
    """Other metrics that somebody watches, for the table: the scheduler's, the search algorithm's, the callbacks'."""
    found: list[str] = []
    for each in (getattr(tune_config, "scheduler", None), getattr(tune_config, "search_alg", None)):
        metrics = getattr(each, "metric", None)
        found += [metrics] if isinstance(metrics, str) else list(metrics or ())
    found += [each.monitor for each in callbacks if isinstance(each, EarlyStopping | ModelCheckpoint) and each.monitor]
    return tuple(dict.fromkeys(found))


def run_config_of(
    given: Any, placement: PlacementConfig, callbacks: Iterable[Callback], goal: Goal, clones: bool
) -> Any:
    """A copy of Ray's ``RunConfig`` with all but the place in it. ``clones``: whether trials clone one another."""
    from ray import tune
    from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback

    run, blank = copy.copy(given) if given is not None else tune.RunConfig(), tune.RunConfig()
    if run.failure_config in (None, blank.failure_config) and placement.max_failures is not None:
        run.failure_config = tune.FailureConfig(max_failures=placement.max_failures)
    if run.checkpoint_config in (None, blank.checkpoint_config):
        run.checkpoint_config = _kept(callbacks, goal, clones)
    run.verbose = 0
    run.callbacks = [*(run.callbacks or []), CSVLoggerCallback(), JsonLoggerCallback()]
    return run


def _kept(callbacks: Iterable[Callback], goal: Goal, clones: bool) -> Any:
    """Which of a trial's checkpoints stay: what a ModelCheckpoint says, else the best and the newest one."""
    from ray import tune

    number: int | None = 1
    rank = {"checkpoint_score_attribute": goal.metric, "checkpoint_score_order": goal.mode}
    asked = [each for each in callbacks if isinstance(each, ModelCheckpoint)]
    for each in sorted(asked, key=lambda each: each.monitor is None)[:1]:  # one that ranks, where there are several
        number = None if each.save_top_k == -1 else max(each.save_top_k, 1)
        if each.monitor is not None:
            rank = {"checkpoint_score_attribute": each.monitor, "checkpoint_score_order": each.mode}
    if clones and number is not None:
        number = max(number, 4)  # also those that a clone may be reading
    rank = rank if rank["checkpoint_score_attribute"] is not None else {}
    return tune.CheckpointConfig(checkpoint_frequency=1, checkpoint_at_end=True, num_to_keep=number, **rank)


def placed(run: Any, placement: PlacementConfig, module: str) -> PlacementConfig:
    """Where a search lies, in the terms of a run: name, storage, and a filesystem that this may be a path on."""
    import ray.train
    from ray import tune

    storage = run.storage_path
    if storage in (None, tune.RunConfig().storage_path):
        storage = placement.storage_path or folders.default_storage()
    filesystem = run.storage_filesystem or getattr(placement.run_config, "storage_filesystem", None)
    on = ray.train.RunConfig(storage_path=str(storage), storage_filesystem=filesystem) if filesystem else None
    name = run.name or placement.name or folders.new_name(f"{module}-search")
    return dataclasses.replace(placement, name=name, storage_path=str(storage), run_config=on, failure_config=None)
