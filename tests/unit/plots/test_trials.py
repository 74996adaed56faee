"""What is read from a search's results before anything is drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from raylit.errors import ConfigError
from raylit.plots.trials import read_search, varied
from tests.unit.plots.fakes import FakeGrid, FakeResult, realistic, result


def test_a_search_with_all_kinds_of_trials() -> None:
    search = read_search(realistic())
    assert (search.metric, search.mode, search.place) == ("val_loss", "min", "epoch")
    assert search.keys == ("lr", "model/hidden", "model/dropout", "optimizer")
    assert [trial.name for trial in search.failed] == ["a3f1c_00005", "a3f1c_00013"]
    assert search.failed[0].reason == "RuntimeError: CUDA out of memory"
    assert [trial.name for trial in search.without_value] == ["a3f1c_00009"]
    values = [trial.value for trial in search.compared]
    assert len(values) == 17 and values == sorted(values, reverse=True)
    assert search.compared[-1] is search.best
    stopped = [trial for trial in search.trials if trial.status == "stopped"]
    assert stopped and all(len(trial.curve) == trial.epochs < 20 for trial in stopped)


def test_the_best_is_by_the_last_value_and_of_those_that_did_not_fail() -> None:
    results = [
        result("early", {"lr": 1}, [0.1, 0.9]),
        result("failed", {"lr": 2}, [0.01], error=RuntimeError("no")),
        result("diverged", {"lr": 3}, [0.2, math.inf]),
        result("first", {"lr": 4}, [0.9, 0.5]),
        result("equal", {"lr": 5}, [0.9, 0.5]),
    ]
    assert read_search(results).best.name == "first"
    assert read_search(results, mode="max").best.name == "early"


@pytest.mark.parametrize(
    ("reported", "metric", "mode"),
    [
        ({"val_loss": 1.0, "train_acc": 0.5}, "val_loss", "min"),
        ({"val_acc": 0.5, "loss": 1.0}, "val_acc", "max"),
        ({"val/f1": 0.5, "train/loss": 1.0}, "val/f1", "max"),
        ({"loss": 0.5, "lr": 0.1}, "loss", "min"),
        ({"val_top1_acc5": 0.5}, "val_top1_acc5", "max"),
    ],
)
def test_metric_and_mode_where_they_can_be_known(reported: dict[str, float], metric: str, mode: str) -> None:
    search = read_search([FakeResult({"lr": i}, {**reported, "epoch": 1}) for i in range(2)])
    assert (search.metric, search.mode) == (metric, mode)


@pytest.mark.parametrize(
    ("reported", "asked", "text"),
    [
        ({"val_loss": 1.0, "val_acc": 0.5}, {}, "say what trials are compared by.*are: 'val_acc', 'val_loss'"),
        ({"train_acc": 0.5, "epoch": 3, "time_total_s": 1.0}, {}, r"are: 'train_acc'\."),
        ({"note": "x", "done": True}, {}, "no numbers at all"),
        ({"val_loss": 1.0}, {"metric": "val_los"}, "no trial has reported it. Did you mean 'val_loss'"),
        ({"val_loss": 1.0}, {"metric": 3}, r"metric=3\): no trial"),
        ({"val_thing": 1.0}, {}, "which 'val_thing' is better"),
        ({"val_error_map": 1.0}, {}, "which 'val_error_map' is better"),
        ({"val_loss": 1.0}, {"mode": "lowest"}, "mode is 'min' or 'max'"),
        ({"val_loss": math.nan}, {}, "no trial that did not fail has a finite last value of 'val_loss'"),
    ],
)
def test_what_must_be_told_is_asked_for(reported: dict[str, float], asked: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        read_search([FakeResult({"lr": i}, dict(reported)) for i in range(2)], **asked)


def test_a_metric_that_only_some_have_is_taken_when_it_is_asked_for() -> None:
    results = [FakeResult({"lr": 1}, {"val_loss": 1.0, "val_acc": 0.4}), FakeResult({"lr": 2}, {"val_loss": 2.0})]
    assert read_search(results).metric == "val_loss"
    search = read_search(results, metric="val_acc")
    assert search.best.config == {"lr": 1} and len(search.without_value) == 1


def test_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match="no trial"):
        read_search([])
    failed = [result(f"t{i}", {"lr": i}, error=ValueError(f"reason {i}")) for i in range(3)]
    with pytest.raises(ConfigError, match="all 3 trials failed .* ValueError: reason 0"):
        read_search(failed)


def test_rays_own_error_is_taken_off() -> None:
    error = RuntimeError("ray::step() and a long trace")
    error.cause = ValueError("too deep\nsecond line")  # type: ignore[attr-defined]
    search = read_search([result("a", {"lr": 1}, [1.0]), result("b", {"lr": 2}, error=error)])
    assert search.failed[0].reason == "ValueError: too deep"


def test_a_trial_that_failed_before_its_first_report_is_found_in_tunes_file(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps({"lr": 7.0, "model": {"hidden": 8}}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "params.json").write_text("{")
    failed = [FakeResult(None, {"trial_id": "f"}, error=RuntimeError("x"), path=str(tmp_path)),
              FakeResult(None, None, error=RuntimeError("x"), path=str(tmp_path / "broken"))]  # fmt: skip
    search = read_search([result("a", {"lr": 1.0, "model": {"hidden": 8}}, [1.0]), *failed])
    assert [dict(trial.config) for trial in search.failed] == [{"lr": 7.0, "model/hidden": 8}, {}]
    assert search.keys == ("lr",)
    assert [trial.name for trial in search.trials] == ["a", "f", "broken"]


def test_names_are_never_the_same() -> None:
    search = read_search([FakeResult({"lr": i}, {"loss": 1.0}, path=path) for i, path in enumerate(["x/a", "y/a", ""])])
    assert [trial.name for trial in search.trials] == ["a", "a_2", "trial_3"]


def test_places_that_were_trained_again_count_once() -> None:
    frame = pd.DataFrame({"epoch": [1, 2, 3, 2, 3, 4], "step": [10, 20, 30, 20, 30, 40],
                          "val_loss": [9.0, 8.0, 99.0, 7.0, 6.0, 5.0]})  # fmt: skip
    search = read_search([FakeResult({"lr": 1}, frame.iloc[-1].to_dict(), frame)])
    assert search.best.curve == ((1, 9.0), (2, 7.0), (3, 6.0), (4, 5.0))


def test_validation_within_an_epoch_is_drawn_over_steps() -> None:
    frame = pd.DataFrame({"epoch": [0, 1, 1, 2], "step": [5, 10, 15, 20], "val_loss": [4.0, 3.0, 2.0, 1.0]})
    search = read_search([FakeResult({"lr": 1}, frame.iloc[-1].to_dict(), frame), result("b", {"lr": 2}, [3.0, 2.0])])
    assert search.place == "step"
    assert [trial.curve[0][0] for trial in search.trials] == [5, 10]


def test_without_epochs_reports_are_counted_and_gaps_are_left_out() -> None:
    frame = pd.DataFrame({"training_iteration": [1, 2, 3, 4], "loss": [4.0, math.nan, 2.0, 1.0]})
    search = read_search([FakeResult({"lr": 1}, {"loss": 1.0}, frame)])
    assert search.place == "report"
    assert [value for _, value in search.best.curve] == [4.0, 2.0, 1.0]


def test_a_metric_that_the_last_report_lacks_and_no_dataframe() -> None:
    frame = pd.DataFrame({"epoch": [1, 2, 3], "val_loss": [4.0, 2.0, math.nan]})
    lacks = FakeResult({"lr": 1}, {"epoch": 3, "train_loss": 0.5}, frame)
    bare = FakeResult({"lr": 2}, {"epoch": 3, "val_loss": 3.0})
    search = read_search([lacks, bare], metric="val_loss")
    assert [trial.value for trial in search.trials] == [2.0, 3.0]
    assert search.trials[1].curve == ((3, 3.0),)


def test_nested_metrics_are_named_as_tune_names_them() -> None:
    search = read_search([FakeResult({"lr": 1}, {"eval": {"loss": 2.0}, "epoch": 1})], metric="eval/loss")
    assert search.best.value == 2.0


def test_varied() -> None:
    assert varied([{"a": 1, "b": 2.0}, {"a": 1, "b": 2.0000001}]) == ["b"]
    assert varied([{"a": 1, "b": [1, 2]}, {"a": True, "b": [1, 2]}]) == ["a"]
    assert varied([{"a": 1}, {"a": 1, "b": 2}, {}]) == ["b"]
    assert varied([{"a": 1, "b": 2}] * 2) == ["a", "b"], "where nothing differs all are shown"
    assert varied([{}, {}]) == []


def test_any_iterable_of_results_does() -> None:
    assert read_search(FakeGrid([result("a", {"lr": 1}, [1.0])])).best.name == "a"
