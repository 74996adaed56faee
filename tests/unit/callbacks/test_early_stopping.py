"""EarlyStopping against decisions worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import raylit
from raylit.callbacks import EarlyStopping
from raylit.errors import ConfigError, UnknownArgumentError
from tests.unit.engine.small import Numbers, numbers, quiet


class Told(Numbers):
    """Logs the values that it is told: ``val`` one after each validation, ``train`` one each epoch."""

    def __init__(self, val: list[float] = (), train: list[float] = (), at: str = "step") -> None:
        super().__init__()
        self.val, self.train_values, self.at = list(val), list(train), at
        self.validations = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.train_values and self.at == "step":
            self.log("train", self.train_values[self.current_epoch], on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def training_epoch_end(self, outputs: Any) -> None:
        if self.train_values and self.at == "epoch_end":
            self.log("train", self.train_values[self.current_epoch])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.val and not self.trainer.sanity_checking:
            self.log("val", self.val[self.validations])

    def on_validation_end(self) -> None:
        self.validations += not self.trainer.sanity_checking


def fitted(tmp_path: Path, module: Told, stopper: EarlyStopping, validates: bool = True, **given: Any) -> Any:
    trainer = quiet(tmp_path, callbacks=[stopper], **{"max_epochs": 8, **given})
    trainer.fit(module, numbers(1, 2), numbers(1) if validates else None)
    return trainer


# name: (arguments, values, epochs run, wait_count, best, words of the reason; None: no stop)
CASES = {
    "improves": ({"patience": 1}, [8, 7, 6, 5, 4, 3, 2, 1], 8, 0, 1, None),
    "patience of 2": ({"patience": 2}, [5, 4, 6, 6, 6], 4, 2, 4, "did not improve in 2 checks; the best was 4"),
    "patience of 0 as of 1": ({"patience": 0}, [5, 5], 2, 1, 5, "in 1 check;"),
    "a better one begins anew": ({"patience": 2}, [5, 6, 4, 6, 6], 5, 2, 4, "did not improve"),
    "equal is no improvement": ({"patience": 1}, [5, 5], 2, 1, 5, "did not improve"),
    "max": ({"patience": 2, "mode": "max"}, [1, 2, 0, 1.5], 4, 2, 2, "the best was 2"),
    "min_delta": ({"patience": 1, "min_delta": 0.5}, [5, 4.6], 2, 1, 5, "did not improve by 0.5 in 1 check"),
    "min_delta that is met": ({"patience": 1, "min_delta": 0.5}, [5, 4.4, 4.4], 3, 1, 4.4, "the best was 4.4"),
    "min_delta max": ({"patience": 1, "min_delta": 0.5, "mode": "max"}, [1, 1.4], 2, 1, 1, "by 0.5"),
    "not finite": ({"patience": 5}, [5, float("nan")], 2, 0, 5, "val = nan is not finite; the best was 5"),
    "infinite": ({"patience": 5, "mode": "max"}, [5, float("inf")], 2, 0, float("inf"), "val = inf is not finite"),
    "stopping_threshold": ({"stopping_threshold": 2.0}, [5, 2, 1.5], 3, 0, 1.5, "better than stopping_threshold=2"),
    "divergence_threshold": ({"divergence_threshold": 9.0}, [5, 9, 9.5], 3, 2, 5, "worse than divergence_threshold=9"),
    "divergence max": ({"divergence_threshold": 1.0, "mode": "max"}, [5, 0.5], 2, 1, 5, "worse than divergence"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_decisions(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, values, epochs, waited, best, words = CASES[case]
    stopper = EarlyStopping("val", **arguments)
    trainer = fitted(tmp_path, Told([float(value) for value in values]), stopper)
    assert trainer.current_epoch == epochs and stopper.wait_count == waited
    assert float(stopper.best_score) == pytest.approx(best)
    printed = capsys.readouterr().out.count("EarlyStopping: ")
    if words is None:
        assert stopper.stopping_reason_message is None and stopper.stopped_epoch == 0 and printed == 0
    else:
        assert words in stopper.stopping_reason_message and printed == 1
        assert stopper.stopped_epoch == epochs - 1 and trainer.should_stop


def test_without_check_finite_nan_is_waited_out(tmp_path: Path) -> None:
    stopper = EarlyStopping("val", check_finite=False)
    nan = float("nan")
    trainer = fitted(tmp_path, Told([5, nan, 3, nan, 2, 1]), stopper, max_epochs=6)
    assert trainer.current_epoch == 6 and float(stopper.best_score) == 1


def test_checked_after_each_validation_within_an_epoch(tmp_path: Path) -> None:
    stopper = EarlyStopping("val", patience=2)
    trainer = fitted(tmp_path, Told([5, 6, 7]), stopper, val_check_interval=1)
    # Validations after steps 1, 2 and 3: the third check is the second without improvement.
    assert trainer.global_step == 3 and stopper.stopped_epoch == 1


@pytest.mark.parametrize("at", ["step", "epoch_end"])
@pytest.mark.parametrize("given", [{}, {"val_check_interval": 1}, {"check_val_every_n_epoch": 3}])
def test_a_training_metric_is_checked_at_the_end_of_each_epoch(at: str, given: dict[str, Any], tmp_path: Path) -> None:
    stopper = EarlyStopping("train", patience=2)
    trainer = fitted(tmp_path, Told([1.0] * 20, [5, 4, 6, 6, 6], at=at), stopper, **given)
    assert trainer.current_epoch == 4 and float(stopper.best_score) == 4


def test_without_validation(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, Told(train=[5, 4, 6, 6, 6]), EarlyStopping("train", patience=1), validates=False)
    assert trainer.current_epoch == 3


def test_check_on_train_epoch_end_counts_epochs(tmp_path: Path) -> None:
    stopper = EarlyStopping("val", patience=2, check_on_train_epoch_end=True)
    # Two validations an epoch, the second counts; a value that stays is no improvement.
    trainer = fitted(tmp_path, Told([9, 5, 1, 6, 1, 7]), stopper, val_check_interval=1)
    assert trainer.current_epoch == 3 and float(stopper.best_score) == 5


def test_validation_in_some_epochs_only(tmp_path: Path) -> None:
    stopper = EarlyStopping("val", patience=1)
    trainer = fitted(tmp_path, Told([5, 5]), stopper, check_val_every_n_epoch=2)
    assert trainer.current_epoch == 4


def test_min_epochs_goes_first(tmp_path: Path) -> None:
    stopper = EarlyStopping("val", patience=1)
    trainer = fitted(tmp_path, Told([5, 6, 7, 8, 9]), stopper, min_epochs=4)
    assert trainer.current_epoch == 4 and stopper.stopped_epoch == 1


def test_the_sanity_check_does_not_count(tmp_path: Path) -> None:
    class Sanity(Told):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", -100.0 if self.trainer.sanity_checking else self.val[self.validations])

    stopper = EarlyStopping("val", patience=1)
    trainer = fitted(tmp_path, Sanity([5, 4, 4]), stopper, num_sanity_val_steps=1)
    assert trainer.current_epoch == 3 and float(stopper.best_score) == 4


def test_a_dry_run_checks_nothing(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, Told([5]), EarlyStopping("not logged"), fast_dev_run=True, max_epochs=None)
    assert trainer.global_step == 1


def test_evaluations_outside_a_fit_do_not_count(tmp_path: Path) -> None:
    stopper = EarlyStopping("val", patience=1)
    trainer = fitted(tmp_path, Told([5, 4, 3, 3]), stopper, max_epochs=2)
    trainer.validate(trainer.model, numbers(1))
    assert stopper.wait_count == 0 and float(stopper.best_score) == 4


def test_verbose_tells_of_each_improvement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted(tmp_path, Told([5, 4, 4]), EarlyStopping("val", patience=1, verbose=True))
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("EarlyStopping")] == [
        "EarlyStopping: val = 5", "EarlyStopping: val = 4, 1 better than before",
        "EarlyStopping: val did not improve in 1 check; the best was 4",
    ]  # fmt: skip


def test_a_metric_that_nobody_logs_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"monitor='vall'\): no metric of this name is logged. Did you mean 'val'\? "
                                          r"Logged are: train, val. .*or give strict=False"):  # fmt: skip
        fitted(tmp_path, Told([5, 4], [1, 1]), EarlyStopping("vall"))


def test_not_strict_says_it_once_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fitted(tmp_path, Told([5, 4, 3]), EarlyStopping("odd", strict=False), max_epochs=3)
    assert trainer.current_epoch == 3
    assert capsys.readouterr().out.count("no metric of this name is logged") == 1


def test_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    first = EarlyStopping("val", patience=3)
    trainer = quiet(tmp_path, callbacks=[first], max_epochs=3, enable_checkpointing=True)
    result = trainer.fit(Told([5, 6, 7]), numbers(1), numbers(1))
    assert first.wait_count == 2
    again = EarlyStopping("val", patience=3)
    later = quiet(tmp_path, callbacks=[again], max_epochs=9)
    later.fit(Told([8, 9]), numbers(1), numbers(1), ckpt_path=result.checkpoint)
    assert later.current_epoch == 4 and again.wait_count == 3 and float(again.best_score) == 5


def test_state_round_trip_and_key() -> None:
    one, other = EarlyStopping("val", mode="max"), EarlyStopping("val", mode="max")
    one.wait_count, one.stopped_epoch, one.best_score = 2, 7, torch.tensor(0.5)
    other.load_state_dict(one.state_dict())
    assert (other.wait_count, other.stopped_epoch, float(other.best_score)) == (2, 7, 0.5)
    assert one.state_key == "EarlyStopping{'monitor': 'val', 'mode': 'max'}"


@pytest.mark.parametrize(("arguments", "words"), [
    ({}, "give the name of the metric to compare"), ({"monitor": ""}, "give the name"),
    ({"monitor": "a", "mode": "auto"}, "expected 'min'"), ({"monitor": "a", "patience": -1}, "0 or more"),
    ({"monitor": "a", "patience": 1.5}, "number of checks"),
])  # fmt: skip
def test_refused_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EarlyStopping(**arguments)


def test_unknown_argument_is_refused_with_the_right_name() -> None:
    with pytest.raises(UnknownArgumentError, match="Instead: min_delta"):
        EarlyStopping("val", delta=0.1)


def test_two_stoppers_each_watch_their_own(tmp_path: Path) -> None:
    patient, hasty = EarlyStopping("val", patience=5), EarlyStopping("train", patience=1)
    trainer = quiet(tmp_path, callbacks=[patient, hasty], max_epochs=8)
    trainer.fit(Told([5, 6, 7, 8], [1, 2, 3, 4]), numbers(1), numbers(1))
    assert trainer.current_epoch == 2 and patient.stopping_reason_message is None and hasty.wait_count == 1


def test_imported_under_the_package() -> None:
    assert raylit.callbacks.EarlyStopping is EarlyStopping
