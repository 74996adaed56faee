"""Checkpoints in a person's hands: the fit's own at the end, ``save_checkpoint``, what is refused (contract 9)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, Sampler

import raylit
from raylit.checkpoint import read
from raylit.checkpoint.ranks import read_ranks
from raylit.errors import CheckpointError, RaylitError
from raylit.ports import RunSnapshot
from raylit.stage import SafePoint
from tests.contract.resuming import (
    Net,
    Noisy,
    Recorder,
    Unsized,
    WithOutputs,
    assert_same,
    check_every_point,
    run_recorded,
    seed_all,
    shuffled,
    through_file,
)

QUIET: dict[str, Any] = {
    "num_workers": 0, "use_gpu": False, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def validation() -> Any:
    return DataLoader(Noisy(6, seed=1), batch_size=3)


def fit(folder: Path, model: Any, loaders: Any, seed: int = 1, ckpt_path: Any = None, val: Any = None,
        datamodule: Any = None, **given: Any) -> tuple[raylit.Trainer, Any]:  # fmt: skip
    trainer = raylit.Trainer(storage_path=str(folder), **{"max_epochs": 3, **QUIET, **given})
    seed_all(seed)
    return trainer, trainer.fit(model, loaders, val, datamodule, ckpt_path)


def whole_state(result: Any) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    common = read(result.checkpoint)
    return common, read_ranks(result.checkpoint, common)


def same_end(whole: Any, resumed: Any) -> None:
    for mine, theirs in zip(whole_state(whole), whole_state(resumed)):
        assert_same(mine, theirs)


# Stopped and gone on -------------------------------------------------------------------------------------------------
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_stop_of_any_run_goes_on_to_the_bit(data: st.DataObject) -> None:
    """Stop after any number of steps, start the script again with other seeds, and end where the whole run ended."""
    unknown = data.draw(st.booleans(), "unknown length")
    given: dict[str, Any] = {
        "max_epochs": data.draw(st.integers(1, 3), "epochs"),
        "accumulate_grad_batches": data.draw(st.integers(1, 3), "accumulate"),
        "val_check_interval": data.draw(st.sampled_from([1, 2, 3]), "val interval"),
        "log_every_n_steps": data.draw(st.sampled_from([0, 1, 2]), "log interval"),
        "val": validation,
    }
    make = data.draw(st.sampled_from([Net, WithOutputs]), "module")
    count = data.draw(st.sampled_from([12, 14, 15, 16, 18]), "samples")

    def loaders() -> Any:
        return DataLoader(Unsized(count), batch_size=4) if unknown else shuffled(count)()

    _, whole = run_recorded(make, loaders, seed=1, **given)
    last = whole.end.common["global_step"]
    stop = data.draw(st.integers(1, last), "steps")
    _, half = run_recorded(make, loaders, seed=1, max_steps=stop, **given)
    assert half.end.common["global_step"] == stop
    start = {"common": half.end.common, "own": {0: half.end.own}}
    _, rest = run_recorded(make, loaders, seed=77, **start, **given)
    assert_same(whole.end.common, rest.end.common)
    assert_same(whole.end.own, rest.end.own)


def test_a_stop_that_was_asked_for_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    class Stops(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.current_epoch == 1 and batch_idx == 1:
                self.trainer.should_stop = True

    _, whole = fit(tmp_path, Net(), shuffled()())
    _, half = fit(tmp_path, Stops(), shuffled()())
    state, _ = whole_state(half)
    assert (state["epoch"], state["global_step"], state["loops"]["fit_loop"]["batches"]) == (1, 6, 2)
    _, rest = fit(tmp_path, Net(), shuffled()(), seed=77, ckpt_path=half.checkpoint)
    same_end(whole, rest)


# save_checkpoint -----------------------------------------------------------------------------------------------------
SAVING_HOOKS = [
    "on_train_batch_end", "on_validation_start", "on_validation_batch_start", "validation_epoch_end",
    "on_validation_end", "on_validation_model_train",
]  # fmt: skip


@pytest.mark.parametrize("hook", SAVING_HOOKS)
@pytest.mark.parametrize("at", [(0, 1), (1, 3)])
def test_what_a_hook_saves_goes_on_to_the_bit(hook: str, at: tuple[int, int], tmp_path: Path) -> None:
    """The batch, its logging and the validation that were under way are brought to their end."""
    path = tmp_path / "kept" / "state.ckpt"

    def save(self: Any, *args: Any) -> None:
        if (self.current_epoch, self.trainer.batch_idx) == at and not path.exists():
            self.trainer.save_checkpoint(path)

    saving = type("Saving", (WithOutputs,), {hook: save})
    given: dict[str, Any] = {"val_check_interval": 2, "accumulate_grad_batches": 2, "log_every_n_steps": 1}
    _, whole = fit(tmp_path, saving(), shuffled()(), val=validation(), **given)
    assert [each.name for each in path.parent.iterdir()] == ["state.ckpt"]
    _, rest = fit(tmp_path, saving(), shuffled()(), seed=77, val=validation(), ckpt_path=path, **given)
    same_end(whole, rest)


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "training_epoch_end", "on_epoch_end"])
def test_what_a_hook_saves_at_the_end_of_an_epoch_does_that_end_anew(hook: str, tmp_path: Path) -> None:
    path = tmp_path / "state.ckpt"

    def save(self: Any, *args: Any) -> None:
        if self.current_epoch == 1 and not path.exists():
            self.trainer.save_checkpoint(path)

    saving = type("Saving", (Net,), {hook: save})
    _, whole = fit(tmp_path, saving(), shuffled()())
    _, rest = fit(tmp_path, saving(), shuffled()(), seed=77, ckpt_path=path)
    same_end(whole, rest)


def test_save_checkpoint_of_weights_only_and_into_a_folder(tmp_path: Path) -> None:
    class Saving(Net):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()

        def on_train_end(self) -> None:
            (tmp_path / "folder").mkdir()
            self.trainer.save_checkpoint(tmp_path / "folder")
            self.trainer.save_checkpoint(f"file://{tmp_path}/by_uri.ckpt")
            self.trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    model = Saving(width=4)
    fit(tmp_path, model, shuffled()(), max_epochs=1)
    weights = read(tmp_path / "weights.ckpt")
    assert not {"optimizer_states", "lr_schedulers", "callbacks"} & set(weights)
    assert read(tmp_path / "by_uri.ckpt")["raylit"]["ranks"]
    for path in ("folder", "folder/model.ckpt", "weights.ckpt", "by_uri.ckpt"):
        loaded = Saving.load_from_checkpoint(tmp_path / path)
        assert loaded.hparams.width == 4
        assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    with pytest.raises(CheckpointError, match=r"weights only.*load_from_checkpoint"):
        fit(tmp_path, Saving(), shuffled()(), ckpt_path=tmp_path / "weights.ckpt")


def test_save_checkpoint_after_a_fit_is_what_the_fit_left(tmp_path: Path) -> None:
    trainer, result = fit(tmp_path, Net(), shuffled()(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    common = read(tmp_path / "after.ckpt")
    assert_same(common["state_dict"], read(result.checkpoint)["state_dict"])
    _, whole = fit(tmp_path, Net(), shuffled()())
    _, rest = fit(tmp_path, Net(), shuffled()(), seed=77, ckpt_path=tmp_path / "after.ckpt")
    same_end(whole, rest)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "optimizer_states" not in read(tmp_path / "weights.ckpt")


def test_save_checkpoint_where_nothing_was_kept_or_run(tmp_path: Path) -> None:
    with pytest.raises(RaylitError, match="run nothing yet"):
        raylit.Trainer(max_epochs=1, num_workers=0).save_checkpoint(tmp_path / "none.ckpt")
    trainer, _ = fit(tmp_path, Net(), shuffled()(), max_epochs=1, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="weights only"):
        trainer.save_checkpoint(tmp_path / "weights.ckpt")
    assert read(tmp_path / "weights.ckpt")["global_step"] == 4


def test_a_path_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    class Saving(Net):
        def on_train_start(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "file" / "state.ckpt")

    with pytest.raises(CheckpointError, match=r"cannot be written to '.*state.ckpt'"):
        fit(tmp_path, Saving(), shuffled()(), max_epochs=1)


# Data that says itself where it stands -------------------------------------------------------------------------------
class OwnPlace:
    """A loader with torchdata's convention, and random state of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.at, self.resumed, self.read = 0, False, 0

    def __iter__(self) -> Iterator[Any]:
        if not self.resumed:
            self.at = 0
        self.resumed = False
        while self.at < 5:
            self.at += 1
            self.read += 1
            x = torch.randn(4, 3, generator=self.generator)
            yield x, x[:, :2]

    def __len__(self) -> int:
        return 5

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.resumed = state["at"], True
        self.generator.set_state(state["generator"])


