"""Ctrl-C and SIGTERM in a fit in this process: the batch that runs is finished, so that its state can be kept. Floor 4.

Only where somebody keeps checkpoints and training goes on; else, and at the second signal, the run ends at once.
"""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from raylit.view import RunState

GRACE_S = 5.0  # a batch that takes longer is not waited for
_DEFAULT = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextmanager
def interrupts_held(state: RunState, grace_s: float = GRACE_S) -> Iterator[None]:
    """Let signals wait for the end of the batch, ``grace_s`` at most. Handlers that someone else has set stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timers: list[threading.Timer] = []

    def handle(number: int, frame: FrameType | None) -> None:
        first = state.interrupt is None
        if first:
            # 128 + number: what a shell reports of a process that a signal ended.
            state.interrupt = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        assert state.interrupt is not None
        if not first or not state.holds_interrupts:
            raise state.interrupt
        state.stop_requested = True  # the loop looks at this after each batch
        # The same signal once more: another one might be ignored here, as SIGINT is in a shell's background jobs.
        timers.append(threading.Timer(grace_s, _thread.interrupt_main, (number,)))
        timers[-1].daemon = True
        timers[-1].start()

    taken = {number: signal.signal(number, handle) for number, usual in _DEFAULT.items()
             if signal.getsignal(number) is usual}  # fmt: skip
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        for number, before in taken.items():
            signal.signal(number, before)
        state.interrupt = None
