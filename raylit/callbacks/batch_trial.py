"""Whether training with one batch size is training with that size at all. Floor 2, on every worker.

Not for a person's list of callbacks: ``trainer.scale_batch_size`` puts it into fits of which nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset

from raylit.callback import Callback
from raylit.datamodule import DataModule
from raylit.hooks import overridden

if TYPE_CHECKING:
    from raylit.module import Module
    from raylit.view import TrainerView


class BatchSizeTrial(Callback):
    """Look at the loaders of one trial, of batches of ``size``.

    ``made``: the batch sizes that they tell. ``short``: why no batch of this size can be made of the data; None where
    it can. Then training ends at once, so that a size which was not tried does not count as one that fits.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.made: list[int] = []
        self.short: str | None = None
        self._source: Any = None
        self._known = False

    def setup(self, trainer: TrainerView, module: Module, stage: str) -> None:
        # The Module and the DataModule of a trial are copies, so the hook may be covered on the object.
        data = trainer.datamodule
        owner: Any = data if data is not None and overridden(data, "train_dataloader", DataModule) else module
        make = owner.train_dataloader

        def made() -> Any:
            self._source = make()
            return self._source

        owner.__dict__["train_dataloader"] = made

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        loaders = list(_loaders(self._source))
        self._source = None
        told = [(_batch_size(each), _samples(each)) for each in loaders]
        self.made = [size for size, _ in told if size is not None]
        whole = [(size, count) for size, count in told if size is not None and count is not None]
        # Beside loaders of this size there may be some of another, which say nothing about it.
        whole = [pair for pair in whole if pair[0] == self._size] or whole
        self._known = bool(whole)
        if whole and all(size * trainer.world_size > count for size, count in whole):
            size, count = max(whole, key=lambda pair: pair[1])
            of = f" on each of {trainer.world_size} workers" if trainer.world_size > 1 else ""
            self._end(trainer, f"the data set has {count} samples, fewer than a batch of {size}{of}")

    def on_train_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        # Of a stream nobody knows the length; all of it in one batch is the end of what can be tried.
        if not self._known and trainer.batch_idx == 0 and trainer.global_step < trainer.max_steps:
            self._end(trainer, "all data came in one batch")

    def _end(self, trainer: TrainerView, why: str) -> None:
        self.short, trainer.should_stop = why, True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}


def _loaders(source: Any) -> Iterator[Any]:
    """The loaders in what ``train_dataloader`` returned: one, or a list or dict of them."""
    if isinstance(source, Mapping):
        for each in source.values():
            yield from _loaders(each)
    elif isinstance(source, (list, tuple)):
        for each in source:
            yield from _loaders(each)
    else:
        yield source


def _batch_size(loader: Any) -> int | None:
    size = getattr(loader, "batch_size", None)
    if size is None:  # a batch sampler of the person's
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def _samples(loader: Any) -> int | None:
    """The length of a loader's data set; None where that is unknown."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    return len(loader.dataset) if isinstance(loader.dataset, Sized) else None