class OwnPlaceUnsized(OwnPlace):
    __len__: Any = None


class FixedData(OwnPlace):
    """Batches that follow from their place alone."""

    def __iter__(self) -> Iterator[Any]:
        for x, _ in super().__iter__():
            self.generator.manual_seed(self.at)
            yield torch.randn(4, 3, generator=self.generator), x.new_zeros(4, 2)


class FixedDataUnsized(FixedData):
    __len__: Any = None


class OwnPlaceData(OwnPlace, IterableDataset[Any]):
    """The same as a data set, a batch an item."""


class OwnPlaceSampler(Sampler[int]):
    """Each epoch's order follows from the one before."""

    def __init__(self) -> None:
        self.order = list(range(14))

    def __iter__(self) -> Iterator[int]:
        self.order = [self.order[(5 * i + 3) % 14] for i in range(14)]
        return iter(self.order)

    def __len__(self) -> int:
        return 14

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = list(state["order"])


STATEFUL: dict[str, Callable[[], Any]] = {
    "loader": OwnPlace,
    "loader_of_unknown_length": OwnPlaceUnsized,
    "dataset": lambda: DataLoader(OwnPlaceData(), batch_size=None),
    "sampler": lambda: DataLoader(Noisy(14), batch_size=4, sampler=OwnPlaceSampler()),
}


