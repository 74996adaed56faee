"""LearningRateMonitor: log the learning rates. Floor 2; every worker logs the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from raylit.callback import Callback
from raylit.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from raylit.module import Module
    from raylit.view import TrainerView


class LearningRateMonitor(Callback):
    """Log each optimizer's learning rate to the loggers and ``trainer.history``.

    The name is the scheduler's ``name``, else ``lr-AdamW`` by the optimizer's class (``lr-AdamW-1`` for a second one);
    with several parameter groups ``/pg1``, ``/pg2``, or the group's own ``"name"``, behind it; then ``-momentum``
    (``log_momentum=True``; Adam's first beta) and ``-weight_decay`` (``log_weight_decay=True``).

    ``logging_interval``: ``"step"``: with the step values, each ``log_every_n_steps``, as in use for that step;
    ``"epoch"``: as at the start of each epoch; None: by the scheduler's own interval, and by step without scheduler.
    ``lrs``: what was logged, by name.
    """

    def __init__(self, logging_interval: str | None = None, log_momentum: bool = False,
                 log_weight_decay: bool = False) -> None:  # fmt: skip
        if logging_interval not in (None, "step", "epoch"):
            raise ConfigError(
                f"LearningRateMonitor(logging_interval={logging_interval!r}): expected 'step', 'epoch' or None"
            )
        self.logging_interval = logging_interval
        self.log_momentum, self.log_weight_decay = log_momentum, log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        self._watched: dict[str, list[tuple[str, Optimizer]]] = {}  # "step" and "epoch": names and optimizers

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        self.lrs = {}
        self._watched = {"step": [], "epoch": []}
        for name, optimizer, interval in _named(trainer):
            self._watched[self.logging_interval or interval].append((name, optimizer))

    def on_train_epoch_start(self, trainer: TrainerView, module: Module) -> None:
        for name, value in self._values("epoch"):
            # The same on every worker: a weighted mean of it could be off by a rounding, the largest cannot.
            module.log(name, value, on_epoch=True, reduce_fx="max")

    def on_train_batch_start(self, trainer: TrainerView, module: Module, batch: Any, batch_idx: int) -> None:
        every = trainer.log_every_n_steps
        if every and (trainer.global_step + 1) % every == 0:  # the values of this step will be kept
            for name, value in self._values("step"):
                module.log(name, value, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: TrainerView, module: Module) -> None:
        self._watched = {}  # optimizers stay where they are

    def _values(self, interval: str) -> Iterator[tuple[str, float]]:
        for name, optimizer in self._watched.get(interval, ()):
            groups = optimizer.param_groups
            for index, group in enumerate(groups):
                key = name if len(groups) == 1 else f"{name}/{group.get('name', f'pg{index + 1}')}"
                values = {key: float(group["lr"])}
                if self.log_momentum:
                    momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
                    values[f"{key}-momentum"] = float(momentum)
                if self.log_weight_decay:
                    values[f"{key}-weight_decay"] = float(group.get("weight_decay", 0.0))
                for each, value in values.items():
                    self.lrs.setdefault(each, []).append(value)
                    yield each, value


def _named(trainer: TrainerView) -> Iterator[tuple[str, Optimizer, str]]:
    """Yield a name, the optimizer and the interval: of each scheduler, then of each optimizer without one."""
    classes = [type(optimizer).__name__ for optimizer in trainer.optimizers]
    by_class = [
        f"lr-{each}" if classes[:index].count(each) == 0 else f"lr-{each}-{classes[:index].count(each)}"
        for index, each in enumerate(classes)
    ]
    scheduled, used = set[int](), Counter[str]()
    for config in trainer.lr_scheduler_configs:
        scheduled.add(config.optimizer_idx)
        name = config.name or by_class[config.optimizer_idx]
        used[name] += 1
        if used[name] == 1 or config.name:  # a second scheduler of one optimizer has nothing new to say
            yield name, trainer.optimizers[config.optimizer_idx], config.interval
    for index, optimizer in enumerate(trainer.optimizers):
        if index not in scheduled:
            yield by_class[index], optimizer, "step"
