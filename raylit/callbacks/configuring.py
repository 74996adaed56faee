"""Callbacks that only say how a run is set up: they are asked once, before anything starts. Floor 2, any process.

The engine and the display never ask such a callback: what it says is worked into plain settings here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from raylit.callback import Callback
from raylit.config.fit import FitConfig
from raylit.errors import ConfigError


@dataclass(frozen=True)
class RunSettings:
    """The Trainer's arguments about training, with what callbacks say worked in."""

    fit: FitConfig
    summary_depth: int = 1  # levels of layers in the summary; -1: all
    bar_every: int = 1  # the progress bar counts in steps of so many batches
    bar_items: Callable[[Any, Any], Mapping[str, Any]] | None = None  # (trainer, module) -> what the bar shows


class ConfiguringCallback(Callback):
    """A callback whose whole effect is on the settings of a run."""

    # What it is about, for the error where two say it.
    subject: ClassVar[str] = "the settings"

    def configure(self, settings: RunSettings) -> RunSettings:
        """Return the settings as this callback wants them; ConfigError where the Trainer's arguments contradict it."""
        raise NotImplementedError


def configured(fit: FitConfig, callbacks: Iterable[Callback]) -> RunSettings:
    """Return the settings of a run with these callbacks; ConfigError where two of them are about the same thing."""
    settings, seen = RunSettings(fit), dict[str, Callback]()
    for callback in callbacks:
        if isinstance(callback, ConfiguringCallback):
            other = seen.setdefault(callback.subject, callback)
            if other is not callback:
                both = f"{type(other).__name__} and {type(callback).__name__}"
                raise ConfigError(f"Trainer(callbacks=[...]): {both} are both about {callback.subject}; leave one out")
            settings = callback.configure(settings)
    return settings
