"""ModelSummary and RichModelSummary: how deep the printed summary goes. Floor 2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from raylit.callbacks.configuring import ConfiguringCallback, RunSettings
from raylit.errors import ConfigError


class ModelSummary(ConfiguringCallback):
    """Print the Module's layers before training, whatever ``Trainer(enable_model_summary=...)`` says.

    ``max_depth``: levels of layers within layers that have a row; -1: all; 0: no summary.
    """

    subject: ClassVar[str] = "the model summary"

    def __init__(self, max_depth: int = 1, **others: Any) -> None:
        name = type(self).__name__
        if isinstance(max_depth, bool) or not isinstance(max_depth, int) or max_depth < -1:
            raise ConfigError(f"{name}(max_depth={max_depth!r}): expected -1 (all levels), 0 (no summary), or levels")
        if others:
            given = ", ".join(f"{argument}={value!r}" for argument, value in others.items())
            raise ConfigError(f"{name}({given}): raylit has one plain table. It takes: max_depth")
        self.max_depth = max_depth

    def configure(self, settings: RunSettings) -> RunSettings:
        """Hand over the depth."""
        fit = replace(settings.fit, enable_model_summary=self.max_depth != 0)
        return replace(settings, fit=fit, summary_depth=self.max_depth)


class RichModelSummary(ModelSummary):
    """The same under Lightning's other name: the table is plain text. Styles of rich's are refused."""
