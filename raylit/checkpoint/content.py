"""What a checkpoint holds, and writing ``model.ckpt``; ``read.py`` reads it. Floor 2, any process.

The keys are Lightning's, so that each library's ``load_from_checkpoint`` reads the other's. Files are read with
``weights_only=True``: one from a stranger executes nothing.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raylit.callback import Callback
from raylit.checkpoint.archive import save
from raylit.checkpoint.memory import plain_copy, to_cpu
from raylit.errors import CheckpointError
from raylit.hparams import kept_hyperparameters, object_argument
from raylit.plain import made_safe
from raylit.view import RunState

FILE_NAME = "model.ckpt"
# Lightning migrates a file by this version when it loads one; the layout below is 2.0's.
_LAYOUT_VERSION = "2.0.0"
# Lightning's Trainer asks a file for the loop of each entry point; what stands in the first one is raylit's own.
_LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")
# Of what raylit adds to it (docs/checkpoints.md). A reader refuses a newer one and still reads every older one.
SCHEMA = 1


def collect(
    state: RunState,
    on_save: Callable[[dict[str, Any]], Any] | None = None,
    *,
    loops: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    copied: Callable[[Tensor], Tensor] | None = plain_copy,
    weights_only: bool = False,
) -> dict[str, Any]:
    """Return what rank 0 writes of a run: Lightning's keys, and ``extra`` under ``raylit``; tensors are CPU copies.

    ``on_save`` may change it. What it then holds can be written and read: the rest is left out, with a warning.
    ``loops``: where the loops stand. ``copied=None``: for ranks that write nothing, and call ``on_save`` only so that
    all do. ``weights_only``: without what only training needs.
    """
    module = state.module
    assert module is not None
    taken: Callable[[Any], Any] = _as_it_is if copied is None else partial(to_cpu, copied=copied)
    checkpoint: dict[str, Any] = {
        "pytorch-lightning_version": _LAYOUT_VERSION,
        "epoch": state.epoch,
        "global_step": state.global_step,
        "state_dict": taken(module.state_dict()),
        "loops": _loops(loops),
        "hparams_name": object_argument(module),
        "hyper_parameters": kept_hyperparameters(module),
    }
    if not weights_only:
        own_states = {key: callback.state_dict() for key, callback in _by_key(state.callbacks)}
        checkpoint["optimizer_states"] = [taken(optimizer.state_dict()) for optimizer in state.optimizers]
        checkpoint["lr_schedulers"] = [taken(scheduler.state_dict()) for scheduler in state.lr_schedulers]
        checkpoint["callbacks"] = {key: taken(own) for key, own in own_states.items() if own}
    if state.datamodule is not None:
        checkpoint["datamodule_hyper_parameters"] = kept_hyperparameters(state.datamodule)
        checkpoint["datamodule_hparams_name"] = object_argument(state.datamodule)
        checkpoint[datamodule_key(type(state.datamodule))] = taken(state.datamodule.state_dict())
    checkpoint["raylit"] = {"schema": SCHEMA, **({} if weights_only or extra is None else extra)}
    if on_save is not None:
        on_save(checkpoint)
    return checkpoint if copied is None else made_safe(checkpoint)


def _as_it_is(value: Any) -> Any:
    return value


def datamodule_key(cls: type[Any]) -> str:
    """Return the name that a DataModule's state has in a checkpoint."""
    return cls.__qualname__


