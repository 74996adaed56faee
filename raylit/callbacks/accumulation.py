"""GradientAccumulationScheduler: how many batches make up an optimizer step, by epoch. Floor 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from raylit.callbacks.configuring import ConfiguringCallback, RunSettings
from raylit.config.amounts import accumulation, accumulation_at
from raylit.errors import ConfigError


class GradientAccumulationScheduler(ConfiguringCallback):
    """Change the accumulation of gradients at given epochs; the same as ``Trainer(accumulate_grad_batches={...})``.

    ``scheduling``: {epoch from which it holds, from 0: batches to an optimizer step, at least 1}; before the first
    epoch named it is 1. ConfigError for anything else, and where the Trainer has an ``accumulate_grad_batches`` too.
    """

    subject: ClassVar[str] = "gradient accumulation"

    def __init__(self, scheduling: Mapping[int, int]) -> None:
        if not isinstance(scheduling, Mapping):
            raise ConfigError(
                f"GradientAccumulationScheduler(scheduling={scheduling!r}): expected a dict {{epoch: batches}}, such "
                "as {0: 8, 4: 4}; for one number in all epochs use Trainer(accumulate_grad_batches=...)"
            )
        try:
            checked = accumulation("scheduling", scheduling)
        except ConfigError as error:  # worded for an argument of the Trainer
            raise ConfigError(str(error).replace("Trainer(", "GradientAccumulationScheduler(", 1)) from None
        assert isinstance(checked, dict)  # a mapping stays one
        self.scheduling: dict[int, int] = {0: 1, **checked}
        self.epochs = sorted(self.scheduling)

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Return the batches to an optimizer step in ``epoch`` (from 0)."""
        return accumulation_at(self.scheduling, epoch)

    def going_to_accumulate_grad_batches(self) -> bool:
        """Return whether any epoch accumulates."""
        return any(batches > 1 for batches in self.scheduling.values())

    def configure(self, settings: RunSettings) -> RunSettings:
        """Put the schedule in the Trainer's place."""
        given = settings.fit.accumulate_grad_batches
        if given != 1:
            raise ConfigError(
                f"Trainer(accumulate_grad_batches={given}) and a GradientAccumulationScheduler in callbacks: both say "
                "how many batches make up a step. Leave one out."
            )
        return replace(settings, fit=replace(settings.fit, accumulate_grad_batches=self.scheduling))
