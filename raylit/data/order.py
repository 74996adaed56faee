"""The order of an epoch's samples, the same on every rank: a pure function of the seed and the epoch.

An order is drawn by each rank for itself, from the same seed, so nothing needs to be sent around.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from raylit.data.rng import FOR_ORDER, mix_seed, seeded
from raylit.data.stateful import Stateful
from raylit.errors import DataError


@runtime_checkable
class HasEpoch(Protocol):
    """A user's sampler or data set that wants to know the epoch (counted from 0)."""

    def set_epoch(self, epoch: int) -> Any: ...


class Order(ABC):
    """What an epoch visits, in order. Items are indices, or whatever a user's sampler yields."""

    @abstractmethod
    def __len__(self) -> int:
        """Items in an epoch."""

    @abstractmethod
    def draw(self, epoch: int) -> Items:
        """Return the items of ``epoch`` (from 0)."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the seed and the epoch do not say; empty where they say it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what ``state_dict`` returned."""


class Items(Protocol):
    """The part of a list's interface that an order's result has."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> Iterable[Any]: ...


class SequentialOrder(Order):
    """0, 1, 2, ...; ``sized`` is asked for its length each epoch, because a data set may grow."""

    def __init__(self, sized: Sized) -> None:
        self._sized = sized

    def __len__(self) -> int:
        return len(self._sized)

    def draw(self, epoch: int) -> Items:
        return range(len(self._sized))


class ShuffledOrder(Order):
    """A permutation from ``torch.randperm`` with a generator seeded by ``mix_seed(seed, epoch, FOR_ORDER)``."""

    def __init__(self, sized: Sized, seed: int) -> None:
        self._sized = sized
        self._seed = seed

    def __len__(self) -> int:
        return len(self._sized)

    def draw(self, epoch: int) -> Items:
        generator = torch.Generator().manual_seed(mix_seed(self._seed, epoch, FOR_ORDER))
        # Kept as a tensor: 8 bytes a sample, where a list of integers takes 36.
        return _TensorItems(torch.randperm(len(self._sized), generator=generator))


class _TensorItems:
    """A 1-d integer tensor whose slices are lists of python integers."""

    def __init__(self, indices: torch.Tensor) -> None:
        self._indices = indices

    def __len__(self) -> int:
        return self._indices.shape[0]

    def __getitem__(self, where: slice, /) -> list[int]:
        values: list[int] = self._indices[where].tolist()
        return values


class DrawnOrder(Order):
    """A user's own sampler, or batch sampler, drawn as a list.

    It is drawn with python's, numpy's and torch's random state seeded from (seed, epoch), and restored afterwards. A
    ``generator`` of the sampler's own counts by its initial seed: it is seeded from (initial seed, epoch) and put
    back. State that the sampler keeps elsewhere is not seen: it should take the epoch from ``set_epoch``.
    """

    def __init__(self, sampler: Iterable[Any], seed: int, limit: int, name: str) -> None:
        """``limit``: more items than this, from a sampler without a length, are taken for an endless sampler."""
        self._sampler = sampler
        self._seed = seed
        self._limit = limit
        self._name = name
        self._drawn: tuple[int, list[Any]] | None = None  # loader workers make torch ask twice for the same epoch
        self._before: dict[str, Any] = {}  # a stateful sampler's state before that was drawn

    def __len__(self) -> int:
        try:
            return len(self._sampler)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return len(self._draw(self._drawn[0] if self._drawn else 0))

    def draw(self, epoch: int) -> Items:
        return self._draw(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's own state from before the last epoch was drawn, so that it can be drawn again."""
        if not isinstance(self._sampler, Stateful):
            return {}
        if self._drawn is None:
            return {"epoch": -1, "before": self._sampler.state_dict()}
        return {"epoch": self._drawn[0], "before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Draw the saved epoch again from the saved state; the epochs after it follow from that."""
        if not state or not isinstance(self._sampler, Stateful):
            return
        self._drawn = None
        self._sampler.load_state_dict(dict(state["before"]))
        if state["epoch"] >= 0:
            self._draw(state["epoch"])

    def _draw(self, epoch: int) -> list[Any]:
        if self._drawn is not None and self._drawn[0] == epoch:
            return self._drawn[1]
        if isinstance(self._sampler, Stateful):
            self._before = self._sampler.state_dict()
        parts = [self._sampler]
        inner = getattr(self._sampler, "sampler", None)  # a batch sampler's own source of indices
        if inner is not None:
            parts.append(inner)
        with seeded(mix_seed(self._seed, epoch, FOR_ORDER)), _generators_at(parts, epoch):
            for part in parts:
                if isinstance(part, HasEpoch):
                    part.set_epoch(epoch)
            drawn = list(itertools.islice(iter(self._sampler), self._limit + 1))
        if len(drawn) > self._limit:
            raise DataError(
                f"{self._name}: {type(self._sampler).__name__} gave more than {self._limit} items and did not end. "
                "raylit draws a sampler's whole epoch to share it out. Let it end after an epoch, or pass "
                "Trainer(use_distributed_sampler=False) to use it as it is on each worker"
            )
        self._drawn = (epoch, drawn)
        return drawn


@contextmanager
def _generators_at(parts: list[Iterable[Any]], epoch: int) -> Iterator[None]:
    """Seed the parts' own generators for ``epoch``, and put their states (and so their initial seeds) back."""
    found = [getattr(part, "generator", None) for part in parts]
    generators = {id(g): g for g in found if isinstance(g, torch.Generator)}
    states = {key: generator.get_state() for key, generator in generators.items()}
    try:
        for generator in generators.values():
            generator.manual_seed(mix_seed(generator.initial_seed(), epoch, FOR_ORDER))
        yield
    finally:
        for key, generator in generators.items():
            generator.set_state(states[key])


def order_of(sampler: Any, dataset: Any, seed: int, name: str) -> Order:
    """Return the order that ``sampler``, found on a user's loader, stands for.

    Torch's sequential and random samplers become raylit's own orders; so does an exact ``DistributedSampler``, whose
    sharding raylit replaces. Anything else is drawn.

    Raises ``DataError`` for a subclass of ``DistributedSampler``: sharding its shard again would lose samples.
    """
    if type(sampler) is SequentialSampler:
        return SequentialOrder(sampler)
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        own = sampler.generator
        return ShuffledOrder(sampler, seed if own is None else own.initial_seed())
    if type(sampler) is DistributedSampler:
        whole = sampler.dataset
        return ShuffledOrder(whole, sampler.seed) if sampler.shuffle else SequentialOrder(whole)  # type: ignore[arg-type]
    if isinstance(sampler, DistributedSampler):
        raise DataError(
            f"{name}: {type(sampler).__name__} shares its samples out over the workers by itself, and raylit would "
            "share out each worker's part again. Give the loader a sampler of the whole data set, or pass "
            "Trainer(use_distributed_sampler=False) to use it as it is on each worker"
        )
    try:
        limit = 100 * len(dataset) + 1_000_000
    except TypeError:
        limit = 100_000_000
    return DrawnOrder(sampler, seed, limit, name)
