"""A rising learning rate and the loss at each: what ``trainer.lr_find`` trains with. Floor 2, on every worker.

Not for a person's list of callbacks: the driver puts it into a fit of which nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raylit.callback import Callback
from raylit.errors import ConfigError, OptimizerError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from raylit.module import Module
    from raylit.view import TrainerView

BETA = 0.98  # of the old losses at each step; Lightning's value


class LearningRateRange(Callback):
    """Take each optimizer step with the next of ``rates``; keep the rates used (``lrs``) and the smoothed ``losses``.

    A step's loss is the mean over its batches and all workers. Smoothed is their exponential average, divided by the
    weights that are in it, so that losses which stay the same are smoothed to themselves. ``threshold``: training stops
    when that exceeds the best by this factor, or is not finite; None: never.
    """

    def __init__(self, rates: Sequence[float], threshold: float | None) -> None:
        self._rates, self._threshold = list(rates), threshold
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self._average, self._best = 0.0, math.inf
        self._pending: list[Tensor] = []  # losses of this worker's batches since the last step that was settled
        self._epoch_began = 0

    # -- the learning rate ---------------------------------------------------------------------------------------
    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        if not module.automatic_optimization:
            raise ConfigError(_MANUAL)
        if len(trainer.optimizers) != 1:
            raise OptimizerError(
                f"lr_find works with one optimizer; configure_optimizers of {type(module).__name__} returned "
                f"{len(trainer.optimizers) or 'none'}"
            )
        trainer.schedulers_on_hold = True

        def set_rate(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            _set(optimizer, self._rates[trainer.global_step])

        # Last before the step itself: an override of optimizer_step that warms up sets a rate of its own.
        trainer.optimizers[0].register_step_pre_hook(set_rate)

    def on_train_epoch_start(self, trainer: TrainerView, module: Module) -> None:
        self._epoch_began = trainer.global_step

    def on_train_batch_start(self, trainer: TrainerView, module: Module, batch: Any, batch_idx: int) -> int | None:
        if self._settle(trainer, module):
            return -1  # on all workers alike
        _set(trainer.optimizers[0], self._rates[trainer.global_step])
        return None

    # -- the loss ------------------------------------------------------------------------------------------------
    def on_train_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pending += [loss.detach().reshape(()) for loss in _losses(outputs)]

    def on_train_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        self._settle(trainer, module)
        if trainer.global_step == self._epoch_began and not trainer.should_stop:
            raise OptimizerError(
                f"lr_find: no optimizer stepped in epoch {trainer.current_epoch}, so there is no loss to look at; did "
                "training_step return the loss in any batch?"
            )

    def on_train_end(self, trainer: TrainerView, module: Module) -> None:
        trainer.schedulers_on_hold = False

    def _settle(self, trainer: TrainerView, module: Module) -> bool:
        """Take in the loss of a step that was done since the last call; True where training is to stop.

        Every worker comes here at the same points, one whose batches were all skipped too.
        """
        if trainer.global_step == len(self.losses):
            return False
        # One look at the device a step; there is no curve without.
        values = torch.stack(self._pending).tolist() if self._pending else []
        self._pending = []
        mine = torch.tensor([sum(values), len(values)], dtype=torch.float64)
        total, count = module.all_gather(mine).sum(dim=0).tolist()
        step = len(self.losses) + 1
        self._average = BETA * self._average + (1 - BETA) * (total / count if count else math.nan)
        smoothed = self._average / (1 - BETA**step)
        self.lrs.append(self._rates[step - 1])
        self.losses.append(smoothed)
        if self._threshold is not None and self._diverged(smoothed, self._threshold):
            trainer.should_stop = True
            return True
        self._best = min(self._best, smoothed)
        return False

    def _diverged(self, loss: float, threshold: float) -> bool:
        if not math.isfinite(loss):
            return True
        # threshold * best, for a best above 0; a loss below 0 may lose as much before it counts.
        return math.isfinite(self._best) and loss > self._best + (threshold - 1) * abs(self._best)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": []}


_MANUAL = (
    "lr_find sets the learning rate of the steps that raylit takes; under manual optimisation "
    "(automatic_optimization=False) training_step takes them itself"
)


def check_automatic(automatic: bool) -> None:
    """Raise ConfigError for manual optimisation."""
    if not automatic:
        raise ConfigError(_MANUAL)


def _set(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _losses(outputs: Any) -> Iterator[Tensor]:
    """The losses in what ``on_train_batch_end`` is given: of a batch, or of each of its pieces in time."""
    for each in outputs if isinstance(outputs, list) else [outputs]:
        loss = each.get("loss") if isinstance(each, Mapping) else None
        if isinstance(loss, Tensor):
            yield loss
