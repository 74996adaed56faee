"""Whether a run on workers is started again after it failed: a pure decision. Floor 5.

raylit starts it again itself, and not Ray Train, which cannot tell a mistake in the script, that happens at the same
step each time, from a machine that was lost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from raylit.errors import ProgressTimeoutError, RaylitError, WorkerLostError

DEFAULT = 3  # restarts after a lost worker, where checkpoints are kept
_UNPLACED = 5  # times in a row that room is looked for anew
_ADDRESS = re.compile(r"0x[0-9a-f]+")


@dataclass(frozen=True)
class Fault:
    """What ended an attempt, as far as two of them are compared."""

    # "lost": a worker process is gone; "preempted": with its node, which was announced; "unplaced": room that was there
    # had gone when the workers were to be started; "raised": an exception, or a stop; "final": nothing would change
    kind: str
    what: str = ""  # type and message, without what differs from process to process
    place: tuple[object, ...] = ()  # stage, epoch, step, batch


def fault_of(error: BaseException) -> Fault:
    """Sort an exception that ``launch`` raised."""
    if getattr(error, "raylit_unplaced", False):
        return Fault("unplaced")
    message = _ADDRESS.sub("0x", (str(error).splitlines() or [""])[0])
    failure = getattr(error, "raylit_failure", None)
    if isinstance(error, WorkerLostError) and not isinstance(error, ProgressTimeoutError):
        return Fault("preempted" if getattr(error, "raylit_preempted", False) else "lost")
    if isinstance(error, ProgressTimeoutError):
        return Fault("raised", type(error).__name__)
    if failure is None or isinstance(error, RaylitError) or not isinstance(error, Exception):
        return Fault("final")  # Ctrl-C, too few resources, a mistake that was refused
    place = tuple(failure.where.get(name) for name in ("stage", "epoch", "global_step", "batch_idx"))
    return Fault("raised", f"{failure.type_name}: {_ADDRESS.sub('0x', failure.message) or message}", place)


def start_again(
    fault: Fault, before: list[Fault], max_failures: int | None, keeps: bool, max_preemptions: int = -1
) -> bool:
    """Decide after ``fault``; ``before``: those of the attempts before it.

    ``max_failures``: so many restarts, -1: any number; None: ``DEFAULT``, of lost workers, where checkpoints are kept
    (``keeps``). An exception is given another chance only where restarts were asked for, and never twice at one place.
    Nodes that were announced as lost count apart, up to ``max_preemptions`` (-1: any number); so do workers for which
    the room had gone.
    """
    if fault.kind == "unplaced":
        return before[-_UNPLACED:] != [fault] * _UNPLACED
    if fault.kind == "preempted":
        return keeps and (max_preemptions == -1 or before.count(fault) < max_preemptions)
    before = [each for each in before if each.kind not in ("preempted", "unplaced")]
    allowed = max_failures if max_failures is not None else DEFAULT if keeps else 0
    if fault.kind == "final" or (allowed != -1 and len(before) >= allowed):
        return False
    if fault.kind == "lost":
        return True
    return max_failures is not None and fault not in before[-1:]
