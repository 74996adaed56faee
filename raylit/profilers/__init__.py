"""Profilers: where a run's time goes. Floor 2; worker side, each rank for itself.

The engine asks for a profiler only where one was given: without one there is no call in the step path.
"""

from __future__ import annotations

from typing import Final

from raylit.errors import ConfigError, nearest
from raylit.profilers.base import PassThroughProfiler, Profiler
from raylit.profilers.pytorch import PyTorchProfiler
from raylit.profilers.simple import SimpleProfiler

__all__ = ["PassThroughProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler", "make_profiler"]

_BY_NAME: Final[dict[str, type[Profiler]]] = {"simple": SimpleProfiler, "pytorch": PyTorchProfiler}


def make_profiler(profiler: Profiler | str | None) -> Profiler | None:
    """Return what ``Trainer(profiler=...)`` stands for: an object, ``"simple"``, ``"pytorch"``, or None for none."""
    if profiler is None or isinstance(profiler, Profiler):
        return profiler
    if isinstance(profiler, str) and profiler in _BY_NAME:
        return _BY_NAME[profiler]()
    hint = nearest(profiler, _BY_NAME) if isinstance(profiler, str) else ""
    raise ConfigError(
        f"profiler={profiler!r} is not known.{hint} Accepted: None, 'simple', 'pytorch', or a raylit.profilers object"
    )
