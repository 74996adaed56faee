"""Contract 6: ``trainer.history``, one row for each logged step or epoch, also in the run folder as Parquet.

Written while training goes on: readable in the middle, and after an exception, Ctrl-C and SIGKILL.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import raylit
from tests.unit.engine.small import Numbers, numbers, quiet

ROOT = Path(__file__).resolve().parents[2]


class Logs(Numbers):
    def training_step(self, batch, batch_idx):
        self.log("loss", batch.sum(), on_step=True, on_epoch=True)
        if self.global_step == 3:
            self.log("late", 0.5)  # a column that begins in the middle
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val", batch.mean())


def stored(tmp_path: Path, name: str = "run"):
    return pq.read_table(tmp_path / name / "history.parquet")


def test_a_row_for_each_step_and_epoch_in_memory_and_in_the_run_folder(tmp_path):
    trainer = quiet(tmp_path, name="run", max_epochs=2, log_every_n_steps=2)
    trainer.fit(Logs(), numbers(1, 2, 3), numbers(4))
    expected = {
        "epoch": [0, 0, 0, 1, 1, 1, 1], "step": [2, 3, 3, 4, 6, 6, 6],
        "loss_step": [2.0, None, None, 1.0, 3.0, None, None], "val": [None, 4.0, None, None, None, 4.0, None],
        "loss_epoch": [None, None, 2.0, None, None, None, 2.0], "late": [None, None, None, 0.5, None, None, None],
    }  # fmt: skip
    assert trainer.history.to_pydict() == expected
    assert stored(tmp_path).equals(trainer.history)
    import pandas

    assert pandas.read_parquet(tmp_path / "run" / "history.parquet")["val"].dropna().tolist() == [4.0, 4.0]


def test_no_step_rows_where_they_are_turned_off(tmp_path):
    trainer = quiet(tmp_path, log_every_n_steps=0)
    trainer.fit(Logs(), numbers(1, 2, 3))
    assert trainer.history.to_pydict() == {"epoch": [0], "step": [3], "loss_epoch": [2.0]}


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_or_ctrl_c_in_the_first_epoch_keeps_what_was_logged(tmp_path, kind):
    class Breaks(Logs):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                raise kind("planned")

    trainer = quiet(tmp_path, name="run", log_every_n_steps=1)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        trainer.fit(Breaks(), numbers(1, 2, 3))
    assert trainer.history.to_pydict() == {"epoch": [0, 0], "step": [1, 2], "loss_step": [1.0, 2.0]}
    assert stored(tmp_path).equals(trainer.history)


def test_a_failing_logger_does_not_take_the_history_with_it(tmp_path):
    class Broken(raylit.loggers.DummyLogger):
        def save(self):
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        quiet(tmp_path, name="run", log_every_n_steps=1, logger=Broken()).fit(Logs(), numbers(1, 2))
    assert stored(tmp_path).to_pydict()["loss_step"][:2] == [1.0, 2.0]


KILLED = """
import sys, time
from pathlib import Path
import pyarrow.parquet as pq
from tests.unit.engine.small import numbers, quiet
from tests.contract.test_history import Logs

class Waits(Logs):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        time.sleep(0.005)  # else the loop would leave the thread that writes little of a busy core
        file = Path(self.trainer.log_dir, "history.parquet")
        rows = pq.read_table(file).num_rows if file.exists() else 0
        if rows > 20:
            print(rows, flush=True)
            time.sleep(60)  # to be killed

trainer = quiet(sys.argv[1], name="run", max_time="00:00:01:00", log_every_n_steps=1)
trainer.fit(Waits(), numbers(*range(20)), numbers(4))
"""


def test_a_killed_run_leaves_a_readable_history(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        rows = int(process.stdout.readline())  # read by the run itself, while it goes on
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.stdout.close()
    table = stored(tmp_path)
    assert table.num_rows >= rows > 20
    columns = table.to_pydict()
    steps = [value for value in columns["loss_step"] if value is not None]
    assert steps == [float(step % 20) for step in range(len(steps))]
    assert columns["val"].count(4.0) == columns["loss_epoch"].count(9.5) >= 1
