"""One logged key: its settings, where they were first given, its latest step value and its running epoch value."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raylit.metrics.reduce import Running, reduce_stacked

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")


def call_site() -> str:
    """Return ``file:line in hook`` of the log call in the user's code. Walks the stack: for registration and errors.

    Where all callers are raylit's own (a callback of ours that logs), the nearest one outside ``raylit/metrics``.
    """
    frame = sys._getframe(1)
    own = None
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(_PACKAGE):
            return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"
        if own is None and not path.startswith(os.path.join(_PACKAGE, "metrics")):
            own = f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return own or "an unknown place"


class Settings(NamedTuple):
    """What one call of log asked for, defaults resolved; plain values, so that two of them compare and are saved.

    ``op`` and ``tbptt_op`` are labels of reductions, ``sync_op`` is "" where step values are not reduced over workers.
    """

    on_step: bool
    on_epoch: bool
    prog_bar: bool
    logger: bool
    op: str
    tbptt_op: str
    sync_op: str
    enable_graph: bool
    add_dataloader_idx: bool
    rank_zero_only: bool
    metric: bool
    in_batch: bool

    def shared(self) -> str:
        """Return what all ranks must have in common: everything but who is shown the value."""
        return repr(self._replace(prog_bar=True, logger=True, enable_graph=False))

    def differences(self, other: Settings) -> str:
        """Return ``"on_step=True against on_step=False, ..."`` in words of the arguments of log."""
        words = {"op": "reduce_fx", "tbptt_op": "tbptt_reduce_fx", "sync_op": "sync_dist_op if synchronised",
                 "metric": "a torchmetrics Metric", "in_batch": "in a batch hook"}  # fmt: skip
        pairs = ((field, a, b) for field, a, b in zip(self._fields, self, other) if a != b)
        return ", ".join(f"{words.get(f, f)}={a!r} against {words.get(f, f)}={b!r}" for f, a, b in pairs)


@dataclass(frozen=True)
class Metrics:
    """Values by the name under which each reader sees them: 0-d tensors. Epoch values are float64 on the device."""

    callback: dict[str, Tensor]
    logger: dict[str, Tensor]
    progress_bar: dict[str, Tensor]

    @classmethod
    def empty(cls) -> Metrics:
        """Return one without any value."""
        return cls({}, {}, {})


def key_names(key: str, suffix: str, settings: Settings) -> tuple[str, str]:
    """Return the names of the step value and of the epoch value of ``key`` (which ends in the loader's ``suffix``)."""
    if not (settings.on_step and settings.on_epoch):
        return key, key
    base = key[: len(key) - len(suffix)] if suffix else key
    return f"{base}_step{suffix}", f"{base}_epoch{suffix}"


class Slot:
    """The state of one key in one loop. ``values`` and ``weights`` are the running chunk's own lists."""

    __slots__ = (
        "call", "fx", "implicit", "key", "last", "loader", "metric", "metric_path", "on_epoch", "on_step", "pending",
        "pending_size", "running", "settings", "shown", "site", "suffix", "tbptt_fx", "values", "weighted", "weights",
    )  # fmt: skip

    def __init__(self, key: str, suffix: str, settings: Settings, site: str, loader: int | None) -> None:
        self.key = key
        self.suffix = suffix
        self.settings = settings
        self.site = site
        self.loader = loader
        self.on_step = settings.on_step
        self.on_epoch = settings.on_epoch
        self.weighted = settings.on_epoch and settings.op == "mean" and settings.in_batch and not settings.metric
        self.call: tuple[Any, ...] | None = None  # the arguments of the last call; None: never the fast path
        self.fx: Callable[[Tensor], Any] | None = None
        self.tbptt_fx: Callable[[Tensor], Any] | None = None
        self.last: Any = None  # the latest step value that the loggers have not had
        self.shown: Any = None  # the one that they have had
        self.metric: Any = None
        self.metric_path = ""
        self.pending: list[Any] = []  # values of the splits of the present batch
        self.pending_size: int | None = None
        self.implicit = False  # an epoch hook's value: weighs as many samples as this rank has seen
        named = settings.op in ("mean", "sum", "min", "max")
        self._use(Running(settings.op if named else "custom"))

    def _use(self, running: Running) -> None:
        self.running = running
        self.values = running.values
        self.weights = running.weights

    @property
    def kind(self) -> str:
        """Return "number", "custom" (a callable reduces all values) or "metric"."""
        return "metric" if self.settings.metric else "custom" if self.running.op == "custom" else "number"

    def add(self, value: Any, weight: float) -> None:
        """Take one value into the epoch's."""
        self.values.append(value)
        self.weights.append(weight)

    def absorb(self, other: Slot) -> None:
        """Take over the epoch's values of a worker that is no more."""
        self.running.absorb(other.running)

    def forget(self) -> None:
        """Keep the key, and none of the values: another worker has them. What an epoch hook logged stays."""
        self.last = None
        if not self.implicit:
            self._use(Running(self.running.op))

    def finish_splits(self, size: Callable[[Slot], int]) -> None:
        """Make one value of the splits' values, and the batch's value of that."""
        if not self.pending:
            return
        stacked = torch.stack([torch.as_tensor(v) for v in self.pending])
        if not stacked.is_floating_point():
            stacked = stacked.to(torch.float64)
        value = reduce_stacked(self.settings.tbptt_op, self.tbptt_fx, stacked)
        weight = self.pending_size
        self.pending, self.pending_size = [], None
        if self.on_step:
            self.last = value
        if self.on_epoch:
            self.add(value, (size(self) if weight is None else weight) if self.weighted else 1)

    def state_dict(self, metric_states: Any) -> dict[str, Any]:
        """Return plain values and tensors; callables stay behind, and come back with the next call of log."""
        return {
            "key": self.key, "suffix": self.suffix, "settings": list(self.settings), "site": self.site,
            "loader": self.loader, "last": self.last, "shown": self.shown, "implicit": self.implicit,
            "pending": list(self.pending), "pending_size": self.pending_size, "metric_path": self.metric_path,
            "metric_states": metric_states, "running": self.running.state_dict(),
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> Slot:
        """Rebuild from :meth:`state_dict`, without its callables and its metric object."""
        slot = cls(state["key"], state["suffix"], Settings(*state["settings"]), state["site"], state["loader"])
        slot.last, slot.shown, slot.implicit = state["last"], state["shown"], state["implicit"]
        slot.pending, slot.pending_size = list(state["pending"]), state["pending_size"]
        slot.metric_path = state["metric_path"]
        slot._use(Running.from_state(state["running"], device))
        return slot