@pytest.mark.parametrize("kind", STATEFUL)
def test_loaders_data_sets_and_samplers_with_a_state_of_their_own(kind: str) -> None:
    check_every_point(Net, STATEFUL[kind], max_epochs=3)


@pytest.mark.parametrize("loaders", [FixedData, FixedDataUnsized, STATEFUL["sampler"]])
def test_loaders_with_a_state_that_are_left_before_their_end(loaders: Any) -> None:
    check_every_point(Net, loaders, own_too=False, max_epochs=3, limit_train_batches=3)


def test_nothing_is_read_and_dropped_where_the_loader_knows_its_place() -> None:
    recorder = Recorder(only=(2,))
    run_recorded(Net, OwnPlace, seed=1, recorder=recorder, max_epochs=1)
    snapshot = recorder.points[2][1]
    assert snapshot is not None
    loader = OwnPlace()
    run_recorded(Net, lambda: loader, seed=1, common=snapshot.common, own={0: snapshot.own}, max_epochs=1)
    assert loader.read == 2


# What is refused, and what others wrote ------------------------------------------------------------------------------
def test_a_newer_schema_and_another_configuration_are_refused(tmp_path: Path) -> None:
    _, result = fit(tmp_path, Net(), shuffled()(), max_epochs=1)
    common = read(result.checkpoint)
    common["raylit"]["schema"] = 99
    torch.save(common, tmp_path / "newer.ckpt")
    with pytest.raises(CheckpointError, match=r"schema 99.*knows up to 1.*newer raylit"):
        fit(tmp_path, Net(), shuffled()(), ckpt_path=tmp_path / "newer.ckpt")
    Net.load_from_checkpoint(tmp_path / "newer.ckpt")

    def groups(module: Any) -> Any:
        return torch.optim.SGD([{"params": [p]} for p in module.parameters()], lr=0.1)

    with pytest.raises(CheckpointError, match=r"optimizer_states\[0\].*does not fit the SGD.*another configuration"):
        fit(tmp_path, Net(groups), shuffled()(), ckpt_path=result.checkpoint)


