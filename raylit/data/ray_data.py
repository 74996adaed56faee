"""A ``ray.data.Dataset`` as a loader: rows reach the ranks while Ray's tasks still make them. Floor 2; no Ray here.

============  ======================================================================================================
one rank      Ray's ``iter_torch_batches`` in this process
several       training: ``streaming_split(equal=True)``, the same number of steps on each rank; fewer rows than there
              are ranks are left out. Evaluation: ``equal=False``, each row once. Prediction: the rows are made whole
              first, in order, and each rank takes one stretch of whole batches
============  ======================================================================================================

What several ranks must do together, and what needs Ray, is behind ``Sharing``.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import GeneratorType
from typing import Any, Protocol, runtime_checkable

from raylit.data.rng import FOR_ORDER, mix_seed
from raylit.errors import DataError, nearest

_DEFAULT_BATCH_SIZE = 256  # Ray's own
_END: Any = object()


@runtime_checkable
class RayRows(Protocol):
    """A ``ray.data.Dataset`` or ``DataIterator``."""

    def iter_torch_batches(self, **options: Any) -> Iterable[Any]: ...


@runtime_checkable
class RayDataset(RayRows, Protocol):
    """A ``ray.data.Dataset``: rows that can be shared out."""

    def streaming_split(self, n: int, **options: Any) -> list[Any]: ...


class Sharing(Protocol):
    """How the ranks of a run read a Dataset."""

    def beginning(self, dataset: Any, *, ordered: bool) -> AbstractContextManager[None]:
        """Return a context to begin a walk in; ``ordered``: with the rows in the Dataset's order."""
        ...

    def stream(self, dataset: Any, *, equal: bool) -> RayRows:
        """Return this rank's rows of each walk; ``equal``: as many on every rank.

        Every rank calls this, and ``stretch``, at the same points. It is rank 0's Dataset that all of them read.
        """
        ...

    def stretch(self, dataset: Any, batch_size: int | None) -> RayRows:
        """Return this rank's stretch of the rows in order; ranks stand in order too (``stretches``)."""
        ...


class RayDataLoader:
    """A ``ray.data.Dataset`` with the size and the making of its batches.

    Give it to ``fit``, ``validate``, ``test`` or ``predict``, or return it from a ``*_dataloader`` hook. A Dataset by
    itself is the same with every default. A batch is what Ray's ``iter_torch_batches`` makes: a dict of tensors
    (rows, ...) by column, or what ``collate_fn`` returns. It comes on the CPU and goes to the device as any batch does.

    Args:
        dataset: a ``ray.data.Dataset``; a ``DataIterator`` for one worker.
        batch_size: rows that each worker takes in a step; None: a block of Ray's, of whatever size.
        drop_last: leave out a worker's last batch where it is short.
        options: the other arguments of ``iter_torch_batches``: ``prefetch_batches``, ``dtypes``, ``collate_fn``,
            ``pin_memory``, ``local_shuffle_buffer_size``, ``local_shuffle_seed``. The last gives another order in each
            epoch and on each worker; without it the run's seed does.

    Raises ``DataError`` for what is no Dataset, an option that Ray does not have, and ``device``.
    """

    def __init__(
        self, dataset: Any, *, batch_size: int | None = _DEFAULT_BATCH_SIZE, drop_last: bool = False, **options: Any
    ) -> None:
        if not isinstance(dataset, RayRows) or isinstance(dataset, type):
            raise DataError(
                f"RayDataLoader takes a ray.data.Dataset; got a {type(dataset).__name__}. ray.data.from_torch(dataset) "
                "makes one of a torch data set"
            )
        whole = isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size >= 1
        if batch_size is not None and not whole:
            raise DataError(
                f"RayDataLoader(batch_size=...) takes a number of rows of at least 1, or None for Ray's blocks; "
                f"got {batch_size!r}"
            )
        if "device" in options:
            raise DataError(
                "RayDataLoader takes no device: batches go to the worker's own as those of any loader do "
                "(transfer_batch_to_device). pin_memory=True lets the copy run beside the step"
            )
        _check_options(dataset, options)
        if options.get("local_shuffle_buffer_size") is not None and batch_size is None:
            raise DataError("RayDataLoader(local_shuffle_buffer_size=...) needs a batch_size; got None")
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.options = options

    def batches(self, rows: RayRows, seed: int | None = None) -> Iterable[Any]:
        """Return one walk over ``rows``, the Dataset or a part of it; ``seed``: of a local shuffle."""
        options = dict(self.options)
        if options.get("local_shuffle_buffer_size") is not None and seed is not None:
            options["local_shuffle_seed"] = seed
        return rows.iter_torch_batches(batch_size=self.batch_size, drop_last=self.drop_last, device="cpu", **options)

    def in_order(self) -> RayDataLoader:
        """Return the same without its local shuffle."""
        options = {key: value for key, value in self.options.items() if not key.startswith("local_shuffle_")}
        return RayDataLoader(self.dataset, batch_size=self.batch_size, drop_last=self.drop_last, **options)

    def __iter__(self) -> Iterator[Any]:
        """Walk the whole Dataset in this process, as a loop written by hand does."""
        return iter(self.batches(self.dataset))


