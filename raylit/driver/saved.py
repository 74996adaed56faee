"""``trainer.save_checkpoint`` after a run, in the script that holds the Trainer. Floor 5, driver side."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from raylit.checkpoint import read
from raylit.checkpoint.content import collect, weights_of
from raylit.checkpoint.ranks import ordered, read_ranks
from raylit.errors import CheckpointError, RaylitError
from raylit.uri import redacted
from raylit.worker.save import write_file

if TYPE_CHECKING:
    from raylit.trainer import Trainer


def save_checkpoint(trainer: Trainer, path: str | os.PathLike[str], weights_only: bool) -> None:
    """Write what the last fit left to one file: its whole state, or the weights where it kept no checkpoint.

    Raises RaylitError before the first run, CheckpointError where the file cannot be written.
    """
    if trainer._state.module is None:
        raise RaylitError("save_checkpoint has nothing to save: this Trainer has run nothing yet")
    checkpoint: dict[str, Any]
    if trainer._last_checkpoint is None:
        if not weights_only:
            warnings.warn(
                "save_checkpoint writes the weights only: the fit kept no state (enable_checkpointing=False, "
                "fast_dev_run, or it was not finished)",
                UserWarning,
                stacklevel=3,
            )
        checkpoint = collect(trainer._state, weights_only=True)
    else:
        checkpoint = read(trainer._last_checkpoint)
        own = read_ranks(trainer._last_checkpoint, checkpoint)
        if weights_only:
            checkpoint = weights_of(checkpoint)
        elif own:
            checkpoint["raylit"]["ranks"] = ordered(list(own.values()))
    try:
        write_file(checkpoint, os.fspath(path))
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint cannot be written to {redacted(os.fspath(path))!r}: {redacted(str(error))}"
        ) from None
