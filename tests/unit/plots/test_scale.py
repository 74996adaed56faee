"""Where values stand on an axis, and what is written there."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylit.plots.scale import UNSET, number, scale_of, shortened, text_of


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1e-4, 1e-3, 1e-1], "log"),
        ([0.001, 0.1], "log"),
        ([1e-4, 2e-3, 5e-3], "linear"),
        ([0.0, 1e-3, 1.0], "linear"),
        ([-1.0, 1e-4, 1.0], "linear"),
        ([16, 32, 1600], "log"),
        ([5], "linear"),
        ([1e-4, None, 1e-1], "log"),
        ([np.float32(1e-4), np.int64(1)], "log"),
        (["a", "b"], "category"),
        ([True, False], "category"),
        ([1, "auto"], "category"),
        ([1.0, math.inf], "category"),
        ([None, None], "category"),
        ([(1, 2), [1, 2]], "category"),
        ([0.001 + 0.005 * i for i in range(100)], "linear"),
        ([10 ** (-4 + 0.02 * i) for i in range(150)], "log"),
    ],
)
def test_kind(values: list[Any], kind: str) -> None:
    assert scale_of(values).kind == kind


def test_numbers_fill_the_axis() -> None:
    linear, log = scale_of([2.0, 3.0, 6.0]), scale_of([1e-4, 1e-3, 1e-1])
    assert [linear.position(value) for value in (2.0, 3.0, 6.0)] == [0.0, 0.25, 1.0]
    assert [log.position(value) for value in (1e-4, 1e-3, 1e-1)] == pytest.approx([0.0, 1 / 3, 1.0])
    assert scale_of([7]).position(7) == 0.5


def test_none_among_numbers_has_a_place_below_them() -> None:
    scale = scale_of([None, 1.0, 3.0, UNSET])
    assert scale.position(None) == scale.position(UNSET) == 0.0
    assert 0.1 < scale.position(1.0) < scale.position(3.0) == 1.0
    assert scale.ticks()[0] == (0.0, "None or not set")
    assert scale_of([1.0, UNSET]).ticks()[0] == (0.0, "not set")


def test_categories_stand_in_an_order_that_people_expect() -> None:
    values = ["layer10", "layer9", None, 3, 20, (64, 64), (128, 128), True]
    scale = scale_of(values)
    assert scale.names == ("None", "3", "20", "(64, 64)", "(128, 128)", "layer9", "layer10", "True")
    assert [position for position, _ in scale.ticks()] == pytest.approx([i / 7 for i in range(8)])
    assert scale_of(["only"]).position("only") == 0.5


def test_ticks_of_few_numbers_are_the_numbers() -> None:
    assert [label for _, label in scale_of([32, 64, 128, 256] * 3).ticks()] == ["32", "64", "128", "256"]
    assert [label for _, label in scale_of([0.1, 0.2]).ticks()] == ["0.1", "0.2"]


def test_ticks_are_round_and_powers_of_ten() -> None:
    assert [label for _, label in scale_of([0.03, 0.2, 0.58]).ticks()] == ["0.1", "0.2", "0.3", "0.4", "0.5"]
    log = scale_of([2e-5, 1e-3, 0.3])
    assert [label for _, label in log.ticks()] == ["0.0001", "0.001", "0.01", "0.1"]
    assert len(log.minor_ticks()) == 8 + 8 + 8 + 8 + 2


def test_many_categories_are_not_all_written() -> None:
    scale = scale_of([f"name{i}" for i in range(100)])
    assert len(scale.names) == 100 and len(scale.ticks()) == 20


@given(
    st.lists(
        st.one_of(
            st.none(),
            st.just(UNSET),
            st.booleans(),
            st.text(max_size=3),
            st.integers(-9, 9),
            st.floats(allow_nan=False, width=32),
            st.tuples(st.integers(0, 3)),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_every_value_stands_on_the_axis(values: list[Any]) -> None:
    scale = scale_of(values)
    for value in values:
        assert -1e-9 <= scale.position(value) <= 1 + 1e-9
    positions = [position for position, _ in scale.ticks()]
    assert positions == sorted(positions) and all(-1e-9 <= position <= 1 + 1e-9 for position in positions)


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=30))
def test_ticks_of_numbers_are_few_and_apart(values: list[float]) -> None:
    ticks = scale_of(values).ticks()
    assert 1 <= len(ticks) <= 11
    assert all(after[0] - before[0] >= 0.05 - 1e-9 for before, after in itertools.pairwise(ticks))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"), (256_000, "256000"), (10.0, "10"), (0.12344, "0.1234"), (1e-5, "1e-5"), (2.5e-7, "2.5e-7"),
        (1e6, "1e6"), (0.0, "0"),
    ],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\n b", "a b"), (None, "None"), (True, "True"), (np.bool_(True), "True"), (np.float64(0.5), "0.5"),
        ((64,), "(64,)"), ([0.1, "x"], "[0.1, x]"), ((1, (2, None)), "(1, (2, None))"), (torch.optim.Adam, "Adam"),
        (math.sqrt, "sqrt"), (object(), "object"), (UNSET, "not set"), (math.nan, "nan"),
        (functools.partial(math.sqrt, 2), "functools.partial(<built-in function sqrt>, 2)"),
    ],
)  # fmt: skip
def test_text_of(value: Any, text: str) -> None:
    assert text_of(value) == text


def test_shortened() -> None:
    assert shortened("short", 5) == "short"
    assert shortened("resnet50.a1_in1k_pretrained", 12) == "resnet50…ned" and len(shortened("x" * 99, 12)) == 12
