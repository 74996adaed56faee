"""From what a user returned as a loader to what one rank walks. The accepted forms are all here.

============================================  ====================================================================
the user's loader                             what a rank gets
============================================  ====================================================================
DataLoader over a map-style data set          the rule of ``sampler``, by samples
    ... with a batch sampler of the user's    its batches in turn: rank r takes batches r, r+N, ...
DataLoader over an iterable data set,         all of it on one worker; on several, its ``shard(num_shards, index)``,
or any other iterable                         refused without
a sequence of batches                         batches r, r+N, ...
a ``ray.data.Dataset``                        a stream of its rows (``ray_data``)
============================================  ====================================================================

With ``shard`` False (``Trainer(use_distributed_sampler=False)``) each is used as it is on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from raylit.data.combined import CombinedLoader
from raylit.data.map_style import prepare_map_style
from raylit.data.ray_data import Sharing, is_ray_data, prepare_ray
from raylit.data.streams import SequenceLoader, prepare_stream
from raylit.errors import DataError

__all__ = ["CombinedLoader", "PreparedLoader", "prepare", "prepare_all", "prepare_train"]

# raylit.stage's loops and entry points; "fit" is not among them, since it walks two kinds of loader.
_TRAINING = {"train": True, "sanity": False, "validate": False, "validation": False, "test": False, "predict": False}


class PreparedLoader(Protocol):
    """One rank's loader. A position in an epoch is ``start_sample``, which counts what all ranks consumed together.

    After k steps from ``start_sample`` s the position is s + k * ``samples_per_step``. A checkpoint keeps it next to
    the epoch, the process's random state, and what the user's own objects keep themselves (``stateful``).
    """

    source: Any  # the user's object
    batch_size: int | None  # samples a rank takes in a full step; None where batches come ready-made
    samples_per_step: int  # what a full step adds to the position: samples, or batches where they come ready-made
    num_samples: int | None  # samples of an epoch over all ranks, before a tail is dropped; None if unknown
    num_batches: int | None  # of this rank, in a whole epoch; None if unknown
    equal_steps: bool  # every rank is known to make the same number of steps
    contiguous: bool  # each rank has one stretch of the data set, not every N-th batch of it
    anywhere: bool  # a position means the same at any world size, with the same shares

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None:
        """Choose what the next walk yields. Walks after it begin at the epoch's start again."""

    def batches_from(self, start_sample: int) -> int | None:
        """Batches of this rank from a position to the epoch's end; None if unknown."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the position does not say: states that the user's loader, sampler or data set keep themselves."""

    def load_state_dict(self, state: Mapping[str, Any], within: bool) -> None:
        """Take back what ``state_dict`` returned. ``within``: the next walk goes on in the middle of that one."""

    def __iter__(self) -> Iterator[Any]:
        """Walk this rank's batches. The iterator is ready on return, whatever it draws at random drawn."""


def prepare(
    source: Any,
    *,
    stage: str,
    rank: int,
    world_size: int,
    seed: int,
    shard: bool = True,
    sharing: Sharing | None = None,
    name: str = "train_dataloader",
    shares: int | None = None,
) -> PreparedLoader:
    """Prepare one loader for one rank.

    Args:
        source: one of the forms at the head of this file.
        stage: ``"train"`` (equal steps on every rank), or an evaluation: ``"validate"``, ``"test"``, ``"predict"``, ...
        rank: from 0.
        world_size: number of ranks.
        seed: of the epochs' orders, where the user's loader has no generator of its own; the same on every rank.
        shard: False uses the loader as it is.
        sharing: how the ranks share a ``ray.data.Dataset``; None where it is not walked.
        name: the hook or argument it came from, for errors.
        shares: parts that each step's data are cut into, for training, a multiple of ``world_size``; None: as many.

    Raises ``DataError`` for anything that is not a loader, is empty, or cannot be shared out.
    """
    training = _TRAINING.get(stage)
    if training is None:
        raise DataError(f"stage must be one of {', '.join(_TRAINING)}; got {str(stage)!r}")
    if is_ray_data(source):
        place: dict[str, Any] = {"rank": rank, "world_size": world_size, "seed": seed, "stage": stage}
        return prepare_ray(source, shard=shard, sharing=sharing, name=name, **place)
    _refuse_others(source, name)
    prepared: PreparedLoader
    if isinstance(source, Sequence) and shard:
        prepared = SequenceLoader(source, rank=rank, world_size=world_size, training=training, shares=shares)
    elif isinstance(source, DataLoader) and shard and not isinstance(source.dataset, IterableDataset):
        prepared = prepare_map_style(source, rank, world_size, seed, training, name, shares)
    else:
        prepared = prepare_stream(source, rank, world_size, seed, shard, name)
    _refuse_empty(prepared, training or not shard, shares or world_size, name)
    return prepared


def prepare_all(
    source: Any, *, stage: str, rank: int, world_size: int, seed: int, shard: bool = True,
    sharing: Sharing | None = None, name: str = "val_dataloader",
) -> list[PreparedLoader]:  # fmt: skip
    """Prepare an evaluation's loaders: None, one, or a list or tuple of them. Arguments as in ``prepare``."""
    if source is None:
        return []
    place: dict[str, Any] = {"stage": stage, "rank": rank, "world_size": world_size, "seed": seed, "shard": shard,
                             "sharing": sharing}  # fmt: skip
    if isinstance(source, Mapping):
        raise DataError(f"{name}: a dictionary of loaders is for training only. Pass a list: {list(source)!r} in order")
    if _is_list_of_loaders(source):
        if len(source) == 1:
            return [prepare(source[0], name=name, **place)]
        return [prepare(part, name=f"{name}[{i}]", **place) for i, part in enumerate(source)]
    return [prepare(source, name=name, **place)]