def _check_options(dataset: RayRows, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(dataset.iter_torch_batches).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            accepted = ", ".join(each for each in parameters if each != "device")
            raise DataError(
                f"RayDataLoader(...) got the unknown option {name!r}.{nearest(name, parameters)} "
                f"This release of Ray has {accepted}"
            )


class RayLoader:
    """One rank's walk over a Dataset (``PreparedLoader``). Its length is not known.

    A resume within an epoch reads the rows before its position and drops them. That gives the rows that were not seen
    yet where Ray makes them in the same order again: ``DataContext.execution_options.preserve_order = True``, and no
    random transformation without a seed.
    """

    def __init__(
        self, source: Any, loader: RayDataLoader, *, rank: int, world_size: int, seed: int, stage: str, shard: bool,
        sharing: Sharing | None,
    ) -> None:  # fmt: skip
        """``sharing``: None where nothing is walked, as before a run."""
        self.source = source
        self.batch_size = loader.batch_size
        self.samples_per_step = world_size * (loader.batch_size or 1)  # in batches where blocks are batches
        self.num_samples: int | None = None
        self.num_batches: int | None = None
        self._shared = shard and world_size > 1
        self._training, self._predicting = stage == "train", stage == "predict"
        self.equal_steps = world_size == 1 or (self._shared and self._training)
        self.contiguous = self._shared and self._predicting
        self.anywhere = False
        self._loader, self._sharing = loader, sharing
        own = loader.options.get("local_shuffle_seed")
        self._seed = seed if own is None else int(own)
        self._rank, self._epoch, self._skip = rank, 0, 0
        self._rows: RayRows | None = None  # this rank's
        self._walk: weakref.ref[GeneratorType[Any, None, None]] | None = None

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None:
        """Choose the next walk: its epoch, and how much of it all ranks together have had."""
        self._epoch, self._skip = epoch, start_sample // self.samples_per_step

    def batches_from(self, start_sample: int) -> int | None:
        """Not known."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The position says it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], within: bool) -> None:
        """There is nothing to take."""

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip, 0
        before = self._walk() if self._walk is not None else None
        if before is not None:
            before.close()  # first: an end that Ray hears of late would end the walk that begins now
        # Shared out here, not when the loader is prepared: all ranks walk at the same time, while one of them alone
        # may have asked for the number of batches.
        rows = self._rows = self._rows or self._own_rows()
        # numpy's generators take any seed that is not negative.
        iterator = iter(self._loader.batches(rows, mix_seed(self._seed, self._epoch, FOR_ORDER, self._rank)))
        if isinstance(iterator, GeneratorType):
            # Weakly: a walk that was given up must end when it is let go, or Ray would go on making rows for it.
            self._walk = weakref.ref(iterator)
        batches: Iterator[Any] = iterator
        if self._sharing is not None and isinstance(rows, RayDataset):
            with self._sharing.beginning(rows, ordered=self._predicting):
                first = next(iterator, _END)
            batches = itertools.chain(() if first is _END else (first,), iterator)
        for _ in itertools.islice(batches, skip):
            pass
        return batches

    def _own_rows(self) -> RayRows:
        rows: RayRows = self._loader.dataset
        if not self._shared:
            return rows
        if self._sharing is None:
            raise DataError("a ray.data.Dataset is shared out over workers within a run only")
        if self._predicting:
            return self._sharing.stretch(rows, self.batch_size)
        return self._sharing.stream(rows, equal=self._training)


def is_ray_data(source: Any) -> bool:
    """Whether ``source`` is a RayDataLoader, or a Dataset or DataIterator of Ray's."""
    return isinstance(source, (RayDataLoader, RayRows)) and not isinstance(source, type)


def datasets_of(source: Any) -> list[Any]:
    """Return the Datasets (and DataIterators) in what a user gave as a loader or a collection of loaders."""
    if is_ray_data(source):
        return [source.dataset if isinstance(source, RayDataLoader) else source]
    parts = source.values() if isinstance(source, dict) else source if isinstance(source, (list, tuple)) else ()
    return [each.dataset if isinstance(each, RayDataLoader) else each for each in parts if is_ray_data(each)]


def prepare_ray(
    source: Any, *, rank: int, world_size: int, seed: int, stage: str, shard: bool, sharing: Sharing | None, name: str
) -> RayLoader:
    """Prepare a Dataset for one rank; arguments as of ``loader.prepare``.

    Raises ``DataError`` where several workers cannot share it.
    """
    loader = source if isinstance(source, RayDataLoader) else RayDataLoader(source)
    if shard and world_size > 1:
        if not isinstance(loader.dataset, RayDataset):
            raise DataError(
                f"{name}: a {type(loader.dataset).__name__} of Ray's cannot be shared out over {world_size} workers. "
                "Pass the ray.data.Dataset itself. If each worker makes one of its own part, pass "
                "Trainer(use_distributed_sampler=False) to use it as it is"
            )
        if stage == "train" and loader.batch_size is None:
            raise DataError(
                f"{name}: RayDataLoader(batch_size=None) makes batches of Ray's blocks, and the {world_size} workers "
                "would get different numbers of them. Give a number of rows"
            )
    place: dict[str, Any] = {"rank": rank, "world_size": world_size, "seed": seed, "stage": stage}
    return RayLoader(source, loader, shard=shard, sharing=sharing, **place)


def stretches(rows: int, world_size: int, batch_size: int | None) -> list[int]:
    """Return where the stretches of ranks 1, 2, ... begin: at whole batches, as evenly as these can be shared.

    The batches of all ranks, one rank behind the other, are then those of one rank.
    """
    size = batch_size or 1
    count = -(-rows // size)
    return [min(rows, (rank * count // world_size) * size) for rank in range(1, world_size)]
