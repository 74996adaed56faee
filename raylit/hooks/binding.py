"""Read an override's signature once and make the callable that the engine calls ever after. Floor 1.

The callable always takes all documented arguments of the hook by position; what the override does not want is dropped
here. An override that takes exactly the documented arguments is returned as it is, so it costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from raylit.errors import HookError, nearest
from raylit.hooks.spec import HookSpec


def check_signature(spec: HookSpec, function: Callable[..., Any], owner: str) -> tuple[list[int], dict[str, int], bool]:
    """Return what ``function`` wants of the hook's arguments: positions to give, names to give, and all by name or not.

    Raises HookError where it asks for a name that the hook does not have.
    """
    picks: list[int] = []
    keywords: dict[str, int] = {}
    index = {name: i for i, name in enumerate(spec.arguments)}
    next_plain, takes_kwargs = 0, False
    for parameter in inspect.signature(function).parameters.values():
        name = parameter.name
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_kwargs = True
        elif parameter.kind is parameter.VAR_POSITIONAL:
            if not spec.by_name:
                picks.extend(range(next_plain, len(spec.plain)))
                next_plain = len(spec.plain)
        elif spec.by_name or name in spec.named or parameter.kind is parameter.KEYWORD_ONLY:
            if name in index:
                keywords[name] = index[name]
            elif parameter.default is parameter.empty:
                raise _unknown_argument(spec, name, owner)
        elif next_plain < len(spec.plain):
            picks.append(next_plain)
            next_plain += 1
        elif parameter.default is parameter.empty:
            raise _unknown_argument(spec, name, owner)
    if takes_kwargs:
        # A keyword argument of this name would collide with a position already given.
        wanted = spec.arguments if spec.by_name else spec.named
        keywords.update({name: index[name] for name in wanted if name not in keywords})
    return picks, keywords, takes_kwargs


def _unknown_argument(spec: HookSpec, name: str, owner: str) -> HookError:
    accepted = ", ".join(spec.arguments) or "no arguments"
    return HookError(
        f"{owner}.{spec.name} asks for {name!r}, which this hook is never given.{nearest(name, spec.arguments)} "
        f"It may take: {accepted}."
    )


def adapt(spec: HookSpec, function: Callable[..., Any], owner: str) -> Callable[..., Any]:
    """Return a callable that takes all of the hook's arguments by position and calls ``function`` with those it wants."""
    picks, keywords, _ = check_signature(spec, function, owner)
    count = len(picks)
    if not keywords:
        if count == len(spec.arguments):
            return function
        if picks == list(range(count)):
            return lambda *args: function(*args[:count])
    named = tuple(keywords.items())
    return lambda *args: function(*[args[i] for i in picks], **{name: args[i] for name, i in named})
