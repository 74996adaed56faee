"""raylit: train a PyTorch Module on a Ray cluster, unchanged.

``import raylit`` starts nothing and imports neither Ray nor anything but torch: names are resolved when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from raylit.callback import Callback
from raylit.checkpoint import build_datamodule, build_from_checkpoint
from raylit.datamodule import DataModule
from raylit.export import to_onnx, to_program, to_torchscript
from raylit.module import Module
from raylit.seed import seed_everything
from raylit.summary import summarize
from raylit.trainer import Trainer

if TYPE_CHECKING:
    from raylit import callbacks, loggers, plots, profilers, strategies
    from raylit import data as data
    from raylit.search import Tuner as Tuner

__version__ = "0.1.0"

Module._build_from_checkpoint = staticmethod(build_from_checkpoint)
DataModule._build_from_checkpoint = staticmethod(build_datamodule)
Module._to_onnx, Module._to_torchscript, Module._to_program = to_onnx, to_torchscript, to_program
Module._summarize = summarize

LightningModule = Module
LightningDataModule = DataModule

__all__ = ["Callback", "DataModule", "LightningDataModule", "LightningModule", "Module", "Trainer", "Tuner",
           "__version__", "callbacks", "loggers", "plots", "profilers", "seed_everything", "strategies"]  # fmt: skip

_LAZY = ("callbacks", "data", "loggers", "plots", "profilers", "strategies")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"raylit.{name}")
    if name == "Tuner":
        return importlib.import_module("raylit.search").Tuner
    raise AttributeError(f"module 'raylit' has no attribute {name!r}")
