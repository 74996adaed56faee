"""docs/from-lightning.md against the code: each name in its tables is what raylit says, takes or refuses."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

import raylit
from raylit.callbacks import EarlyStopping, ModelCheckpoint
from raylit.config.fit import STRATEGIES
from raylit.config.names import replacement
from raylit.config.trainer import TRAINER_ARGUMENTS
from raylit.errors import ConfigError, UnknownArgumentError
from raylit.hooks.spelling import NOT_CALLED
from raylit.view import NOT_HERE, RunState, WorkerTrainer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from-lightning.md").read_text()


def table(head: str) -> dict[str, str]:
    """The rows of the table whose first column is called ``head``."""
    rows = re.search(rf"^\| {re.escape(head)} \|.*\n\| --- \|.*\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
    assert rows is not None, head
    return dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", rows[1], flags=re.MULTILINE))


@pytest.mark.parametrize("old", table("Trainer"))
def test_an_argument_of_the_trainer_is_refused_with_these_words(old: str) -> None:
    with pytest.raises(UnknownArgumentError) as caught:
        raylit.Trainer(**{old: 1})
    assert str(caught.value) == f"Trainer has no argument {old!r} in raylit. Instead: {table('Trainer')[old]}."


@pytest.mark.parametrize("old", table("strategy"))
def test_a_strategy_is_refused_with_these_words(old: str) -> None:
    with pytest.raises(ConfigError) as caught:
        raylit.Trainer(strategy=old)
    assert table("strategy")[old] in str(caught.value)


CALLS = [("fit", "fit"), ("validate, test", "validate"), ("validate, test", "test"), ("validate, test", "predict"),
         ("predict", "predict"), ("lr_find", "lr_find"), ("scale_batch_size", "scale_batch_size")]  # fmt: skip


@pytest.mark.parametrize(("call", "old"), [(call, old) for head, call in CALLS for old in table(head)])
def test_an_argument_of_a_call_is_refused_with_these_words(call: str, old: str) -> None:
    words = next(table(head)[old] for head, its in CALLS if its == call and old in table(head))
    with pytest.raises(UnknownArgumentError) as caught:
        getattr(raylit.Trainer(num_workers=0, max_epochs=1), call)(raylit.Module(), **{old: 1})
    assert str(caught.value) == f"{call} has no argument {old!r} in raylit. Instead: {words}."


@pytest.mark.parametrize("old", table("EarlyStopping"))
def test_an_argument_of_early_stopping(old: str) -> None:
    with pytest.raises(UnknownArgumentError, match=re.escape(table("EarlyStopping")[old])):
        EarlyStopping("loss", **{old: 1})


@pytest.mark.parametrize("old", table("ModelCheckpoint"))
def test_an_argument_of_model_checkpoint(old: str) -> None:
    with pytest.raises(UnknownArgumentError, match=re.escape(table("ModelCheckpoint")[old])):
        ModelCheckpoint(**{old: 1})


def test_no_old_name_is_missing_from_the_page() -> None:
    from raylit.config import fit, names

    assert {name: replacement("Trainer", name) for name in table("Trainer")} == names._CALLS["Trainer"]
    assert table("strategy") == fit._OTHER_STRATEGIES
    assert not set(table("strategy")) & set(STRATEGIES)
    assert table("hook") == NOT_CALLED
    for head, call in CALLS:
        assert table(head).items() <= dict(names._CALLS[call]).items()
    assert {**table("validate, test"), **table("predict")} == names._CALLS["predict"]
    for call in ("fit", "lr_find", "scale_batch_size", "ModelCheckpoint", "EarlyStopping"):
        assert table(call) == names._CALLS[call]


def test_names_to_import_are_there() -> None:
    for ours in table("Lightning").values():
        for path in re.findall(r"`raylit\.([\w.]+)`", ours):
            owner, _, name = f"raylit.{path}".rpartition(".")
            assert hasattr(importlib.import_module(owner), name), path
    assert raylit.LightningModule is raylit.Module and raylit.LightningDataModule is raylit.DataModule


# The public members as published, so that one that neither class nor page has is missed here. Hooks are left to
# tests/unit/hooks.
MODULE = """all_gather allow_zero_length_dataloader_with_multiple_devices automatic_optimization backward clip_gradients
configure_callbacks configure_gradient_clipping configure_model configure_optimizers configure_sharded_model
current_epoch device device_mesh dtype example_input_array fabric forward freeze global_rank global_step hparams
hparams_initial load_from_checkpoint local_rank log log_dict logger loggers lr_scheduler_step lr_schedulers
manual_backward on_gpu optimizer_step optimizer_zero_grad optimizers predict_dataloader predict_step prepare_data print
save_hyperparameters setup strict_loading teardown test_dataloader test_step to_onnx to_torchscript toggle_optimizer
toggled_optimizer train_dataloader trainer training_step transfer_batch_to_device unfreeze untoggle_optimizer
val_dataloader validation_step datamodule get_progress_bar_dict get_tqdm_dict grad_norm manual_optimizer_step precision
summarize tbptt_split_batch test_epoch_end test_step_end training_epoch_end training_step_end truncated_bptt_steps
use_amp use_ddp use_ddp2 use_dp use_tpu validation_epoch_end validation_step_end write_prediction
write_prediction_dict""".split()
DATA = """prepare_data setup teardown train_dataloader val_dataloader test_dataloader predict_dataloader
transfer_batch_to_device on_before_batch_transfer on_after_batch_transfer save_hyperparameters hparams hparams_initial
state_dict load_state_dict trainer prepare_data_per_node from_datasets has_prepared_data has_setup_fit dims
size""".split()


@pytest.mark.parametrize(
    ("head", "cls", "members"),
    [("LightningModule", raylit.Module, MODULE), ("LightningDataModule", raylit.DataModule, DATA)],
)
def test_every_member_is_there_or_answered(head: str, cls: Any, members: list[str]) -> None:
    gone = {name for name in members if not hasattr(cls, name)}
    assert gone - set(NOT_CALLED) == set(table(head)) - {"EvalResult", "TrainResult"}


def test_attributes_of_the_trainer_that_are_not_here() -> None:
    assert table("trainer") == NOT_HERE
    for trainer in (raylit.Trainer(max_epochs=1), WorkerTrainer(RunState())):
        for name, words in NOT_HERE.items():
            assert not hasattr(trainer, name)
            with pytest.raises(AttributeError, match=re.escape(f"no attribute {name!r} in raylit. Instead: {words}.")):
                getattr(trainer, name)
        # What is to be read instead is there.
        for instead in re.findall(r"trainer\.(\w+)", " ".join(NOT_HERE.values())):
            assert hasattr(trainer, instead), instead
        for instead in re.findall(r"module\.(\w+)", " ".join(NOT_HERE.values())):
            assert hasattr(raylit.Module, instead), instead
        with pytest.raises(AttributeError, match="no attribute 'globalstep' in raylit. Did you mean 'global_step'"):
            _ = trainer.globalstep
        assert copy.copy(trainer).global_step == 0 and pickle.loads(pickle.dumps(trainer)).global_step == 0


def test_arguments_that_the_script_uses_are_taken() -> None:
    for name in re.findall(r"^    (\w+)=", PAGE, flags=re.MULTILINE):
        assert name in TRAINER_ARGUMENTS
