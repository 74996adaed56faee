"""Names of arguments that Lightning 1.0 or 2.x had and raylit has not, and the words for an unknown name. Floor 0.

The table is data: each old name with what to write instead. Names that raylit accepts are never looked up in it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from raylit.errors import UnknownArgumentError

_CHECKPOINT = "callbacks.ModelCheckpoint(...) in callbacks"
_GPUS = "use_gpu=True and num_workers=N: each worker has one GPU"
_CKPT = "fit(..., ckpt_path=...)"
_BAR = "enable_progress_bar=False turns the bar off; how often it is drawn is raylit's"
_LR_FIND = "trainer.lr_find(model), before fit"
_SCALE = "trainer.scale_batch_size(model), before fit"

_TRAINER: Mapping[str, str] = {
    # where it runs
    "gpus": _GPUS,
    "devices": "num_workers=N (and use_gpu=True or False): one worker a device",
    "accelerator": "use_gpu=True, False or 'auto'; what was accelerator='ddp' is strategy='ddp'",
    "num_nodes": "num_workers=N, the number of workers on all nodes together; Ray places them (placement_strategy)",
    "num_processes": "num_workers=N",
    "auto_select_gpus": "nothing: Ray gives each worker a free GPU",
    "tpu_cores": "nothing: raylit runs on CPUs and GPUs",
    "num_tpu_cores": "nothing: raylit runs on CPUs and GPUs",
    "ipus": "nothing: raylit runs on CPUs and GPUs",
    "hpus": "nothing: raylit runs on CPUs and GPUs",
    "nb_gpu_nodes": "num_workers=N, the number of workers on all nodes together",
    "num_gpu_nodes": "num_workers=N, the number of workers on all nodes together",
    "distributed_backend": "strategy='ddp', 'dp' or 'ddp2'",
    "plugins": "strategy= (a raylit.strategies object) and precision=",
    "replace_sampler_ddp": "use_distributed_sampler",
    "use_gpus": "use_gpu",
    # run folder and checkpoints
    "default_root_dir": "storage_path=... (and name=... for the run's own folder)",
    "default_save_path": "storage_path=... (and name=... for the run's own folder)",
    "weights_save_path": f"storage_path=..., or {_CHECKPOINT}",
    "checkpoint_callback": f"enable_checkpointing=True or False; a callback object goes into callbacks: {_CHECKPOINT}",
    "early_stop_callback": "callbacks.EarlyStopping(monitor=...) in callbacks",
    "resume_from_checkpoint": _CKPT,
    "ckpt_path": _CKPT,
    "model_registry": "nothing: checkpoints are in the run folder (storage_path)",
    # what is shown and logged
    "progress_bar_refresh_rate": _BAR,
    "process_position": _BAR,
    "show_progress_bar": "enable_progress_bar",
    "weights_summary": "enable_model_summary=True or False",
    "row_log_interval": "log_every_n_steps",
    "add_row_log_interval": "log_every_n_steps",
    "log_save_interval": "an argument of the logger object, where it has one",
    "flush_logs_every_n_steps": "an argument of the logger object, where it has one",
    "log_gpu_memory": "callbacks.DeviceStatsMonitor() in callbacks, or self.log in a hook",
    "track_grad_norm": "self.log the norm in the hook on_before_optimizer_step",
    "enable_autolog_hparams": "save_hyperparameters(logger=False) in the Module",
    "print_nan_grads": "detect_anomaly=True",
    "barebones": "logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False",
    # training
    "terminate_on_nan": "detect_anomaly=True, or callbacks.TerminateOnNaN() in callbacks",
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs=1",
    "auto_lr_find": _LR_FIND,
    "auto_scale_batch_size": _SCALE,
    "amp_backend": "precision='16-mixed' or 'bf16-mixed': torch's own mixed precision",
    "amp_level": "precision='16-mixed' or 'bf16-mixed': torch's own mixed precision",
    "use_amp": "precision='16-mixed' or 'bf16-mixed'",
    "stochastic_weight_avg": "callbacks.StochasticWeightAveraging(...) in callbacks",
    "move_metrics_to_cpu": "nothing: logged values take one number each on their device",
    "multiple_trainloader_mode": "a loader of your own over the others, given to fit as train_dataloaders",
    "enable_pl_optimizer": "nothing: optimizers are torch's own objects",
    "gradient_clip": "gradient_clip_val",
    "max_nb_epochs": "max_epochs",
    "min_nb_epochs": "min_epochs",
    "nb_sanity_val_steps": "num_sanity_val_steps",
    "train_percent_check": "limit_train_batches",
    "val_percent_check": "limit_val_batches",
    "test_percent_check": "limit_test_batches",
    "overfit_pct": "overfit_batches",
    "unit_test": "fast_dev_run",
    # arguments of other calls
    "train_dataloader": "fit(model, train_dataloaders=...)",
    "train_dataloaders": "fit(model, train_dataloaders=...)",
    "val_dataloaders": "fit(model, val_dataloaders=...)",
    "datamodule": "fit(model, datamodule=...)",
    "model": "fit(model)",
}

_LOADERS: Mapping[str, str] = {
    "val_dataloader": "dataloaders",
    "val_dataloaders": "dataloaders",
    "test_dataloader": "dataloaders",
    "test_dataloaders": "dataloaders",
    "predict_dataloaders": "dataloaders",
    "dataloader": "dataloaders",
    "verbose": "Trainer(enable_progress_bar=False) to print nothing; the metrics are returned",
    "weights_only": "nothing: checkpoints are always loaded with weights_only=True",
}

_CALLS: Mapping[str, Mapping[str, str]] = {
    "Trainer": _TRAINER,
    "fit": {
        "train_dataloader": "train_dataloaders",
        "train_loader": "train_dataloaders",
        "val_dataloader": "val_dataloaders",
        "valid_dataloaders": "val_dataloaders",
        "dataloaders": "train_dataloaders and val_dataloaders",
        "test_dataloaders": "test(dataloaders=...)",
        "resume_from_checkpoint": "ckpt_path",
        "weights_only": "nothing: checkpoints are always loaded with weights_only=True",
        "max_epochs": "Trainer(max_epochs=...)",
    },
    "validate": _LOADERS,
    "test": _LOADERS,
    "predict": {
        **_LOADERS,
        "return_predictions": "output=URI to write the outputs as Parquet instead of returning them",
    },
    "lr_find": {
        "train_dataloader": "train_dataloaders",
        "dataloaders": "train_dataloaders",
        "method": "nothing: it trains",
        "num_training_steps": "num_training",
        "lr_min": "min_lr",
        "lr_max": "max_lr",
    },
    "scale_batch_size": {
        "train_dataloader": "train_dataloader() of the Module or the DataModule, with batch_size=self.batch_size",
        "dataloaders": "train_dataloader() of the Module or the DataModule, with batch_size=self.batch_size",
        "method": "nothing: it trains",
        "margin": "nothing: the size that is returned was tried; take less of it yourself",
        "max_val": "max_trials: doubling init_val=2, the 13th trial is 8192",
    },
    "ModelCheckpoint": {
        "filepath": "dirpath=... for the folder and filename=... for the file's name",
        "prefix": "filename='prefix-{epoch}'",
        "period": "every_n_epochs",
        "every_n_val_epochs": "every_n_epochs",
        "every_n_batches": "every_n_train_steps",
        "every_n_steps": "every_n_train_steps",
        "save_best_only": "save_top_k=1",
    },
    "EarlyStopping": {
        "log_rank_zero_only": "nothing: messages come from global rank 0 alone",
        "metric": "monitor",
        "delta": "min_delta",
    },
}


def refuse_unknown(where: str, given: Iterable[str], accepted: Iterable[str]) -> None:
    """Raise ``UnknownArgumentError`` if ``given`` holds a name that is not ``accepted``; all of them in one error.

    ``where``: what was called, as the user writes it: "Trainer", "fit" or "Trainer.fit", "ModelCheckpoint".
    Each name comes with what to write instead if Lightning had it, else with the nearest accepted name, else with all.
    """
    names = sorted(accepted)
    lines = [_line(where, name, names) for name in given if name not in names]
    if lines:
        raise UnknownArgumentError("\n".join(lines))


def replacement(where: str, name: str) -> str | None:
    """Return what to write instead of an argument of Lightning's, or None if the name is not one that is known."""
    return _CALLS.get(where.rpartition(".")[2], {}).get(name)


def _line(where: str, name: str, accepted: list[str]) -> str:
    instead = replacement(where, name)
    if instead is not None:
        return f"{where} has no argument {name!r} in raylit. Instead: {instead}."
    close = difflib.get_close_matches(name, accepted, n=1, cutoff=0.6)
    if close:
        return f"{where} has no argument {name!r}. Did you mean {close[0]!r}?"
    return f"{where} has no argument {name!r}. It has: {', '.join(accepted)}."
