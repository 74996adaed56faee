"""The four entry points on one worker: what is around the loops. Floor 3.

::

    [on_fit_start]                     fit alone
    prepare_data                       (global rank 0, or local rank 0 of each node; the rest wait)
    setup(stage): DataModule, callbacks, Module; then configure_model
    -- the loop: raylit/engine/fit.py or evaluate.py --
    teardown(stage): DataModule, callbacks, Module
    [on_fit_end]
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from raylit.engine.evaluate import Evaluation, in_dataset_order
from raylit.engine.fit import Fit
from raylit.engine.handle import ModuleHandle
from raylit.engine.notices import WorkersChange
from raylit.engine.parts import Parts
from raylit.engine.resume import take_weights
from raylit.errors import DataError, HookError
from raylit.hooks import DATAMODULE_HOOKS, adapt
from raylit.metrics.place import NO_EPOCH
from raylit.ports import RunSnapshot, RunStopped
from raylit.stage import Loop, Stage, Status

_LOOP = {Stage.VALIDATE: Loop.VALIDATION, Stage.TEST: Loop.TEST, Stage.PREDICT: Loop.PREDICT}


@dataclass
class StageResult:
    """What a stage leaves: metrics of each dataloader, and predictions in data set order (rank 0; None elsewhere)."""

    metrics: list[dict[str, Tensor]] = field(default_factory=list)
    predictions: list[list[Any]] | None = None
    last: RunSnapshot | None = None  # the state at the end of a fit, where it is wanted


def run_stage(parts: Parts, stage: Stage) -> StageResult:
    """Run one entry point to its end on this worker; every rank calls it."""
    state, module = parts.state, parts.module
    handle = ModuleHandle(parts)
    module.__dict__["_run"] = handle  # past nn.Module.__setattr__, which would look for parameters in it
    if parts.datamodule is not None:
        parts.datamodule.trainer = parts.trainer
    state.stage, state.status, state.stop_requested = stage, Status.RUNNING, False
    parts.metrics.place = NO_EPOCH
    state.take = lambda weights_only: take_weights(parts, weights_only)  # a fit knows more, once it has optimizers
    try:
        if stage is Stage.FIT:
            _event(parts, "on_fit_start")
        _prepare_data(parts)
        _setup(parts, stage)
        if stage is Stage.FIT:
            if not module.training:
                module.train()  # else each submodule keeps the mode the person gave it
            fit = Fit(parts, handle)
            fit.run()
            result = StageResult(last=fit.last)
        else:
            result = _evaluate(parts, stage)
        _teardown(parts, stage)
        if stage is Stage.FIT:
            _event(parts, "on_fit_end")
        state.status = Status.FINISHED
        return result
    except WorkersChange:
        state.status = Status.INTERRUPTED
        parts.metrics.clear()
        raise
    except RunStopped:
        state.status = Status.INTERRUPTED
        parts.metrics.clear()
        _teardown(parts, stage)  # the process goes on with something else
        raise
    except BaseException as error:
        state.status = Status.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Status.FAILED
        _note_place(parts, error)
        parts.metrics.clear()
        on_exception = parts.hooks.event("on_exception")
        if on_exception is not None:
            on_exception(error)
        raise
    finally:
        state.loop, state.live_metrics, state.replay, state.take = None, None, None, None
        state.stepping_batches = None
        handle.restore()
        module.__dict__.pop("_run", None)
        if parts.datamodule is not None:
            parts.datamodule.__dict__.pop("trainer", None)
        parts.output.flush()


def _prepare_data(parts: Parts) -> None:
    world = parts.state.world
    for owner in (parts.datamodule, parts.module):
        if owner is None:
            continue
        mine = world.local_rank == 0 if owner.prepare_data_per_node else world.global_rank == 0
        if mine:
            owner.prepare_data()
    parts.strategy.collective.barrier()


def _setup(parts: Parts, stage: Stage) -> None:
    _datamodule(parts, "setup", stage)
    _event(parts, "setup", stage.value)
    own = parts.hooks.own("setup")
    if own is not None:
        own(stage.value)
    configure = parts.hooks.own("configure_model")
    if configure is not None:
        configure()
    if parts.load is not None:
        parts.load()
    # The optimizers must see the parameters where they will stay.
    parts.precision.convert_module(parts.module)
    parts.strategy.setup_module(parts.module)


def _teardown(parts: Parts, stage: Stage) -> None:
    _datamodule(parts, "teardown", stage)
    _event(parts, "teardown", stage.value)
    own = parts.hooks.own("teardown")
    if own is not None:
        own(stage.value)


def _datamodule(parts: Parts, name: str, stage: Stage) -> None:
    if parts.datamodule is not None:
        own = getattr(parts.datamodule, name)
        adapt(DATAMODULE_HOOKS[name], own, type(parts.datamodule).__name__)(stage.value)


def _evaluate(parts: Parts, stage: Stage) -> StageResult:
    loop = _LOOP[stage]
    evaluation = Evaluation(parts, loop)
    if not evaluation.possible:
        raise HookError(f"{type(parts.module).__name__} has no {evaluation.name}_step; {stage.value} needs one")
    loaders = parts.loaders.evaluation(stage.value)
    if not loaders:
        raise DataError(
            f"{stage.value} has no loader: pass dataloaders=, a datamodule, or write the Module's dataloader method"
        )
    settings = parts.settings
    limit = {
        Loop.VALIDATION: settings.val_batch_limit,
        Loop.TEST: settings.limit_test_batches,
        Loop.PREDICT: settings.limit_predict_batches,
    }[loop]
    parts.output.stage_start(parts.state)
    metrics, outputs = evaluation.run(loaders, limit)
    if loop is not Loop.PREDICT:
        return StageResult(metrics=metrics)
    if parts.state.world.world_size == 1:
        return StageResult(predictions=outputs)
    gathered = parts.strategy.collective.gather_object(outputs)
    if gathered is None:
        return StageResult()
    return StageResult(predictions=in_dataset_order(gathered, [loader.contiguous for loader in loaders]))


def _event(parts: Parts, name: str, *args: Any) -> None:
    hook = parts.hooks.event(name)
    if hook is not None:
        hook(*args)


def _note_place(parts: Parts, error: BaseException) -> None:
    """Write on the exception where the run stood; the caller's message is made from it."""
    state = parts.state
    place: dict[str, Any] = {"stage": state.stage.value if state.stage else None, "global_step": state.global_step}
    if state.stage is Stage.FIT:
        place["epoch"] = state.epoch
        if state.batch_idx >= 0:  # -1: before the first batch
            place["batch_idx"] = state.batch_idx
    if state.loop is not None:
        place["loop"] = state.loop.value
    with contextlib.suppress(AttributeError, TypeError):  # a type may refuse attributes; it matters more than the note
        error.__dict__["raylit_where"] = place
