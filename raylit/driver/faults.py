"""How an exception of a run reaches the caller: its own type, the person's own frames, one line on where. Floor 5.

An error on a worker comes without frames of this process (see ``worker/failure.py``); one in this process keeps the
frames of the person's code and of torch, and loses those of raylit between them, which say nothing about the mistake.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from raylit.errors import RaylitError, WorkerLostError
from raylit.worker.failure import bare

_PACKAGE = str(Path(__file__).resolve().parents[1]) + "/"


def for_caller(error: Exception) -> Exception:
    """Return ``error`` ready to be raised by an entry point of the Trainer."""
    if "raylit_failure" in error.__dict__ or isinstance(error, WorkerLostError):
        bare(error)
        return error
    frames: list[TracebackType] = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(traceback)
        traceback = traceback.tb_next
    ours = [frame.tb_frame.f_code.co_filename.startswith(_PACKAGE) for frame in frames]
    if frames and ours[-1] and not isinstance(error, RaylitError):
        return error  # a fault of raylit's: every frame is wanted
    _note(error)
    kept: TracebackType | None = None
    for frame, own in zip(reversed(frames), reversed(ours), strict=True):
        if not own:
            kept = TracebackType(kept, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    error.__traceback__ = kept
    return error


def _note(error: Exception) -> None:
    """Say where the run stood; Python 3.10 shows no notes."""
    where = getattr(error, "raylit_where", None)
    if not where or sys.version_info < (3, 11) or (isinstance(error, RaylitError) and "loop" not in where):
        return
    names = {"epoch": "epoch", "batch_idx": "batch", "global_step": "step"}
    place = [str(where["stage"])]
    place += [f"{text} {where[key]}" for key, text in names.items() if where.get(key) is not None]
    error.add_note(f"raised in {', '.join(place)}")
