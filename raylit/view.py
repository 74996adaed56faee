"""What everyone but the engine sees of a run. Floor 1.

``RunState`` is written by the engine alone. ``TrainerView`` is the read side of it: the ``trainer`` that hooks receive
in a worker, and the base of the ``Trainer`` that the caller holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raylit.config.fit import FitConfig
from raylit.errors import ConfigError, NotAttachedError, RaylitError, nearest
from raylit.stage import Loop, Stage, Status
from raylit.wire import World

if TYPE_CHECKING:
    from raylit.callback import Callback
    from raylit.datamodule import DataModule
    from raylit.module import Module
    from raylit.ports import RunSnapshot


@dataclass
class RunState:
    """Everything that changes while a run goes on. Counts start at 0 and count what is done."""

    world: World = field(default_factory=World)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stage: Stage | None = None
    loop: Loop | None = None
    status: Status = Status.INITIALIZING
    epoch: int = 0  # epochs finished; the number of the epoch that runs
    global_step: int = 0  # rounds of optimizer steps since training began
    batch_idx: int = -1  # batch that runs, or ran last, in this epoch
    eval_batches: int = 0  # batches of evaluations done since the run began; only ever counted up
    stop_requested: bool = False
    max_epochs: int = -1
    max_steps: int = -1
    num_training_batches: int | float = 0  # of this rank in one epoch; inf where the loader cannot tell
    module: Module | None = None
    datamodule: DataModule | None = None
    callbacks: list[Callback] = field(default_factory=list)
    loggers: list[Any] = field(default_factory=list)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    lr_schedulers: list[Any] = field(default_factory=list)
    lr_scheduler_configs: list[Any] = field(default_factory=list)
    schedulers_on_hold: bool = False  # a callback steps a scheduler of its own instead
    validates: bool = False  # this fit runs validation
    settings: FitConfig = field(default_factory=FitConfig)
    callback_metrics: dict[str, Tensor] = field(default_factory=dict)
    # Epoch values by name, with the global_step at which each was reduced over all workers: of these weights it tells.
    measured: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    logged_metrics: dict[str, Tensor] = field(default_factory=dict)
    progress_bar_metrics: dict[str, Tensor] = field(default_factory=dict)
    log_dir: str | None = None
    strategy_name: str = "single"
    precision: str = "32-true"
    history: Any = None
    # In a fit: the latest step values of the loop that runs, by reference; asked only when someone reads metrics.
    live_metrics: Callable[[], Any] | None = None
    # In a run: copies its state; the argument says whether to take the weights alone. Every rank calls it.
    take: Callable[[bool], RunSnapshot] | None = None
    # In a fit with checkpoints: Ctrl-C or SIGTERM waits for the end of the batch, and is raised then.
    holds_interrupts: bool = False
    interrupt: BaseException | None = None
    # In a fit: rounds of optimizer steps in all of it; inf where nobody can tell.
    stepping_batches: Callable[[], int | float] | None = None
    # In a run: writes a checkpoint to a path. Every rank calls it.
    save: Callable[[str, bool], None] | None = None
    # In a fit: runs training_step over this worker's training data and changes nothing but the layers' own statistics.
    replay: Callable[[], int] | None = None


# What Lightning's trainer has and this one has not, each with what to read instead.
NOT_HERE = {
    "num_devices": "trainer.world_size",
    "num_gpus": "trainer.world_size",
    "num_nodes": "trainer.world_size, the number of workers on all nodes together",
    "device_ids": "module.device",
    "root_gpu": "module.device",
    "strategy": "module.use_ddp, use_ddp2 or use_dp",
    "accelerator": "module.on_gpu",
    "proc_rank": "trainer.global_rank",
    "default_root_dir": "trainer.log_dir",
    "weights_save_path": "trainer.log_dir",
    "running_sanity_check": "trainer.sanity_checking",
    "interrupted": "trainer.state",
    "is_last_batch": "trainer.num_training_batches == batch_idx + 1",
    "total_batch_idx": "trainer.global_step",
    "early_stopping_callback": "trainer.callbacks",
    "early_stopping_callbacks": "trainer.callbacks",
    "progress_bar_callback": "trainer.progress_bar_metrics",
    "progress_bar_dict": "trainer.progress_bar_metrics",
    "train_dataloader": "the loader that you gave, or trainer.num_training_batches",
    "val_dataloaders": "the loaders that you gave",
    "test_dataloaders": "the loaders that you gave",
    "predict_dataloaders": "the loaders that you gave",
    "print": "module.print",
    "tuner": "trainer.lr_find and trainer.scale_batch_size",
}


class TrainerView:
    """The run as hooks may read it. ``should_stop`` may also be set: training ends after this batch, on all workers."""

    _state: RunState

    def __init__(self, state: RunState | None = None) -> None:
        self._state = RunState() if state is None else state

    if not TYPE_CHECKING:  # a type checker knows what is there

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_") or hasattr(type(self), name):
                return object.__getattribute__(self, name)  # raises what a property of this name raised
            there = [each for each in dir(type(self)) if not each.startswith("_")]
            hint = f" Instead: {NOT_HERE[name]}." if name in NOT_HERE else nearest(name, there)
            raise AttributeError(f"the trainer has no attribute {name!r} in raylit.{hint}")

    # -- where this process stands -------------------------------------------------------------------------------
    @property
    def global_rank(self) -> int:
        """Rank of this worker in the run, from 0."""
        return self._state.world.global_rank

    @property
    def local_rank(self) -> int:
        """Rank of this worker on its node, from 0."""
        return self._state.world.local_rank

    @property
    def node_rank(self) -> int:
        """Rank of this worker's node, from 0."""
        return self._state.world.node_rank

    @property
    def world_size(self) -> int:
        """Number of workers in the run."""
        return self._state.world.world_size

    @property
    def is_global_zero(self) -> bool:
        """True on the worker with global rank 0, and in a single process."""
        return self._state.world.global_rank == 0

    # -- progress ------------------------------------------------------------------------------------------------
    @property
    def current_epoch(self) -> int:
        """Number of the epoch that runs, from 0; after a fit, the number of epochs done."""
        return self._state.epoch

    @property
    def global_step(self) -> int:
        """Rounds of optimizer steps done since training began."""
        return self._state.global_step

    @property
    def max_epochs(self) -> int:
        """Epochs to train; -1 where there is no limit."""
        return self._state.max_epochs

    @property
    def max_steps(self) -> int:
        """Optimizer steps to train; -1 where there is no limit."""
        return self._state.max_steps

    @property
    def num_training_batches(self) -> int | float:
        """Batches of this worker in one training epoch; ``inf`` where the loader cannot tell."""
        return self._state.num_training_batches

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Rounds of optimizer steps that the whole fit takes at most; ``inf`` where nothing limits them.

        In a fit, from ``configure_optimizers`` on, for schedules over all steps. NotAttachedError elsewhere.
        """
        if self._state.stepping_batches is None:
            raise NotAttachedError("trainer.estimated_stepping_batches is known in a fit: ask in a hook of one")
        return self._state.stepping_batches()

    @property
    def sanity_checking(self) -> bool:
        """True while the validation batches before training run."""
        return self._state.loop is Loop.SANITY

    @property
    def training(self) -> bool:
        """True while training batches run."""
        return self._state.loop is Loop.TRAIN

    @property
    def validating(self) -> bool:
        """True while validation batches run, in a fit or in ``validate``."""
        return self._state.loop is Loop.VALIDATION

    @property
    def testing(self) -> bool:
        """True while test batches run."""
        return self._state.loop is Loop.TEST

    @property
    def predicting(self) -> bool:
        """True while prediction runs."""
        return self._state.loop is Loop.PREDICT

    @property
    def state(self) -> Status:
        """Where the run stands: initializing, running, finished, interrupted or failed."""
        return self._state.status

    @property
    def stage(self) -> Stage | None:
        """The entry point that runs: fit, validate, test or predict; None before the first."""
        return self._state.stage

    @property
    def should_stop(self) -> bool:
        """True once someone asked training to end."""
        return self._state.stop_requested

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self._state.stop_requested = bool(value)

    @property
    def batch_idx(self) -> int:
        """Index of the training batch that runs, or ran last, in this epoch; -1 before the first."""
        return self._state.batch_idx

    # -- settings ------------------------------------------------------------------------------------------------
    @property
    def fast_dev_run(self) -> int:
        """Batches of a ``fast_dev_run``; 0 where it is off."""
        return self._state.settings.fast_dev_run

    @property
    def log_every_n_steps(self) -> int:
        """Optimizer steps between two rows of step values; 0: none are kept."""
        return self._state.settings.log_every_n_steps

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches of this worker to an optimizer step in the epoch that runs."""
        return self._state.settings.accumulation_at(self._state.epoch) * self._state.world.turns

    @property
    def enable_validation(self) -> bool:
        """True in a fit that has validation batches to run."""
        return self._state.validates

    # -- parts ---------------------------------------------------------------------------------------------------
    @property
    def model(self) -> Module | None:
        """The Module of the run."""
        return self._state.module

    lightning_module = model

    @property
    def datamodule(self) -> DataModule | None:
        """The DataModule of the run, if there is one."""
        return self._state.datamodule

    @property
    def callbacks(self) -> list[Callback]:
        """The callbacks of the run, in the order in which their hooks are called."""
        return self._state.callbacks

    @property
    def checkpoint_callback(self) -> Callback | None:
        """The first ModelCheckpoint among the callbacks, if any."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def checkpoint_callbacks(self) -> list[Callback]:
        """The ModelCheckpoints among the callbacks."""
        return [c for c in self._state.callbacks if "ModelCheckpoint" in {kind.__name__ for kind in type(c).__mro__}]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers of the fit, on a worker."""
        return self._state.optimizers

    @property
    def lr_schedulers(self) -> list[Any]:
        """The learning rate schedulers of the fit, on a worker."""
        return self._state.lr_schedulers

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """The schedulers of the fit, each with its ``interval``, ``frequency``, ``monitor``, ``name`` and optimizer."""
        return self._state.lr_scheduler_configs

    @property
    def schedulers_on_hold(self) -> bool:
        """True while the schedulers of ``configure_optimizers`` do not step. May be set; a fit begins with False."""
        return self._state.schedulers_on_hold

    @schedulers_on_hold.setter
    def schedulers_on_hold(self, value: bool) -> None:
        self._state.schedulers_on_hold = bool(value)

    @property
    def loggers(self) -> list[Any]:
        """The loggers of the run."""
        return self._state.loggers

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        return self._state.loggers[0] if self._state.loggers else None

    @property
    def log_dir(self) -> str | None:
        """The run folder on this machine, or None before a run."""
        return self._state.log_dir

    @property
    def precision(self) -> str:
        """Number format of the run, e.g. ``"32-true"`` or ``"bf16-mixed"``."""
        return self._state.precision

    # -- metrics -------------------------------------------------------------------------------------------------
    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """All metrics logged last, by name; those of the step that runs are this worker's own."""
        if self._state.live_metrics is not None:
            self._state.callback_metrics.update(self._state.live_metrics().callback)
        return self._state.callback_metrics

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The metrics last sent to the loggers."""
        return self._state.logged_metrics

    @property
    def progress_bar_metrics(self) -> dict[str, Tensor]:
        """The metrics logged with ``prog_bar=True``."""
        if self._state.live_metrics is not None:
            self._state.progress_bar_metrics.update(self._state.live_metrics().progress_bar)
        return self._state.progress_bar_metrics

    @property
    def history(self) -> Any:
        """A ``pyarrow.Table``: one row for each logged step or epoch, one column a metric; None before a fit."""
        history = self._state.history
        return history.table() if hasattr(history, "table") else history

    # -- requests ------------------------------------------------------------------------------------------------
    def save_checkpoint(self, path: str | os.PathLike[str], weights_only: bool = False) -> None:
        """Write a checkpoint of the run as it stands: now, in one file; on several workers all ranks must call it.

        ``path``: the file, or a folder that is there (it gets ``model.ckpt``), or a URI of ``pyarrow.fs``; rank 0
        writes it. ``weights_only``: without what only training needs. From ``on_train_batch_end`` and validation's
        hooks on, a fit goes on from it to the bit; what a hook within a batch or at the epoch's end saves begins that
        batch, or those hooks, anew: docs/checkpoints.md. RaylitError outside a run.
        """
        if self._state.save is None:
            raise RaylitError("save_checkpoint works while a run goes on: call it in a hook")
        self._state.save(os.fspath(path), weights_only)

    def pass_over_training_data(self) -> int:
        """Call ``training_step`` once with each of this worker's training batches; return how many they were.

        In training mode, without gradients, optimizers, hooks and logging: what changes are statistics that layers
        keep of what they saw (BatchNorm). All ranks must call it. In ``on_train_end`` and the epoch hooks of a fit;
        NotAttachedError elsewhere.
        """
        if self._state.replay is None:
            raise NotAttachedError("pass_over_training_data works in the hooks of a fit, from on_train_start on")
        return self._state.replay()

    def _refuse_entry(self, name: str) -> ConfigError:
        advice = "call it in the script that made the Trainer"
        return ConfigError(f"trainer.{name}() cannot be called inside a run; {advice}")


class WorkerTrainer(TrainerView):
    """``trainer`` as hooks on a Ray worker see it."""

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a run is going on."""
        raise self._refuse_entry("fit")

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a run is going on."""
        raise self._refuse_entry("validate")

    def test(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a run is going on."""
        raise self._refuse_entry("test")

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a run is going on."""
        raise self._refuse_entry("predict")

    def lr_find(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a run is going on."""
        raise self._refuse_entry("lr_find")

    def scale_batch_size(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a run is going on."""
        raise self._refuse_entry("scale_batch_size")
