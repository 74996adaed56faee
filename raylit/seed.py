"""Seeds and random states of python, numpy and torch. Floor 1, any process."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from raylit.errors import ConfigError

_MAX_SEED = 2**32 - 1  # numpy takes no larger one


def seed_everything(seed: int | None = None, workers: bool = False) -> int:
    """Seed python, numpy and torch (all devices) and return the seed; None draws one.

    ``workers`` is accepted for Lightning's sake: loader workers always derive their seed from the run's.
    """
    if seed is None:
        seed = random.SystemRandom().randint(0, _MAX_SEED)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _MAX_SEED:
        raise ConfigError(f"seed must be an integer from 0 to {_MAX_SEED}; got {seed!r}")
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    return seed


def get_random_state() -> dict[str, Any]:
    """Return the random states of this process, as they can be given to ``set_random_state``."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state(),
                             "seed": torch.initial_seed()}  # fmt: skip
    if "numpy" in sys.modules:
        state["numpy"] = sys.modules["numpy"].random.get_state()
    return state


def set_random_state(state: dict[str, Any], devices: bool = True) -> None:
    """Restore what ``get_random_state`` returned. ``devices=False``: the GPUs' generators stay as they are."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if devices and torch.cuda.is_available():
        # The caller may have no such device: its seed is all that can be taken over.
        torch.cuda.manual_seed_all(state["seed"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])
