"""Which samples of an epoch's order each rank takes, step by step. Pure arithmetic, and torch samplers over it.

The rule, for N workers with batch size b over n samples, from position ``start`` (samples consumed by all ranks)::

    step 0            step 1            ...   tail: t < N*b samples
    |r0  b|r1  b|...  |r0  b|r1  b|...        |r0|r1|..|   as even as can be, contiguous, in rank order

* training: every rank takes t // N samples of the tail, the t % N left over are dropped, so that all ranks make the
  same number of steps; ``drop_last``: the tail is dropped whole.
* evaluation: the first t % N ranks take one more; each sample exactly once, so a rank may make one step fewer than
  another, or none; ``drop_last``: the data set is first cut to the n // b * b samples that one process would see.

What comes next follows from (order, start, world size) alone, so a run resumes at any start with any world size.

An elastic run keeps the size of a step while its number of workers changes: N in the rule above is then its number of
``shares``, and of W workers, which N is a multiple of, worker r takes shares r, r+W, r+2W, ... of each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler, get_worker_info

from raylit.data.order import Order
from raylit.data.rng import FOR_BATCH, mix_seed, seed_process


def _usable(n: int, batch_size: int, start: int, training: bool, drop_last: bool) -> int:
    """Samples from ``start`` on that the rule shares out."""
    if drop_last and not training:
        n = n // batch_size * batch_size
    return max(0, n - start)


def _tail(tail: int, rank: int, world_size: int, training: bool, drop_last: bool) -> tuple[int, int]:
    """Return (offset, length) of one rank's block in a tail of ``tail`` samples."""
    share, extra = divmod(tail, world_size)
    if training:
        return (0, 0) if drop_last else (rank * share, share)
    return rank * share + min(rank, extra), share + (rank < extra)


def rank_blocks(
    n: int, batch_size: int, rank: int, world_size: int, start: int = 0, training: bool = True, drop_last: bool = False,
    shares: int | None = None,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Yield one rank's blocks as (first, past the last) positions of the epoch's order.

    Args:
        n: samples in the epoch's order, over all ranks.
        batch_size: samples of a block in a full step.
        rank: from 0.
        world_size: number of ranks.
        start: samples already consumed by all ranks together; it may come from a run with another world size.
        training: equal steps on every rank, against every sample exactly once.
        drop_last: see the head of this file.
        shares: blocks of a step, as many for each rank; None: one.
    """
    shares = world_size if shares is None else shares
    remaining = _usable(n, batch_size, start, training, drop_last)
    step = shares * batch_size
    steps, tail = divmod(remaining, step)
    mine = range(rank, shares, world_size)
    first = start
    for _ in range(steps):
        for share in mine:
            yield first + share * batch_size, first + (share + 1) * batch_size
        first += step
    for share in mine:
        offset, length = _tail(tail, share, shares, training, drop_last)
        if length:
            yield first + offset, first + offset + length


def num_blocks(
    n: int, batch_size: int, rank: int, world_size: int, start: int = 0, training: bool = True, drop_last: bool = False,
    shares: int | None = None,
) -> int:  # fmt: skip
    """Return how many blocks ``rank_blocks`` yields, without walking them."""
    shares = world_size if shares is None else shares
    steps, tail = divmod(_usable(n, batch_size, start, training, drop_last), shares * batch_size)
    mine = range(rank, shares, world_size)
    return steps * len(mine) + sum(_tail(tail, share, shares, training, drop_last)[1] > 0 for share in mine)


class IndexBatch(list[Any]):
    """A batch's indices on their way to a loader worker, with the seed for the random state it is loaded under.

    A worker seeds itself when it first walks the list, which is when it starts to load the batch. So augmentation
    follows from (seed, epoch, position) alone: it does not matter which worker loads the batch, what that worker did
    before, or whether the run was resumed in the middle of the epoch. In the main process it is a plain list.
    """

    def __init__(self, indices: Any, seed: int) -> None:
        super().__init__(indices)
        self.seed: int | None = seed

    def __iter__(self) -> Iterator[Any]:
        # Once only: a data set that walks the indices twice (labels, then images) must not see the same numbers twice.
        if self.seed is not None and get_worker_info() is not None:
            seed_process(self.seed)
            self.seed = None
        return super().__iter__()

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexBatch, (self[:], self.seed)


class _Sharded(Sampler[Any]):
    """What the two samplers share: the place in the run, and the blocks of one rank."""

    def __init__(
        self,
        order: Order,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        training: bool,
        drop_last: bool = False,
        worker_seed: int | None = None,
        shares: int | None = None,
    ) -> None:
        """``worker_seed``: seed of the batches' random states in loader workers; None: there are none."""
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.training = training
        self.drop_last = drop_last
        self.shares, self.elastic = world_size if shares is None else shares, shares is not None
        self.epoch = 0
        self.start_sample = 0  # applies to the next walk only
        self._worker_seed = worker_seed

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None:
        """Choose what the next walk yields: the epoch (from 0), and the samples of it that were consumed before."""
        self.epoch = epoch
        self.start_sample = start_sample

    def length_from(self, start: int) -> int:
        """Batches this rank yields from position ``start`` to the epoch's end."""
        rule = (self.rank, self.world_size, start, self.training, self.drop_last, self.shares)
        return num_blocks(len(self.order), self.batch_size, *rule)

    def length_of(self, rank: int) -> int:
        """Batches that ``rank`` yields in a whole epoch."""
        rule = (rank, self.world_size, 0, self.training, self.drop_last, self.shares)
        return num_blocks(len(self.order), self.batch_size, *rule)

    def __len__(self) -> int:
        return self.length_from(0)

    def __iter__(self) -> Iterator[Any]:
        # With loader workers, torch calls this twice for one walk and throws the first result away unused: the place
        # is read here, but start_sample is only used up when the walk begins.
        return self._walk(self.epoch, self.start_sample)

    def _walk(self, epoch: int, start: int) -> Iterator[Any]:
        self.start_sample = 0
        items = self.order.draw(epoch)
        rule = (self.rank, self.world_size, start, self.training, self.drop_last, self.shares)
        for first, last in rank_blocks(len(items), self.batch_size, *rule):
            yield self._pick(list(items[first:last]), epoch, first)

    def _pick(self, block: list[Any], epoch: int, position: int) -> Any:
        raise NotImplementedError

    def _with_seed(self, indices: list[Any], epoch: int, position: int) -> list[Any]:
        if self._worker_seed is None:
            return indices
        return IndexBatch(indices, mix_seed(self._worker_seed, epoch, FOR_BATCH, position))


class ShardedBatchSampler(_Sharded, Sampler[list[int]]):
    """One rank's batches of indices, for ``DataLoader(dataset, batch_sampler=...)``. Its length is a whole epoch's."""

    def _pick(self, block: list[Any], epoch: int, position: int) -> list[int]:
        return self._with_seed(block, epoch, position)


class ShardedItemSampler(_Sharded):
    """One rank's items of an order, one at a time: rank r takes items r, r+N, r+2N, ...

    For orders whose items are not to be put together: a user's ready batches of indices, or the indices of a loader
    with ``batch_size=None``. It is the same rule with a batch size of 1, and positions count items.
    """

    def _pick(self, block: list[Any], epoch: int, position: int) -> Any:
        (item,) = block
        return self._with_seed(item, epoch, position) if isinstance(item, list) else item
