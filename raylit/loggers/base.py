"""The base of every logger, and the part that those with a folder of their own share. Floor 2.

A logger is made by the person on the driver, travels by pickle to the workers, and is used there: rank 0 writes, on
other ranks everything is accepted and nothing happens. Nothing is imported, opened or created before the first value.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylit.errors import NotAttachedError
from raylit.loggers.hparams import write_yaml
from raylit.loggers.null import NullExperiment


class Logger(ABC):
    """Where metrics and hyperparameters are kept; a ``ports.RunLogger``. Subclass it for another place.

    A subclass overrides ``log_metrics`` and ``log_hyperparams``, which are called on rank 0 only, and ``open`` where
    ``.experiment`` shall be something; it need not call ``super().__init__()``.
    """

    # Files in the run folder that a later stage of the same run (a test after a fit) goes on with.
    goes_on_with: tuple[str, ...] = ()
    # Class attributes and no constructor: a person's subclass need not know of them.
    rank: int = 0
    _run_dir: str | None = None
    _purge_step: int | None = None
    _experiment: Any = None

    def attach(self, log_dir: str | os.PathLike[str] | None, rank: int, purge_step: int | None = None) -> None:
        """Learn the run folder and the rank; called by each worker before the first hook.

        ``log_dir`` is None where there is no folder of this machine: after a run on remote storage, on the driver.
        ``purge_step``: the first step that a resumed run will log again. What an attempt that broke off has logged
        from there on is taken back, where the logger can do that.
        """
        self._run_dir = None if log_dir is None else os.fspath(log_dir)
        self.rank = rank
        self._purge_step = purge_step

    @property
    def experiment(self) -> Any:
        """The library's own object, opened at first use on rank 0; a NullExperiment elsewhere."""
        if self.rank != 0:
            return NullExperiment()
        if self._experiment is None:
            self._experiment = self.open()
        return self._experiment

    def open(self) -> Any:
        """Make what ``experiment`` returns; called once, on rank 0."""
        return NullExperiment()

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep these values; ``step`` is the global step."""

    @abstractmethod
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Keep the run's hyperparameters."""

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Keep a picture of the model, where the logger can show one."""
        return None

    def save(self) -> None:
        """Bring what was logged to the disk or the server."""
        return None

    def finalize(self, status: str) -> None:
        """The run is over (``status``: one of ``raylit.stage.Status``); a later value opens the experiment again."""
        return None

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """A checkpoint was kept (rank 0)."""
        return None

    @property
    def name(self) -> str | None:
        """The name of what is logged: an experiment, a project, a folder."""
        return None

    @property
    def version(self) -> int | str | None:
        """Which run of that name this is."""
        return None

    @property
    def save_dir(self) -> str | None:
        """The folder in which this logger keeps its files; None where it has none, or no run has begun."""
        return self._run_dir

    @property
    def log_dir(self) -> str | None:
        """The folder of this run's files; None as for ``save_dir``."""
        return self.save_dir

    def __getstate__(self) -> dict[str, Any]:
        # An open file or connection stays where it is; the copy opens its own.
        return {key: value for key, value in self.__dict__.items() if key != "_experiment"}


class FolderLogger(Logger):
    """A logger of files. Without ``save_dir`` they lie in the run folder, else in ``save_dir/name/version_N``."""

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self._save_dir = None if save_dir is None else os.path.expanduser(os.fspath(save_dir))
        self._name = name or ""
        self._version = version
        self._prefix = prefix
        self._sub_dir = None if sub_dir is None else os.path.expandvars(os.path.expanduser(os.fspath(sub_dir)))
        self.hparams: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The folder between ``save_dir`` and the version."""
        return self._name

    @property
    def save_dir(self) -> str | None:
        """What was given, else the run folder; None where that is not known yet."""
        return self._save_dir if self._save_dir is not None else self._run_dir

    @property
    def root_dir(self) -> str | None:
        """The folder that holds the versions; the run folder where no ``save_dir`` was given."""
        return self._run_dir if self._save_dir is None else os.path.join(self._save_dir, self._name)

    @property
    def version(self) -> int | str | None:
        """What was given, else the first number that no folder has; the run folder's name without ``save_dir``."""
        if self._version is None and self._save_dir is not None:
            self._version = _next_version(Path(self._save_dir, self._name))
        if self._version is None and self._run_dir is not None:
            return os.path.basename(os.path.normpath(self._run_dir))
        return self._version

    @property
    def log_dir(self) -> str | None:
        """The folder of this run's files; None where no ``save_dir`` was given and no run has begun."""
        root = self.root_dir
        if root is None:
            return None
        if self._save_dir is not None:
            version = self.version
            root = os.path.join(root, version if isinstance(version, str) else f"version_{version}")
        return root if self._sub_dir is None else os.path.join(root, self._sub_dir)

    def attach(self, log_dir: str | os.PathLike[str] | None, rank: int, purge_step: int | None = None) -> None:
        """Learn the run folder and the rank; see ``Logger.attach``."""
        super().attach(log_dir, rank, purge_step)
        _ = self.version  # settled now: a folder that appears later must not change the answer

    def __getstate__(self) -> dict[str, Any]:
        # Settled before the logger travels: every worker, and the driver, must come to the same folder.
        _ = self.version
        return super().__getstate__()

    def _folder(self) -> str:
        """Return the existing folder to write to; NotAttachedError where none is known."""
        folder = self.log_dir
        if folder is None:
            kind = type(self).__name__
            raise NotAttachedError(
                f"{kind}() writes to the run folder, and no run has begun. Use .experiment in a hook, or give a "
                f"folder: {kind}(save_dir='logs')"
            )
        os.makedirs(folder, exist_ok=True)
        return folder

    def _named(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        return {f"{self._prefix}-{name}": value for name, value in metrics.items()} if self._prefix else metrics

    def _save_hparams(self) -> None:
        # The run folder has its own hparams.yaml, written by the worker, which also warns of what is left out.
        if self._save_dir is not None and self.hparams:
            write_yaml(os.path.join(self._folder(), "hparams.yaml"), self.hparams)


class DummyLogger(Logger):
    """Keeps nothing. Stands in for loggers where nothing shall be kept, so that hooks find ``self.logger``."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep nothing."""

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Keep nothing."""

    def __getattr__(self, name: str) -> Any:
        # Methods of other loggers (log_image, watch): accepted. Private and dunder names are asked for by pickle.
        if name.startswith("_"):
            raise AttributeError(name)
        return NullExperiment()


def _next_version(folder: Path) -> int:
    """Return one more than the highest N of the folders ``version_N`` in ``folder``; 0 where there is none."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except FileNotFoundError:
        return 0
    numbers = [name.removeprefix("version_") for name in names if name.startswith("version_")]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
