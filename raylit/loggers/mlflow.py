"""MLflow, an optional extra. Rank 0 of a run; mlflow is imported when the first value is written."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylit.errors import ConfigError, missing
from raylit.loggers.base import Logger
from raylit.loggers.hparams import flatten

_PARAMS_A_CALL = 100  # the server takes no more
_PARAM_LENGTH = 250
_STATUSES = {"finished": "FINISHED", "success": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_RUN_FILE = ".mlflow_run_id"


class MLFlowLogger(Logger):
    """Logs to an MLflow server, or to ``mlflow.db`` (SQLite) in ``save_dir`` or the run folder.

    ``tracking_uri`` is by default the environment variable MLFLOW_TRACKING_URI. ``experiment`` is an
    ``mlflow.MlflowClient``, ``run_id`` the run in it. A run that is resumed in its run folder goes on with its MLflow
    run.
    """

    goes_on_with = (_RUN_FILE, "mlflow.db")

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
        save_dir: str | os.PathLike[str] | None = None,
        log_model: bool = False,
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
    ) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise missing("mlflow", "mlflow", "MLFlowLogger")
        if log_model:
            raise ConfigError(_NO_MODELS.format("MLFlowLogger"))
        self._experiment_name = experiment_name
        self._run_name = run_name
        self._tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._tags = dict(tags or {})
        self._save_dir = None if save_dir is None else os.fspath(save_dir)
        self._prefix = prefix
        self._artifact_location = artifact_location
        self._run_id = run_id
        self._waiting: dict[str, Any] = {}  # hyperparameters not written yet

    def open(self) -> Any:
        """Connect, and take up or begin the run."""
        uri, artifacts = self._where()
        client = importlib.import_module("mlflow").MlflowClient(uri)
        self._run_id = self._run_id or self._known_run()
        if self._run_id is not None:
            client.set_terminated(self._run_id, "RUNNING")  # it goes on
            return client
        found = client.get_experiment_by_name(self._experiment_name)
        if found is None:
            experiment_id = client.create_experiment(self._experiment_name, artifacts)
        else:
            experiment_id = found.experiment_id
        self._run_id = client.create_run(experiment_id, tags=self._tags, run_name=self._run_name).info.run_id
        if self._run_dir is not None:
            Path(self._run_dir).mkdir(parents=True, exist_ok=True)
            Path(self._run_dir, _RUN_FILE).write_text(self._run_id, encoding="utf-8")
        return client

    @property
    def experiment(self) -> Any:
        """The ``MlflowClient`` on rank 0; a NullExperiment elsewhere."""
        client = super().experiment
        if self._waiting and self.rank == 0:
            waiting, self._waiting = self._waiting, {}
            self._write_params(client, waiting)
        return client

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run; None before it has begun, and on ranks other than 0."""
        return self._run_id

    @property
    def name(self) -> str:
        """The MLflow experiment's name."""
        return self._experiment_name

    @property
    def version(self) -> str | None:
        """The id of the MLflow run."""
        return self._run_id

    @property
    def save_dir(self) -> str | None:
        """The folder that holds ``mlflow.db``, where no server keeps the values."""
        return self._save_dir if self._save_dir is not None else self._run_dir

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send these values in one call; characters that MLflow refuses in names are left out."""
        if self.rank != 0 or not metrics:
            return
        client = self.experiment
        entities = importlib.import_module("mlflow.entities")
        prefix = f"{self._prefix}-" if self._prefix else ""
        now_ms = int(time.time() * 1000)
        values = [
            entities.Metric(re.sub(r"[^\w/. -]+", "", prefix + name), float(value), now_ms, step or 0)
            for name, value in metrics.items()
        ]
        client.log_batch(self._run_id, metrics=values)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Keep the hyperparameters; sent with the first value, each cut to 250 characters."""
        if self.rank != 0:
            return
        self._waiting.update(flatten(params))
        if self._experiment is not None:
            _ = self.experiment  # writes what waits

    def finalize(self, status: str) -> None:
        """End the MLflow run as finished, failed or killed."""
        if self.rank != 0 or (self._experiment is None and not self._waiting):
            return
        self.experiment.set_terminated(self._run_id, _STATUSES.get(status, "FINISHED"))
        self._experiment = None

    def _where(self) -> tuple[str, str | None]:
        """Return the tracking URI and where artifacts go (None: the server knows)."""
        if self._tracking_uri is not None:
            return self._tracking_uri, self._artifact_location
        # Not the older store of plain files: MLflow 3 refuses it.
        folder = Path(self.save_dir or ".").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{folder / 'mlflow.db'}", self._artifact_location or (folder / "mlartifacts").as_uri()

    def _known_run(self) -> str | None:
        file = Path(self._run_dir or ".", _RUN_FILE)
        return file.read_text(encoding="utf-8").strip() if self._run_dir is not None and file.exists() else None

    def _write_params(self, client: Any, params: Mapping[str, Any]) -> None:
        entities = importlib.import_module("mlflow.entities")
        known = client.get_run(self._run_id).data.params  # a parameter cannot change; a resumed run has them already
        listed = [
            entities.Param(name, str(value)[:_PARAM_LENGTH]) for name, value in params.items() if name not in known
        ]
        for first in range(0, len(listed), _PARAMS_A_CALL):
            client.log_batch(self._run_id, params=listed[first : first + _PARAMS_A_CALL])


_NO_MODELS = (
    "{0}(log_model=True): raylit does not upload checkpoints through loggers; they are kept under the Trainer's "
    "storage_path (any pyarrow.fs URI). Leave log_model out."
)
