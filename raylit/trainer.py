"""Trainer: what the caller holds. Floor 5, driver side (or the whole run's process with ``num_workers=0``).

It checks, describes the run (``assemble.RunSpec``), has it run here or on Ray workers, and brings the caller's objects
up to date. torch and Ray are imported by what it calls, where they are needed.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from raylit.callback import Callback
from raylit.config.names import refuse_unknown
from raylit.config.trainer import TRAINER_ARGUMENTS, parse_trainer_args
from raylit.datamodule import DataModule
from raylit.errors import ConfigError
from raylit.module import Module
from raylit.stage import Stage
from raylit.view import RunState, TrainerView


class RunInterrupted(SystemExit, KeyboardInterrupt):
    """Ctrl-C ended the run. Not caught, it ends the script with code 130 and no traceback; it is a KeyboardInterrupt."""


class Trainer(TrainerView):
    """Runs a Module: in this process (``num_workers=0``), or on N Ray Train workers.

    Keyword arguments only; the table of all of them, with defaults, is in ``docs/trainer.md``. What happens in training has
    Lightning's names (``max_epochs``, ``accumulate_grad_batches``, ``precision``, ...), where it runs has Ray's
    (``num_workers``, ``use_gpu``, ``resources_per_worker``, ``storage_path``, ``name``, ...). Raises ConfigError or
    UnknownArgumentError at construction for what is unknown, contradictory or impossible.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(RunState())
        self._config = parse_trainer_args(**arguments)
        fit = self._config.fit
        for callback in fit.callbacks:
            if not isinstance(callback, Callback):
                raise ConfigError(f"Trainer(callbacks=[...]) takes raylit.Callback objects; got {type(callback).__name__}")
        self._state.callbacks = list(fit.callbacks)
        self._state.max_epochs = -1 if fit.epoch_limit is None else fit.epoch_limit
        self._state.max_steps = -1 if fit.step_limit is None else fit.step_limit
        self._state.precision = fit.precision
        self._notes_given = False

    # -- entry points --------------------------------------------------------------------------------------------
    def fit(self, model: Any = None, train_dataloaders: Any = None, val_dataloaders: Any = None, datamodule: Any = None,
            ckpt_path: Any = None, *, hparams: dict[str, Any] | None = None, **unknown: Any) -> Any:  # fmt: skip
        """Train ``model`` and return Ray's ``Result`` (in process: an object with the same fields).

        ``model``: a Module, or a Module class with ``hparams`` for its ``__init__``. Afterwards ``model`` holds rank 0's
        weights, buffers and changed attributes. Raises what the Module raised, as the same type.
        """
        refuse_unknown("fit", unknown, _arguments(Trainer.fit))
        if inspect.isclass(model) and issubclass(model, Module):
            model = model(**(hparams or {}))
        elif hparams is not None:
            raise ConfigError("fit(hparams=...) goes with a Module class; the model given is built already")
        model, datamodule = self._check_model(model, "fit"), self._datamodule(datamodule, train_dataloaders, "fit")
        from raylit.driver.runs import fit

        return fit(self, model, {"train": train_dataloaders, "validate": val_dataloaders}, datamodule, ckpt_path)

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
        model = self._check_model(self._state.module if model is None else model, stage.value)
        datamodule = self._datamodule(datamodule, dataloaders, stage.value)
        from raylit.driver.runs import evaluate

        return evaluate(self, stage, model, {stage.value: dataloaders}, datamodule, ckpt_path)

    # -- checks --------------------------------------------------------------------------------------------------
    def _check_model(self, model: Any, entry: str) -> Module:
        if isinstance(model, Module):
            return model
        if model is None:
            raise ConfigError(f"trainer.{entry}() needs a model: pass a raylit.Module")
        hint = f"; pass an object: {model.__name__}(...)" if inspect.isclass(model) else ""
        raise ConfigError(
            f"trainer.{entry}() takes a raylit.Module; got {model if inspect.isclass(model) else type(model).__name__}{hint}"
        )

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
