"""The training data once more through ``training_step``, for the statistics that layers keep of what they saw. Floor 3.

No gradients, no optimizers, no hooks, no logging: an average of weights needs BatchNorm's statistics anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from raylit.engine.parts import Parts
from raylit.errors import HookError


def replay(parts: Parts, batches: Iterable[tuple[int, Any]], muted: Callable[[], AbstractContextManager[Any]]) -> int:
    """Run ``training_step`` on (index, batch) pairs and return their number. ``muted`` makes ``log`` do nothing.

    The Module keeps the modes it is in. HookError under manual optimisation, whose training_step would train.
    """
    step = parts.hooks.own("training_step")
    assert step is not None  # refused long before
    if not parts.module.automatic_optimization:
        raise HookError("a pass over the training data needs automatic optimisation: training_step steps optimizers")
    count = 0
    with torch.no_grad(), muted():
        for batch_idx, batch in batches:
            moved = batch if parts.transfer is None else parts.transfer(batch, 0)
            with parts.precision.forward_context() or nullcontext():
                step(moved, batch_idx, 0, None)
            count += 1
    return count
