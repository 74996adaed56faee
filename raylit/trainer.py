"""Trainer: what the caller holds. Floor 5, driver side (or the whole run's process with ``num_workers=0``).

It checks, describes the run (``assemble.RunSpec``), has it run here or on Ray workers, and brings the caller's objects
up to date. torch and Ray are imported by what it calls, where they are needed.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from raylit.callback import Callback
from raylit.config.names import refuse_unknown
from raylit.config.trainer import TRAINER_ARGUMENTS, parse_trainer_args
from raylit.datamodule import DataModule
from raylit.errors import ConfigError
from raylit.module import Module
from raylit.stage import Stage
from raylit.view import RunState, TrainerView

if TYPE_CHECKING:
    from raylit.driver.lr_finder import LRFinder


class RunInterrupted(SystemExit, KeyboardInterrupt):
    """Ctrl-C ended the run. Not caught, it ends the script with code 130 and no traceback."""


class Trainer(TrainerView):
    """Runs a Module: in this process (``num_workers=0``), or on N Ray Train workers.

    Keyword arguments only; the table of all of them, with defaults, is in ``docs/trainer.md``. What happens in training
    has Lightning's names (``max_epochs``, ``accumulate_grad_batches``, ``precision``, ...), where it runs has Ray's
    (``num_workers``, ``use_gpu``, ``resources_per_worker``, ``storage_path``, ``name``, ...). Raises ConfigError or
    UnknownArgumentError at construction for what is unknown, contradictory or impossible.
    """

    def __init__(
        self,
        *,
        # how long
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | timedelta | Mapping[str, int] | None = None,
        # how much of the data
        limit_train_batches: int | float = 1.0,
        limit_val_batches: int | float = 1.0,
        limit_test_batches: int | float = 1.0,
        limit_predict_batches: int | float = 1.0,
        overfit_batches: int | float = 0.0,
        fast_dev_run: int | bool = False,
        val_check_interval: int | float = 1.0,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int = 2,
        reload_dataloaders_every_n_epochs: int = 0,
        use_distributed_sampler: bool = True,
        # optimisation
        accumulate_grad_batches: int | Mapping[int, int] = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        precision: str | int = "32",
        truncated_bptt_steps: int | None = None,
        automatic_optimization: bool | None = None,
        sync_batchnorm: bool = False,
        deterministic: bool | str = False,
        benchmark: bool | None = None,
        detect_anomaly: bool = False,
        inference_mode: bool = True,
        seed: int | None = None,
        strategy: Any = "auto",
        # what is kept and shown
        callbacks: Any = None,
        logger: Any = True,
        log_every_n_steps: int = 50,
        enable_progress_bar: bool = True,
        enable_model_summary: bool = True,
        enable_checkpointing: bool = True,
        profiler: Any = None,
        # where it runs: Ray's names
        num_workers: int | tuple[int, int] = 1,
        use_gpu: bool | str = "auto",
        resources_per_worker: Mapping[str, float] | None = None,
        placement_strategy: str | None = None,
        scaling_config: Any = None,
        run_config: Any = None,
        failure_config: Any = None,
        name: str | None = None,
        storage_path: str | None = None,
        resume: str | None = None,
        elastic_batch: str = "keep",
        max_failures: int | None = None,
        progress_timeout: str | timedelta | Mapping[str, int] | None = "00:00:30:00",
        runtime_env: Mapping[str, Any] | None = None,
        start_timeout: str | timedelta | Mapping[str, int] | None = None,
        prepare_data_per_node: bool | None = None,
        **unknown: Any,
    ) -> None:
        # First line: locals() holds the arguments and nothing else yet.
        given = {key: value for key, value in locals().items() if key not in ("self", "unknown", "__class__")}
        super().__init__(RunState())
        self._last_checkpoint: Any = None  # of the last fit
        self._run_folder: str | None = None  # of the last fit, where it has one
        self._own_checkpoints: Any = None  # the ModelCheckpoint of fits that were given none
        failed: ConfigError | None = None
        try:
            self._config = parse_trainer_args(**given, **unknown)
        except ConfigError as error:
            failed = error
        if failed is not None:
            raise failed.with_traceback(None)  # the caller's line and the message say it all
        fit = self._config.fit
        for callback in fit.callbacks:
            if not isinstance(callback, Callback):
                kind = type(callback).__name__
                raise ConfigError(f"Trainer(callbacks=[...]) takes raylit.Callback objects; got {kind}")
        from raylit.loggers import make_loggers

        make_loggers(fit.logger)  # refuses what is no logger
        from raylit.callbacks.configuring import configured

        self._state.settings = configured(fit, fit.callbacks).fit
        self._state.callbacks = list(fit.callbacks)
        self._state.max_epochs = -1 if fit.epoch_limit is None else fit.epoch_limit
        self._state.max_steps = -1 if fit.step_limit is None else fit.step_limit
        self._state.precision = fit.precision
        self._notes_given = False

    # -- entry points --------------------------------------------------------------------------------------------
    def fit(self, model: Any = None, train_dataloaders: Any = None, val_dataloaders: Any = None, datamodule: Any = None,
            ckpt_path: Any = None, *, hparams: dict[str, Any] | None = None, **unknown: Any) -> Any:  # fmt: skip
        """Train ``model`` and return Ray's ``Result`` (in process: an object with the same fields).

        ``model``: a Module, or a Module class with ``hparams`` for its ``__init__``. Afterwards ``model`` holds rank
        0's weights, buffers and changed attributes. Raises what the Module raised, as the same type.
        """
        refuse_unknown("fit", unknown, _arguments(Trainer.fit))
        if inspect.isclass(model) and issubclass(model, Module):
            model = model(**(hparams or {}))
        elif hparams is not None:
            raise ConfigError("fit(hparams=...) goes with a Module class; the model given is built already")
        model, datamodule = self._check_model(model, "fit"), self._datamodule(datamodule, train_dataloaders, "fit")
        from raylit.driver import faults, runs

        given = {"train": train_dataloaders, "validate": val_dataloaders}
        try:
            return runs.fit(self, model, given, datamodule, ckpt_path)
        except Exception as error:
            failed = faults.for_caller(error)
        raise failed

    def validate(self, model: Any = None, dataloaders: Any = None, datamodule: Any = None, ckpt_path: Any = None,
                 **unknown: Any) -> list[dict[str, float]]:  # fmt: skip
        """Run the validation loop; return a dict of metrics for each dataloader."""
        refuse_unknown("validate", unknown, _arguments(Trainer.validate))
        metrics: list[dict[str, float]] = self._evaluate(Stage.VALIDATE, model, dataloaders, datamodule, ckpt_path)
        return metrics

    def test(self, model: Any = None, dataloaders: Any = None, datamodule: Any = None, ckpt_path: Any = None,
             **unknown: Any) -> list[dict[str, float]]:  # fmt: skip
        """Run the test loop, each sample exactly once; return a dict of metrics for each dataloader."""
        refuse_unknown("test", unknown, _arguments(Trainer.test))
        metrics: list[dict[str, float]] = self._evaluate(Stage.TEST, model, dataloaders, datamodule, ckpt_path)
        return metrics

    def predict(self, model: Any = None, dataloaders: Any = None, datamodule: Any = None, ckpt_path: Any = None,
                **unknown: Any) -> list[Any]:  # fmt: skip
        """Return ``predict_step``'s outputs in data set order; a list of lists where there are several dataloaders."""
        refuse_unknown("predict", unknown, _arguments(Trainer.predict))
        predicted: list[Any] = self._evaluate(Stage.PREDICT, model, dataloaders, datamodule, ckpt_path)
        return predicted

    def _evaluate(self, stage: Stage, model: Any, dataloaders: Any, datamodule: Any, ckpt_path: Any) -> Any:
        same_model = model is None
        model = self._check_model(self._state.module if same_model else model, stage.value)
        datamodule = self._datamodule(datamodule, dataloaders, stage.value)
        from raylit.driver import faults, runs

        try:
            return runs.evaluate(self, stage, model, {stage.value: dataloaders}, datamodule, ckpt_path, same_model)
        except Exception as error:
            failed = faults.for_caller(error)
        raise failed

    # -- before a fit --------------------------------------------------------------------------------------------
    def lr_find(self, model: Any = None, train_dataloaders: Any = None, val_dataloaders: Any = None,
                datamodule: Any = None, *, min_lr: float = 1e-8, max_lr: float = 1.0, num_training: int = 100,
                mode: str = "exponential", early_stop_threshold: float | None = 4.0, update_attr: bool = True,
                attr_name: str = "", **unknown: Any) -> LRFinder:  # fmt: skip
        """Try learning rates from ``min_lr`` to ``max_lr``, one each optimizer step, and set ``model`` to the best.

        The steps are taken on a copy: of ``model`` only the learning rate changes, and nothing is written. Loaders
        begin anew as often as ``num_training`` steps need. ``val_dataloaders`` are not looked at.

        Args:
            mode: the learning rate grows by a factor (``"exponential"``) or a sum (``"linear"``) at each step.
            early_stop_threshold: stop when the smoothed loss is more than so many times the best; None: never.
            update_attr: set ``lr`` or ``learning_rate``, or ``attr_name``, of the Module and of its hyperparameters, to
                ``suggestion()``.

        Raises ConfigError for a wrong argument, where the Module has no such attribute, and for manual optimisation;
        OptimizerError for several optimizers; what the Module raised, as the same type.
        """
        refuse_unknown("lr_find", unknown, _arguments(Trainer.lr_find))
        model = self._check_model(model, "lr_find")
        datamodule = self._datamodule(datamodule, train_dataloaders, "lr_find")
        from raylit.driver import faults, tuning

        try:
            return tuning.lr_find(
                self, model, train_dataloaders, datamodule, min_lr=min_lr, max_lr=max_lr, num_training=num_training,
                mode=mode, early_stop_threshold=early_stop_threshold, update_attr=update_attr, attr_name=attr_name,
            )  # fmt: skip
        except Exception as error:
            failed = faults.for_caller(error)
        raise failed

    def scale_batch_size(self, model: Any = None, train_dataloaders: Any = None, val_dataloaders: Any = None,
                         datamodule: Any = None, *, mode: str = "power", steps_per_trial: int = 3, init_val: int = 2,
                         max_trials: int = 25, batch_arg_name: str = "batch_size", **unknown: Any) -> int:  # fmt: skip
        """Look for the largest batch size that can be trained with, set ``batch_arg_name`` to it, and return it.

        Sizes are doubled from ``init_val`` until memory is exhausted on any worker, or the data set has fewer samples
        than one batch on each; ``mode="binsearch"`` then looks between the last two. Each is tried with
        ``steps_per_trial`` optimizer steps, on a copy of ``model``, and nothing is written. Set are the Module, the
        DataModule, and the hyperparameters of both, where they have ``batch_arg_name``; ``train_dataloader()`` of one
        of them must make its loader of that size. Where not even ``init_val`` fits, sizes are halved.

        Raises ConfigError for a wrong argument, loaders that are passed, and where there is no such attribute;
        ResourceError where nothing fits; what the Module raised, as the same type.
        """
        refuse_unknown("scale_batch_size", unknown, _arguments(Trainer.scale_batch_size))
        model = self._check_model(model, "scale_batch_size")
        datamodule = self._datamodule(datamodule, train_dataloaders, "scale_batch_size")
        from raylit.driver import faults, tuning

        try:
            return tuning.scale_batch_size(
                self, model, train_dataloaders, datamodule, mode=mode, steps_per_trial=steps_per_trial,
                init_val=init_val, max_trials=max_trials, batch_arg_name=batch_arg_name,
            )  # fmt: skip
        except Exception as error:
            failed = faults.for_caller(error)
        raise failed

    def save_checkpoint(self, path: str | os.PathLike[str], weights_only: bool = False) -> None:
        """In a hook: write the run's state as it stands (``TrainerView.save_checkpoint``). After a fit: what it left.

        After a fit the file has the state at its end, to go on from with ``fit(ckpt_path=)``; the weights alone, with a
        warning, where the fit kept no checkpoint. RaylitError before the first run.
        """
        if self._state.save is not None:
            super().save_checkpoint(path, weights_only)
            return
        from raylit.driver import saved

        saved.save_checkpoint(self, path, weights_only)

    # -- checks --------------------------------------------------------------------------------------------------
    def _check_model(self, model: Any, entry: str) -> Module:
        if isinstance(model, Module):
            return model
        if model is None:
            raise ConfigError(f"trainer.{entry}() needs a model: pass a raylit.Module")
        hint = f"; pass an object: {model.__name__}(...)" if inspect.isclass(model) else ""
        given = model if inspect.isclass(model) else type(model).__name__
        raise ConfigError(f"trainer.{entry}() takes a raylit.Module; got {given}{hint}")

    def _datamodule(self, datamodule: Any, loaders: Any, entry: str) -> DataModule | None:
        if isinstance(loaders, DataModule):
            raise ConfigError(f"trainer.{entry}() got a DataModule as its loaders: pass it as datamodule=")
        if datamodule is not None and not isinstance(datamodule, DataModule):
            raise ConfigError(
                f"trainer.{entry}(datamodule=...) takes a raylit.DataModule; got {type(datamodule).__name__}"
            )
        if datamodule is not None and loaders is not None:
            raise ConfigError(f"trainer.{entry}() got loaders and a datamodule; pass one of them")
        return datamodule

    def __getstate__(self) -> dict[str, Any]:
        # A Module or callback that keeps the Trainer must travel; what it holds of a run does not.
        state = copy.copy(self.__dict__)
        state["_state"] = RunState()
        return state


def _arguments(method: Any) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name not in ("self", "unknown")]


__all__ = ["TRAINER_ARGUMENTS", "RunInterrupted", "Trainer"]
