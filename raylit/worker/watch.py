"""Notices that a worker makes no progress, says where it stands, and ends it. Floor 4, worker side.

A rank that waits for ever (a deadlock of the person's threads, a file system that is away, a collective that not every
rank calls) would keep all others in their next collective until that one's own time-out, half an hour later, and then
the message would name the wrong ranks. A daemon thread looks at the run's counters instead: where nothing was counted
for ``progress_timeout`` seconds within a loop, it reports this rank's place and stack to the driver. A rank that is not
itself waiting for others then ends its process, which the driver takes for a failure, and restarts with
``max_failures``. Ranks that only wait give it half as long again before they end too, so a run always ends.

The step path pays nothing: the counters are the run's own.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

from raylit.stage import Stage
from raylit.view import RunState
from raylit.wire import World
from raylit.worker.failure import library_folders

_PATIENCE = 1.5  # times the time-out, for ranks that wait for others
_LOOKS = 10  # at the counters, within one time-out
_FRAMES = 4
_FLUSH_S = 1.0  # for the report to leave the process
# A thread in one of these waits for other ranks. Backward is among them: DDP averages gradients in it.
_WAITING = ("torch/distributed/", "torch/nn/parallel/", "torch/autograd/graph.py", "raylit/worker/preemption.py")


class ProgressWatch:
    """Watches the run of the thread that makes it, until ``close``.

    Args:
        state: the run's counters, which the engine writes.
        world: this worker's place.
        timeout_s: seconds without progress within a loop.
        report: gets the event ``{"kind": "stalled", ...}``; called once.
        end: ends this process.
    """

    def __init__(
        self, state: RunState, world: World, timeout_s: float, report: Callable[[dict[str, Any]], None],
        end: Callable[[], None] | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._state, self._world, self._timeout_s = state, world, timeout_s
        self._report, self._end, self._clock = report, end or _exit, clock
        self._thread_id = threading.get_ident()
        self._position: Any = None
        self._since = clock()
        self._reported = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raylit-watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(self._timeout_s / _LOOKS):
            self.look()

    def look(self) -> None:
        """Compare the counters with those of the last look, and act where they have not moved for too long."""
        state, now = self._state, self._clock()
        position = (state.loop, state.epoch, state.batch_idx, state.global_step, state.eval_batches)
        if position != self._position or state.loop is None:
            self._position, self._since, self._reported = position, now, False
            return
        stalled_s = now - self._since
        if stalled_s < self._timeout_s:
            return
        frame = sys._current_frames().get(self._thread_id)
        waiting = is_waiting(frame)
        if not self._reported:
            self._reported = True
            self._report(self._event(frame, waiting))
        if not waiting or stalled_s >= _PATIENCE * self._timeout_s:
            self._end()

    def _event(self, frame: FrameType | None, waiting: bool) -> dict[str, Any]:
        state = self._state
        where: dict[str, Any] = {"stage": state.stage.value if state.stage else None, "global_step": state.global_step}
        if state.stage is Stage.FIT:
            where |= {"epoch": state.epoch, "batch_idx": max(state.batch_idx, 0)}
        if state.loop is not None:
            where["loop"] = state.loop.value
        return {
            "kind": "stalled", "rank": self._world.global_rank, "node": self._world.node_name,
            "waiting": waiting, "timeout_s": self._timeout_s, "where": where, "frames": own_frames(frame),
        }  # fmt: skip


def is_waiting(frame: FrameType | None) -> bool:
    """Whether a thread that stands at ``frame`` waits for other ranks; told from the files of its innermost frames.

    Those around the person's own code say nothing: DDP's forward is around every training_step.
    """
    inside = library_folders()
    while frame is not None and frame.f_code.co_filename.startswith(("<frozen", *inside)):
        if any(part in frame.f_code.co_filename.replace(os.sep, "/") for part in _WAITING):
            return True
        frame = frame.f_back
    return False


def own_frames(frame: FrameType | None) -> list[list[Any]]:
    """The innermost frames of the person's own files as [file, line, function, source]; of any where there are none."""
    found: list[list[Any]] = [
        [f.filename, f.lineno or 0, f.name, (f.line or "").strip()] for f in traceback.extract_stack(frame)
    ]
    inside = library_folders()
    own = [each for each in found if not each[0].startswith(("<frozen", *inside))]
    return (own or found[-3:])[-_FRAMES:]


def _exit() -> None:
    time.sleep(_FLUSH_S)  # the report is sent by another thread, and the run is lost by now
    os._exit(1)
