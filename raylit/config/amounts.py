"""Amounts with units: durations, numbers of batches, gradient accumulation, precision. Pure functions. Floor 0."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from datetime import timedelta

from raylit.config.checks import number, refuse, show, whole
from raylit.errors import ConfigError, nearest

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")
_PRECISION_ALIASES = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
_UNITS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")
_DURATION_FORMS = "expected 'DD:HH:MM:SS', a datetime.timedelta, or a dict such as {'hours': 2, 'minutes': 30}"
_AMOUNT_FORMS = "expected a fraction from 0.0 to 1.0, or a whole number of batches of at least 0"


def duration(name: str, value: object) -> timedelta | None:
    """Read a duration: "DD:HH:MM:SS", a timedelta, a dict of timedelta's arguments, or None. More than zero.

    A bare number is refused, as its unit would be a guess.
    """
    if value is None:
        return None
    if isinstance(value, timedelta):
        span = value
    elif isinstance(value, str):
        match = re.fullmatch(r"(\d+):(\d{1,2}):(\d{1,2}):(\d{1,2})", value.strip(), re.ASCII)
        if match is None:
            refuse(name, value, _DURATION_FORMS)
        span = _span(name, value, dict(zip(("days", "hours", "minutes", "seconds"), map(int, match.groups()))))
    elif isinstance(value, Mapping):
        for unit in value:
            if unit not in _UNITS:
                hint = nearest(unit, _UNITS) if isinstance(unit, str) else ""
                refuse(
                    name, value, f"{show(unit)} is no unit of time; units are {', '.join(_UNITS)}.{hint}".rstrip(".")
                )
        span = _span(
            name, value, {unit: number(f"{name}[{unit}]", n, "expected a number") for unit, n in value.items()}
        )
    else:
        hint = "; a number alone has no unit" if isinstance(value, numbers.Real) else ""
        refuse(name, value, _DURATION_FORMS + hint)
    if span <= timedelta(0):
        refuse(name, value, "expected a time of more than zero")
    return span


def batch_amount(name: str, value: object) -> int | float:
    """Check a number of batches: a float from 0.0 to 1.0 is a fraction (1.0: all), an int is that many batches."""
    if isinstance(value, bool):
        # True is 1 in Python, so one batch, and reads like "all": the two writings of one are the user's to tell apart.
        refuse(name, value, f"{_AMOUNT_FORMS} (1.0: all of them; 1: one batch; 0: none)")
    if isinstance(value, numbers.Integral):
        return whole(name, value, 0, "batches; a fraction has a point, as 0.5")
    fraction = number(name, value, _AMOUNT_FORMS)
    if not 0.0 <= fraction <= 1.0:
        hint = f"; for {int(fraction)} batches write {int(fraction)}" if fraction > 1 and fraction.is_integer() else ""
        refuse(name, value, _AMOUNT_FORMS + hint)
    return fraction


def batches(limit: int | float, total: int | None, name: str = "limit") -> int | None:
    """Return how many batches a limit leaves of ``total``; None: as many as there are.

    ``total``: batches of the loader, or None where it has no length. A fraction is rounded down, as in Lightning.
    Raises ``ConfigError`` for a fraction that leaves no batch of a loader that has some (the least one that leaves one
    is named), and for a fraction of a loader without length. ``name``: the argument, for the message.
    """
    if isinstance(limit, int):
        return limit if total is None else min(limit, total)
    if limit == 0.0:
        return 0
    if limit == 1.0:
        return total
    if total is None:
        raise ConfigError(
            f"Trainer({name}={limit}) is a fraction of a loader that has no length. "
            f"Give a whole number of batches, or 1.0 for all."
        )
    left = int(total * limit)
    if left == 0 and total > 0:
        raise ConfigError(
            f"Trainer({name}={limit}) leaves no batch of the {total} that the loader has. "
            f"The least fraction that leaves one is {least_fraction(total)}; write 0 for none, or a number of batches."
        )
    return left


def least_fraction(total: int) -> float:
    """Return a short number, just above 1/``total``, that as a fraction of ``total`` batches leaves one."""
    digits = 2
    while True:
        fraction = math.ceil(10.0**digits / total) / 10.0**digits
        # Short, but not so short that it is far from the least: 2 digits of 1/3 are 0.34, of 1/900 they would be 0.01.
        if int(total * fraction) == 1 and fraction * total < 1.1:
            return min(fraction, 1.0)
        digits += 1


def accumulation(name: str, value: object) -> int | dict[int, int]:
    """Check ``accumulate_grad_batches``: a number of batches, or {epoch from which it holds (from 0): number}.

    Before the first epoch of the dict it is 1, as in Lightning.
    """
    if not isinstance(value, Mapping):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            refuse(name, value, "expected a number of batches of at least 1, or a dict {epoch: number of batches}")
        return whole(name, value, 1, "batches")
    if not value:
        refuse(name, value, "the dict {epoch: number of batches} is empty")
    return {
        whole(f"{name}: epoch", epoch, 0, "the first epoch is 0"): whole(f"{name}[{epoch}]", n, 1, "batches")
        for epoch, n in sorted(value.items(), key=lambda item: _order(item[0]))
    }


def accumulation_at(schedule: int | Mapping[int, int], epoch: int) -> int:
    """Return the batches in an accumulation group in ``epoch`` (from 0)."""
    if isinstance(schedule, int):
        return schedule
    started = [first for first in schedule if first <= epoch]
    return schedule[max(started)] if started else 1


def precision(name: str, value: object) -> str:
    """Bring a precision to its full name: 16 and "16" are "16-mixed", "bf16" is "bf16-mixed", 32 is "32-true"."""
    text = str(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value
    if isinstance(text, str):
        text = _PRECISION_ALIASES.get(text, text)
        if text in PRECISIONS:
            return text
    hint = nearest(text, PRECISIONS) if isinstance(text, str) else ""
    accepted = ", ".join(map(repr, PRECISIONS))
    refuse(name, value, f"expected one of {accepted}, or 16, 'bf16', 32, 64.{hint}")


def check_precision(chosen: str, use_gpu: bool) -> None:
    """Refuse "16-mixed" where there is no GPU. Called where the hardware is known, before the first batch."""
    if chosen == "16-mixed" and not use_gpu:
        raise ConfigError(
            "Trainer(precision='16-mixed') needs a GPU, and this run has none. "
            "Use precision='bf16-mixed', which works on CPUs."
        )


def _span(name: str, value: object, units: Mapping[str, float]) -> timedelta:
    try:
        return timedelta(**units)
    except OverflowError:
        refuse(name, value, "longer than a datetime.timedelta can hold")


def _order(epoch: object) -> float:
    """Sort what may not be a number without failing: the check of each key words the error."""
    return float(epoch) if isinstance(epoch, numbers.Real) else -1.0
