"""The small interfaces through which the engine reaches the rest of the house. Floor 1: torch, never Ray.

Each port says in which process its implementations run. The engine sees nothing but these; ``assemble`` picks the
concrete parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from raylit.stage import SafePoint


class Collective(Protocol):
    """Talk between the workers of one run (worker side). Every call is a barrier: all ranks must reach it."""

    rank: int
    world_size: int
    device: torch.device  # tensors given to all_gather and all_reduce lie here or on the CPU

    def barrier(self) -> None: ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Gather a tensor of one shape and dtype from every rank, in rank order; one collective."""
        ...

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Gather a picklable object from every rank, in rank order."""
        ...

    def gather_object(self, obj: Any) -> list[Any] | None:
        """Gather a picklable object from every rank on rank 0, in rank order; None on the others."""
        ...

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s object on every rank."""
        ...

    def all_reduce(self, tensor: Tensor, op: str = "mean") -> Tensor:
        """Reduce over the ranks with ``"mean"``, ``"sum"``, ``"min"`` or ``"max"`` into a new tensor."""
        ...


class Precision(Protocol):
    """Number formats (worker side)."""

    name: str
    scaled: bool  # a gradient scaler is at work: the step must unscale before clipping
    update_each_step: bool  # False: the scale changes only in update()

    def convert_module(self, module: nn.Module) -> None: ...

    def convert_batch(self, batch: Any) -> Any: ...

    def forward_context(self) -> AbstractContextManager[Any] | None:
        """Return a context to run a step's forward pass in, or None where none is needed."""
        ...

    def scale(self, loss: Tensor) -> Tensor: ...

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, once an optimizer step."""
        ...

    def step(self, optimizer: Optimizer, step: Callable[[], Any]) -> Any:
        """Call ``step``, or leave it out where the scaled gradients were not finite."""
        ...

    def update(self) -> None:
        """Change the scale by what the steps since the last call met."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Strategy(Protocol):
    """How one Module runs on this worker's devices and together with the other workers (worker side)."""

    name: str
    device: torch.device
    collective: Collective
    # (batch, n) -> at most n parts, where the person gave a function of their own; see ``each_device``
    split: Callable[[Any, int], Sequence[Any]] | None

    def setup_module(self, module: nn.Module) -> None:
        """Move the module to the device and convert it (SyncBatchNorm); before ``configure_optimizers``."""
        ...

    def equalize_buffers(self, module: nn.Module) -> None:
        """Give every rank the same buffers, before an evaluation within a fit; every rank calls it."""
        ...

    def each_device(
        self, module: nn.Module, step: Callable[..., Any]
    ) -> list[tuple[torch.device, Callable[..., Any]]] | None:
        """Return ``step`` for each device that shares a batch, in order; None where the batch stays whole."""
        ...

    def wrap_training_step(
        self, module: nn.Module, step: Callable[..., Any], *, optimizers: int, manual: bool
    ) -> Callable[..., Any]:
        """Return what the engine calls as ``training_step``; under DDP the pass through it arms the reducer."""
        ...

    def no_sync(self) -> AbstractContextManager[Any] | None:
        """Return a context in which backward does not all-reduce, or None where there is nothing to leave out."""
        ...

    def reduce_gradients(self, optimizer: Optimizer) -> None:
        """Average the gradients over the workers where backward did not (manual optimisation)."""
        ...

    def skip_pass(self) -> None:
        """Take part in the other ranks' all-reduce with zeros: this rank's training_step returned None."""
        ...

    def anyone_took_part(self, optimizer_idx: int) -> bool:
        """At the end of a group that this rank skipped whole: did any rank have a loss in it? Waits for the device."""
        ...

    def end_group(self, optimizer_idx: int) -> None:
        """An optimizer has stepped: forget who took part in the group."""
        ...

    def group_state(self) -> dict[str, Any]:
        """Return what this rank knows of the group that is not done: plain values and tensors."""
        ...

    def load_group_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``group_state`` returned."""
        ...

    def teardown(self) -> None: ...


@runtime_checkable
class Display(Protocol):
    """What a person sees while a run goes on (rank 0 sends; driver or local process draws)."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Show one event. Events are plain JSON values; the kinds are listed in ``raylit/display/events.py``."""
        ...


class RunLogger(Protocol):
    """A place where metrics are kept (rank 0). Values arrive as floats, after the device has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_hyperparams(self, params: Mapping[str, Any]) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None: ...


@dataclass(frozen=True)
class RunSnapshot:
    """A run's whole state at one moment: plain values, and tensors on the CPU that nobody else changes."""

    common: dict[str, Any]  # what ``model.ckpt`` holds, on rank 0; empty on the others
    own: dict[str, Any]  # what is this rank's alone; docs/checkpoints.md


class RunStopped(BaseException):
    """Nobody has use for this run any more. A ``Checkpointer`` raises it, on every rank, where the run is to end.

    No error: ``on_exception`` is not called, and ``teardown`` is.
    """


class Checkpointer(Protocol):
    """Decides when checkpoints are kept, and keeps them (worker side). Every rank asks it, at the same points."""

    def safe_point(self, point: SafePoint, take: Callable[[], RunSnapshot]) -> bool:
        """The whole state is at hand; ``take`` copies it. Every rank must call ``take``, or none.

        Called after each batch: the common answer, that nothing is due, must come at once and without a collective.
        After ``PREEMPTION`` it returns once the state is written: soon there may be nobody left to write it. False
        where that failed, on every rank. Raises RunStopped.
        """
        ...


@dataclass(frozen=True)
class Notice:
    """Something about the cluster that a run has to act on. The same on every rank."""

    text: str  # one line
    leave: bool = False  # the run is to go on with another number of workers: keep the state, and stop


class Notices(Protocol):
    """Hears of nodes that the cluster is about to take away, and in elastic runs of room for more (worker side)."""

    every_s: float  # announcements come to be known about this often: to ask much more often is of no use

    def ask(self, collective: Collective) -> Notice | None:
        """Return what was announced since the last time; None where nothing was.

        A barrier: every rank calls it equally often, and all get the same.
        """
        ...


class LoaderLike(Protocol):
    """One rank's loader as ``raylit.data`` prepares it."""

    num_batches: int | None
    samples_per_step: int
    equal_steps: bool
    contiguous: bool

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None: ...

    def batches_from(self, start_sample: int) -> int | None: ...

    def state_dict(self) -> dict[str, Any]:
        """Return what the position does not say, of this rank; plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], within: bool) -> None:
        """Take back what ``state_dict`` returned. ``within``: the next walk goes on in the middle of that one."""
        ...

    def __iter__(self) -> Any: ...


Loaders = Sequence[LoaderLike]
