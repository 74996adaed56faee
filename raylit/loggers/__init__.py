"""Loggers: where a run's metrics and hyperparameters are kept. Floor 2; written on rank 0.

Importing this loads none of the libraries behind them.
"""

from __future__ import annotations

from collections.abc import Iterable

from raylit.errors import ConfigError
from raylit.loggers.base import DummyLogger, Logger
from raylit.loggers.csv_file import CSVLogger
from raylit.loggers.mlflow import MLFlowLogger
from raylit.loggers.null import NullExperiment
from raylit.loggers.tensorboard import TensorBoardLogger
from raylit.loggers.wandb import WandbLogger

__all__ = [
    "CSVLogger",
    "DummyLogger",
    "Logger",
    "MLFlowLogger",
    "NullExperiment",
    "TensorBoardLogger",
    "WandbLogger",
    "make_loggers",
]


def make_loggers(logger: Logger | Iterable[Logger] | bool | None) -> list[Logger]:
    """Return the loggers that ``Trainer(logger=...)`` stands for.

    True: a TensorBoardLogger in the run folder. False or None: none. ConfigError for anything but loggers.
    """
    if logger is True:
        return [TensorBoardLogger()]
    if logger is False or logger is None:
        return []
    given = [logger] if isinstance(logger, Logger) else list(logger) if isinstance(logger, Iterable) else [logger]
    for each in given:
        if not isinstance(each, Logger):
            raise ConfigError(
                f"logger={each!r}: accepted are True (TensorBoard files in the run folder), False, and one or a "
                "list of raylit.loggers objects (TensorBoardLogger, CSVLogger, ...; for others subclass "
                "raylit.loggers.Logger)"
            )
    return given
