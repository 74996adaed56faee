"""``trainer.save_checkpoint``: in which hooks, on several workers, and where it cannot be written (contract 9).

What it saves at a batch's end and in validations is in ``test_resume_trainer.py``.
"""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raylit.checkpoint import read
from raylit.checkpoint.ranks import read_ranks
from raylit.errors import CheckpointError
from tests.contract.resuming import Net, Recorder, WithOutputs, assert_same, run_recorded, shuffled
from tests.contract.test_resume_trainer import fit, same_end
from tests.two_process.harness import Processes, RankFailed, run_here
from tests.two_process.modules import Numbers, numbers


# -- where ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("hook", "max_epochs"), [("on_train_start", 3), ("on_train_end", 1), ("on_train_end", 2)])
def test_before_the_first_batch_and_after_the_last_it_is_the_same_run(
    hook: str, max_epochs: int, tmp_path: Path
) -> None:
    path = tmp_path / "state.ckpt"

    def save(self: Any) -> None:
        if not path.exists():
            self.trainer.save_checkpoint(path)

    saving = type("Saving", (WithOutputs,), {hook: save})
    given: dict[str, Any] = {"accumulate_grad_batches": 2, "log_every_n_steps": 1}
    fit(tmp_path, saving(), shuffled()(), max_epochs=max_epochs, **given)
    _, whole = fit(tmp_path, saving(), shuffled()(), **given)
    _, rest = fit(tmp_path, saving(), shuffled()(), seed=77, ckpt_path=path, **given)
    same_end(whole, rest)


class Within(Numbers):
    """Draws at the start and at the end of each batch; saves in ``hook`` of batch ``at`` of the second epoch."""

    def __init__(self, path: Path, hook: str, at: int) -> None:
        super().__init__()
        self.path, self.hook, self.at = path, hook, at
        self.first, self.second = list[float](), list[float]()

    def save(self, hook: str) -> None:
        here = (hook, self.trainer.current_epoch, self.trainer.batch_idx)
        if here == (self.hook, 1, self.at) and not self.path.exists():
            self.trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.save("on_train_batch_start")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.first.append(float(torch.rand(())))
        self.save("training_step")
        return super().training_step(batch, batch_idx)

    def on_before_backward(self, loss: Any) -> None:
        self.save("on_before_backward")

    def on_after_backward(self) -> None:
        self.save("on_after_backward")
        self.second.append(float(torch.rand(())))


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "training_step", "on_before_backward", "on_after_backward"])
def test_within_a_batch_that_batch_begins_anew_with_the_draws_and_gradients_of_the_moment(
    hook: str, at: int, tmp_path: Path
) -> None:
    """Each step takes its batch's number off the weight, so that a gradient that is there already counts once more."""
    path, given = tmp_path / "state.ckpt", numbers(1, 2, 4, 8)
    whole, rest = Within(path, hook, at), Within(path, hook, at)
    fit(tmp_path, whole, given, max_epochs=2)
    assert float(whole.weight.detach()) == -30.0
    trainer, _ = fit(tmp_path, rest, given, max_epochs=2, seed=77, ckpt_path=path)
    assert trainer.global_step == 8 and len(rest.first) == 4 - at
    there_already = float(given[at]) if hook == "on_after_backward" else 0.0
    assert float(rest.weight.detach()) == -30.0 - there_already
    drawn = whole.first if hook == "on_train_batch_start" else whole.second
    assert rest.first[0] == drawn[4 + at]


# -- on several workers -----------------------------------------------------------------------------------------------
def saving_case(rank: int, world_size: int, path: str, at: int) -> Any:
    """The whole run's state at its end, and that of a run from what a hook of it saved."""

    class Saving(WithOutputs):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (self.current_epoch, batch_idx) == (1, at) and not Path(path).exists():
                self.trainer.save_checkpoint(path)
                assert read(path)["raylit"]["world_size"] == world_size  # it is there when the call is over

    place: dict[str, Any] = {"rank": rank, "world_size": world_size, "max_epochs": 3, "accumulate_grad_batches": 2}
    _, whole = run_recorded(Saving, shuffled(24, 2), seed=1, recorder=Recorder(only=()), **place)
    common = read(path)
    own = read_ranks(path, common)
    _, rest = run_recorded(
        Saving, shuffled(24, 2), seed=77, recorder=Recorder(only=()), common=common, own=own, **place
    )
    assert_same(whole.end.common, rest.end.common)
    assert_same(whole.end.own, rest.end.own)
    return [part["rank"] for part in common["raylit"]["ranks"]], len(own)


@pytest.mark.parametrize("at", [2, 5])
def test_on_two_workers_it_is_one_file_with_each_ones_part_and_a_fit_goes_on_from_it(
    at: int, two: Processes, tmp_path: Path
) -> None:
    """In the middle of an accumulation group, and at the end of an epoch."""
    assert two(saving_case, str(tmp_path / "kept" / "state.ckpt"), at) == [([0, 1], 2)] * 2
    assert [each.name for each in (tmp_path / "kept").iterdir()] == ["state.ckpt"]


# -- where it cannot be written ---------------------------------------------------------------------------------------
@contextlib.contextmanager
def no_room(size_bytes: int = 3000) -> Iterator[None]:
    """Files of this process cannot grow further than this: the write fails when a part is on the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Large(Numbers):
    """Saves where a save is there already, and has no room for it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.register_buffer("ballast", torch.zeros(100_000))
        self.path, self.told = path, ""

    def on_train_batch_end(self) -> None:
        with no_room() if self.global_rank == 0 else contextlib.nullcontext():
            try:
                self.trainer.save_checkpoint(self.path)
            except CheckpointError as error:
                self.told = str(error)


def full_case(rank: int, world_size: int, path: str) -> str:
    return str(run_here(Large(path), numbers(1, 2), rank=rank, world_size=world_size).module.told)


def test_a_write_that_fails_over_a_file_leaves_the_old_one_and_is_told_on_every_worker(
    two: Processes, tmp_path: Path
) -> None:
    """A disk that is full half-way, whose fault torch words as one of its own."""
    path = tmp_path / "state.ckpt"
    path.write_bytes(b"the old one")
    model = Large(str(path))
    trainer, _ = fit(tmp_path / "runs", model, numbers(1), max_epochs=1)
    words = f"the checkpoint cannot be written to {str(path)!r}: [Errno {errno.EFBIG}] File too large"
    assert model.told == words
    with no_room(), pytest.raises(CheckpointError) as caught:
        trainer.save_checkpoint(path)
    assert str(caught.value) == words
    try:
        assert two(full_case, str(path)) == [words, words]
    except RankFailed as error:
        pytest.fail(f"a rank waits for another: {error}")
    assert path.read_bytes() == b"the old one"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["runs", "state.ckpt"]


def test_a_storage_that_fails_half_way_keeps_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.fs

    def copy_half(source: str, target: str, *, destination_filesystem: Any, **other: Any) -> None:
        with destination_filesystem.open_output_stream(target) as stream:
            stream.write(Path(source).read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "kept" / "state.ckpt"
    trainer, _ = fit(tmp_path / "runs", Net(), shuffled()(), max_epochs=1)
    trainer.save_checkpoint(path.as_uri())
    before = path.read_bytes()
    monkeypatch.setattr(pyarrow.fs, "copy_files", copy_half)
    with pytest.raises(CheckpointError, match="cannot be written to 'file://.*No space left"):
        trainer.save_checkpoint(path.as_uri())
    assert path.read_bytes() == before and [each.name for each in path.parent.iterdir()] == ["state.ckpt"]
