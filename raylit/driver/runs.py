"""From a call of ``fit``, ``validate``, ``test`` or ``predict`` to its result. Floor 5, driver side.

Everything that can be refused is refused here, before a worker starts: the Module's steps and hook signatures, the
loaders that were passed, the run's folder.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import secrets
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from raylit.assemble import (
    RunSpec,
    check_can_keep_batch,
    check_strategy,
    metrics_as_floats,
    pick_device,
    strategy_name,
)
from raylit.callback import Callback
from raylit.callbacks.configuring import configured
from raylit.checkpoint import check_weights, read
from raylit.checkpoint.content import check_resumable
from raylit.checkpoint.folder import Folder
from raylit.checkpoint.ranks import read_ranks
from raylit.config.placement import PlacementConfig
from raylit.data.loader import prepare_all, prepare_train
from raylit.datamodule import DataModule
from raylit.display.terminal import TerminalDisplay
from raylit.driver import folder as folders
from raylit.driver.elastic import open_requests, sized
from raylit.driver.going_on import check_checkpoints, for_evaluation, for_fit, kept_by, with_checkpoints
from raylit.driver.hooks import check_hooks, require
from raylit.driver.restarts import DEFAULT, Fault, fault_of, start_again
from raylit.driver.result import LocalResult, StoredCheckpoint
from raylit.errors import DataError, HookError
from raylit.hooks import overridden
from raylit.module import Module
from raylit.seed import get_random_state, set_random_state
from raylit.stage import Stage, Status
from raylit.travel import Homecoming, pack_spec, receive, unpack, with_gpu
from raylit.wire import RESIZED, Elastic, Job, World
from raylit.worker.failure import bare
from raylit.worker.loaders import HOOK
from raylit.worker.ray_data import cpus_to_read, validates_within
from raylit.worker.signals import interrupts_held
from raylit.worker.storage import files_of, is_remote, local_folder

if TYPE_CHECKING:
    from raylit.trainer import Trainer

Loaders = dict[str, Any]


def fit(trainer: Trainer, model: Module, loaders: Loaders, datamodule: DataModule | None, ckpt_path: Any) -> Any:
    """Train; return Ray's Result, or a LocalResult where the run took place in this process."""
    callbacks = with_checkpoints(trainer, merge_callbacks(trainer, model))
    check_before_fit(trainer, model, callbacks, loaders, datamodule)
    placement = trainer._config.placement
    choice = for_fit(trainer, ckpt_path, callbacks)
    checkpoint = load_checkpoint(choice.path, model, callbacks, datamodule)
    own_states = {}
    if checkpoint is not None:
        check_resumable(checkpoint)
        if choice.run_folder is None:  # else each worker finds it in the run folder
            own_states = read_ranks(choice.path, checkpoint)
    keeps = trainer._config.fit.fast_dev_run == 0
    run_folder = (choice.run_folder or folders.claim(placement, type(model).__name__)) if keeps else None
    spec = describe(trainer, Stage.FIT, model, loaders, datamodule, callbacks, run_folder)
    spec.storage, spec.looks_back = run_folder, True
    if choice.run_folder is None or not keeps:
        spec.checkpoint, spec.own_states = checkpoint, own_states
    trainer._last_checkpoint, trainer._run_folder = None, None
    with shown(trainer, first=True) as display, folders.kept_if_used(run_folder):
        if choice.note:
            display.event({"kind": "note", "text": choice.note})
        if placement.in_process:
            outcome = _run_here(trainer, spec, display)
            metrics, result = metrics_as_floats(outcome.state.callback_metrics), None
        else:
            launched = _launch_fit(trainer, spec, display, run_folder)
            home = unpack(launched.outcome)
            come_home(trainer, home, model, callbacks)
            metrics, result = metrics_as_floats(home.metrics["callback"]), launched.result
        trainer._run_folder = run_folder
        return _result(trainer, spec, run_folder, metrics, result)


