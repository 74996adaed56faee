"""RichProgressBar and TQDMProgressBar: how raylit's own bar behaves. Floor 2.

There is one bar (``display/``), drawn where a person looks, which may be another process than the run's. These classes
keep Lightning's names and arguments for what it can do, and refuse the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from raylit.callbacks.configuring import ConfiguringCallback, RunSettings
from raylit.errors import ConfigError

if TYPE_CHECKING:
    from raylit.module import Module
    from raylit.view import TrainerView


class ProgressBar(ConfiguringCallback):
    """How the progress bar behaves.

    ``refresh_rate``: batches between two counts that are shown; it is drawn four times a second at most. 0: no bar and
    no lines on epochs. ``leave``: taken for the sake of scripts; the bar goes and each epoch leaves one line either
    way. Override ``get_metrics`` to choose what it shows. ConfigError for an argument that the bar cannot follow, and
    where the Trainer has ``enable_progress_bar=False``.
    """

    subject: ClassVar[str] = "the progress bar"

    def __init__(self, refresh_rate: int = 1, leave: bool = False, **others: Any) -> None:
        name = type(self).__name__
        if isinstance(refresh_rate, bool) or not isinstance(refresh_rate, int) or refresh_rate < 0:
            raise ConfigError(
                f"{name}(refresh_rate={refresh_rate!r}): expected a whole number of batches; 0 turns the bar off"
            )
        if not isinstance(leave, bool):
            raise ConfigError(f"{name}(leave={leave!r}): expected True or False")
        for argument, value in others.items():
            # Lightning's own defaults say nothing.
            if value not in (None, 0) or argument not in ("theme", "console_kwargs", "process_position"):
                raise ConfigError(
                    f"{name}({argument}={value!r}): raylit has one bar, of one look and in one place. It takes: "
                    "refresh_rate, leave; override get_metrics to choose what it shows"
                )
        self.refresh_rate, self.leave = refresh_rate, leave

    @property
    def is_enabled(self) -> bool:
        """False where ``refresh_rate`` is 0."""
        return self.refresh_rate > 0

    is_disabled = property(lambda self: not self.is_enabled)

    def get_metrics(self, trainer: TrainerView, module: Module) -> Mapping[str, Any]:
        """Return what the bar shows behind its count: by default the Module's ``get_progress_bar_dict()``."""
        return module.get_progress_bar_dict()

    def configure(self, settings: RunSettings) -> RunSettings:
        """Turn the bar off, or hand over how it counts and what it shows."""
        if not self.is_enabled:
            return replace(settings, fit=replace(settings.fit, enable_progress_bar=False))
        if not settings.fit.enable_progress_bar:
            raise ConfigError(
                f"Trainer(enable_progress_bar=False) and a {type(self).__name__} in callbacks: leave one out, or give "
                "refresh_rate=0"
            )
        return replace(settings, bar_every=self.refresh_rate, bar_items=self.get_metrics)


class RichProgressBar(ProgressBar):
    """raylit's bar, which is drawn with rich, under Lightning's name. ``theme`` and ``console_kwargs`` are refused."""


class TQDMProgressBar(ProgressBar):
    """raylit's bar under the name of Lightning's tqdm one. ``process_position`` is refused."""
