"""What a search began with comes back to a process that has drawn other numbers since."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import torch

import raylit
from raylit.checkpoint.folder import Folder
from raylit.search import beginning
from raylit.seed import get_random_state, set_random_state
from tests.unit.search.test_trial import spec


def drawn() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.random()), float(torch.rand(()))


def test_a_search_that_is_taken_up_begins_as_it_did(tmp_path: Path) -> None:
    before = get_random_state()
    try:
        raylit.seed_everything(41)
        first = spec()
        first.random_state, first.order_seed = get_random_state(), 41
        beginning.keep(first, Folder(str(tmp_path)))
        expected = drawn()
        raylit.seed_everything(42)
        second = spec()
        second.random_state, second.order_seed = get_random_state(), 42
        beginning.take_up(second, Folder(str(tmp_path)))
        assert second.order_seed == 41 and second.random_state is not None
        set_random_state(second.random_state)
        assert drawn() == expected
    finally:
        set_random_state(before)


def test_a_search_that_has_kept_nothing_begins_as_the_process(tmp_path: Path) -> None:
    made = spec()
    state = made.random_state
    beginning.take_up(made, Folder(str(tmp_path)))
    assert made.random_state is state and made.order_seed == 3