def evaluate(
    trainer: Trainer, stage: Stage, model: Module, loaders: Loaders, datamodule: DataModule | None, ckpt_path: Any,
    same_model: bool = False,
) -> Any:  # fmt: skip
    """Validate, test or predict; return metrics of each dataloader, or the predictions.

    ``same_model``: the caller passed none, so it is that of the run before.
    """
    callbacks = with_checkpoints(trainer, merge_callbacks(trainer, model))
    if datamodule is None and model is trainer._state.module and all(v is None for v in loaders.values()):
        datamodule = trainer._state.datamodule
    check_step(stage, model)
    check_placement(trainer)
    check_hooks(trainer, model, callbacks, datamodule)
    check_loaders(trainer, stage, model, loaders, datamodule)
    choice = for_evaluation(trainer, stage.value, ckpt_path, same_model)
    checkpoint = load_checkpoint(choice.path, model, callbacks, datamodule)
    # The folder of the fit before, where there was one: test results stand beside the training's.
    run_folder = trainer._state.log_dir
    if run_folder is None and keeps_values(trainer):
        run_folder = folders.claim(trainer._config.placement, type(model).__name__, stage)
    spec = describe(trainer, stage, model, loaders, datamodule, callbacks, run_folder)
    spec.checkpoint = checkpoint
    with shown(trainer) as display, folders.kept_if_used(run_folder):
        if choice.note:
            display.event({"kind": "note", "text": choice.note})
        elif choice.path is None and model is trainer._state.module and trainer._state.status is Status.FINISHED:
            display.event({"kind": "note", "text": f"{stage.value} uses the model's current weights"})
        if trainer._config.placement.in_process:
            outcome = _run_here(trainer, spec, display)
            metrics, predictions = outcome.result.metrics, outcome.result.predictions
        else:
            home = unpack(_launch(trainer, spec, display, None).outcome)
            come_home(trainer, home, model, callbacks)
            metrics, predictions = home.stage_metrics, home.predictions
    if stage is Stage.PREDICT:
        assert predictions is not None
        return predictions[0] if len(predictions) == 1 else predictions
    return [metrics_as_floats(each) for each in metrics]


def probe(trainer: Trainer, spec: RunSpec) -> Callback:
    """Train as ``spec`` says and return its first callback as rank 0 left it; nothing else comes home."""
    with shown(trainer) as display:
        if trainer._config.placement.in_process:
            _run_here(trainer, spec, display)
            return spec.callbacks[0]
        launched = _launch(trainer, spec, display, None, worker_main="raylit.worker.probe:worker_main")
    seen: Callback = pickle.loads(launched.outcome)
    return seen


# -- in this process -------------------------------------------------------------------------------------------------
def _run_here(trainer: Trainer, spec: RunSpec, display: TerminalDisplay) -> Any:
    from raylit.assemble import run

    run_folder = spec.run_folder
    try:
        with local_folder(run_folder, spec.run_filesystem, files_of(spec.loggers)) as folder:
            spec.run_folder = folder
            with interrupts_held(trainer._state):
                return run(spec, World(), trainer, display.event, trainer._config.placement.use_gpu)
    finally:
        spec.run_folder = trainer._state.log_dir = run_folder
        attach_loggers(spec.loggers, run_folder, spec.run_filesystem)


def _result(trainer: Trainer, spec: RunSpec, run_folder: str | None, metrics: dict[str, float], ray: Any) -> Any:
    """What ``fit`` returns: Ray's Result, or its like, with the checkpoints that are kept."""
    kept: list[tuple[Any, Any]] = []
    if run_folder is not None and trainer._config.fit.enable_checkpointing:
        try:
            kept = kept_by(spec.callbacks, run_folder, spec.run_filesystem)
        except OSError as error:
            warnings.warn(f"the checkpoints of the run cannot be looked at: {error}", UserWarning, stacklevel=4)
    whole = [each for each, manifest in kept if not manifest.weights_only]
    trainer._last_checkpoint = whole[-1] if whole else None
    if ray is None:
        best = [(each, manifest.metrics) for each, manifest in kept]
        newest = best[-1][0] if best else None
        return LocalResult(metrics=metrics, checkpoint=newest, path=run_folder, best_checkpoints=best)
    from ray.train import Checkpoint

    def as_rays(kept: Any) -> Any:
        return Checkpoint(kept.path, kept.filesystem) if isinstance(kept, StoredCheckpoint) else Checkpoint(kept.path)

    best = [(as_rays(each), manifest.metrics) for each, manifest in kept]
    changes: dict[str, Any] = {"checkpoint": best[-1][0] if best else None, "best_checkpoints": best}
    if run_folder is None:
        changes["path"] = None  # what was there is gone
    if best:
        import pandas as pd

        changes["metrics_dataframe"] = pd.DataFrame([each for _, each in best])
    return dataclasses.replace(ray, metrics=metrics, return_value=None, **changes)


