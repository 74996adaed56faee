"""What a search tells Ray beside its space: the goal, what is watched, what stays, how often a trial is tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.search import Searcher

import raylit
from raylit.callbacks import EarlyStopping, ModelCheckpoint
from raylit.config.placement import PlacementConfig
from raylit.errors import ConfigError, RunExistsError
from raylit.goal import goal_from_json, goal_to_json
from raylit.search.settings import goal_of, placed, run_config_of, watched
from raylit.search.table import Goal, Row, shown_metrics

LOSS = Goal("val_loss", "min")


def test_the_goal_is_what_somebody_says() -> None:
    assert goal_of(None) == goal_of(tune.TuneConfig()) == Goal()
    assert goal_of(tune.TuneConfig(metric="acc", mode="max")) == Goal("acc", "max")
    by_scheduler = tune.TuneConfig(scheduler=tune.schedulers.ASHAScheduler(metric="acc", mode="max"))
    assert goal_of(by_scheduler) == Goal() and watched(by_scheduler, []) == ("acc",)  # it does not tell its mode
    assert goal_of(tune.TuneConfig(search_alg=Searcher(metric="acc", mode="max"))) == Goal("acc", "max")
    several = tune.TuneConfig(search_alg=Searcher(metric=["val_loss", "seconds"], mode=["min", "min"]))
    assert goal_of(several) == Goal() and watched(several, []) == ("val_loss", "seconds")


def test_what_is_watched_is_shown_before_what_is_logged() -> None:
    callbacks = [EarlyStopping(monitor="val_f1", mode="max"), ModelCheckpoint(monitor="val_loss"), ModelCheckpoint()]
    assert watched(None, callbacks) == ("val_f1", "val_loss")
    rows = [Row("a", {}, metrics={"loss": 1.0, "loss_step": 1.0, "val_acc": 0.5, "val_loss": 2.0, "val_x": 1.0})]
    assert shown_metrics(rows, LOSS, ("val_f1",)) == ["val_loss", "val_f1", "val_acc", "val_x"]
    assert shown_metrics(rows, Goal()) == ["val_acc", "val_loss", "val_x", "loss"]


def kept(callbacks: list[Any], goal: Goal = LOSS, clones: bool = False, run_config: Any = None) -> tuple[Any, ...]:
    found = run_config_of(run_config, PlacementConfig(), callbacks, goal, clones).checkpoint_config
    return found.num_to_keep, found.checkpoint_score_attribute, found.checkpoint_score_order


def test_a_model_checkpoint_says_which_checkpoints_of_a_trial_stay() -> None:
    assert kept([]) == (1, "val_loss", "min") and kept([], clones=True) == (4, "val_loss", "min")
    assert kept([], Goal())[:2] == (1, None)
    best_three = ModelCheckpoint(monitor="val_acc", mode="max", save_top_k=3)
    assert kept([ModelCheckpoint(), best_three]) == (3, "val_acc", "max")
    assert kept([best_three], clones=True) == (4, "val_acc", "max")
    assert kept([ModelCheckpoint(save_top_k=-1)]) == (None, "val_loss", "min")
    assert kept([ModelCheckpoint(save_top_k=0)]) == (1, "val_loss", "min")
    own = tune.RunConfig(checkpoint_config=tune.CheckpointConfig(num_to_keep=7))
    assert kept([best_three], run_config=own)[:2] == (7, None)


def test_how_often_a_trial_is_tried_again() -> None:
    def failures(run_config: Any, **given: Any) -> int:
        return int(run_config_of(run_config, PlacementConfig(**given), [], LOSS, False).failure_config.max_failures)

    own = tune.RunConfig(failure_config=tune.FailureConfig(max_failures=5))
    assert failures(None) == 0 and failures(None, max_failures=2) == 2 and failures(own, max_failures=2) == 5


def test_the_run_config_that_was_given_is_left_as_it_was() -> None:
    given = tune.RunConfig(name="x", verbose=2)
    run_config_of(given, PlacementConfig(max_failures=1), [], LOSS, False)
    assert given == tune.RunConfig(name="x", verbose=2)


def test_the_place_is_rays_word_then_the_trainers(tmp_path: Path) -> None:
    import pyarrow.fs

    trainers = PlacementConfig(name="mine", storage_path=str(tmp_path))
    assert placed(tune.RunConfig(), trainers, "Net").name == "mine"
    assert placed(tune.RunConfig(), PlacementConfig(), "Net").name.startswith("Net-search-")
    theirs = placed(tune.RunConfig(name="rays", storage_path="/other"), trainers, "Net")
    assert (theirs.name, theirs.storage_path) == ("rays", "/other")
    on = pyarrow.fs.LocalFileSystem()
    assert placed(tune.RunConfig(storage_filesystem=on), trainers, "Net").run_config.storage_filesystem is on


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b'{"metric": "x"}', b'{"metric": 3, "mode": "min"}', goal_to_json(None, "min")]
)
def test_a_goal_that_is_not_there(content: bytes | None) -> None:
    assert goal_from_json(content) is None


def test_a_goal_is_read_as_it_was_written() -> None:
    assert goal_from_json(goal_to_json("val/lóss", "max")) == ("val/lóss", "max")


class Net(raylit.Module):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_what_is_no_search_is_not_restored(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no search in this folder"):
        raylit.Tuner.restore(str(tmp_path), Net, param_space={"lr": 0.1}, trainer=raylit.Trainer())


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    """Before Ray starts, and before the dry run."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "kept.txt").write_text("x")
    trainer = raylit.Trainer(name="taken", storage_path=str(tmp_path))
    with pytest.raises(RunExistsError, match=r"'taken' exists .*Tuner\.restore"):
        raylit.Tuner(Net, param_space={"lr": 0.1}, trainer=trainer).fit()
