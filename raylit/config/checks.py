"""Checks of single arguments. Each returns the value as a plain one, or raises ``ConfigError`` naming it. Floor 0."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Sequence
from typing import NoReturn

from raylit.errors import ConfigError, nearest


def refuse(name: str, value: object, accepted: str) -> NoReturn:
    """Raise the error of one argument: its name, the value given, what is accepted."""
    stop = "" if accepted.endswith(("?", ".")) else "."
    raise ConfigError(f"Trainer({name}={show(value)}): {accepted}{stop}")


def show(value: object) -> str:
    """Show a value as the user wrote it, in brief."""
    return value.__name__ if isinstance(value, type) else reprlib.repr(value)


def whole(name: str, value: object, least: int, meaning: str = "") -> int:
    """Check a whole number of at least ``least``. Takes numpy's; refuses True and 3.0."""
    accepted = f"expected a whole number of at least {least}{f' ({meaning})' if meaning else ''}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        refuse(name, value, accepted)
    number = operator.index(value)
    if number < least:
        refuse(name, value, accepted)
    return number


def whole_or_none(name: str, value: object, least: int, meaning: str = "") -> int | None:
    """Check a whole number, or None."""
    return None if value is None else whole(name, value, least, f"{meaning}; " * bool(meaning) + "or None")


def number(name: str, value: object, accepted: str) -> float:
    """Check a real number that is not nan. Takes numpy's; refuses True and text."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        hint = ""
        if isinstance(value, str) and _reads_as_number(value):
            hint = f" (this is text; YAML reads {float(value)!r} as a number)"
        refuse(name, value, accepted + hint)
    return float(value)


def flag(name: str, value: object) -> bool:
    """Check True or False."""
    if not isinstance(value, bool):
        refuse(name, value, "expected True or False")
    return value


def one_of(name: str, value: object, accepted: Sequence[str]) -> str:
    """Check one of a few words."""
    if not isinstance(value, str) or value not in accepted:
        hint = nearest(value, accepted) if isinstance(value, str) else ""
        refuse(name, value, f"expected one of {', '.join(map(repr, accepted))}.{hint}")
    return value


def instance(name: str, value: object, accepted: str) -> None:
    """Refuse a class where an object of it is meant: ``callbacks=[EarlyStopping]``."""
    if isinstance(value, type):
        refuse(name, value, f"{value.__name__} is a class, expected {accepted}; write {value.__name__}(...)")


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
