"""A map-style DataLoader of the user's, as one rank walks it: sharded, seeded, and resumable at any sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from raylit.data.order import DrawnOrder, order_of
from raylit.data.rebuild import rebuilt
from raylit.data.sampler import ShardedBatchSampler, ShardedItemSampler
from raylit.data.stateful import Stateful
from raylit.data.streams import WorkerSeeds
from raylit.errors import DataError


class MapLoader:
    """The user's loader rebuilt around raylit's sampler. ``loader`` is the rebuilt one, ``source`` the user's."""

    def __init__(
        self,
        source: DataLoader[Any],
        loader: DataLoader[Any],
        sampler: ShardedBatchSampler | ShardedItemSampler,
        seeds: WorkerSeeds | None,
        num_samples: int | None,
        batch_size: int | None,
    ) -> None:
        self.source = source
        self.loader = loader
        self.sampler = sampler
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.samples_per_step = sampler.shares * sampler.batch_size
        self.num_batches: int | None = len(sampler)
        self.equal_steps = sampler.training or sampler.length_of(0) == sampler.length_of(sampler.world_size - 1)
        self.contiguous = False
        self.anywhere = True
        self._seeds = seeds

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None:
        """Choose the next walk: the epoch (from 0), and the position that all ranks together had reached in it."""
        self.sampler.set_epoch(epoch, start_sample)

    def batches_from(self, start_sample: int) -> int:
        """Batches from ``start_sample`` to the epoch's end, on this rank."""
        return self.sampler.length_from(start_sample)

    def state_dict(self) -> dict[str, Any]:
        """Return whether persistent workers have been started, and the states of the user's sampler and data set."""
        state: dict[str, Any] = {"started": self._seeds is not None and self._seeds.started}
        order = self.sampler.order.state_dict()
        if order:
            state["order"] = order
        if isinstance(self.source.dataset, Stateful):
            state["dataset"] = self.source.dataset.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], within: bool) -> None:
        """Take back what ``state_dict`` returned; the position itself is ``set_epoch``'s."""
        if self._seeds is not None:
            self._seeds.started = bool(state.get("started"))
        self.sampler.order.load_state_dict(state.get("order") or {})
        if "dataset" in state and isinstance(self.source.dataset, Stateful):
            self.source.dataset.load_state_dict(state["dataset"])

    def __iter__(self) -> Iterator[Any]:
        # Torch's own iterator is returned: no frame of ours in a step. It is made here, not at the first batch, so
        # that a resume can restore the random state after the one number that making it draws.
        if self._seeds is not None:
            self._seeds.prepare(self.sampler.epoch)
        if not self.sampler.elastic:
            return iter(self.loader)
        with torch.random.fork_rng(devices=[]):  # of several loaders one may start over in the midst, for some shares
            return iter(self.loader)


def prepare_map_style(
    source: DataLoader[Any], rank: int, world_size: int, seed: int, training: bool, name: str,
    shares: int | None = None,
) -> MapLoader:  # fmt: skip
    """Rebuild a map-style loader around raylit's sampler.

    The order's seed is the initial seed of the sampler's or the loader's own generator where there is one, else
    ``seed``. The user's generator itself is never advanced where there are loader workers.
    """
    own_seed = seed if source.generator is None else source.generator.initial_seed()
    place: dict[str, Any] = {"rank": rank, "world_size": world_size, "training": training, "shares": shares}
    place["worker_seed"] = own_seed if source.num_workers > 0 else None
    batches = source.batch_sampler
    sampler: ShardedBatchSampler | ShardedItemSampler
    changed: dict[str, Any]
    if batches is None:  # batch_size=None: the data set makes the batches, an index each
        sampler = ShardedItemSampler(order_of(source.sampler, source.dataset, own_seed, name), batch_size=1, **place)
        changed = {"sampler": sampler, "batch_size": None}
    elif type(batches) is BatchSampler:
        order = order_of(batches.sampler, source.dataset, own_seed, name)
        sampler = ShardedBatchSampler(order, batch_size=batches.batch_size, drop_last=batches.drop_last, **place)
        changed = {"batch_sampler": sampler}
    else:  # a user's own batch sampler: its batches are kept whole, and shared out in turn
        drawn = order_of(batches, source.dataset, own_seed, name)
        sampler = ShardedItemSampler(drawn, batch_size=1, **place)
        changed = {"batch_sampler": sampler}
    _check_length(sampler, source, name)
    own_batches = isinstance(sampler, ShardedItemSampler)
    seeds = WorkerSeeds(source, own_seed, rank) if source.num_workers > 0 else None
    if seeds is not None:
        changed["generator"] = seeds.generator
    return MapLoader(
        source,
        rebuilt(source, name, dataset=source.dataset, **changed),
        sampler,
        seeds,
        num_samples=None if own_batches else len(sampler.order),
        batch_size=None if own_batches else sampler.batch_size,
    )


def _check_length(sampler: ShardedBatchSampler | ShardedItemSampler, source: DataLoader[Any], name: str) -> None:
    """Refuse an order whose length cannot be known. ``len`` of a drawn order draws it, so errors in it show here."""
    try:
        len(sampler.order)
    except (TypeError, NotImplementedError) as error:
        if isinstance(sampler.order, DrawnOrder):
            raise  # from the user's own sampler
        raise DataError(
            f"{name}: the data set {type(source.dataset).__name__} has no length, so it cannot be shared out. Define "
            "__len__, or make it an IterableDataset"
        ) from error
