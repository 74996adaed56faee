"""What ``trainer.lr_find`` returns: losses by learning rate, the one to take, a picture. Floor 5, driver side."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from raylit.errors import missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LRFinder:
    """``results``: ``{"lr": [...], "loss": [...]}``, a smoothed loss for each learning rate that a step was taken with.

    ``mode``: ``"exponential"`` or ``"linear"``; ``lr_min``, ``lr_max``, ``num_training``: as they were given.
    """

    def __init__(
        self, mode: str, lr_min: float, lr_max: float, num_training: int, lrs: Sequence[float], losses: Sequence[float]
    ) -> None:
        self.mode, self.lr_min, self.lr_max, self.num_training = mode, lr_min, lr_max, num_training
        self.results: dict[str, list[float]] = {"lr": list(lrs), "loss": list(losses)}

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """Return the learning rate at which the loss falls most steeply.

        Steepness is that of the curve as it is drawn: over the logarithm of the learning rate, in mode ``"linear"``
        over the learning rate itself. ``skip_begin``, ``skip_end``: points that are left out at either end, where the
        loss has not settled, or rises. Losses that are not finite are left out as well. None where fewer than two
        points are left, or the loss falls nowhere.
        """
        last = len(self.results["lr"]) - skip_end
        points = zip(self.results["lr"][skip_begin:last], self.results["loss"][skip_begin:last])
        lrs, losses = torch.tensor(list(points), dtype=torch.float64).reshape(-1, 2).unbind(1)
        finite = torch.isfinite(losses)
        lrs, losses = lrs[finite], losses[finite]
        if not bool((losses.diff() < 0).any()):
            return None
        slopes = torch.gradient(losses, spacing=[lrs.log() if self.mode == "exponential" else lrs])[0]
        return float(lrs[slopes.argmin()])

    def plot(self, suggest: bool = True, path: str | os.PathLike[str] | None = None, show: bool = False) -> Figure:
        """Draw the loss over the learning rate; return matplotlib's figure.

        ``suggest``: mark the suggestion. ``path``: write the picture to this file, in the format of its ending.
        ``show``: open it in a window. MissingDependencyError without matplotlib.
        """
        if importlib.util.find_spec("matplotlib") is None:
            raise missing("matplotlib", "plots", "LRFinder.plot")
        figure = _new_figure(show)
        axes = figure.subplots()
        lrs, losses = self.results["lr"], self.results["loss"]
        axes.plot(lrs, losses)
        if self.mode == "exponential":
            axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss (smoothed)")
        best = self.suggestion() if suggest else None
        if best is not None:
            axes.plot(best, losses[lrs.index(best)], "o", markersize=10, color="red", label=f"suggestion: {best:.3g}")
            axes.legend()
        if path is not None:
            figure.savefig(os.fspath(path))
        if show:
            import matplotlib.pyplot

            matplotlib.pyplot.show()
        return figure

    def __repr__(self) -> str:
        return f"LRFinder({len(self.results['lr'])} of {self.num_training} learning rates, mode={self.mode!r})"


def _new_figure(show: bool) -> Figure:
    """A figure of its own; one that is to be shown is among pyplot's, which has the windows."""
    if show:
        import matplotlib.pyplot

        return matplotlib.pyplot.figure(layout="constrained")
    import matplotlib.figure

    return matplotlib.figure.Figure(layout="constrained")
