"""What is wrong with a person's hooks, said before anything starts. Floor 5, driver side."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from raylit.callback import Callback
from raylit.datamodule import DataModule
from raylit.errors import HookError
from raylit.hooks import CALLBACK_HOOKS, DATAMODULE_HOOKS, MODULE_HOOKS, HookTable, check_signature, overridden
from raylit.hooks.spelling import never_called
from raylit.module import Module

if TYPE_CHECKING:
    from raylit.trainer import Trainer


def check_hooks(trainer: Trainer, model: Module, callbacks: Sequence[Callback], datamodule: DataModule | None) -> None:
    """Read every override's signature: HookError for one that asks for what it is never given.

    Warns of methods that look like hooks and that nobody will call.
    """
    HookTable(model, Module, callbacks, Callback, trainer)
    for name, spec in DATAMODULE_HOOKS.items():
        if datamodule is not None and overridden(datamodule, name, DataModule):
            check_signature(spec, getattr(datamodule, name), type(datamodule).__name__)
    texts = dict.fromkeys(_lookalikes(model, callbacks, datamodule))
    if texts:
        warnings.warn("\n".join(texts), UserWarning, stacklevel=_callers_level())


def require(model: Module, hook: str, without: str) -> None:
    """Raise HookError where the Module lacks a hook; ``without``: what to do then."""
    if overridden(model, hook, Module):
        return
    name = type(model).__name__
    meant = [own for own, advice in never_called(model, Module, MODULE_HOOKS).items() if f" {hook}?" in advice]
    has = f" ({name} has {', '.join(meant)})" if meant else ""
    raise HookError(f"{name} has no {hook}: {without}{has}")


def _lookalikes(model: Module, callbacks: Sequence[Callback], datamodule: DataModule | None) -> Iterator[str]:
    for name, advice in never_called(model, Module, MODULE_HOOKS, CALLBACK_HOOKS).items():
        yield _line(model, name, advice)
    others = [name for name in MODULE_HOOKS if name.startswith("on_")]
    for callback in callbacks:
        for name, advice in never_called(callback, Callback, CALLBACK_HOOKS, others).items():
            yield _line(callback, name, advice)
    if datamodule is not None:
        for name, advice in never_called(datamodule, DataModule, DATAMODULE_HOOKS, [*CALLBACK_HOOKS, *others]).items():
            yield _line(datamodule, name, advice)


def _line(owner: object, name: str, advice: str) -> str:
    return f"{type(owner).__name__}.{name} is no hook, and nothing in the class calls it: {advice}"


def _callers_level() -> int:
    """The ``stacklevel`` with which a warning of ``check_hooks`` shows the first line that is not raylit's."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "raylit":
        level, frame = level + 1, frame.f_back
    return level
