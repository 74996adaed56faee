"""LambdaCallback: hooks given as functions. Floor 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raylit.callback import Callback
from raylit.errors import ConfigError, UnknownArgumentError, nearest
from raylit.hooks import CALLBACK_HOOKS


class LambdaCallback(Callback):
    """A callback made of functions: ``LambdaCallback(on_train_end=lambda trainer, module: print("done"))``.

    Each keyword is the name of a Callback hook, each value a function of that hook's arguments, ``(trainer, module,
    ...)``; None leaves the hook out. UnknownArgumentError for a name that is no hook.
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        for name, function in hooks.items():
            if name not in CALLBACK_HOOKS:
                raise UnknownArgumentError(
                    f"LambdaCallback({name}=...): there is no such hook.{nearest(name, CALLBACK_HOOKS)} "
                    f"Hooks are: {', '.join(CALLBACK_HOOKS)}"
                )
            if function is None:
                continue
            if not callable(function):
                raise ConfigError(f"LambdaCallback({name}={function!r}): expected a function of (trainer, module, ...)")
            setattr(self, name, function)
