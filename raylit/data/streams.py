"""Loaders without positions to jump to: iterable data sets, plain iterables, and loaders that are used as they are."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from types import GeneratorType
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, IterableDataset

from raylit.data.order import HasEpoch
from raylit.data.rebuild import rebuilt
from raylit.data.rng import FOR_LOADER_WORKERS, mix_seed
from raylit.data.sampler import num_blocks, rank_blocks
from raylit.data.stateful import load_states, states, walked
from raylit.errors import DataError


@runtime_checkable
class Shardable(Protocol):
    """An iterable that can say how it is shared out: Hugging Face's convention."""

    def shard(self, num_shards: int, index: int) -> Any: ...


class StreamLoader:
    """An iterable walked from its start each epoch. A resume reads the batches before its position and drops them.

    Only what the iterable does again in the same way comes again: its order must follow from the epoch it is told
    through ``set_epoch``, not from random state that it keeps to itself.
    """

    def __init__(
        self, source: Any, batches: Iterable[Any], *, world_size: int, batch_size: int | None, name: str
    ) -> None:
        """``batches``: what this rank walks, made from the user's ``source``."""
        self.source = source
        self.batch_size = batch_size
        self.samples_per_step = world_size * (batch_size or 1)  # in batches where the batch size is not known
        self.equal_steps = world_size == 1
        self.contiguous = False
        self.anywhere = False
        self.num_batches = _length(batches)
        self.num_samples = _num_samples(batches) if world_size == 1 else None
        self._batches = batches
        self._skip = 0
        self._begun = False
        self._epoch = 0
        self._name = name
        self._stateful = walked(batches)
        self._placed = False  # the user's objects stand at the position themselves
        self._taken_up: GeneratorType[Any, Any, Any] | None = None  # the walk that went on from there

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None:
        """Tell samplers and data set the epoch; the next walk begins at ``start_sample``, rounded down to a step."""
        self._epoch = epoch
        self._skip = start_sample // self.samples_per_step
        parts: list[Any] = [self._batches]
        if isinstance(self._batches, DataLoader):
            batches = self._batches.batch_sampler
            parts += [self._batches.dataset, self._batches.sampler, batches, getattr(batches, "sampler", None)]
        for part in {id(part): part for part in parts}.values():  # a loader names one sampler in two places
            if isinstance(part, HasEpoch):
                part.set_epoch(epoch)

    def batches_from(self, start_sample: int) -> int | None:
        """Batches from ``start_sample`` to the epoch's end, on this rank; None if unknown."""
        if self.num_batches is None:
            return None
        return max(0, self.num_batches - start_sample // self.samples_per_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the states by which the user's objects say where the walk stands."""
        return states(self._stateful)

    def load_state_dict(self, state: Mapping[str, Any], within: bool) -> None:
        """Let the user's objects go on from their states: nothing is then read and dropped."""
        if not state or not self._stateful:
            return
        load_states(self._stateful, dict(state))
        self._placed = within
        if not within:
            # The walk that the state is of was given up at the epoch's end: it is taken up and left, so that the next
            # one begins anew. A generator begins when it is asked for a batch; at its end it has none.
            left = iter(self._batches)
            if isinstance(left, GeneratorType) or isinstance(self._batches, DataLoader):
                next(left, None)

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = 0 if self._placed else self._skip, 0
        if self._taken_up is not None and inspect.getgeneratorstate(self._taken_up) == inspect.GEN_CREATED:
            next(self._taken_up, None)  # nobody asked it for a batch, and so it did not see that it was to go on
        self._taken_up = None
        iterator = iter(self._batches)
        if self._placed and isinstance(iterator, GeneratorType):
            self._taken_up = iterator
        self._placed = False
        if iterator is self._batches:
            if self._begun:
                raise DataError(
                    f"{self._name}: the loader is a {type(iterator).__name__}, which can be walked only "
                    "once, and its second walk was asked for. Pass a list, a DataLoader, or an object whose __iter__ "
                    "starts anew each time"
                )
            self._begun = True
        # Read now, not at the first batch, so that random state restored after this call is not spent on the skipped.
        for _ in itertools.islice(iterator, skip):
            pass
        return iterator


class SeededStreamLoader(StreamLoader):
    """A DataLoader over an iterable data set; its workers' random state follows from (seed, epoch, rank)."""

    def __init__(self, source: Any, batches: DataLoader[Any], *, seeds: WorkerSeeds, **place: Any) -> None:
        super().__init__(source, batches, **place)
        self._seeds = seeds

    def state_dict(self) -> dict[str, Any]:
        """Also whether persistent workers have been started."""
        return {**super().state_dict(), "started": self._seeds.started}

    def load_state_dict(self, state: Mapping[str, Any], within: bool) -> None:
        """Take back what ``state_dict`` returned."""
        super().load_state_dict({key: value for key, value in state.items() if key != "started"}, within)
        self._seeds.started = bool(state.get("started"))

    def __iter__(self) -> Iterator[Any]:
        self._seeds.prepare(self._epoch)
        return super().__iter__()


class WorkerSeeds:
    """The generator from which a DataLoader draws the seed of its workers, seeded for each epoch.

    A plain DataLoader draws one number from the process's own random state each time it starts its workers. That draw
    is still made, and not used: dropout and the rest go on as in a hand-written loop over the user's loader.
    """

    def __init__(self, loader: DataLoader[Any], seed: int, rank: int) -> None:
        self.generator = torch.Generator()
        self._seed = seed
        self._rank = rank
        self._draws = loader.generator is None  # else the draw was from the user's generator, which we leave alone
        self._persistent = loader.persistent_workers
        self.started = False

    def prepare(self, epoch: int) -> None:
        """Call right before the DataLoader's iterator is made."""
        self.generator.manual_seed(mix_seed(self._seed, epoch, FOR_LOADER_WORKERS, self._rank))
        # Persistent workers are started once in a run: a resumed run starts them again, but must not draw again.
        first = not self.started and epoch == 0
        self.started = True
        if self._draws and (first or not self._persistent):
            torch.empty((), dtype=torch.int64).random_()


class SequenceLoader:
    """A sequence whose items are batches: rank r takes batches r, r+N, r+2N, ... Positions count batches."""

    def __init__(self, source: Sequence[Any], *, rank: int, world_size: int, training: bool,
                 shares: int | None = None) -> None:  # fmt: skip
        self.source = source
        self.batch_size: int | None = None
        self.num_samples: int | None = None
        self.samples_per_step = self._shares = world_size if shares is None else shares
        self._rule = (rank, world_size)
        self._training = training
        self._start = 0
        self.num_batches: int | None = self.batches_from(0)
        self.equal_steps = training or len(source) % world_size == 0
        self.contiguous = False
        self.anywhere = True

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None:
        """The next walk begins at batch ``start_sample``; the order is the same in each epoch."""
        self._start = start_sample

    def batches_from(self, start_sample: int) -> int:
        """Batches from batch ``start_sample`` to the epoch's end, on this rank."""
        return num_blocks(len(self.source), 1, *self._rule, start_sample, self._training, shares=self._shares)

    def state_dict(self) -> dict[str, Any]:
        """The position says it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], within: bool) -> None:
        """There is nothing to take."""

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        blocks = rank_blocks(len(self.source), 1, *self._rule, start, self._training, shares=self._shares)
        return (self.source[first] for first, _ in blocks)


def prepare_stream(source: Any, rank: int, world_size: int, seed: int, shard: bool, name: str) -> StreamLoader:
    """Prepare an iterable, or a DataLoader over an iterable data set, or (``shard`` False) any loader as it is.

    Raises ``DataError`` where it must be shared out over several workers and does not say how.
    """
    loader = source if isinstance(source, DataLoader) else None
    place: dict[str, Any] = {"world_size": world_size, "name": name}
    place["batch_size"] = None if loader is None else loader.batch_size
    if not shard or (world_size == 1 and (loader is None or type(loader) is not DataLoader)):
        return StreamLoader(source, source, **place)
    data: Any = source if loader is None else loader.dataset
    if world_size > 1:
        data = _shard_of(data, rank, world_size, name)
    if loader is None:
        return StreamLoader(source, data, **place)
    changed = {"dataset": data, "batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if loader.num_workers == 0:
        return StreamLoader(source, rebuilt(loader, name, **changed) if world_size > 1 else loader, **place)
    seeds = WorkerSeeds(loader, seed if loader.generator is None else loader.generator.initial_seed(), rank)
    return SeededStreamLoader(source, rebuilt(loader, name, **changed, generator=seeds.generator), seeds=seeds, **place)


def _shard_of(data: Any, rank: int, world_size: int, name: str) -> Any:
    if not isinstance(data, Shardable):
        raise DataError(
            f"{name}: {type(data).__name__} is an iterable, and there are {world_size} workers: each would see all of "
            "it. Give it a method shard(num_shards, index) that returns one worker's part (Hugging Face data sets have "
            "it). If it shares itself out already, by torch.distributed.get_rank() for instance, pass "
            "Trainer(use_distributed_sampler=False) to use it as it is on each worker"
        )
    return data.shard(num_shards=world_size, index=rank)


def _length(batches: Iterable[Any]) -> int | None:
    """Batches of one walk; None if unknown."""
    if (
        isinstance(batches, DataLoader)
        and isinstance(batches.dataset, IterableDataset)
        and type(batches).__len__ is DataLoader.__len__
    ):
        # Not len(loader): torch remembers that it was asked, and then warns where a data set is longer than it said.
        samples = _num_samples(batches)
        if samples is None or batches.batch_size is None:
            return samples
        return samples // batches.batch_size if batches.drop_last else -(-samples // batches.batch_size)
    return _len_or_none(batches)


def _num_samples(batches: Iterable[Any]) -> int | None:
    return _len_or_none(batches.dataset) if isinstance(batches, DataLoader) else None


def _len_or_none(sized: Any) -> int | None:
    if not isinstance(sized, Sized):
        return None
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None  # torch's classes define __len__ and raise where the data set behind them has none
