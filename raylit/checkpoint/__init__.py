"""Checkpoints: what they hold, reading and writing them, and building a Module from one. Floor 2, any process."""

from raylit.checkpoint.content import FILE_NAME, apply, check_weights, collect, load_weights, write
from raylit.checkpoint.read import read
from raylit.checkpoint.restore import build_datamodule, build_from_checkpoint

__all__ = [
    "FILE_NAME",
    "apply",
    "build_datamodule",
    "build_from_checkpoint",
    "check_weights",
    "collect",
    "load_weights",
    "read",
    "write",
]
