"""Talk between workers: ``ports.Collective`` over torch.distributed, and its one-process form. Floor 2, worker side.

The process group is made by whoever started the workers (Ray Train). A group for CPU tensors is always there, so that
asking the other ranks a yes or no never waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_OPS = {"mean": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


class LocalCollective:
    """One process: every call returns what it was given."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def barrier(self) -> None:
        """Return at once."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensor alone."""
        return [tensor]

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the object alone."""
        return [obj]

    def gather_object(self, obj: Any) -> list[Any] | None:
        """Return the object alone."""
        return [obj]

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Return the object."""
        return obj

    def all_reduce(self, tensor: Tensor, op: str = "mean") -> Tensor:
        """Return a copy of the tensor."""
        return tensor.clone()


_host: tuple[Any, Any] | None = None  # the default group, and the one for CPU tensors that was made beside it


def _host_group() -> Any:
    """A group for CPU tensors, which NCCL has none for; None where the default group takes them.

    Making one is itself a collective and opens connections: a worker that is kept for several evaluations makes one.
    """
    if dist.get_backend() == "gloo":
        return None
    global _host
    if _host is None or _host[0] is not dist.group.WORLD:
        _host = (dist.group.WORLD, dist.new_group(backend="gloo"))
    return _host[1]


class TorchCollective:
    """All ranks of the default process group. A dead rank ends a call with torch's error, after its time-out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._host = _host_group()

    def _group(self, tensor: Tensor) -> Any:
        return self._host if tensor.device.type == "cpu" else None

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self._host)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Gather a tensor of one shape and dtype from every rank, in rank order; one collective."""
        tensor = tensor.contiguous()
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor, group=self._group(tensor))
        return gathered

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Gather a picklable object from every rank, in rank order."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, obj, group=self._host)
        return gathered

    def gather_object(self, obj: Any) -> list[Any] | None:
        """Gather a picklable object on rank 0; None on the others."""
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(obj, gathered, dst=0, group=self._host)
        return gathered

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s object on every rank."""
        box = [obj]
        dist.broadcast_object_list(box, src=src, group=self._host)
        return box[0]

    def all_reduce(self, tensor: Tensor, op: str = "mean") -> Tensor:
        """Reduce over the ranks into a new tensor."""
        result = tensor.detach().clone().contiguous()
        dist.all_reduce(result, op=_OPS[op], group=self._group(result))
        # Divided afterwards: gloo has no mean of its own.
        return result / self.world_size if op == "mean" else result