def prepare_train(
    source: Any, *, rank: int, world_size: int, seed: int, shard: bool = True, sharing: Sharing | None = None,
    name: str = "train_dataloader", shares: int | None = None, resized: bool = False,
) -> PreparedLoader:  # fmt: skip
    """Prepare the training loader: one, or a list, tuple or dict of them that are walked together.

    ``resized``: the number of ranks may change in the middle of an epoch. Raises ``DataError`` for None, for an empty
    collection, and, where ``resized``, for a loader whose positions mean nothing at another world size.
    """
    prepared = _prepare_train(source, name, {"stage": "train", "rank": rank, "world_size": world_size, "seed": seed,
                                             "shard": shard, "sharing": sharing, "shares": shares})  # fmt: skip
    if resized and not prepared.anywhere:
        raise DataError(
            f"{name}: an elastic run takes up its data at any number of workers, so that no sample is seen twice or "
            f"never. That needs a DataLoader over a map-style data set, or a sequence of batches, that raylit shares "
            f"out (use_distributed_sampler=True); a {type(source).__name__} like this one has no such positions. Pass "
            "such a loader, or one number of workers"
        )
    return prepared


def _prepare_train(source: Any, name: str, place: dict[str, Any]) -> PreparedLoader:
    if source is None:
        raise DataError(
            f"{name}: there is no loader to train on. Define train_dataloader() on the Module or the DataModule, or "
            "pass fit(model, train_dataloaders=...)"
        )
    turns = (place["shares"] or place["world_size"]) // place["world_size"]
    if isinstance(source, Mapping):
        named = {key: prepare(part, name=f"{name}[{key!r}]", **place) for key, part in source.items()}
        _refuse_no_loaders(named, name)
        return CombinedLoader(source, named, turns)
    if _is_list_of_loaders(source):
        listed = {i: prepare(part, name=f"{name}[{i}]", **place) for i, part in enumerate(source)}
        _refuse_no_loaders(listed, name)
        return CombinedLoader(source, listed, turns)
    return prepare(source, name=name, **place)


def _refuse_no_loaders(loaders: Mapping[Any, Any], name: str) -> None:
    if not loaders:
        raise DataError(f"{name}: an empty collection of loaders. Put at least one DataLoader in it")


def _is_list_of_loaders(source: Any) -> bool:
    """A list or tuple is one of loaders, unless its first item is a batch."""
    return isinstance(source, (list, tuple)) and not (source and _is_batch(source[0]))


def _is_batch(item: Any) -> bool:
    return isinstance(item, (torch.Tensor, tuple, Mapping))


def _refuse_others(source: Any, name: str) -> None:
    """Raise ``DataError`` for what is not a loader, with the likely fix."""
    kind = type(source).__name__
    fix = "Pass a DataLoader, an iterable of batches, or a list of these"
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        raise DataError(f"{name}: got the data set {kind} itself. Pass DataLoader(dataset, batch_size=...)")
    if isinstance(source, torch.Tensor):
        raise DataError(f"{name}: got a tensor. Pass DataLoader(TensorDataset(tensor), batch_size=...)")
    if isinstance(source, (str, bytes)):
        raise DataError(f"{name}: got {source!r}, which is text and not a loader. {fix}")
    if isinstance(source, Mapping):
        raise DataError(f"{name}: got a {kind} where one loader was expected. {fix}")
    if isinstance(source, (list, tuple)) and source and not _is_batch(source[0]):
        raise DataError(
            f"{name}: got a {kind} whose first item is a {type(source[0]).__name__}, which is not a batch: the first "
            f"item of a sequence of batches is a tensor, tuple or dict. {fix}"
        )
    if hasattr(source, "__getitems__") or (hasattr(source, "__getitem__") and not isinstance(source, Iterable)):
        # Torch's marks of a map-style data set that does not derive from Dataset.
        raise DataError(f"{name}: got the data set {kind} itself. Pass DataLoader(dataset, batch_size=...)")
    if not isinstance(source, Iterable):
        raise DataError(f"{name}: got {source!r}, a {kind}, which cannot be iterated. {fix}")


def _refuse_empty(prepared: PreparedLoader, each_rank: bool, world_size: int, name: str) -> None:
    """Raise ``DataError`` for a loader without a batch for any rank, or (``each_rank``) for this one."""
    if prepared.num_batches != 0 or (not each_rank and not prepared.equal_steps):
        return
    source = prepared.source
    details = [f"world size {world_size}"]
    if isinstance(source, DataLoader):
        drop_last = source.drop_last or getattr(source.batch_sampler, "drop_last", False)
        details = [f"batch size {prepared.batch_size}", f"drop_last={drop_last}", *details]
        if not isinstance(source.dataset, IterableDataset):
            details.insert(0, f"data set of length {len(source.dataset)}")  # type: ignore[arg-type]
    elif isinstance(source, Sequence):
        details.insert(0, f"{len(source)} batches")
    raise DataError(
        f"{name}: the {type(source).__name__} gives no batch at all ({', '.join(details)}). Training needs at least "
        "one sample, or one ready batch, for each worker, evaluation at least one in all: pass more data, fewer "
        "workers, a smaller batch size, or drop_last=False"
    )
