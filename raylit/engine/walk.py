"""The batches of one training epoch, on this rank: from the start, or from where a checkpoint stands. Floor 3.

In an elastic run a step's data are cut into more shares than there are ranks, and the ranks take them in turns: batch
``i`` of the epoch is turn ``i % turns`` of step ``i // turns``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from raylit.ports import Collective, LoaderLike
from raylit.wire import World

NOTHING: Any = object()

Reseed = Callable[[int, int, int], None]  # epoch, step of the epoch, share


class Walk:
    """One walk over the training loader. ``open`` it, then iterate: (index in the epoch, batch).

    ``final``: index of the last batch; -2 where the number is not known. Then one batch is looked up ahead, and
    several workers agree before each batch that all of them have one, since DDP would wait for ever for a rank that has
    run out. ``ended``: of such a walk, the last batch is out.
    """

    def __init__(self, loader: LoaderLike, total: int | None, known: bool, collective: Collective | None,
                 world: World | None = None, reseed: Reseed | None = None) -> None:  # fmt: skip
        """``total``: batches of an epoch, where known or limited. ``collective``: None for one worker.

        ``reseed``: called before a share is loaded, so that what is drawn for it is the same on whichever rank.
        """
        self._loader, self._total, self._collective = loader, total, collective
        self._world, self._reseed = world or World(), reseed
        self._turns = self._world.turns
        # Where the number is known nothing is looked up ahead, and not one batch too many is loaded.
        self.final = total - 1 if known and total is not None else -2
        self.ended = False
        self.first = 0
        self.ahead: Any = NOTHING  # the batch that was looked up
        self._start = self._epoch = 0
        self._iterator: Iterator[Any] = iter(())

    def open(self, epoch: int, first: int = 0, start: int = 0, ahead: Any = NOTHING) -> None:
        """Go to batch ``first`` of the epoch. What the iterator draws at random is drawn when this returns.

        ``start``: samples of the epoch that all ranks have consumed, in whole steps. ``ahead``: the batch ``first``
        itself, where the checkpoint holds it.
        """
        self._epoch, self.first, self._start = epoch, first, start
        begun = first % self._turns  # turns of the running step that are done
        if first and self.final != -2:
            left = self._loader.batches_from(start)
            if left is not None:
                whole, final = self._loader.num_batches, first - begun + left - 1
                # At another number of ranks than before the position may lie within a step: one more is then left than
                # an epoch has, and only a limit that was asked for may cut it off.
                limited = self.final + 1 != whole
                self.final = min(self.final, final) if limited else final
        self._loader.set_epoch(epoch, start if ahead is NOTHING else start + self._loader.samples_per_step)
        self._iterator = iter(self._loader)
        for _ in range(begun):
            next(self._iterator, None)
        if self.final == -2:
            self.ahead = next(self._iterator, NOTHING) if ahead is NOTHING else ahead

    def over(self, first: int, start: int) -> None:
        """Stand at the end of an epoch of ``first`` batches, without opening the loader."""
        self.first, self._start, self.ended = first, start, True
        self.final = first - 1 if self.final != -2 else -2

    def samples(self, batches_done: int) -> int:
        """The position of all ranks together after so many batches of the epoch, in whole steps."""
        steps = batches_done // self._turns - self.first // self._turns
        return self._start + steps * self._loader.samples_per_step

    def complete(self, batches_done: int) -> bool:
        """Tell whether the epoch has no batch after these."""
        return batches_done > self.final if self.final != -2 else self.ended

    @property
    def reseeds(self) -> bool:
        """Whether random numbers follow from the place in the data: in elastic runs."""
        return self._reseed is not None

    def reseed_hooks(self, batches_done: int) -> None:
        """Between two steps of an elastic run: what hooks draw there follows from the step and the rank alone."""
        if self._reseed is not None:
            share = self._world.shares_of_a_step + self._world.global_rank
            self._reseed(self._epoch, batches_done // self._turns, share)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        if self._reseed is not None:
            return self._seeded(self._reseed)
        return zip(range(self.first, self.final + 1), self._iterator) if self.final > -2 else self._looked_ahead()

    def _seeded(self, reseed: Reseed) -> Iterator[tuple[int, Any]]:
        world = self._world
        for index in range(self.first, self.final + 1):
            step, turn = divmod(index, self._turns)
            reseed(self._epoch, step, turn * world.world_size + world.global_rank)
            batch = next(self._iterator, NOTHING)
            if batch is NOTHING:
                return
            yield index, batch

    def _looked_ahead(self) -> Iterator[tuple[int, Any]]:
        count, current = self.first, self.ahead
        if self.ended or self._total == 0 or not self._all_have(current is not NOTHING):
            return
        while True:
            more = self._total is None or count + 1 < self._total
            self.ahead = next(self._iterator, NOTHING) if more else NOTHING
            self.ended = not self._all_have(self.ahead is not NOTHING)
            yield count, current
            if self.ended:
                return
            current, count = self.ahead, count + 1

    def _all_have(self, mine: bool) -> bool:
        if self._collective is None:
            return mine
        flag = torch.tensor(1.0 if mine else 0.0)
        return bool(self._collective.all_reduce(flag, "min").item())
