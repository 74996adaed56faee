"""Methods that look like hooks and that nobody calls."""

from __future__ import annotations

from typing import Any

import pytest

import raylit
from raylit import Callback, DataModule, Module
from raylit.errors import HookError
from raylit.hooks import CALLBACK_HOOKS, DATAMODULE_HOOKS, MODULE_HOOKS
from raylit.hooks.spelling import never_called
from tests.unit.engine.small import Numbers, numbers, quiet


def found(source: str, base: type = Module) -> dict[str, str]:
    """What is said of a class with this body, one statement a line."""
    scope: dict[str, Any] = {}
    lines = "\n    ".join(source.split("; "))
    exec(f"class Own(base):\n    {lines}", {"base": base}, scope)
    hooks = {Module: MODULE_HOOKS, Callback: CALLBACK_HOOKS, DataModule: DATAMODULE_HOOKS}[base]
    return never_called(scope["Own"](), base, hooks, CALLBACK_HOOKS if base is Module else ())


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("on_train_epoch_ends", "on_train_epoch_end"),
        ("validation_epoch_ends", "validation_epoch_end"),
        ("trainig_step", "training_step"),
        ("val_step", "validation_step"),
        ("on_val_epoch_end", "on_validation_epoch_end"),
        ("on_training_epoch_end", "on_train_epoch_end"),
        ("configure_optimizer", "configure_optimizers"),
        ("train_dataloaders", "train_dataloader"),
        ("on_befor_backward", "on_before_backward"),
        ("prepare_dat", "prepare_data"),
        ("setups", "setup"),
    ],
)
def test_a_misspelt_hook_is_found_with_the_nearest(written, meant):
    assert found(f"def {written}(self): ...") == {written: f"did you mean {meant}?"}


@pytest.mark.parametrize(
    "source",
    [
        "def shared_step(self): ...; def generator_step(self): ...; def last_step(self): ...; def on_device(self): ...",
        "def configure_model_parts(self): ...; def configure_sampling(self): ...; def week_end(self): ...",
        # Somebody calls it: by name, in a nested function, by text, from a property.
        "def train_step(self): ...; def training_step(self, batch): return self.train_step()",
        "def val_step(self): ...; def test_step(self, batch): return (lambda: self.val_step())()",
        "def val_step(self): ...; def test_step(self, batch): return getattr(self, 'val_step')()",
        "def val_step(self): ...; step = property(lambda self: self.val_step())",
        # The hook itself is there, so the name is not its misspelling.
        "def training_step(self, batch): ...; def training_steps(self): ...",
        "def _training_step(self): ...",
        "on_train_epoch_ends = 3",
        "def forward(self, x): ...; def on_train_epoch_end(self): ...",
    ],
)
def test_methods_of_ones_own_are_left_alone(source):
    assert found(source) == {}


def test_handing_on_to_super_is_no_call():
    assert "trainig_step" in found("def trainig_step(self): return super().trainig_step()")


def test_hooks_of_another_class_and_of_lightning():
    assert found("def on_sanity_check_end(self): ...") == {"on_sanity_check_end": "Module has no such hook"}
    assert found("def on_batch_end(self): ...") == {"on_batch_end": "write on_train_batch_end"}
    assert found("def on_keyboard_interrupt(self, trainer, module): ...", Callback).keys() == {"on_keyboard_interrupt"}
    assert found("def on_train_ends(self, trainer, module): ...", Callback).keys() == {"on_train_ends"}
    assert found("def val_dataloaders(self): ...", DataModule) == {"val_dataloaders": "did you mean val_dataloader?"}


@pytest.mark.parametrize(("base", "hooks"), [(Module, MODULE_HOOKS), (Callback, CALLBACK_HOOKS)])
def test_no_hook_is_taken_for_a_misspelt_one(base, hooks):
    own = type("Own", (base,), {name: (lambda self: None) for name in hooks})()
    assert never_called(own, base, hooks) == {}
    # Nor alone: each but one is not there.
    for name in hooks:
        assert never_called(type("Own", (base,), {name: lambda self: None})(), base, hooks) == {}


def test_the_trainer_warns_before_it_starts(tmp_path):
    class Net(Numbers):
        def on_train_epoch_ends(self): ...

        def training_step(self, batch, batch_idx):
            raise AssertionError("it began")

    class Watch(Callback):
        def on_fit_begin(self): ...

        def on_fit_ends(self): ...

    text = (
        "Net.on_train_epoch_ends is no hook, and nothing in the class calls it: did you mean on_train_epoch_end.\n"
        "Watch.on_fit_ends is no hook, and nothing in the class calls it: did you mean on_fit_end"
    )
    with pytest.warns(UserWarning, match=text) as caught, pytest.raises(AssertionError, match="it began"):
        quiet(tmp_path, callbacks=Watch()).fit(Net(), numbers(1))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_missing_step_is_refused_with_what_is_there(tmp_path):
    class Net(Module):
        def trainig_step(self, batch, batch_idx): ...

        def configure_optimizers(self): ...

    with pytest.raises(HookError, match="Net has no training_step: .* .Net has trainig_step.$"):
        quiet(tmp_path).fit(Net(), numbers(1))


# -- a DataModule's hooks --------------------------------------------------------------------------------------------
def test_a_datamodules_signatures_are_read_too(tmp_path):
    class Data(DataModule):
        def setup(self, stage, more): ...

    with pytest.raises(HookError, match="Data.setup asks for 'more'.*It may take: stage"):
        quiet(tmp_path).fit(Numbers(), datamodule=Data())


def test_a_datamodules_hooks_take_what_they_accept(tmp_path):
    calls: list[Any] = []

    class Data(raylit.LightningDataModule):
        def prepare_data(self):
            calls.append("prepare_data")

        def setup(self):
            calls.append("setup")

        def teardown(self, *args):
            calls.append(("teardown", *args))

        def train_dataloader(self):
            return numbers(1)

        def on_before_batch_transfer(self, batch):
            return super().on_before_batch_transfer(batch) + 1

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return super().transfer_batch_to_device(batch, device, dataloader_idx) * 3

        def on_after_batch_transfer(self, batch, **kwargs):
            calls.append(kwargs)
            return super().on_after_batch_transfer(batch, **kwargs)

    class Net(Numbers):
        def on_before_batch_transfer(self, batch):
            raise AssertionError("the DataModule's goes before")

    net = Net()
    quiet(tmp_path).fit(net, datamodule=Data())
    assert calls == ["prepare_data", "setup", {"dataloader_idx": 0}, ("teardown", "fit")]
    assert net.weight.item() == -6.0
