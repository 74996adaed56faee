"""Weights & Biases, an optional extra. Rank 0 of a run; wandb is imported when the first value is written."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylit.errors import ConfigError, missing
from raylit.loggers.base import Logger
from raylit.loggers.hparams import flatten, plain_value

_STEP = "trainer/global_step"
_RUN_FILE = ".wandb_run_id"


class WandbLogger(Logger):
    """Logs to Weights & Biases; ``experiment`` is the ``wandb.Run``.

    ``offline=True`` writes to ``save_dir`` (by default the run folder) alone, for ``wandb sync`` later. ``version`` and
    ``id`` both name the run's id. Other arguments go to ``wandb.init``. A run that is resumed in its run folder goes on
    with its wandb run. wandb's step is left alone; the x axis is ``trainer/global_step``.
    """

    goes_on_with = (_RUN_FILE,)

    def __init__(
        self,
        name: str | None = None,
        save_dir: str | os.PathLike[str] | None = None,
        version: str | None = None,
        offline: bool = False,
        dir: str | os.PathLike[str] | None = None,
        id: str | None = None,
        project: str | None = None,
        log_model: bool | str = False,
        experiment: Any = None,
        prefix: str = "",
        **kwargs: Any,
    ) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise missing("wandb", "wandb", "WandbLogger")
        if log_model:
            raise ConfigError(
                f"WandbLogger(log_model={log_model!r}): raylit does not upload checkpoints through loggers; they are "
                "kept under the Trainer's storage_path (any pyarrow.fs URI). Leave log_model out."
            )
        folder = save_dir if save_dir is not None else dir
        self._save_dir = None if folder is None else os.path.expanduser(os.fspath(folder))
        self._name = name
        self._id = version or id
        self._project = project or os.environ.get("WANDB_PROJECT", "lightning_logs")
        self._offline = offline
        self._prefix = prefix
        self._options = kwargs
        self._experiment = experiment
        self._waiting: dict[str, Any] = {}  # hyperparameters not written yet

    def open(self) -> Any:
        """Begin the wandb run, or take it up."""
        wandb = importlib.import_module("wandb")
        marker = None if self._run_dir is None else Path(self._run_dir, _RUN_FILE)
        if self._id is None and marker is not None and marker.exists():
            self._id = marker.read_text(encoding="utf-8").strip()
        folder = self.save_dir or "."
        os.makedirs(folder, exist_ok=True)
        options = {"name": self._name, "project": self._project, "id": self._id, "dir": folder, "resume": "allow"}
        if self._offline:
            options["mode"] = "offline"
        run = wandb.init(**{**options, **self._options})
        self._id = run.id
        if marker is not None:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text(run.id, encoding="utf-8")
        run.define_metric(_STEP)
        run.define_metric("*", step_metric=_STEP, step_sync=True)
        return run

    @property
    def experiment(self) -> Any:
        """The ``wandb.Run`` on rank 0; a NullExperiment elsewhere."""
        run = super().experiment
        if self._waiting and self.rank == 0:
            waiting, self._waiting = self._waiting, {}
            run.config.update(waiting, allow_val_change=True)
        return run

    @property
    def name(self) -> str:
        """The wandb project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The id of the wandb run; None before it has begun, and on ranks other than 0."""
        return self._id

    @property
    def save_dir(self) -> str | None:
        """The folder that holds wandb's files."""
        return self._save_dir if self._save_dir is not None else self._run_dir

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log these values as one row."""
        if self.rank != 0 or not metrics:
            return
        prefix = f"{self._prefix}-" if self._prefix else ""
        row = {prefix + name: value for name, value in metrics.items()}
        self.experiment.log(row if step is None else {**row, _STEP: step})

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Keep the hyperparameters in the run's config; sent with the first value."""
        if self.rank != 0:
            return
        self._waiting.update({name: plain_value(value) for name, value in flatten(params).items()})
        if self._experiment is not None:
            _ = self.experiment  # writes what waits

    def watch(self, model: Any, log: str | None = "gradients", log_freq: int = 100, log_graph: bool = True) -> None:
        """Let wandb record the model's gradients, parameters or both ("all")."""
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    def unwatch(self, model: Any) -> None:
        """End what ``watch`` began."""
        self.experiment.unwatch(model)

    def finalize(self, status: str) -> None:
        """Send what waits and end the run: the worker process may be gone a moment later."""
        if self.rank != 0 or (self._experiment is None and not self._waiting):
            return
        self.experiment.finish(exit_code=0 if status in ("finished", "success") else 1)
        self._experiment = None