# -- on Ray ----------------------------------------------------------------------------------------------------------
def _launch_fit(trainer: Trainer, spec: RunSpec, display: TerminalDisplay, run_folder: str | None) -> Any:
    """Launch, and launch again from the newest checkpoint after a fault that may pass, or in another size."""
    placement = trainer._config.placement
    keeps = run_folder is not None and trainer._config.fit.enable_checkpointing
    faults: list[Fault] = []
    again = False
    while True:
        if run_folder is not None:
            # What Ray noted of an earlier attempt; it would insist on checkpoints that are gone.
            Folder(run_folder, spec.run_filesystem).delete_file("checkpoint_manager_snapshot.json")
        spec.used_s = 0.0 if spec.began_at_s is None else time.monotonic() - spec.began_at_s
        try:
            launched = _launch(trainer, spec, display, run_folder, again=again)
        except Exception as error:
            fault, failed = fault_of(error), error
        else:
            if launched.outcome != RESIZED:
                return launched
            again = True
            continue
        if not start_again(fault, faults, placement.max_failures, keeps, _preemptions_allowed(placement)):
            raise bare(failed)
        faults.append(fault)
        again = True
        line = (str(failed).splitlines() or [""])[0]
        counted = sum(each.kind not in ("preempted", "unplaced") for each in faults)
        of = "" if placement.max_failures == -1 else f" of {placement.max_failures or DEFAULT}"
        restart = "" if fault.kind in ("preempted", "unplaced") else f" (restart {counted}{of})"
        display.event({"kind": "note", "text": f"{type(failed).__name__}: {line}; starting again{restart}"})


def _preemptions_allowed(placement: PlacementConfig) -> int:
    """How often raylit starts a run again that lost an announced node; -1: any number. Older Rays do not count them."""
    import ray.train

    if all(each.name != "max_preemption_failures" for each in dataclasses.fields(ray.train.FailureConfig)):
        return -1
    given = getattr(placement.failure_config, "max_preemption_failures", -1)
    return given if placement.elastic else 0  # a run of one size Ray itself has started again so often


