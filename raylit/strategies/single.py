"""One worker on one device. Floor 2, worker side; also the strategy of a run in the caller's own process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from raylit.ports import Collective


class SingleDevice:
    """The Module as it is, on one device: nothing is wrapped, nothing is sent."""

    name = "single"
    split: Callable[[Any, int], Sequence[Any]] | None = None

    def __init__(self, device: torch.device, collective: Collective) -> None:
        self.device, self.collective = device, collective

    def setup_module(self, module: nn.Module) -> None:
        """Move the module to the device."""
        if self.device.type != "cpu":
            module.to(self.device)

    def equalize_buffers(self, module: nn.Module) -> None:
        """There is nobody to differ from."""

    def each_device(
        self, module: nn.Module, step: Callable[..., Any]
    ) -> list[tuple[torch.device, Callable[..., Any]]] | None:
        """The batch stays whole."""
        return None

    def wrap_training_step(
        self, module: nn.Module, step: Callable[..., Any], *, optimizers: int, manual: bool
    ) -> Callable[..., Any]:
        """Return ``step`` itself."""
        return step

    def no_sync(self) -> AbstractContextManager[Any] | None:
        """There is nothing to leave out."""
        return None

    def reduce_gradients(self, optimizer: Optimizer) -> None:
        """There is nobody to average with."""

    def skip_pass(self) -> None:
        """Nobody waits."""

    def anyone_took_part(self, optimizer_idx: int) -> bool:
        """Nobody else is there."""
        return False

    def end_group(self, optimizer_idx: int) -> None:
        """Nothing to forget."""

    def group_state(self) -> dict[str, Any]:
        """There is nothing to know."""
        return {}

    def load_group_state(self, state: Mapping[str, Any]) -> None:
        """There is nothing to know."""

    def teardown(self) -> None:
        """Nothing to close."""