def _loops(fit: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    return {**{name: {} for name in _LOOPS}, **({} if fit is None else {"fit_loop": dict(fit)})}


def weights_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a whole checkpoint without what only training needs."""
    weights = {key: value for key, value in checkpoint.items()
               if key not in ("optimizer_states", "lr_schedulers", "callbacks")}  # fmt: skip
    schema = (checkpoint.get("raylit") or {}).get("schema", SCHEMA)
    return {**weights, "loops": _loops(None), "raylit": {"schema": schema}}


def apply(checkpoint: Mapping[str, Any], state: RunState) -> None:
    """Put optimizers, schedulers, callbacks and DataModule back as a checkpoint has them; weights come before."""
    apply_optimizers(checkpoint, state)
    for key, callback in _by_key(state.callbacks):
        own_state = checkpoint.get("callbacks", {}).get(key)
        if own_state is not None:
            callback.load_state_dict(own_state)
    datamodule = state.datamodule
    if datamodule is not None and datamodule_key(type(datamodule)) in checkpoint:
        datamodule.load_state_dict(checkpoint[datamodule_key(type(datamodule))])


def apply_optimizers(checkpoint: Mapping[str, Any], state: RunState) -> None:
    """Put optimizers and schedulers back; CheckpointError where there are more or fewer of them than saved."""
    for what, objects in (("optimizer_states", state.optimizers), ("lr_schedulers", state.lr_schedulers)):
        saved = checkpoint.get(what, [])
        if len(saved) != len(objects):
            raise CheckpointError(
                f"the checkpoint has {len(saved)} {what}, configure_optimizers returned {len(objects)}: "
                "it belongs to another configuration"
            )
        for index, (each, own) in enumerate(zip(objects, saved, strict=True)):
            try:
                # A copy: schedulers take entries out of what they are given, and a resume gives it twice.
                each.load_state_dict(copy.deepcopy(own) if what == "lr_schedulers" else dict(own))
            except (ValueError, KeyError) as error:
                name = type(each).__name__
                raise CheckpointError(
                    f"{what}[{index}] of the checkpoint does not fit the {name} that configure_optimizers returned "
                    f"({error}): it belongs to another configuration"
                ) from error


def check_resumable(checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError for what no fit can go on from: weights alone, or a schema that is newer than this one."""
    schema = (checkpoint.get("raylit") or {}).get("schema", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise CheckpointError(
            f"the checkpoint has schema {schema!r}, and this raylit knows up to {SCHEMA}: it was written by a newer "
            "raylit. Install that one; the weights alone load with Module.load_from_checkpoint"
        )
    missing = [key for key in ("optimizer_states", "lr_schedulers", "epoch", "global_step") if key not in checkpoint]
    if missing:
        raise CheckpointError(
            f"the checkpoint has no {', '.join(missing)}: it holds weights only, and a fit cannot go on from it. To "
            "begin a new fit with these weights, build the Module with Module.load_from_checkpoint(path)"
        )


def _by_key(callbacks: Sequence[Callback]) -> list[tuple[str, Callback]]:
    """Each callback with the name of its state; of one name the second gets ``:1`` behind it, the third ``:2``."""
    seen: dict[str, int] = {}
    named = []
    for callback in callbacks:
        key = callback.state_key
        count = seen[key] = seen.get(key, -1) + 1
        named.append((f"{key}:{count}" if count else key, callback))
    return named


def write(checkpoint: Mapping[str, Any], folder: str, name: str = FILE_NAME) -> str:
    """Write ``folder/model.ckpt`` (or another ``name``) whole or not at all; return its path. Raises OSError."""
    os.makedirs(folder, exist_ok=True)
    target = os.path.join(folder, name)
    partial = f"{target}.partial"
    try:
        with open(partial, "wb") as file:
            save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch words what the disk said as a fault of its own
            raise error.__context__ from error
        raise
    finally:
        if os.path.exists(partial):
            os.unlink(partial)
    return target


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
    """Load a checkpoint's weights into ``module``; CheckpointError naming what does not fit.

    ``strict=False``: what only one side has is left alone, and a UserWarning names it.
    """
    try:
        left = module.load_state_dict(checkpoint["state_dict"], strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint is of another model: {error}") from None
    # A Module's own load_state_dict may return nothing.
    missing, unexpected = getattr(left, "missing_keys", []), getattr(left, "unexpected_keys", [])
    if not strict and (missing or unexpected):
        sides = {"not in the checkpoint, so kept as constructed": missing, "not in the model": unexpected}
        named = "; ".join(f"{side}: {', '.join(names)}" for side, names in sides.items() if names)
        warnings.warn(f"strict=False loaded the other weights. {named}", UserWarning, stacklevel=4)
