"""The user's loaders, samplers and data sets that keep a state of their own: ``state_dict`` and ``load_state_dict``.

torchdata's convention: the state says where the walk stands that runs, and after loading it the next walk goes on from
there; the one after that begins anew.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader, IterableDataset


@runtime_checkable
class Stateful(Protocol):
    """What can tell where it stands."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def walked(batches: Any) -> dict[str, Stateful]:
    """Return the parts of a walked loader that say together where the walk stands; empty where they do not.

    The loader itself, or, where it reads in this process, its data set or what draws the indices. Loader workers read
    ahead of training, and what they have read shows in no state here.
    """
    if isinstance(batches, Stateful):
        return {"loader": batches}
    if not isinstance(batches, DataLoader) or batches.num_workers:
        return {}
    if isinstance(batches.dataset, IterableDataset):
        return {"dataset": batches.dataset} if isinstance(batches.dataset, Stateful) else {}
    for source in (batches.batch_sampler, batches.sampler):
        if isinstance(source, Stateful):
            return {"sampler": source} | ({"dataset": batches.dataset} if isinstance(batches.dataset, Stateful) else {})
    return {}


def states(parts: dict[str, Stateful]) -> dict[str, Any]:
    """Return the parts' states by name."""
    return {name: part.state_dict() for name, part in parts.items()}


def load_states(parts: dict[str, Stateful], saved: dict[str, Any]) -> None:
    """Give each part its state back."""
    for name, part in parts.items():
        if name in saved:
            part.load_state_dict(saved[name])
