"""Names that Lightning had, misspelt names, and names that nobody had."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylit.config.names import refuse_unknown, replacement
from raylit.config.trainer import TRAINER_ARGUMENTS
from raylit.errors import UnknownArgumentError

# The constructors as published, so that a name that is dropped from the table is missed here.
LIGHTNING_1_0 = """logger checkpoint_callback callbacks default_root_dir gradient_clip_val process_position num_nodes
num_processes gpus auto_select_gpus tpu_cores log_gpu_memory progress_bar_refresh_rate overfit_batches track_grad_norm
check_val_every_n_epoch fast_dev_run accumulate_grad_batches max_epochs min_epochs max_steps min_steps
limit_train_batches limit_val_batches limit_test_batches val_check_interval flush_logs_every_n_steps log_every_n_steps
accelerator sync_batchnorm precision weights_summary weights_save_path num_sanity_val_steps truncated_bptt_steps
resume_from_checkpoint profiler benchmark deterministic reload_dataloaders_every_epoch auto_lr_find replace_sampler_ddp
terminate_on_nan auto_scale_batch_size prepare_data_per_node plugins amp_backend amp_level distributed_backend
automatic_optimization""".split()
LIGHTNING_1_X = """enable_pl_optimizer move_metrics_to_cpu multiple_trainloader_mode stochastic_weight_avg devices ipus
hpus max_time limit_predict_batches strategy enable_progress_bar enable_model_summary enable_checkpointing
detect_anomaly reload_dataloaders_every_n_epochs gradient_clip_algorithm""".split()
LIGHTNING_2_X = """accelerator strategy devices num_nodes precision logger callbacks fast_dev_run max_epochs min_epochs
max_steps min_steps max_time limit_train_batches limit_val_batches limit_test_batches limit_predict_batches
overfit_batches val_check_interval check_val_every_n_epoch num_sanity_val_steps log_every_n_steps enable_checkpointing
enable_progress_bar enable_model_summary accumulate_grad_batches gradient_clip_val gradient_clip_algorithm deterministic
benchmark inference_mode use_distributed_sampler profiler detect_anomaly barebones plugins sync_batchnorm
reload_dataloaders_every_n_epochs default_root_dir enable_autolog_hparams model_registry""".split()


@pytest.mark.parametrize("name", sorted({*LIGHTNING_1_0, *LIGHTNING_1_X, *LIGHTNING_2_X}))
def test_every_name_of_lightnings_trainer_is_accepted_or_answered(name: str) -> None:
    assert (name in TRAINER_ARGUMENTS) != (replacement("Trainer", name) is not None)


def test_no_name_is_both_accepted_and_refused() -> None:
    assert [name for name in TRAINER_ARGUMENTS if replacement("Trainer", name) is not None] == []


@pytest.mark.parametrize(
    ("where", "name", "instead"),
    [
        ("Trainer", "gpus", "use_gpu=True and num_workers=N"),
        ("Trainer", "devices", "num_workers=N"),
        ("Trainer", "default_root_dir", "storage_path"),
        ("Trainer", "resume_from_checkpoint", "ckpt_path"),
        ("Trainer", "replace_sampler_ddp", "use_distributed_sampler"),
        ("fit", "train_dataloader", "train_dataloaders"),
        ("Trainer.fit", "train_dataloader", "train_dataloaders"),
        ("test", "test_dataloaders", "dataloaders"),
        ("validate", "val_dataloaders", "dataloaders"),
        ("predict", "return_predictions", "output=URI"),
        ("ModelCheckpoint", "filepath", "dirpath"),
        ("ModelCheckpoint", "period", "every_n_epochs"),
    ],
)
def test_old_names_are_answered_with_the_new_one(where: str, name: str, instead: str) -> None:
    with pytest.raises(UnknownArgumentError) as caught:
        refuse_unknown(where, [name], ["other"])
    assert f"{where} has no argument {name!r} in raylit. Instead: " in str(caught.value)
    assert instead in str(caught.value)


def test_a_misspelt_name() -> None:
    with pytest.raises(UnknownArgumentError, match=r"fit has no argument 'ckptpath'. Did you mean 'ckpt_path'\?"):
        refuse_unknown("fit", ["ckptpath"], ["ckpt_path", "datamodule"])


def test_a_name_that_nobody_had_gets_the_list() -> None:
    with pytest.raises(UnknownArgumentError, match=r"no argument 'zzz'. It has: ckpt_path, datamodule\."):
        refuse_unknown("fit", ["zzz"], ["datamodule", "ckpt_path"])


def test_all_unknown_names_at_once() -> None:
    with pytest.raises(UnknownArgumentError) as caught:
        refuse_unknown("Trainer", ["gpus", "max_epochs", "max_stepz"], TRAINER_ARGUMENTS)
    assert len(str(caught.value).splitlines()) == 2


def test_accepted_names_pass_even_where_the_table_knows_them() -> None:
    refuse_unknown("test", ["verbose"], ["verbose"])
    refuse_unknown("Trainer", [], [])


@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=8), max_size=4))
def test_unknown_is_refused_and_known_passes(name: str, accepted: list[str]) -> None:
    if name in accepted:
        refuse_unknown("Trainer", [name], accepted)
    else:
        with pytest.raises(UnknownArgumentError):
            refuse_unknown("Trainer", [name], accepted)
