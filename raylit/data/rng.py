"""Seeds that follow from integers alone, and code run under such a seed without a trace in the process's own state.

Nothing here uses python's ``hash``: a seed must be the same on every rank, platform and interpreter.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raylit.seed import get_random_state, set_random_state

_MASK64 = 2**64 - 1

# What a seed is for, so that an epoch's order and its augmentations never share a stream of random numbers.
FOR_ORDER, FOR_BATCH, FOR_LOADER_WORKERS, FOR_SHARE = 0, 1, 2, 3


def mix_seed(*parts: int) -> int:
    """Mix integers into one seed of 63 bits, the same everywhere.

    Each part (modulo 2**64) is xored into the state, which then takes one round of splitmix64 (Steele, Lea and Flood,
    OOPSLA 2014). The order of the parts counts. 63 bits: torch, numpy and python all take the result.
    """
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state >> 1


def seed_process(seed: int) -> None:
    """Seed python, numpy (if loaded) and torch's CPU generator of this process.

    Not ``torch.manual_seed``: that also reaches for the accelerator, whose state a data loader must not touch.
    """
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed & 0xFFFFFFFF)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the body under ``seed``; python's, numpy's and torch's CPU state are afterwards what they were before."""
    before = get_random_state()
    try:
        seed_process(seed)
        yield
    finally:
        set_random_state(before)
