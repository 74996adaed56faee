"""The loops' decisions as pure functions of plain values. Floor 3."""

from __future__ import annotations

import math
from collections.abc import Callable

from raylit.errors import ConfigError


def resolve_val_interval(interval: int | float, total: int | None, every_n_epoch: int | None) -> int | None:
    """Turn ``val_check_interval`` into training batches between validations; None: at the end of the epoch.

    ``every_n_epoch`` None: the batches are counted over epochs, so that an interval may be longer than one.
    """
    if isinstance(interval, int) and not isinstance(interval, bool):
        if total is not None and interval > total and every_n_epoch is not None:
            raise ConfigError(
                f"val_check_interval={interval} is more than the {total} training batches of an epoch; give at most "
                f"{total}, or check_val_every_n_epoch=None to count over epochs"
            )
        return interval
    if interval == 1.0:
        return None
    if total is None:
        raise ConfigError(
            f"val_check_interval={interval} is a fraction, but the training loader does not know its length; "
            "give a number of batches"
        )
    return max(1, int(total * interval))


def stepping_batches(
    total: int | None, epochs: int | None, max_steps: int, accumulate: Callable[[int], int]
) -> int | float:
    """Return the rounds of optimizer steps of a fit: ``total`` batches an epoch, ``accumulate(epoch)`` to a step.

    ``total`` and ``epochs`` None: unknown or without limit; ``max_steps`` -1: no limit.
    """
    limit = math.inf if max_steps == -1 else max_steps
    if total is None or epochs is None:
        return limit
    return min(limit, sum(math.ceil(total / accumulate(epoch)) for epoch in range(epochs)))


def validation_due(
    batches_done: int, total_batches_done: int, last: bool, interval: int | None, epoch: int, every_n_epoch: int | None
) -> bool:
    """Tell whether validation runs after this training batch; ``batches_done`` counts this one in."""
    if every_n_epoch is None:  # the interval runs on over epochs
        return interval is not None and total_batches_done % interval == 0
    if (epoch + 1) % every_n_epoch != 0:
        return False
    return last if interval is None else batches_done % interval == 0


def steps_reached(global_step: int, max_steps: int) -> bool:
    """Tell whether ``max_steps`` optimizer steps are done."""
    return max_steps != -1 and global_step >= max_steps


def epochs_reached(epoch: int, max_epochs: int) -> bool:
    """Tell whether ``max_epochs`` epochs are done."""
    return max_epochs != -1 and epoch >= max_epochs


def may_stop(epochs_done: int, global_step: int, min_epochs: int, min_steps: int) -> bool:
    """Tell whether a request to stop may be granted yet."""
    return epochs_done >= min_epochs and global_step >= min_steps


def total_or_inf(total: int | None) -> int | float:
    """A number of batches as ``trainer.num_training_batches`` shows it."""
    return math.inf if total is None else total
