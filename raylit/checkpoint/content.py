"""What a checkpoint holds, and writing and reading ``model.ckpt``. Floor 2, any process.

The keys are Lightning's, so that each library's ``load_from_checkpoint`` reads the other's. Files are read with
``weights_only=True``: one from a stranger executes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylit.checkpoint.safe import made_safe
from raylit.errors import CheckpointError
from raylit.view import RunState

FILE_NAME = "model.ckpt"
# Lightning migrates a file by this version when it loads one; the layout below is 2.0's.
_LAYOUT_VERSION = "2.0.0"


def collect(state: RunState, on_save: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
    """Return the checkpoint of a fit as it stands between two epochs; tensors are copied to the CPU.

    ``on_save`` may change it. What it then holds can be written and read: the rest is left out, with a warning.
    """
    module = state.module
    assert module is not None
    own_states = {_callback_key(c, i): c.state_dict() for i, c in enumerate(state.callbacks)}
    checkpoint: dict[str, Any] = {
        "pytorch-lightning_version": _LAYOUT_VERSION,
        "epoch": state.epoch,
        "global_step": state.global_step,
        "state_dict": to_cpu(module.state_dict()),
        "optimizer_states": [to_cpu(optimizer.state_dict()) for optimizer in state.optimizers],
        "lr_schedulers": [to_cpu(scheduler.state_dict()) for scheduler in state.lr_schedulers],
        "callbacks": {key: own for key, own in own_states.items() if own},
        "loops": {},
        "hparams_name": "kwargs",
        "hyper_parameters": dict(module.hparams),
    }
    if state.datamodule is not None:
        checkpoint["datamodule_hyper_parameters"] = dict(state.datamodule.hparams)
        checkpoint[type(state.datamodule).__name__] = state.datamodule.state_dict()
    if on_save is not None:
        on_save(checkpoint)
    return made_safe(checkpoint)


def apply(checkpoint: dict[str, Any], state: RunState) -> None:
    """Put optimizers, schedulers, callbacks and DataModule back as a checkpoint has them; weights come before."""
    for what, objects in (("optimizer_states", state.optimizers), ("lr_schedulers", state.lr_schedulers)):
        saved = checkpoint.get(what, [])
        if len(saved) != len(objects):
            raise CheckpointError(
                f"the checkpoint has {len(saved)} {what}, configure_optimizers returned {len(objects)}: "
                "it belongs to another configuration"
            )
        for each, own in zip(objects, saved, strict=True):
            each.load_state_dict(own)
    for index, callback in enumerate(state.callbacks):
        own_state = checkpoint.get("callbacks", {}).get(_callback_key(callback, index))
        if own_state is not None:
            callback.load_state_dict(own_state)
    if state.datamodule is not None and type(state.datamodule).__name__ in checkpoint:
        state.datamodule.load_state_dict(checkpoint[type(state.datamodule).__name__])


def _callback_key(callback: object, index: int) -> str:
    return f"{type(callback).__qualname__}:{index}"


def to_cpu(value: Any) -> Any:
    """Return a copy of a nested value with every tensor detached and copied to the CPU."""
    if torch.nn.parameter.is_lazy(value):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu().clone() if value.device.type == "cpu" else value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_cpu(item) for item in value)
    return value


def write(checkpoint: Mapping[str, Any], folder: str) -> str:
    """Write ``folder/model.ckpt`` whole or not at all; return its path."""
    os.makedirs(folder, exist_ok=True)
    target = os.path.join(folder, FILE_NAME)
    partial = f"{target}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)
    return target


def read(path: Any, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint from its file, its folder, or a Ray ``Checkpoint``; CheckpointError where there is none."""
    if hasattr(path, "as_directory"):
        with path.as_directory() as folder:
            return read(folder, map_location)
    if not isinstance(path, (str, Path)):
        raise CheckpointError(f"ckpt_path must be a path or a Ray Checkpoint; got {type(path).__name__}")
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    if not file.is_file():
        raise CheckpointError(f"there is no checkpoint at {str(path)!r} (looked for {file})")
    try:
        loaded = torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be loaded: damaged, or holding more than tensors and plain values "
                              f"({str(error).splitlines()[0]})") from error  # fmt: skip
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        raise CheckpointError(f"{file} is no checkpoint of a Module: it has no 'state_dict'")
    return loaded


def check_weights(checkpoint: Mapping[str, Any], module: torch.nn.Module) -> None:
    """Raise CheckpointError where the weights are clearly another model's; load nothing.

    A layer that loads by rules of its own is left to ``load_weights``.
    """
    for layer in module.modules():
        own_rules = type(layer)._load_from_state_dict is not torch.nn.Module._load_from_state_dict
        known = isinstance(layer, torch.nn.modules.batchnorm._NormBase)  # only adds a counter that old files lack
        if (own_rules and not known) or layer._load_state_dict_pre_hooks:
            return
    own, given = module.state_dict(), checkpoint["state_dict"]
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    shapes = [
        f"{name} ({list(given[name].shape)}, the model has {list(tensor.shape)})"
        for name, tensor in own.items()
        if isinstance(tensor, Tensor) and name in given and given[name].shape != tensor.shape
    ]
    faults = [
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for what, names in (
            ("not in the checkpoint", sorted(own.keys() - given.keys() - counters)),
            ("not in the model", sorted(given.keys() - own.keys())),
            ("of another shape", shapes),
        )
        if names
    ]
    if faults:
        raise CheckpointError(f"the checkpoint is of another model than {type(module).__name__}: {'; '.join(faults)}")


def load_weights(checkpoint: Mapping[str, Any], module: torch.nn.Module, strict: bool = True) -> None:
    """Load a checkpoint's weights into ``module``; CheckpointError naming what does not fit."""
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint is of another model: {error}") from None
