"""The order of hooks against text files that are written by hand from section 4 of the contract.

A file is never made from raylit's own output. Where the two differ, one of contract and engine is wrong, and a person
says which.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import raylit
from raylit.hooks import CALLBACK_HOOKS, MODULE_HOOKS
from tests.unit.engine.small import quiet

HERE = Path(__file__).parent
# Not in fit.txt and its like: how batches travel and loaders (batch_travel.txt), what runs on the driver, and hooks of
# things that are off here.
LEFT_OUT = {
    "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "train_dataloader",
    "val_dataloader", "test_dataloader", "predict_dataloader", "configure_callbacks", "get_progress_bar_dict",
    "configure_model", "on_save_checkpoint", "on_load_checkpoint",
}  # fmt: skip


def golden(name: str) -> list[str]:
    """The lines of a file as "hook C" and "hook M", one an entry."""
    entries: list[str] = []
    for line in (HERE / f"{name}.txt").read_text().splitlines():
        if line.startswith("@"):
            entries += golden(line[1:])
        elif line and not line.startswith("#"):
            hook, *owners = line.split()
            entries += [f"{hook} {owner}" for owner in owners]
    return entries


class Plain(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Any) -> Any:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def training_step_end(self, step_output: Any) -> Any:
        return step_output

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    test_step = validation_step

    def validation_step_end(self, step_output: Any) -> Any:
        return step_output

    test_step_end = validation_step_end

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def recording(base: type, hooks: Any, owner: str, entries: list[str], left_out: Any = LEFT_OUT) -> type:
    """A subclass of ``base`` that notes every hook of ``hooks`` and then does what ``base`` does."""

    def note(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            entries.append(f"{name} {owner}")
            if name.endswith("_step") and name != "optimizer_step":
                kwargs = {}  # Plain's steps name no further arguments
            return getattr(base, name)(self, *args, **kwargs)

        return hook

    return type("Recording", (base,), {name: note(name) for name in hooks if name not in left_out})


@pytest.fixture
def entries() -> list[str]:
    return []


@pytest.fixture
def module(entries: list[str]) -> raylit.Module:
    return recording(Plain, MODULE_HOOKS, "M", entries)()


@pytest.fixture
def trainer(entries: list[str], tmp_path: Path) -> raylit.Trainer:
    callback = recording(raylit.Callback, CALLBACK_HOOKS, "C", entries)()
    return quiet(tmp_path, max_epochs=2, num_sanity_val_steps=2, callbacks=callback, gradient_clip_val=1.0)


def data(count: int) -> list[torch.Tensor]:
    return [torch.ones(3, 2)] * count


def test_fit(trainer, module, entries):
    trainer.fit(module, data(2), data(1))
    assert entries == golden("fit")


def test_validate(trainer, module, entries):
    trainer.validate(module, data(1))
    assert entries == golden("validate")


def test_test(trainer, module, entries):
    trainer.test(module, data(2))
    assert entries == golden("test")


def test_predict(trainer, module, entries):
    trainer.predict(module, data(2))
    assert entries == golden("predict")


def test_no_hook_of_the_contract_is_missing_from_the_files():
    """Each hook stands in some file, so that none can be lost from the order unseen."""
    found = {entry.split()[0].split("[")[0] for path in HERE.glob("*.txt") for entry in golden(path.stem)}
    elsewhere = {
        "on_exception", "lr_scheduler_step", "test_dataloader", "predict_dataloader", "configure_callbacks",
        "get_progress_bar_dict", "on_save_checkpoint", "on_load_checkpoint",
    }  # fmt: skip
    assert {*MODULE_HOOKS, *CALLBACK_HOOKS} - elsewhere == found


STEP_HOOKS = (
    "on_train_batch_start", "training_step", "on_before_backward", "backward", "on_after_backward",
    "on_before_optimizer_step", "optimizer_step", "on_before_zero_grad", "optimizer_zero_grad", "on_train_batch_end",
    "tbptt_split_batch",
)  # fmt: skip


def indexed(base: type, entries: list[str]) -> type:
    """As ``recording``, with the index of the optimizer that a hook is about."""

    def note(name: str) -> Any:
        spec = MODULE_HOOKS[name]

        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(spec.plain, args)), **kwargs}
            index = given.get("optimizer_idx")
            if "optimizer" in given:
                found = self.trainer.optimizers.index(given["optimizer"])
                assert index in (None, found)
                index = found
            entries.append(f"{name}{'' if index is None else f'[{index}]'} M")
            return getattr(base, name)(self, *args, **kwargs)

        # backward's own *args are the caller's: it names what it wants.
        if name == "backward":
            return lambda self, loss, optimizer, optimizer_idx: hook(self, loss, optimizer, optimizer_idx)
        return hook

    return type("Recording", (base,), {name: note(name) for name in STEP_HOOKS})


def test_truncated_bptt_with_two_optimizers(tmp_path, entries):
    class Two(raylit.Module):
        truncated_bptt_steps = 2

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(1, 1), nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int, hiddens: Any) -> Any:
            layer = (self.one, self.two)[optimizer_idx]
            return {"loss": layer(batch).sum(), "hiddens": 0}

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.one, self.two)]

    quiet(tmp_path).fit(indexed(Two, entries)(), [torch.ones(2, 4, 1)])
    assert entries == golden("bptt_two_optimizers")


def test_accumulation(tmp_path, entries):
    class One(Plain):
        training_step_end = raylit.Module.training_step_end  # not overridden

        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int, **kwargs: Any) -> Any:
            return super().training_step(batch, batch_idx)

    quiet(tmp_path, accumulate_grad_batches=2).fit(indexed(One, entries)(), data(3))
    assert entries == golden("accumulation")


TRAVEL = (
    "prepare_data", "setup", "teardown", "configure_model", "configure_optimizers", "train_dataloader",
    "val_dataloader", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
    "on_train_batch_start", "on_train_batch_end", "training_step", "on_validation_batch_start", "validation_step",
    "on_validation_batch_end",
)  # fmt: skip


def test_loaders_late_layers_and_the_way_of_a_batch(tmp_path, entries):
    class Net(Plain):
        def train_dataloader(self) -> Any:
            return data(1)

        val_dataloader = train_dataloader

    quiet(tmp_path, num_sanity_val_steps=1).fit(recording(Net, TRAVEL, "M", entries, ())())
    assert entries == golden("batch_travel")