def _launch(
    trainer: Trainer, spec: RunSpec, display: TerminalDisplay, run_folder: str | None, again: bool = False,
    worker_main: str | None = None,
) -> Any:  # fmt: skip
    """``worker_main``: in place of the usual one, on the workers that evaluations keep."""
    from raylit.driver import cluster, pool
    from raylit.driver.launch import launch
    from raylit.driver.storage_check import require_shared_folder

    placement, pooled = trainer._config.placement, spec.stage is not Stage.FIT or worker_main is not None
    refs: list[Any] = []
    payload = pack_spec(spec, refs)  # before Ray is started: what cannot travel is refused here

    def say(text: str) -> None:
        display.event({"kind": "note", "text": text})

    if not placement.elastic and (not pooled or not cluster.connected()):
        workers = placement.worker_range[0]
        say(f"starting {workers} Ray worker{'s' * (workers != 1)} ...")  # the next line may take half a minute to come
    cluster.connect(placement.runtime_env)
    use_gpu = placement.use_gpu
    devices = getattr(trainer._config.fit.strategy, "devices", None) or 1  # that share a batch in each worker
    if use_gpu == "auto":
        use_gpu = cluster.available().get("GPU", 0.0) >= placement.worker_range[0] * devices
    job = Job(
        stage=spec.stage.value,
        payload=with_gpu(payload, bool(use_gpu)),
        refs=tuple(refs),
        sys_path=tuple(entry for entry in sys.path if entry),
        working_dir=os.getcwd(),
        argv=tuple(sys.argv),
    )
    resources = cluster.with_gpus(placement.resources_per_worker, devices if use_gpu else 0)
    workers, failures, elastic = placement.worker_range[0], placement.failure_config, None
    if placement.elastic:
        elastic = Elastic(
            *placement.worker_range, keeps_batch=placement.elastic_batch == "keep", every_s=placement.resize_every_s,
            bundle=cluster.per_worker(resources, bool(use_gpu)), request=f"raylit-{secrets.token_hex(8)}-",
        )  # fmt: skip
        workers, failures = sized(pooled, elastic, failures, again, say, placement.start_timeout_s)
        job = dataclasses.replace(job, elastic=elastic)
    where: dict[str, Any] = {
        "num_workers": workers,
        "use_gpu": bool(use_gpu),
        "resources_per_worker": resources,
        "runtime_env": placement.runtime_env,
        "on_event": lambda event: _follow(trainer, spec, display, event),
        "ray_data": _read_at_a_time(trainer, spec),
        "say": say,
        "start_timeout_s": placement.start_timeout_s,
    }
    if pooled:
        # No checkpoint, no restart: plain actors do, which start sooner and are kept for the next evaluation.
        where |= {} if worker_main is None else {"worker_main": worker_main}
        return pool.launch_pooled(job, placement_strategy=placement.placement_strategy or "PACK", **where)
    if run_folder is not None and not again:
        require_shared_folder(run_folder, spec.run_filesystem)
    with folders.storage_of(run_folder, spec.stage) as (storage, name), open_requests(elastic):
        return launch(
            job,
            placement_strategy=placement.placement_strategy,
            scaling_config=placement.scaling_config,
            run_config=placement.run_config,
            failure_config=failures,
            name=name,
            storage_path=storage,
            storage_filesystem=spec.run_filesystem,
            max_failures=0,  # see driver/restarts.py
            again=again,
            **where,
        )


def _read_at_a_time(trainer: Trainer, spec: RunSpec) -> int:
    """How many of the Datasets that were passed are read at a time; those of hooks only the workers see."""
    passed, evaluated = spec.loaders, "validate" if spec.stage is Stage.FIT else spec.stage.value
    predicting = spec.stage is Stage.PREDICT
    return cpus_to_read(
        passed.get("train"), passed.get(evaluated), beside=validates_within(trainer._config.fit), predicting=predicting
    )


def _follow(trainer: Trainer, spec: RunSpec, display: TerminalDisplay, event: dict[str, Any]) -> None:
    """Show a worker's event; what it says of the progress is all that is known if the run is interrupted."""
    if event.get("kind") == "stage_start" and spec.began_at_s is None:
        spec.began_at_s = time.monotonic()
    if event.get("kind") == "epoch_end":
        trainer._state.epoch, trainer._state.global_step = event["epoch"] + 1, event.get("global_step", 0)
    display.event(event)


def come_home(trainer: Trainer, home: Homecoming, model: Module, callbacks: list[Callback]) -> None:
    """Bring the caller's objects and the Trainer up to date with what rank 0 sent."""
    receive(home, model, callbacks, trainer, trainer._state.datamodule)
    state = trainer._state
    state.module, state.callbacks = model, callbacks
    state.status = Status(home.status)
    if state.stage is Stage.FIT:
        state.epoch, state.global_step = home.epoch, home.global_step
        state.num_training_batches = home.num_training_batches
    state.world = World(world_size=home.world_size)
    state.strategy_name = strategy_name(trainer._config.fit.strategy, home.world_size)
    state.callback_metrics, state.logged_metrics = home.metrics["callback"], home.metrics["logged"]
    state.progress_bar_metrics = home.metrics["progress_bar"]
    if home.history is not None:
        state.history = home.history
    if home.random_state is not None:
        # As after a run in this process: what is drawn next goes on from there, and a second fit draws other numbers.
        set_random_state(home.random_state, devices=False)


