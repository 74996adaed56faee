"""Methods that look like hooks and are none: nobody would ever call them. Floor 1; the driver asks once a run.

A Module may have any method of its own, so the answer is a guess: only a name shaped like a hook's that is close to a
documented one (or was one in Lightning) and that no method of the class mentions.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

_SHAPE = re.compile(r"(on_|configure_).*|.*(_step|_step_end|_epoch_end|_end|_dataloader)s?|(prepare|setup|tear).*")
# Measured over raylit's own hooks: one letter lost, doubled or swapped stays above it, another word below.
_CLOSE = 0.85

# Hooks that some Lightning called and raylit does not, each with what to do instead.
NOT_CALLED: Mapping[str, str] = {
    "on_batch_start": "write on_train_batch_start",
    "on_batch_end": "write on_train_batch_end",
    "on_init_start": "do it where the Trainer is made",
    "on_init_end": "do it where the Trainer is made",
    "on_keyboard_interrupt": "write on_exception; it gets the KeyboardInterrupt",
    "on_configure_sharded_model": "write setup",
    "configure_sharded_model": "write configure_model",
    "on_before_accelerator_backend_setup": "write setup",
    "on_post_move_to_device": "write setup: the parameters lie on the device after it",
    "on_validation_model_zero_grad": "gradients are zero after each step",
    "on_hpc_save": "write on_save_checkpoint",
    "on_hpc_load": "write on_load_checkpoint",
    "training_end": "write training_step_end",
    "tng_dataloader": "write train_dataloader",
    "configure_ddp": "give strategy=raylit.strategies.DDP(...) to the Trainer",
    "configure_apex": "give precision= to the Trainer",
    **{f"on_{x}_dataloader": f"write {x}_dataloader" for x in ("train", "val", "test", "predict")},
}


def never_called(obj: object, base: type, hooks: Iterable[str], others: Iterable[str] = ()) -> dict[str, str]:
    """Return the methods of ``obj``'s class that look like hooks and are not called, each with a word of advice.

    ``base``: the open class that it derives from, whose methods are not judged. ``hooks``: the names that are called;
    ``others``: hooks of the other open classes, which are not called here.
    """
    hooks, others = sorted(hooks), set(others)
    classes = [each for each in type(obj).__mro__ if each not in base.__mro__]
    own = {name: value for each in reversed(classes) for name, value in vars(each).items()}
    overridden = {name for name in hooks if name in own or name in getattr(obj, "__dict__", {})}
    # A method that hands on to super() mentions itself.
    mentioned = {each for name, value in own.items() for each in _mentions(value) if each != name}
    found: dict[str, str] = {}
    for name, value in own.items():
        if name.startswith("_") or hasattr(base, name) or name in hooks or name in mentioned or not _function(value):
            continue
        if name in NOT_CALLED:
            found[name] = NOT_CALLED[name]
        elif name in others:
            found[name] = f"{base.__name__} has no such hook"
        elif _SHAPE.fullmatch(name):
            nearest = _nearest(name, hooks)
            # Who wrote the hook itself has spelt it, and means something else here.
            if nearest is not None and nearest not in overridden:
                found[name] = f"did you mean {nearest}?"
    return found


def _nearest(name: str, hooks: list[str]) -> str | None:
    on = name.startswith("on_")
    hooks = [hook for hook in hooks if hook.startswith("on_") is on]
    spellings = {name, re.sub(r"(^|_)val_", r"\1validation_", name)}
    matches = [m for each in spellings for m in difflib.get_close_matches(each, hooks, n=1, cutoff=_CLOSE)]
    return max(matches, key=lambda m: max(_ratio(each, m) for each in spellings), default=None)


def _ratio(one: str, two: str) -> float:
    return difflib.SequenceMatcher(None, one, two).ratio()


def _function(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, (staticmethod, classmethod))


def _mentions(value: Any) -> Iterator[str]:
    """Names that a function of the class looks up or holds as text (``getattr(self, "name")``)."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    code = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
    stack: list[CodeType] = [code] if isinstance(code, CodeType) else []
    while stack:
        code = stack.pop()
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, str):
                yield constant
            elif isinstance(constant, tuple):
                yield from (each for each in constant if isinstance(each, str))
            elif isinstance(constant, CodeType):
                stack.append(constant)
