"""Every hook and all the arguments it can be given, in order. Floor 1: values only.

``plain`` arguments are given by position as far as an override's signature reaches; ``named`` ones (marked with a
dagger in the documentation) only to an override that names them or takes ``**kwargs``. ``by_name`` hooks receive any
subset of their arguments by name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HookSpec:
    """One hook: its name and its documented arguments."""

    name: str
    plain: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    by_name: bool = False
    extra: bool = False  # the caller's own *args and **kwargs follow (``backward``); an override's *args are these

    @property
    def arguments(self) -> tuple[str, ...]:
        """All arguments in the order in which the engine gives them."""
        return self.plain + self.named


def _specs(*rows: tuple[str, str, str]) -> dict[str, HookSpec]:
    return {name: HookSpec(name, tuple(plain.split()), tuple(named.split())) for name, plain, named in rows}


_BATCH = ("batch batch_idx", "dataloader_idx")
_BATCH_END = ("outputs batch batch_idx", "dataloader_idx")

# Hooks that a Module and a Callback both have.
SHARED_HOOKS = _specs(
    ("on_fit_start", "", ""), ("on_fit_end", "", ""),
    ("on_pretrain_routine_start", "", ""), ("on_pretrain_routine_end", "", ""),
    ("on_train_start", "", ""), ("on_train_end", "", ""),
    ("on_epoch_start", "", ""), ("on_epoch_end", "", ""),
    ("on_train_epoch_start", "", ""), ("on_train_epoch_end", "", "outputs"),
    ("on_train_batch_start", *_BATCH), ("on_train_batch_end", *_BATCH_END),
    ("on_before_backward", "loss", ""), ("on_after_backward", "", ""),
    ("on_before_optimizer_step", "optimizer", "optimizer_idx"), ("on_before_zero_grad", "optimizer", ""),
    *((f"on_{x}_{when}", "", "") for x in ("validation", "test", "predict") for when in ("start", "end")),
    *((f"on_{x}_epoch_{when}", "", "") for x in ("validation", "test", "predict") for when in ("start", "end")),
    *((f"on_{x}_batch_start", *_BATCH) for x in ("validation", "test", "predict")),
    *((f"on_{x}_batch_end", *_BATCH_END) for x in ("validation", "test", "predict")),
    ("setup", "stage", ""), ("teardown", "stage", ""),
    ("on_save_checkpoint", "checkpoint", ""), ("on_load_checkpoint", "checkpoint", ""),
)  # fmt: skip

MODULE_HOOKS: dict[str, HookSpec] = {
    **SHARED_HOOKS,
    **_specs(
        ("training_step", "batch batch_idx", "optimizer_idx hiddens"),
        ("training_step_end", "step_output", ""), ("training_epoch_end", "outputs", ""),
        *((f"{x}_step", "batch batch_idx", "dataloader_idx") for x in ("validation", "test", "predict")),
        *((f"{x}_step_end", "step_output", "") for x in ("validation", "test")),
        *((f"{x}_epoch_end", "outputs", "") for x in ("validation", "test")),
        ("configure_optimizers", "", ""), ("configure_callbacks", "", ""), ("configure_model", "", ""),
        ("prepare_data", "", ""),
        *((f"{x}_dataloader", "", "") for x in ("train", "val", "test", "predict")),
        ("transfer_batch_to_device", "batch device", "dataloader_idx"),
        ("on_before_batch_transfer", "batch", "dataloader_idx"), ("on_after_batch_transfer", "batch", "dataloader_idx"),
        ("tbptt_split_batch", "batch split_size", ""),
        ("optimizer_zero_grad", "epoch batch_idx optimizer", "optimizer_idx"),
        ("lr_scheduler_step", "scheduler", "metric optimizer_idx"),
        *((f"on_{x}_model_{m}", "", "") for x in ("validation", "test", "predict") for m in ("eval", "train")),
        ("get_progress_bar_dict", "", ""),
    ),
    "backward": HookSpec("backward", ("loss", "optimizer", "optimizer_idx"), extra=True),
    "optimizer_step": HookSpec(
        "optimizer_step",
        tuple("epoch batch_idx optimizer optimizer_idx optimizer_closure on_tpu using_native_amp using_lbfgs".split()),
        by_name=True,
    ),
    "configure_gradient_clipping": HookSpec(
        "configure_gradient_clipping",
        tuple("optimizer optimizer_idx gradient_clip_val gradient_clip_algorithm".split()),
        by_name=True,
    ),
}  # fmt: skip

CALLBACK_HOOKS: dict[str, HookSpec] = {
    name: HookSpec(name, ("trainer", "module", *spec.plain), spec.named)
    for name, spec in {
        **SHARED_HOOKS,
        **_specs(
            ("on_sanity_check_start", "", ""), ("on_sanity_check_end", "", ""), ("on_train_epoch_settled", "", ""),
            ("on_exception", "exception", ""),
        ),
    }.items()
}

# A DataModule's, called as the Module's of the same name.
DATAMODULE_HOOKS: dict[str, HookSpec] = {
    name: MODULE_HOOKS[name]
    for name in (
        "prepare_data", "setup", "teardown",
        "train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader",
        "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
        "on_save_checkpoint", "on_load_checkpoint",
    )
}  # fmt: skip
