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


def check_signature(
    spec: HookSpec, function: Callable[..., Any], owner: str
) -> tuple[list[int], dict[str, int], frozenset[str]]:
    """Return what ``function`` wants of the hook's arguments, as places in ``spec.arguments``.

    These are: the places to give by position, in the order of the signature; those to give by name; and the names of
    all that it gets because it names them (or takes ``**kwargs``). Raises HookError where it asks for a name that the
    hook does not have.
    """
    picks: list[int] = []
    keywords: dict[str, int] = {}
    names: set[str] = set()
    index = {name: i for i, name in enumerate(spec.arguments)}
    next_plain = 0
    in_row = True  # no parameter was left out yet, so the next one can be given by position
    for parameter in inspect.signature(function).parameters.values():
        name = parameter.name
        if parameter.kind is parameter.VAR_KEYWORD:
            if not spec.extra:
                wanted = spec.arguments if spec.by_name else spec.named
                # One that stands in the signature already would be given twice.
                new = [each for each in wanted if index[each] not in picks and each not in keywords]
                keywords.update({each: index[each] for each in new})
                names.update(new)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            # Of an ``extra`` hook that names an argument before them, they are the caller's own.
            if not spec.by_name and in_row and not (spec.extra and next_plain):
                picks.extend(range(next_plain, len(spec.plain)))
                next_plain = len(spec.plain)
        elif spec.by_name or name in spec.named or parameter.kind is parameter.KEYWORD_ONLY:
            if name not in index:
                in_row = False
                if parameter.default is parameter.empty:
                    raise _unknown_argument(spec, name, owner)
            else:
                names.add(name)
                if in_row and parameter.kind is not parameter.KEYWORD_ONLY:
                    # By position: a plain argument may follow it, and it may be positional-only.
                    picks.append(index[name])
                elif parameter.kind is not parameter.POSITIONAL_ONLY:
                    keywords[name] = index[name]
        elif next_plain < len(spec.plain):
            picks.append(next_plain)
            next_plain += 1
        else:
            in_row = False
            if parameter.default is parameter.empty:
                raise _unknown_argument(spec, name, owner)
    return picks, keywords, frozenset(names)


def _unknown_argument(spec: HookSpec, name: str, owner: str) -> HookError:
    accepted = ", ".join(spec.arguments) or "no arguments"
    return HookError(
        f"{owner}.{spec.name} asks for {name!r}, which this hook is never given.{nearest(name, spec.arguments)} "
        f"It may take: {accepted}."
    )


def adapt(spec: HookSpec, function: Callable[..., Any], owner: str) -> Callable[..., Any]:
    """Return a callable that takes all of the hook's arguments by position and calls ``function`` with those it wants.

    For a hook with ``extra`` it takes more after them, which reach ``function`` where its signature has them.
    """
    picks, keywords, _ = check_signature(spec, function, owner)
    named = tuple(keywords.items())
    if spec.extra:
        return _with_extra(spec, function, picks, named)
    count = len(picks)
    if not named and picks == list(range(count)):
        return function if count == len(spec.arguments) else lambda *args: function(*args[:count])
    return lambda *args: function(*[args[i] for i in picks], **{name: args[i] for name, i in named})


def _with_extra(
    spec: HookSpec, function: Callable[..., Any], picks: list[int], named: tuple[tuple[str, int], ...]
) -> Callable[..., Any]:
    parameters = inspect.signature(function).parameters.values()
    more_args = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    more_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters)
    declared = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - set(spec.arguments)
    known = len(spec.arguments)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [args[i] for i in picks] + list(args[known:] if more_args else ())
        extra = kwargs if more_kwargs else {name: value for name, value in kwargs.items() if name in declared}
        return function(*given, **{name: args[i] for name, i in named}, **extra)

    return call
