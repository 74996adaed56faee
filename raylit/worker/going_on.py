"""Finding the state that a run goes on from, in its own folder. Floor 4, every rank.

A run folder belongs to one run, so whatever whole checkpoint lies there is this run's: of an attempt whose worker was
lost, or of the same script before it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.checkpoint import read
from raylit.checkpoint.content import FILE_NAME
from raylit.checkpoint.folder import Folder
from raylit.checkpoint.ranks import file_name, read_ranks
from raylit.checkpoint.store import Found, Manifest, Store
from raylit.errors import CheckpointError
from raylit.ports import Collective
from raylit.worker.keeper import FOLDER, store_of

Loaded = tuple[dict[str, Any], dict[int, dict[str, Any]]]  # what rank 0 wrote, and each rank's own part


def stores_of(callbacks: Iterable[Any], run_folder: str, filesystem: Any = None) -> list[Store]:
    """Every store that a run with these callbacks may have: the run folder's own first."""
    stores = [Store(Folder(f"{run_folder.rstrip('/')}/{FOLDER}", filesystem))]
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            store = store_of(callback, run_folder, filesystem)
            if store.folder.path not in {each.folder.path for each in stores}:
                stores.append(store)
    return stores


def newest_of(stores: list[Store], run_folder: str, damaged: list[str] | None = None) -> tuple[Store, Manifest] | None:
    """Return the newest whole state of a run that a fit can go on from; ``damaged`` is given a line for each worse one.

    A store may be shared with other runs; only this run's checkpoints count in it. Raises OSError.
    """
    there = []
    for index, store in enumerate(stores):
        passed_over: list[Found] = []

        def mine(manifest: Manifest, own: bool = index == 0) -> bool:
            return not manifest.weights_only and (own or manifest.run == run_folder)

        found = store.newest(mine, passed_over)
        if found is not None:
            there.append((store, found))
        if damaged is not None:
            damaged += [f"{store.path_of(each.name)}: {'; '.join(each.faults)}" for each in passed_over]
    return max(there, key=lambda each: each[1].age) if there else None


def load(store: Store, name: str, rank: int | None = None) -> Loaded:
    """Read one checkpoint of a store. ``rank``: the only one whose own part is needed; None: all parts are."""
    files = None if rank is None else [FILE_NAME, file_name(rank)]
    with store.folder.fetched(name, files) as folder:
        common = read(folder)
        return common, read_ranks(folder, common, rank)


def load_newest(stores: list[Store], run_folder: str, collective: Collective,
                note: Callable[[str], None]) -> Loaded | None:  # fmt: skip
    """Load the newest whole state of the run on every rank; None where there is none. Rank 0 looks, once for all.

    Of the ranks' own parts each rank has its own alone where there are as many ranks as the state is of: N ranks that
    read N files each would be a million reads of a thousand ranks. At another number each needs all of them.
    """
    choice: tuple[str, Any] = ("none", None)
    if collective.rank == 0:
        damaged: list[str] = []
        try:
            found = newest_of(stores, run_folder, damaged)
            for line in damaged:
                note(f"passed over a damaged checkpoint: {line}")
            if found is not None:
                store, manifest = found
                note(f"going on from step {manifest.step}: {store.path_of(manifest.name)}")
                choice = ("found", (stores.index(store), manifest.name, manifest.world_size))
        except OSError as error:
            choice = ("fault", str(error))
    kind, what = collective.broadcast_object(choice)
    if kind == "fault":
        raise CheckpointError(f"the checkpoints of the run in {run_folder} cannot be looked at: {what}")
    if kind == "none":
        return None
    index, name, ranks = what
    return load(stores[index], name, collective.rank if ranks == collective.world_size else None)
