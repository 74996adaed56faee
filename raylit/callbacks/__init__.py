"""What a person hangs beside the Module, under Lightning's names. Floor 2; runs on every worker.

Importing this loads no optional package.
"""

from __future__ import annotations

import importlib
from typing import Any

from raylit.callback import Callback
from raylit.callbacks.accumulation import GradientAccumulationScheduler
from raylit.callbacks.device_stats import DeviceStatsMonitor
from raylit.callbacks.early_stopping import EarlyStopping
from raylit.callbacks.lambda_callback import LambdaCallback
from raylit.callbacks.lr_monitor import LearningRateMonitor
from raylit.callbacks.model_summary import ModelSummary, RichModelSummary
from raylit.callbacks.progress import ProgressBar, RichProgressBar, TQDMProgressBar
from raylit.callbacks.swa import StochasticWeightAveraging
from raylit.callbacks.terminate_on_nan import TerminateOnNaN
from raylit.callbacks.timer import Timer
from raylit.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging

__all__ = [
    "Callback",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelSummary",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "TerminateOnNaN",
    "Timer",
    "WeightAveraging",
]

# Found when they are asked for: name -> the file of this folder that has it.
_LAZY = {"ModelCheckpoint": "model_checkpoint"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = f"{__name__}.{_LAZY[name]}"
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != module:  # a fault within it
                raise
            raise AttributeError(f"raylit.callbacks.{name} is not there yet") from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