# -- describing and checking -----------------------------------------------------------------------------------------
def describe(
    trainer: Trainer, stage: Stage, model: Module, loaders: Loaders, datamodule: DataModule | None,
    callbacks: list[Callback], run_folder: str | None,
) -> RunSpec:  # fmt: skip
    """Write down the run for whoever runs it."""
    import torch

    state = trainer._state
    state.module, state.datamodule, state.callbacks, state.log_dir = model, datamodule, callbacks, run_folder
    model.__dict__["_last_trainer"] = trainer  # what the Module's properties tell between runs
    state.stage = stage
    if stage is Stage.FIT:
        state.epoch, state.global_step = 0, 0
    filesystem = folders.filesystem_of(trainer._config.placement)
    state.loggers = pick_loggers(trainer, run_folder)
    attach_loggers(state.loggers, run_folder, filesystem)
    seed = trainer._config.fit.seed
    return RunSpec(
        stage=stage,
        config=trainer._config,
        module=model,
        datamodule=datamodule,
        loaders={kind: loader for kind, loader in loaders.items() if loader is not None},
        callbacks=callbacks,
        loggers=state.loggers,
        run_folder=run_folder,
        run_filesystem=filesystem,
        random_state=None if trainer._config.placement.in_process else get_random_state(),
        order_seed=(torch.initial_seed() if seed is None else seed) % 2**32,
        epoch=state.epoch,
        global_step=state.global_step,
    )


def pick_loggers(trainer: Trainer, run_folder: str | None) -> list[Any]:
    """The run's loggers: TensorBoard in the run folder by default.

    In a run that keeps nothing a DummyLogger stands in: hooks that use ``self.logger`` run all the same.
    """
    from raylit.loggers import DummyLogger, make_loggers

    fit = trainer._config.fit
    loggers = make_loggers(fit.logger)
    return [DummyLogger()] if loggers and (fit.fast_dev_run or run_folder is None) else loggers


def attach_loggers(loggers: list[Any], run_folder: str | None, filesystem: Any) -> None:
    """Tell the caller's own loggers where the run's files are, for who asks ``trainer.logger`` before and after it."""
    here = run_folder is not None and not is_remote(run_folder, filesystem)
    for logger in loggers:
        logger.attach(run_folder if here else None, 0)


def keeps_values(trainer: Trainer) -> bool:
    """True where loggers were given: an evaluation without a fit before it gets a run folder for them."""
    fit = trainer._config.fit
    return fit.logger is not True and bool(fit.logger) and not fit.fast_dev_run


def merge_callbacks(trainer: Trainer, model: Module) -> list[Callback]:
    """The Trainer's callbacks with the Module's own; one of the same type is the Module's."""
    return joined_callbacks(trainer._config.fit.callbacks, model)


def joined_callbacks(given: Sequence[Callback], model: Module) -> list[Callback]:
    """Those that were ``given`` with the Module's own; one of the same type is the Module's."""
    own = model.configure_callbacks() or []
    own = [own] if isinstance(own, Callback) else list(own)
    for callback in own:
        if not isinstance(callback, Callback):
            raise HookError(
                f"configure_callbacks returned a {type(callback).__name__}; it must be raylit.Callback objects"
            )
    kept = [c for c in given if type(c) not in {type(o) for o in own}]
    return kept + own


def check_step(stage: Stage, model: Module) -> None:
    """Refuse an evaluation of a Module that has not its step."""
    step = {Stage.VALIDATE: "validation_step", Stage.TEST: "test_step", Stage.PREDICT: "predict_step"}[stage]
    if overridden(model, step, Module) or (stage is Stage.PREDICT and overridden(model, "forward", nn.Module)):
        return
    either = " or forward" if stage is Stage.PREDICT else ""
    name = type(model).__name__
    raise HookError(f"{name} has no {step}{either}; {stage.value} needs one: write {step}(self, batch, batch_idx)")


def check_placement(trainer: Trainer) -> None:
    """Refuse where and how a run cannot take place yet."""
    check_strategy(trainer._config.fit.strategy)
    if trainer._config.placement.in_process and trainer._config.placement.use_gpu is True:
        pick_device(World(), use_gpu=True)


