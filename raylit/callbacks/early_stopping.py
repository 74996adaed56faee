"""EarlyStopping: end training when a metric no longer gets better. Floor 2; decides on every worker alike."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, tensor

from raylit.callback import Callback
from raylit.config.names import refuse_unknown
from raylit.errors import ConfigError, nearest
from raylit.stage import Stage

if TYPE_CHECKING:
    from raylit.module import Module
    from raylit.view import TrainerView

_ARGUMENTS = ("monitor", "min_delta", "patience", "verbose", "mode", "strict", "check_finite", "stopping_threshold",
              "divergence_threshold", "check_on_train_epoch_end")  # fmt: skip


class EarlyStopping(Callback):
    """Ask the Trainer to stop when ``monitor`` has not improved in ``patience`` checks.

    ``monitor``: the name of a logged metric; its epoch value, reduced over all workers, is compared.
    ``min_delta``: the least change that counts as an improvement. ``mode``: ``"min"`` or ``"max"`` is better.
    ``check_finite``: stop at nan or infinity. ``stopping_threshold``: stop when the metric is better than this.
    ``divergence_threshold``: stop when it is worse than this. ``strict``: a metric that is not logged is an error.
    ``check_on_train_epoch_end``: True: check at the end of each training epoch; False: after each validation; None:
    after each validation where the metric is logged in one, else at the end of each training epoch.
    ``verbose``: print each improvement too; the reason for stopping is always printed, once.

    Attributes: ``wait_count`` (checks without improvement), ``best_score``, ``stopped_epoch`` (0 where it did not
    stop), ``stopping_reason_message``. Raises ConfigError for arguments that cannot be followed, and in training where
    ``monitor`` is not logged. The Trainer's ``min_epochs`` and ``min_steps`` go before the request to stop.
    """

    def __init__(self, monitor: str | None = None, min_delta: float = 0.0, patience: int = 3, verbose: bool = False,
                 mode: str = "min", strict: bool = True, check_finite: bool = True,
                 stopping_threshold: float | None = None, divergence_threshold: float | None = None,
                 check_on_train_epoch_end: bool | None = None, **unknown: Any) -> None:  # fmt: skip
        refuse_unknown("EarlyStopping", unknown, _ARGUMENTS)
        if not isinstance(monitor, str) or not monitor:
            raise ConfigError(
                f"EarlyStopping(monitor={monitor!r}): give the name of the metric to compare, as it is logged: "
                "EarlyStopping(monitor='val_loss')"
            )
        if mode not in ("min", "max"):
            raise ConfigError(f"EarlyStopping(mode={mode!r}): expected 'min' (less is better) or 'max'")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 0:
            raise ConfigError(f"EarlyStopping(patience={patience!r}): expected a number of checks, 0 or more")
        self.monitor, self.mode, self.patience = monitor, mode, patience
        self.min_delta = abs(min_delta)
        self.verbose, self.strict, self.check_finite = verbose, strict, check_finite
        self.stopping_threshold, self.divergence_threshold = stopping_threshold, divergence_threshold
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self.wait_count = self.stopped_epoch = 0
        self.best_score: Tensor = tensor(math.inf if mode == "min" else -math.inf)
        self.stopping_reason_message: str | None = None
        self._before: Tensor | None = None  # the metric as validation found it
        self._of_validation = self._validated = self._missed = False

    @property
    def state_key(self) -> str:
        """The name of the state in a checkpoint: one for each metric and mode, as Lightning's."""
        return f"EarlyStopping{ {'monitor': self.monitor, 'mode': self.mode} }"

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted so far."""
        return {"wait_count": self.wait_count, "stopped_epoch": self.stopped_epoch, "best_score": self.best_score,
                "patience": self.patience}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from a checkpoint; ``patience`` is the one given to this object."""
        self.wait_count, self.stopped_epoch = state["wait_count"], state["stopped_epoch"]
        self.best_score = state["best_score"]

    def on_fit_start(self, trainer: TrainerView, module: Module) -> None:
        self._of_validation = self._validated = self._missed = False
        self.stopping_reason_message = None

    def on_validation_start(self, trainer: TrainerView, module: Module) -> None:
        self._before = trainer.callback_metrics.get(self.monitor)

    def on_validation_end(self, trainer: TrainerView, module: Module) -> None:
        if trainer.stage is not Stage.FIT or trainer.sanity_checking or trainer.fast_dev_run:
            return
        self._validated = True
        value, before, self._before = trainer.callback_metrics.get(self.monitor), self._before, None
        if self.check_on_train_epoch_end is None:
            # A new object under the name: this validation logged it.
            self._of_validation = value is not None and value is not before
            if not self._of_validation:
                return
        if not self.check_on_train_epoch_end:
            self._check(trainer, module, value)

    def on_train_epoch_settled(self, trainer: TrainerView, module: Module) -> None:
        if self.check_on_train_epoch_end is False or self._of_validation or trainer.fast_dev_run:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None and trainer.enable_validation and not self._validated:
            return  # the validation that will log it is still to come
        self._check(trainer, module, value)

    # -- the decision --------------------------------------------------------------------------------------------
    def _check(self, trainer: TrainerView, module: Module, value: Tensor | None) -> None:
        if value is None:
            self._miss(trainer, module)
            return
        # Read off the device, once a check: the loop that has just ended waited for its values anyway.
        current = agreed(module, value)
        best = float(self.best_score)
        if self._is_better(current, best):
            # What all ranks compared, which of a step's value is not this rank's own.
            self.best_score, self.wait_count = tensor(current, dtype=value.dtype), 0
            if self.verbose:
                change = f", {abs(best - current):.4g} better than before" if math.isfinite(best) else ""
                module.print(f"EarlyStopping: {self.monitor} = {current:.6g}{change}")
        elif math.isfinite(current):
            self.wait_count += 1
        reason = self._reason(current, best)
        if reason is not None and self.stopping_reason_message is None:
            self.stopping_reason_message = reason
            self.stopped_epoch = trainer.current_epoch
            trainer.should_stop = True
            module.print(f"EarlyStopping: {reason}")

    def _is_better(self, current: float, than: float, by: float | None = None) -> bool:
        by = self.min_delta if by is None else by
        return current + by < than if self.mode == "min" else current - by > than

    def _reason(self, current: float, best: float) -> str | None:
        """Return why training should stop, or None."""
        name = f"{self.monitor} = {current:.6g}"
        if self.check_finite and not math.isfinite(current):
            return f"{name} is not finite; the best was {best:.6g}"
        if self.stopping_threshold is not None and self._is_better(current, self.stopping_threshold, 0.0):
            return f"{name} is better than stopping_threshold={self.stopping_threshold:g}"
        if self.divergence_threshold is not None and self._is_better(self.divergence_threshold, current, 0.0):
            return f"{name} is worse than divergence_threshold={self.divergence_threshold:g}"
        if self.wait_count >= max(self.patience, 1):
            checks = f"{self.wait_count} check{'s' * (self.wait_count != 1)}"
            delta = f" by {self.min_delta:g}" if self.min_delta else ""
            return f"{self.monitor} did not improve{delta} in {checks}; the best was {float(self.best_score):.6g}"
        return None

    def _miss(self, trainer: TrainerView, module: Module) -> None:
        known = sorted(trainer.callback_metrics)
        text = (
            f"EarlyStopping(monitor={self.monitor!r}): no metric of this name is logged.{nearest(self.monitor, known)} "
            f"Logged are: {', '.join(known) or 'none'}. Log it with self.log({self.monitor!r}, ...)"
        )
        if self.strict:
            raise ConfigError(f"{text}, or give strict=False")
        if not self._missed:
            self._missed = True
            module.print(text)


def agreed(module: Module, value: Tensor) -> float:
    """Return a metric as all workers see it. Epoch values are the same on all; of a step's, which are not, the mean.

    One collective with several workers: all ranks must call it.
    """
    if module.world_size == 1:
        return float(value)
    seen: list[float] = module.all_gather(value.detach().double().reshape(())).tolist()
    return seen[0] if len(set(seen)) == 1 else sum(seen) / len(seen)
