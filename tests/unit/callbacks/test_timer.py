"""Timer with a clock that the test moves."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from raylit.callbacks import Timer
from raylit.errors import ConfigError
from tests.unit.engine.small import Numbers, numbers, quiet


class Slow(Numbers):
    """Each training batch takes 10 s, each validation batch 1 s."""

    clock: list[float]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.clock[0] += 10
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock[0] += 1

    test_step = predict_step = validation_step


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Slow:
    clock = [1000.0]
    monkeypatch.setattr("raylit.callbacks.timer.time.monotonic", lambda: clock[0])
    Slow.clock = clock
    return Slow()


def fit(tmp_path: Path, module: Slow, timer: Timer, **given: Any) -> Any:
    trainer = quiet(tmp_path, callbacks=[timer], **{"max_epochs": 5, **given})
    trainer.fit(module, numbers(1, 2, 3), numbers(1, 2))
    return trainer


@pytest.mark.parametrize("duration", ["00:00:00:35", timedelta(seconds=35), {"seconds": 35}])
def test_it_stops_after_the_step_in_which_the_time_is_over(duration: Any, module: Slow, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    timer = Timer(duration)
    trainer = fit(tmp_path, module, timer)
    assert trainer.global_step == 4  # 3 steps and 2 s of validation are 32 s
    assert timer.time_elapsed() == 42 and timer.time_remaining() == -7
    assert capsys.readouterr().out.count("Timer: 0:00:35 of training are over") == 1


def test_by_epoch(module: Slow, tmp_path: Path) -> None:
    assert fit(tmp_path, module, Timer({"seconds": 5}, interval="epoch", verbose=False)).global_step == 3


def test_min_epochs_goes_first(module: Slow, tmp_path: Path) -> None:
    assert fit(tmp_path, module, Timer({"seconds": 5}), min_epochs=2).current_epoch == 2


def test_it_measures_each_stage(module: Slow, tmp_path: Path) -> None:
    timer = Timer()
    trainer = fit(tmp_path, module, timer, max_epochs=2, num_sanity_val_steps=1)
    assert timer.time_elapsed("train") == 64 and timer.time_elapsed("validate") == 4
    assert timer.time_elapsed("sanity_check") == 1 and timer.time_remaining() is None
    assert (timer.start_time(), timer.end_time()) == (1001, 1065)
    trainer.test(module, numbers(1, 2))
    trainer.predict(module, numbers(1))
    assert timer.time_elapsed("test") == 2 and timer.time_elapsed("predict") == 1
    fit(tmp_path, module, timer, max_epochs=1)  # a new fit begins at 0
    assert timer.time_elapsed() == 32


def test_it_tells_the_time_while_it_runs(module: Slow, tmp_path: Path) -> None:
    timer, seen = Timer({"hours": 1}), []

    class Watching(Slow):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append((timer.time_elapsed(), timer.time_remaining(), timer.end_time()))

    fit(tmp_path, Watching(), timer, max_epochs=1)
    assert seen == [(10, 3590, None), (20, 3580, None), (30, 3570, None)]


def test_the_time_survives_a_checkpoint(module: Slow, tmp_path: Path) -> None:
    first = quiet(tmp_path, callbacks=[Timer({"seconds": 50})], max_epochs=1, enable_checkpointing=True)
    result = first.fit(module, numbers(1, 2, 3), numbers(1, 2))
    timer = Timer({"seconds": 50})
    later = quiet(tmp_path, callbacks=[timer], max_epochs=9)
    later.fit(Slow(), numbers(1, 2, 3), numbers(1, 2), ckpt_path=result.checkpoint)
    assert later.global_step == 5 and timer.time_elapsed() == 52


def test_a_run_whose_time_was_used_up_takes_no_step(module: Slow, tmp_path: Path) -> None:
    timer = Timer({"seconds": 5})
    result = quiet(tmp_path, callbacks=[timer], max_epochs=1, enable_checkpointing=True).fit(module, numbers(1))
    later = quiet(tmp_path, callbacks=[Timer({"seconds": 5})], max_epochs=9)
    later.fit(Slow(), numbers(1), ckpt_path=result.checkpoint)
    assert later.global_step == 1


def test_real_time_passes(tmp_path: Path) -> None:
    timer, before = Timer(), time.monotonic()
    quiet(tmp_path, callbacks=[timer]).fit(Numbers(), numbers(1))
    assert 0 < timer.time_elapsed() <= time.monotonic() - before


@pytest.mark.parametrize(("arguments", "words"), [
    ({"duration": 5}, r"Timer\(duration=5\): expected 'DD:HH:MM:SS'"), ({"duration": "5:00"}, "DD:HH:MM:SS"),
    ({"duration": {"hour": 1}}, "Did you mean 'hours'"), ({"interval": "batch"}, "expected 'step' or 'epoch'"),
])  # fmt: skip
def test_refused_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Timer(**arguments)


def test_an_unknown_stage_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'train'"):
        Timer().time_elapsed("training")
