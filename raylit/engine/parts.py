"""What one run consists of, put together by ``assemble`` and handed to the loops. Floor 3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from raylit.config.fit import FitConfig
from raylit.datamodule import DataModule
from raylit.hooks import HookTable
from raylit.metrics.store import MetricStore
from raylit.module import Module
from raylit.ports import Checkpointer, LoaderLike, Notices, Precision, Strategy
from raylit.stage import Loop
from raylit.view import RunState, TrainerView


class Output(Protocol):
    """Where a run's numbers go: loggers, history, display (worker side; rank 0 keeps, the others count along)."""

    wants_steps: bool
    refresh_s: float  # seconds between two progress events; inf where nobody looks

    def stage_start(self, state: RunState) -> None: ...
    def epoch_start(self, state: RunState, total: int | None) -> None: ...
    def progress(self, state: RunState, batches_done: int, total: int | None, loss: Tensor | None) -> None: ...
    def step_metrics(self, state: RunState, metrics: Mapping[str, Tensor]) -> None: ...
    def epoch_metrics(self, state: RunState, metrics: Mapping[str, Tensor], bar: Mapping[str, Tensor]) -> None: ...
    def loop_end(self, state: RunState, loop: Loop, metrics: Mapping[str, Tensor]) -> None: ...
    def print(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def flush(self) -> None: ...


class LoaderSource(Protocol):
    """Asks the person's objects for loaders and prepares them for this rank (worker side)."""

    def train(self) -> LoaderLike: ...
    def evaluation(self, stage: str) -> list[LoaderLike]:
        """``"validate"``, ``"test"`` or ``"predict"``; empty where there is nothing to run."""
        ...


@dataclass
class Saved:
    """A loaded checkpoint, as one rank goes on from it."""

    common: dict[str, Any]
    own: dict[str, Any] | None = None  # None: none was saved. By another number of ranks: what can be taken over
    same_ranks: bool = True

    @property
    def turns(self) -> int:
        """Batches of a step in the run that saved it; see ``walk``."""
        ranks = int(self.extra.get("world_size", 1))
        return -(-int(self.extra.get("shares", ranks)) // ranks)

    @property
    def extra(self) -> dict[str, Any]:
        """What raylit adds to Lightning's keys; empty in a file of Lightning's."""
        return self.common.get("raylit") or {}


@dataclass
class Parts:
    """Everything the loops need. Nothing here is replaced while a run goes on."""

    state: RunState
    trainer: TrainerView
    module: Module
    datamodule: DataModule | None
    settings: FitConfig
    strategy: Strategy
    precision: Precision
    metrics: MetricStore
    hooks: HookTable
    loaders: LoaderSource
    output: Output
    # (batch, dataloader_idx) -> batch on the device; None where there is nothing to move or to call.
    transfer: Callable[[Any, int], Any] | None = None
    # default of transfer_batch_to_device: (batch, device) -> batch
    move: Callable[[Any, Any], Any] | None = None
    # default of tbptt_split_batch: (batch, split_size) -> splits
    split_time: Callable[[Any, int], list[Any]] | None = None
    # loads a checkpoint's weights, once setup and configure_model have made every layer
    load: Callable[[], None] | None = None
    # the checkpoint that a fit goes on from
    saved: Saved | None = None
    # seed of the epochs' orders; a checkpoint keeps it
    order_seed: int = 0
    # on_save_checkpoint of everyone
    on_save: Callable[[dict[str, Any]], None] | None = None
    # asked at every safe point; None where nobody keeps checkpoints while the run goes on
    checkpointer: Checkpointer | None = None
    # who hears of nodes that will be taken away; None where nobody does
    notices: Notices | None = None
    # elastic runs: seeds this process for (epoch, step of the epoch, share of its data)
    reseed: Callable[[int, int, int], None] | None = None
    # hyperparameters of optimizers and schedulers are those of configure_optimizers now, not those of ``saved``
    rebased: bool = False
    # seconds since training began, in earlier attempts of this run; they count in max_time
    used_s: float = 0.0
    # the state at the end is wanted
    keeps_last: bool = False
    # each submodule's mode before the evaluation that runs
    modes: list[tuple[nn.Module, bool]] = field(default_factory=list)

    def restore_modes(self) -> None:
        """Give each submodule the mode it had before the evaluation that runs."""
        for module, mode in self.modes:
            module.training = mode
