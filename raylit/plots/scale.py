"""One axis of a picture: where a hyperparameter's value stands on it, from 0 to 1. Floor 2; no matplotlib here.

Numbers stand on a linear axis, or on a logarithmic one where they are positive and span two orders of magnitude or more
(and not for one that happens to be near zero, as among many of ``uniform(0, 1)``).
Everything else, and mixtures, are categories at equal distances. ``None`` among numbers, and a key that some trials
lack, have a place of their own below the numbers.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

UNSET: Any = type("Unset", (), {"__repr__": lambda self: "not set"})()  # a key that this trial does not have

_FLOOR = 0.14  # where numbers begin on an axis that has a place for None below them
_DECADES = 2.0
_MOST_VALUES = 8  # so many different numbers are ticks themselves
_MOST_CATEGORIES = 20  # so many names are written at one axis
_GAP = 0.05  # of the axis's length, between two labels


@dataclass(frozen=True)
class Scale:
    """``kind``: "linear", "log" or "category". ``names``: the categories, or what stands below the numbers."""

    kind: str
    low: float = 0.0
    high: float = 1.0
    names: tuple[str, ...] = ()
    values: tuple[float, ...] = ()  # the different numbers, where they are few

    def position(self, value: Any) -> float:
        """Where a value stands, from 0 to 1."""
        if self.kind == "category":
            return self._slot(self.names.index(text_of(value)))
        if value is None or value is UNSET:
            return 0.0
        low, high, at = self._measured(self.low), self._measured(self.high), self._measured(float(value))
        inside = 0.5 if high == low else (at - low) / (high - low)
        return self.floor + (1 - self.floor) * inside

    def ticks(self) -> list[tuple[float, str]]:
        """Positions with their labels, at most one in each twentieth of the axis's length."""
        if self.kind == "category":
            every = math.ceil(len(self.names) / _MOST_CATEGORIES)
            return [(self._slot(index), name) for index, name in enumerate(self.names) if index % every == 0]
        chosen = self.values or (self._decades() if self.kind == "log" else self._rounded())
        found = [(0.0, name) for name in self.names]
        for value in chosen:
            position = self.position(value)
            if not found or position - found[-1][0] >= _GAP:
                found.append((position, number(value)))
        return found

    def minor_ticks(self) -> list[float]:
        """Of a logarithmic axis: 2, 3, ... 9 of each decade."""
        if self.kind != "log" or self.values:
            return []
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        marks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in range(2, 10)]
        return [self.position(mark) for mark in marks if self.low <= mark <= self.high]

    @property
    def floor(self) -> float:
        """Where the numbers begin."""
        return _FLOOR if self.names and self.kind != "category" else 0.0

    def _slot(self, index: int) -> float:
        return 0.5 if len(self.names) == 1 else index / (len(self.names) - 1)

    def _measured(self, value: float) -> float:
        return math.log10(value) if self.kind == "log" else value

    def _decades(self) -> list[float]:
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        every = math.ceil((last - first + 1) / 8)
        return [float(f"1e{exponent}") for exponent in range(first, last + 1, every)]

    def _rounded(self) -> list[float]:
        """Four to eight round numbers within the range."""
        span = self.high - self.low
        if span == 0:
            return [self.low]
        step = 10.0 ** math.floor(math.log10(span / 4))
        step *= max(factor for factor in (1, 2, 2.5, 5) if factor * step * 4 <= span * (1 + 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [round(index * step, 12 - math.floor(math.log10(step)))
                for index in range(first, math.floor(self.high / step + 1e-9) + 1)]  # fmt: skip


def scale_of(values: Sequence[Any]) -> Scale:
    """The axis for these values; ``UNSET`` where a trial does not have the key."""
    below = [name for name, absent in (("None", None), ("not set", UNSET)) if any(v is absent for v in values)]
    known = [value for value in values if value is not None and value is not UNSET]
    if not known or not all(is_number(value) and math.isfinite(value) for value in known):
        return Scale("category", names=tuple(text_of(value) for value in _sorted(values)))
    found = sorted({float(value) for value in known})
    spans = is_log(found) and _is_wide_in_the_middle(found)
    few = len(found) <= 2 or (len(found) <= _MOST_VALUES and len(known) >= 2 * len(found))
    names = (" or ".join(below),) if below else ()
    return Scale("log" if spans else "linear", found[0], found[-1], names, tuple(found) if few else ())


def is_log(values: Sequence[float]) -> bool:
    """Whether numbers are positive and span two orders of magnitude or more."""
    low, high = min(values), max(values)
    return low > 0 and math.log10(high) - math.log10(low) >= _DECADES - 1e-9


def _is_wide_in_the_middle(values: Sequence[float]) -> bool:
    """Whether the middle three fifths span a factor of 6: numbers at equal distances span 4, whatever their range."""
    low, high = np.quantile(np.log10(values), [0.2, 0.8])
    return bool(high - low >= math.log10(6))


def is_number(value: Any) -> bool:
    """A number that is no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def number(value: Any) -> str:
    """A number as people write it: four digits that count, ``1e-5``, no ``.0``."""
    if isinstance(value, numbers.Integral) and abs(int(value)) < 10_000_000:
        return str(int(value))
    text = f"{float(value):.4g}"
    if "e" in text:
        digits, exponent = text.split("e")
        text = f"{digits}e{int(exponent)}"
    return text


def text_of(value: Any) -> str:
    """A hyperparameter's value as it is written, and as categories are told apart.

    Functions and classes go by their names, tuples and lists by their items.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if is_number(value):
        return number(value)
    if isinstance(value, tuple | list):
        items = ", ".join(map(text_of, value))
        return f"[{items}]" if isinstance(value, list) else f"({items},)" if len(value) == 1 else f"({items})"
    if callable(value) and isinstance(getattr(value, "__name__", None), str):
        return str(value.__name__)
    text = str(value)
    return type(value).__name__ if " at 0x" in text else " ".join(text.split())


def shortened(text: str, most: int) -> str:
    """A long text without its middle, at most so many characters."""
    if len(text) <= most:
        return text
    end = (most - 1) // 3
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def _sorted(values: Sequence[Any]) -> list[Any]:
    """The different values: the absent ones, numbers by size, then names, of which 'layer 9' is before 'layer 10'."""
    different = list({text_of(value): value for value in values}.values())

    def key(value: Any) -> tuple[int, float, list[tuple[int, float, str]]]:
        if value is None or value is UNSET:
            return 0, 0.0, []
        if is_number(value) and not math.isnan(value):
            return 1, float(value), []
        parts = re.findall(r"(\d+(?:\.\d+)?)|(\D+)", text_of(value).lower())
        return 2, 0.0, [(0, float(digits), "") if digits else (1, 0.0, text) for digits, text in parts]

    return sorted(different, key=key)
