"""A trial goes on from what is left of its checkpoints, and counts its reports as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from ray import tune

from raylit.search.trainable import TrialSteps
from raylit.wire import Job
from tests.unit.search.test_trial import spec

REPORTS = 3  # one an epoch


class Tunes:
    """What of Tune's class matters here: it loads a checkpoint that is there."""

    def restore(self, checkpoint: tune.Checkpoint) -> None:
        with checkpoint.as_directory() as folder:
            assert Path(folder).is_dir(), "this checkpoint is gone"
            self.load_checkpoint(folder)  # type: ignore[attr-defined]


class Steps(TrialSteps, Tunes):
    logdir = "/working_dirs/trial"


def steps(tmp_path: Path) -> Steps:
    made = Steps()
    made.setup({"lr": 0.05}, cloudpickle.dumps(spec()), Job("fit", b""), str(tmp_path))
    return made


def saved(made: Steps, tmp_path: Path, number: int) -> Path:
    """A checkpoint, in the trial's folder, as Tune calls it."""
    folder = tmp_path / "trial" / f"checkpoint_{number:06d}"
    folder.mkdir(parents=True)
    made.save_checkpoint(str(folder))
    return folder


def end_of(made: Steps) -> dict[str, Any]:
    while not (report := made.step())["done"]:
        continue
    made.cleanup()
    return report


def truncated(folder: Path) -> None:
    data = (folder / "model.ckpt").read_bytes()
    (folder / "model.ckpt").write_bytes(data[: len(data) // 2])


def without_a_rank(folder: Path) -> None:
    (folder / "rank_00000.ckpt").unlink()


def without_its_number(folder: Path) -> None:
    (folder / "reports.json").write_text("")


def of_two_checkpoints(folder: Path) -> None:
    shutil.copy(folder.with_name("checkpoint_000001") / "rank_00000.ckpt", folder)


@pytest.mark.parametrize("damage", [truncated, without_a_rank, without_its_number, of_two_checkpoints])
def test_a_checkpoint_that_is_gone_has_the_newest_whole_one_in_its_place(tmp_path: Path, damage: Any) -> None:
    first = steps(tmp_path)
    first.step()
    gone = saved(first, tmp_path, 0)
    first.step()
    saved(first, tmp_path, 1)
    expected = first.step()
    damage(saved(first, tmp_path, 2))  # as a process leaves it that was killed while it wrote
    first.cleanup()
    shutil.rmtree(gone)
    second = steps(tmp_path)
    second.restore(tune.Checkpoint(str(gone)))
    assert second.step() == expected and expected["training_iteration"] == REPORTS
    second.cleanup()


def test_a_newer_checkpoint_of_the_trial_is_the_one_and_none_of_a_donor(tmp_path: Path) -> None:
    first = steps(tmp_path)
    first.step()
    known = saved(first, tmp_path, 0)
    first.step()
    saved(first, tmp_path, 1)
    first.cleanup()
    second = steps(tmp_path)
    second.restore(tune.Checkpoint(str(known)))
    assert second.step()["training_iteration"] == 3
    second.cleanup()
    clone = steps(tmp_path)
    clone.logdir = "/working_dirs/clone"
    clone.restore(tune.Checkpoint(str(known)))
    assert clone.step()["training_iteration"] == 2
    clone.cleanup()


def test_a_trial_that_had_ended_is_at_its_end_again_and_counts_no_report_more(tmp_path: Path) -> None:
    """As after a driver that was killed before Tune had written the end down."""
    first = steps(tmp_path)
    while not (expected := first.step())["done"]:
        continue
    known = saved(first, tmp_path, 0)
    first.cleanup()
    for _ in range(2):
        again = steps(tmp_path)
        again.restore(tune.Checkpoint(str(known)))
        assert again.step() == expected and expected["training_iteration"] == REPORTS
        again.save_checkpoint(str(known))
        again.cleanup()


def test_where_no_checkpoint_is_left_tune_says_so(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="this checkpoint is gone"):
        steps(tmp_path).restore(tune.Checkpoint(str(tmp_path / "trial" / "checkpoint_000000")))
    empty = tmp_path / "empty"
    empty.mkdir()
    made = steps(tmp_path)
    made.save_checkpoint(str(empty))  # nothing was trained: nothing is kept, and it begins anew
    assert not list(empty.iterdir())
    made.load_checkpoint(str(empty))
    assert end_of(made)["training_iteration"] == REPORTS
