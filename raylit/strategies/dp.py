"""The devices of one worker share each batch: ``dp`` in one worker, ``ddp2`` in several. Floor 2, worker side.

The batch is split by samples and the parts' steps are started one after another from one thread. GPUs compute beside
each other all the same, since a step only hands them work; what is logged, drawn and kept in the step stays in order,
and attributes that a step sets are the Module's own. The parameters of the first device are the Module's; on another
device the step runs with copies of them, made anew for each batch, through which gradients flow back. Changes of
buffers in these copies (BatchNorm's statistics) are lost, so the first device's count, as in torch's DataParallel.

CPUs have virtual devices: they share the parameters, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raylit.errors import ConfigError
from raylit.ports import Collective
from raylit.strategies.ddp import DDP
from raylit.strategies.single import SingleDevice

Split = Callable[[Any, int], Sequence[Any]]
_VIRTUAL = 2  # devices of a CPU, where no number is given


class DataParallel(SingleDevice):
    """One worker that splits each batch over its devices: ``strategy="dp"``.

    ``devices``: how many; None: all GPUs of the worker, or 2 virtual ones on a CPU. ``split(batch, n)`` returns at most
    n parts of a batch, for batches that cannot be split along dimension 0. ConfigError for a number below 1.
    """

    name = "dp"

    def __init__(self, devices: int | None = None, split: Split | None = None) -> None:
        self.devices, self.split = _checked(devices), split

    def attach(self, visible: Sequence[torch.device], collective: Collective, name: str = "dp") -> DataParallel:
        """Give the strategy this worker's devices, the Module's first."""
        self.device, self.collective, self.name = visible[0], collective, name
        self._devices = _chosen(self.devices, visible)
        return self

    def each_device(self, module: nn.Module, step: Callable[..., Any]) -> list[tuple[torch.device, Callable[..., Any]]]:
        """Return ``step`` for each device, in order."""
        return _on_each(self._devices, module, step)

    def __getstate__(self) -> dict[str, Any]:
        return {"devices": self.devices, "split": self.split}


class DDP2(DDP):
    """Several workers, each of which splits its batch over its devices as ``dp`` does: ``strategy="ddp2"``.

    ``devices`` (of each worker) and ``split`` as in ``DataParallel``; the rest as in ``DDP``.
    """

    name = "ddp2"

    def __init__(
        self, devices: int | None = None, split: Split | None = None, find_unused_parameters: bool | None = None,
        **ddp_options: Any,
    ) -> None:  # fmt: skip
        super().__init__(find_unused_parameters, **ddp_options)
        self.devices, self.split = _checked(devices), split

    def attach_devices(self, visible: Sequence[torch.device], collective: Collective | None = None) -> DDP2:
        """Give the strategy this worker's devices, the Module's first; the process group must exist."""
        self._devices = _chosen(self.devices, visible)
        self.attach(visible[0], collective)
        return self

    def alone(self, visible: Sequence[torch.device], collective: Collective) -> DataParallel:
        """Return the strategy of a run with one worker, where there is nobody to average with."""
        return DataParallel(self.devices, self.split).attach(visible, collective, self.name)

    def each_device(self, module: nn.Module, step: Callable[..., Any]) -> list[tuple[torch.device, Callable[..., Any]]]:
        """Return ``step`` for each device of this worker, in order."""
        return _on_each(self._devices, module, step)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "devices": self.devices, "split": self.split}


class OnCopies:
    """A step of ``module`` on another device: while it runs, copies there stand in for parameters and buffers.

    Not ``torch.func.functional_call``: that leaves copies behind in a layer that has two names, and does not reach the
    weights of an LSTM.
    """

    def __init__(self, module: nn.Module, step: Callable[..., Any], device: torch.device) -> None:
        self._module, self._step, self._device = module, step, device

    def __call__(self, *args: Any) -> Any:
        """Call the step; gradients of the copies flow back to the Module's own parameters."""
        tables: list[tuple[dict[str, Any], dict[str, Any]]] = []  # the live one, and what belongs in it
        copies: dict[int, Tensor] = {}  # by id(), so that a weight in two places stays one
        recurrent: list[tuple[nn.RNNBase, list[Any]]] = []
        for layer in self._module.modules():
            tables += [(table, dict(table)) for table in (layer._parameters, layer._buffers) if table]
            if isinstance(layer, nn.RNNBase):  # keeps a list of its weights beside them
                recurrent.append((layer, layer._flat_weights))
        for _, own in tables:
            for tensor in own.values():
                if tensor is not None and id(tensor) not in copies:
                    # Towards the host such a copy may still be under way when the step reads it.
                    copies[id(tensor)] = tensor.to(self._device, non_blocking=self._device.type == "cuda", copy=True)
        try:
            for table, own in tables:
                table.update({name: copies[id(tensor)] for name, tensor in own.items() if tensor is not None})
            for layer, weights in recurrent:
                layer._flat_weights = [copies.get(id(weight), weight) for weight in weights]
            if self._device.type != "cuda":
                return self._step(*args)
            with torch.cuda.device(self._device):
                return self._step(*args)
        finally:
            for table, own in tables:
                table.clear()
                table.update(own)
            for layer, weights in recurrent:
                layer._flat_weights = weights


def _on_each(
    devices: Sequence[torch.device], module: nn.Module, step: Callable[..., Any]
) -> list[tuple[torch.device, Callable[..., Any]]]:
    return [(device, step if device == devices[0] else OnCopies(module, step, device)) for device in devices]


def _checked(devices: Any) -> int | None:
    if devices is not None and (isinstance(devices, bool) or not isinstance(devices, int) or devices < 1):
        raise ConfigError(f"devices={devices!r}: expected a number of devices of at least 1, or None for all of them")
    return devices


def _chosen(asked: int | None, visible: Sequence[torch.device]) -> list[torch.device]:
    if visible[0].type != "cuda":
        return [visible[0]] * (asked or _VIRTUAL)
    if asked is not None and asked > len(visible):
        raise ConfigError(
            f"devices={asked}, but the worker sees {len(visible)} GPU(s): give it as many with "
            f"resources_per_worker={{'GPU': {asked}}}, or leave devices out to use those that are there"
        )
    return list(visible[:asked])
