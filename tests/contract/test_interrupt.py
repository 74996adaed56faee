"""Ctrl-C in a fit in this process: what is kept, how long it waits, and that a run goes on from it (contract 9)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from raylit.callbacks import ModelCheckpoint
from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store
from raylit.trainer import RunInterrupted
from raylit.view import RunState
from raylit.worker.signals import GRACE_S, interrupts_held
from tests.contract.resuming import Net, assert_same, shuffled
from tests.contract.test_resume_trainer import fit, whole_state


class Interrupted(Net):
    """A person presses Ctrl-C within the batch ``at``."""

    at: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if (self.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("callbacks", [(), ({"monitor": "loss_epoch"},), ({"every_n_train_steps": 5},)])
@pytest.mark.parametrize("at", [(1, 1), (1, 3)])
def test_ctrl_c_leaves_a_whole_checkpoint_of_its_batch_and_the_same_script_goes_on_to_the_bit(
    at: tuple[int, int], callbacks: tuple[dict[str, Any], ...], tmp_path: Path
) -> None:
    """In the middle of an epoch and at its end, without a ModelCheckpoint and whatever its rhythm."""

    def given(**more: Any) -> dict[str, Any]:
        return {"accumulate_grad_batches": 2, "callbacks": [ModelCheckpoint(**each) for each in callbacks], **more}

    model = Interrupted()
    model.at = at
    with pytest.raises(RunInterrupted):
        fit(tmp_path, model, shuffled()(), name="run", resume="auto", **given())
    store = Store(Folder(f"{tmp_path}/run/checkpoints"))
    newest = store.manifests()[-1]
    assert (newest.epoch, newest.batches) == (at[0], 4 * at[0] + at[1] + 1) and store.faults(newest) == ()
    assert all(found.manifest is not None for found in store.survey())
    _, whole = fit(tmp_path, Interrupted(), shuffled()(), **given())
    _, rest = fit(tmp_path, Interrupted(), shuffled()(), seed=77, name="run", resume="auto", **given())
    mine, theirs = whole_state(whole), whole_state(rest)
    for common, _ in (mine, theirs):
        del common["callbacks"]  # has the folder in which a ModelCheckpoint keeps its own
    assert_same(mine, theirs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_batch_that_takes_too_long_is_not_waited_for(number: signal.Signals) -> None:
    """SIGTERM also where Ctrl-C is ignored, as in a shell's background job."""
    state = RunState()
    state.holds_interrupts = True
    kind: Any = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    before = signal.getsignal(signal.SIGINT)
    if number == signal.SIGTERM:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def batch_without_end() -> None:
        os.kill(os.getpid(), number)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            time.sleep(0.01)

    try:
        with pytest.raises(kind), interrupts_held(state, grace_s=0.05):
            batch_without_end()
    finally:
        signal.signal(signal.SIGINT, before)
    assert state.stop_requested  # so the signal itself ended nothing
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_batch_that_ends_in_time_is_waited_for() -> None:
    assert GRACE_S == 5.0  # as the page says
    state = RunState()
    state.holds_interrupts = True
    with interrupts_held(state, grace_s=60.0):
        os.kill(os.getpid(), signal.SIGINT)
        assert state.stop_requested and isinstance(state.interrupt, KeyboardInterrupt)
    assert state.interrupt is None
