"""Durations, batches, accumulation and precision as plain values."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylit.config import amounts
from raylit.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("00:00:00:05", 5),
        ("01:02:03:04", 86400 + 7200 + 180 + 4),
        (" 100:0:0:0 ", 8640000),
        (timedelta(minutes=2), 120),
        ({"hours": 1, "minutes": 1.5}, 3690),
    ],
)
def test_duration(value: Any, seconds: float) -> None:
    span = amounts.duration("max_time", value)
    assert span is not None
    assert span.total_seconds() == seconds
    assert amounts.duration("max_time", span) == span


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (30, "a number alone has no unit"),
        ("1:00:00", "expected 'DD:HH:MM:SS'"),
        ("00:00:00:00", "more than zero"),
        (timedelta(seconds=-1), "more than zero"),
        ({}, "more than zero"),
        ({"hour": 1}, "'hour' is no unit of time"),
        ({"hours": "1"}, "max_time[hours]='1'"),
        ({"days": 10**12}, "longer than"),
        ("99999999999:00:00:00", "longer than"),
        ([1], "expected 'DD:HH:MM:SS'"),
    ],
)
def test_duration_errors(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        amounts.duration("max_time", value)
    assert message in str(caught.value)


@given(st.integers(0, 999), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_duration_text_equals_timedelta(days: int, hours: int, minutes: int, seconds: int) -> None:
    expected = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    if expected:
        assert amounts.duration("max_time", f"{days:02}:{hours:02}:{minutes:02}:{seconds:02}") == expected


@pytest.mark.parametrize("value", [0, 1, 7, 0.0, 0.25, 1.0, np.int64(3), np.float32(0.5)])
def test_batch_amount(value: Any) -> None:
    checked = amounts.batch_amount("limit_val_batches", value)
    assert checked == value
    assert type(checked) in (int, float)
    assert isinstance(checked, int) == isinstance(value, (int, np.integer))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "(1.0: all of them; 1: one batch; 0: none)"),
        (-1, "at least 0"),
        (1.5, "a fraction from 0.0 to 1.0"),
        (-0.1, "a fraction from 0.0 to 1.0"),
        (5.0, "for 5 batches write 5"),
        ("0.5", "this is text; YAML reads 0.5 as a number"),
        (float("nan"), "a fraction from 0.0 to 1.0"),
        (float("inf"), "a fraction from 0.0 to 1.0"),
        (None, "a fraction from 0.0 to 1.0"),
    ],
)
def test_batch_amount_errors(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        amounts.batch_amount("limit_val_batches", value)
    assert message in str(caught.value)
    assert "limit_val_batches=" in str(caught.value)


@pytest.mark.parametrize(
    ("limit", "total", "left"),
    [
        (1.0, 10, 10),
        (1, 10, 1),
        (20, 10, 10),
        (0, 10, 0),
        (0.0, 10, 0),
        (0.25, 10, 2),
        (0.99, 10, 9),
        (1.0, None, None),
        (5, None, 5),
        (0, None, 0),
        (0.0, None, 0),
        (0.5, 0, 0),
    ],
)
def test_batches(limit: float, total: int | None, left: int | None) -> None:
    assert amounts.batches(limit, total) == left


def test_a_fraction_that_leaves_nothing_names_the_least_one() -> None:
    with pytest.raises(ConfigError, match=r"limit_val_batches=0.01\) leaves no batch of the 8 .* is 0.13"):
        amounts.batches(0.01, 8, "limit_val_batches")


def test_a_fraction_of_a_loader_without_length() -> None:
    with pytest.raises(ConfigError, match="no length"):
        amounts.batches(0.5, None)


@given(st.integers(1, 10**7))
def test_the_least_fraction_leaves_one_batch(total: int) -> None:
    fraction = amounts.least_fraction(total)
    assert 0 < fraction <= 1
    assert amounts.batches(fraction, total) == 1


@given(st.floats(0, 1), st.integers(0, 10**6))
def test_batches_are_never_more_than_there_are(limit: float, total: int) -> None:
    try:
        left = amounts.batches(limit, total)
    except ConfigError:
        assert int(limit * total) == 0
        return
    assert left is not None
    assert 0 <= left <= total


@pytest.mark.parametrize(("value", "epochs"), [(4, [4] * 4), ({0: 2}, [2] * 4), ({3: 8, 1: 4}, [1, 4, 4, 8])])
def test_accumulation(value: Any, epochs: list[int]) -> None:
    schedule = amounts.accumulation("accumulate_grad_batches", value)
    assert [amounts.accumulation_at(schedule, epoch) for epoch in range(4)] == epochs


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "2", {}, {0: 0}, {-1: 2}, {"a": 2, 1: 1}, {0: 1.5}, [2]])
def test_accumulation_errors(value: Any) -> None:
    with pytest.raises(ConfigError, match="accumulate_grad_batches"):
        amounts.accumulation("accumulate_grad_batches", value)


@pytest.mark.parametrize(
    ("value", "name"),
    [(32, "32-true"), ("32", "32-true"), (16, "16-mixed"), ("16", "16-mixed"), ("bf16", "bf16-mixed"), (64, "64-true")]
    + [(name, name) for name in amounts.PRECISIONS],
)
def test_precision(value: Any, name: str) -> None:
    assert amounts.precision("precision", value) == name


@pytest.mark.parametrize("value", [8, "8", True, None, 16.0, "fp16", "bf16-mixd"])
def test_precision_errors(value: Any) -> None:
    with pytest.raises(ConfigError, match="expected one of '32-true'"):
        amounts.precision("precision", value)


def test_16_mixed_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="bf16-mixed"):
        amounts.check_precision("16-mixed", use_gpu=False)
    amounts.check_precision("16-mixed", use_gpu=True)
    for name in amounts.PRECISIONS:
        if name != "16-mixed":
            amounts.check_precision(name, use_gpu=False)