def test_a_damaged_file_of_a_rank_is_named(tmp_path: Path) -> None:
    _, result = fit(tmp_path, Net(), shuffled()(), max_epochs=1)
    (Path(result.checkpoint.path) / "rank_00000.ckpt").write_bytes(b"not a checkpoint")
    (Path(result.checkpoint.path) / "manifest.json").unlink(missing_ok=True)  # it would tell of the damage before
    with pytest.raises(CheckpointError, match=r"rank_00000.ckpt cannot be loaded"):
        fit(tmp_path, Net(), shuffled()(), ckpt_path=result.checkpoint)


def lightnings(model: Net, processed: int) -> dict[str, Any]:
    """The keys of a file that Lightning 2 wrote at the end of an epoch."""
    optimizer = model.configure_optimizers()
    progress = {"ready": 1, "started": 1, "processed": processed, "completed": processed - 1}
    return {
        "epoch": processed - 1, "global_step": 4, "pytorch-lightning_version": "2.5.0",
        "state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [],
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": progress, "current": progress}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": ""}}, "hparams_name": "kwargs",
        "hyper_parameters": {},
    }  # fmt: skip


def test_a_fit_goes_on_from_lightnings_file(tmp_path: Path) -> None:
    model = Net()
    torch.save(lightnings(model, 1), tmp_path / "lightning.ckpt")
    trainer, _ = fit(tmp_path, Net(), shuffled()(), ckpt_path=tmp_path / "lightning.ckpt", max_epochs=2)
    assert (trainer.current_epoch, trainer.global_step) == (2, 8)


def test_the_file_has_the_keys_that_lightning_reads(tmp_path: Path) -> None:
    _, result = fit(tmp_path, Net(), shuffled()(), max_epochs=1)
    common = torch.load(Path(result.checkpoint.path) / "model.ckpt", weights_only=True)
    assert {"state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "hyper_parameters", "callbacks",
            "loops", "pytorch-lightning_version", "hparams_name"} <= set(common)  # fmt: skip
    assert set(common["loops"]) == {"fit_loop", "validate_loop", "test_loop", "predict_loop"}
    assert common["raylit"]["schema"] == 1


def test_the_sanity_check_does_not_run_again(tmp_path: Path) -> None:
    class Checked(Net):
        checks = 0

        def on_validation_start(self) -> None:
            self.checks += self.trainer.sanity_checking

    first, second = Checked(), Checked()
    _, result = fit(tmp_path, first, shuffled()(), val=validation(), max_epochs=1)
    fit(tmp_path, second, shuffled()(), val=validation(), max_epochs=2, ckpt_path=result.checkpoint)
    assert (first.checks, second.checks) == (1, 0)


# Interrupted ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_batch_and_its_state_is_kept(number: signal.Signals) -> None:
    class Interrupted(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 1 and batch_idx == 1:
                os.kill(os.getpid(), number)
            return super().training_step(batch, batch_idx)

    kind: Any = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    _, whole = run_recorded(Net, shuffled(), seed=1, max_epochs=3)
    recorder = InterruptRecorder(only=())
    with pytest.raises(kind):
        run_recorded(Interrupted, shuffled(), seed=1, recorder=recorder, held=True, max_epochs=3)
    assert recorder.kept is not None and recorder.kept.common["global_step"] == 6
    start = {"common": recorder.kept.common, "own": {0: recorder.kept.own}}
    _, rest = run_recorded(Net, shuffled(), seed=77, max_epochs=3, **start)
    assert_same(whole.end.common, rest.end.common)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@dataclass
class InterruptRecorder(Recorder):
    kept: RunSnapshot | None = None

    def safe_point(self, point: SafePoint, take: Callable[[], RunSnapshot]) -> None:
        if point is SafePoint.INTERRUPT:
            snapshot = take()
            self.kept = RunSnapshot(through_file(snapshot.common), through_file(snapshot.own))
            return
        super().safe_point(point, take)


def test_a_second_signal_and_a_run_that_keeps_nothing_end_at_once(tmp_path: Path) -> None:
    class Impatient(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            self.first = True
            os.kill(os.getpid(), signal.SIGINT)
            self.second = True

    for keeps in (True, False):
        model = Impatient()
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path, model, shuffled()(), enable_checkpointing=keeps)
        assert hasattr(model, "first") is keeps and not hasattr(model, "second")