def check_before_fit(
    trainer: Trainer, model: Module, callbacks: list[Callback], loaders: Loaders, datamodule: DataModule | None
) -> None:
    """Refuse a fit that cannot begin."""
    name = type(model).__name__
    require(model, "training_step", "write training_step(self, batch, batch_idx), returning the loss")
    require(model, "configure_optimizers", "write configure_optimizers(self); return None to run forward only")
    check_placement(trainer)
    placement = trainer._config.placement
    if placement.elastic and placement.elastic_batch == "keep":
        check_can_keep_batch(model, trainer._config.fit)
    check_checkpoints(trainer, callbacks)
    configured(trainer._config.fit, callbacks)  # refuses callbacks that contradict one another or an argument
    check_hooks(trainer, model, callbacks, datamodule)
    check_loaders(trainer, Stage.FIT, model, loaders, datamodule)
    if overridden(model, "validation_step", Module) is False and loaders.get("validate") is not None:
        raise HookError(f"val_dataloaders are given, but {name} has no validation_step: write it, or leave them out")


def check_loaders(
    trainer: Trainer, stage: Stage, model: Module, loaders: Loaders, datamodule: DataModule | None
) -> None:
    """Refuse what is missing, empty or no loader at all; hooks that make loaders are left to the workers."""
    kind = "train" if stage is Stage.FIT else stage.value
    there = loaders.get(kind) is not None
    hook = HOOK[kind]
    there = there or (datamodule is not None and overridden(datamodule, hook, DataModule))
    if not there and not overridden(model, hook, Module):
        argument = "train_dataloaders" if kind == "train" else "dataloaders"
        raise DataError(
            f"{stage.value} has no data: pass {argument}=, a datamodule with {hook}(), or write {hook}() in "
            f"{type(model).__name__}"
        )
    placement = trainer._config.placement
    world = max(1, placement.worker_range[0])
    place: dict[str, Any] = {
        "rank": 0, "world_size": world, "seed": 0, "shard": trainer._config.fit.use_distributed_sampler,
    }  # fmt: skip
    elastic: dict[str, Any] = {
        "shares": placement.worker_range[1] if placement.elastic and placement.elastic_batch == "keep" else None,
        "resized": placement.elastic,
    }
    for each, source in loaders.items():
        if source is None:
            continue
        if each == "train":
            prepare_train(source, name="train_dataloaders", **place, **elastic)
        else:
            name = "val_dataloaders" if stage is Stage.FIT else "dataloaders"
            prepare_all(source, stage=each, name=name, **place)


def load_checkpoint(
    path: Any, model: Module, callbacks: list[Callback], datamodule: DataModule | None
) -> dict[str, Any] | None:
    """Read a checkpoint, and refuse one that is clearly of another model."""
    if path is None:
        return None
    checkpoint = read(path)
    made_later = overridden(model, "setup", Module) or overridden(model, "configure_model", Module)
    changed_later = (
        overridden(model, "on_load_checkpoint", Module)
        or (datamodule is not None and overridden(datamodule, "on_load_checkpoint", DataModule))
        or any(overridden(callback, "on_load_checkpoint", Callback) for callback in callbacks)
    )
    if not (made_later or changed_later):  # the layers, or the checkpoint
        check_weights(checkpoint, model)
    return checkpoint


class shown:
    """The display of one call; turns Ctrl-C into one line and an exit code."""

    def __init__(self, trainer: Trainer, first: bool = False) -> None:
        self._trainer, self._first = trainer, first
        settings = configured(trainer._config.fit, trainer._state.callbacks)
        self._display = TerminalDisplay(enabled=settings.fit.enable_progress_bar)

    def __enter__(self) -> TerminalDisplay:
        if self._first and not self._trainer._notes_given:
            self._trainer._notes_given = True
            for note in self._trainer._config.notes:
                self._display.event({"kind": "note", "text": note})
        return self._display

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        state = self._trainer._state
        interrupted = isinstance(error, KeyboardInterrupt)
        if error is not None:
            state.status = Status.INTERRUPTED if interrupted else Status.FAILED
        self._display.event({"kind": "end", "status": state.status.value})
        self._display.close()
        if interrupted:
            from raylit.trainer import RunInterrupted

            where = f"; the run folder is {state.log_dir}" if state.log_dir else ""
            done = f"{state.epoch} epochs and {state.global_step} steps done"
            print(f"interrupted after {done}{where}", file=sys.stderr)
            raise RunInterrupted(130) from None
