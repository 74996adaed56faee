"""Which checkpoint, and which run folder, a call of ``fit`` or ``test`` is about. Floor 5, driver side."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylit.callback import Callback
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.checkpoint.folder import Folder, folder_at
from raylit.checkpoint.store import Manifest, Store, check_whole
from raylit.driver import folder as folders
from raylit.driver.result import LocalCheckpoint, StoredCheckpoint
from raylit.errors import CheckpointError, ConfigError
from raylit.worker.going_on import newest_of, stores_of
from raylit.worker.storage import is_remote

if TYPE_CHECKING:
    from raylit.trainer import Trainer


@dataclass(frozen=True)
class Choice:
    """What a call goes on from. ``path`` is None where nothing is loaded."""

    path: Any = None
    run_folder: str | None = None  # of the run that goes on under its own name; None: a run of its own
    note: str = ""


def with_checkpoints(trainer: Trainer, callbacks: list[Callback]) -> list[Callback]:
    """The callbacks, with the ModelCheckpoint that a run has where none was given; at the end, as its hooks see all."""
    fit = trainer._config.fit
    given = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    if given or fit.fast_dev_run or not fit.enable_checkpointing:
        return callbacks
    if trainer._own_checkpoints is None:
        trainer._own_checkpoints = ModelCheckpoint.default()
    return [*callbacks, trainer._own_checkpoints]


def check_checkpoints(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Refuse a ModelCheckpoint in a run that keeps nothing."""
    fit = trainer._config.fit
    if fit.enable_checkpointing or fit.fast_dev_run or not any(isinstance(c, ModelCheckpoint) for c in callbacks):
        return
    raise ConfigError(
        "Trainer(enable_checkpointing=False) keeps nothing, and there is a ModelCheckpoint among the callbacks: leave "
        "one of them out"
    )


def for_fit(trainer: Trainer, ckpt_path: Any, callbacks: list[Callback]) -> Choice:
    """What a fit goes on from; CheckpointError where that is not there."""
    placement = trainer._config.placement
    if placement.resume == "auto":
        folder = folders.place_of(placement)
        stores = stores_of(callbacks, folder, folders.filesystem_of(placement))
        if folders.exists(placement, folder):
            found = _newest(stores, folder)
            if found is None:
                return Choice(None if _named(ckpt_path) else ckpt_path, folder,
                              f"the run {placement.name!r} has no whole checkpoint yet and begins anew")  # fmt: skip
            return Choice(_as_path(*found), folder)
        return Choice() if _named(ckpt_path) == "last" else Choice(_resolved(trainer, ckpt_path, callbacks))
    if _named(ckpt_path) == "last" and placement.name is not None:
        folder = folders.place_of(placement)
        return Choice(_last_in(trainer, folder, callbacks), folder)
    return Choice(_resolved(trainer, ckpt_path, callbacks))


def for_evaluation(trainer: Trainer, stage: str, ckpt_path: Any, same_model: bool) -> Choice:
    """What an evaluation loads. ``same_model``: none was passed, so it is that of the fit before."""
    if ckpt_path is not None:
        return Choice(_resolved(trainer, ckpt_path, list(trainer._config.fit.callbacks)))
    best = next((each for each in trainer._state.callbacks if _has_best(each)), None)
    if not same_model or not isinstance(best, ModelCheckpoint) or trainer._run_folder is None:
        return Choice()
    path = best.best_model_path
    score = "" if best.best_model_score is None else f", {best.monitor} = {float(best.best_model_score):.6g}"
    return Choice(_readable(trainer, path), note=f"{stage} uses the best checkpoint{score}: {os.path.dirname(path)}")


def _has_best(callback: Callback) -> bool:
    return isinstance(callback, ModelCheckpoint) and callback.monitor is not None and bool(callback.best_k_models)


def _named(ckpt_path: Any) -> str | None:
    return ckpt_path if isinstance(ckpt_path, str) and ckpt_path in ("last", "best") else None


def _resolved(trainer: Trainer, ckpt_path: Any, callbacks: list[Callback]) -> Any:
    """A checkpoint's place: what was given, or what ``"last"`` and ``"best"`` stand for."""
    named = _named(ckpt_path)
    if named is None:
        if ckpt_path is not None:
            check_given(ckpt_path)
        return ckpt_path
    placement = trainer._config.placement
    folder = trainer._run_folder or (folders.place_of(placement) if placement.name is not None else None)
    if folder is None:
        raise CheckpointError(
            f"ckpt_path={named!r} looks under the run's name, and none is given: Trainer(name=...) of the run that "
            "kept it, or give a path"
        )
    return _last_in(trainer, folder, callbacks) if named == "last" else _best_in(trainer, folder, callbacks)


def _last_in(trainer: Trainer, folder: str, callbacks: list[Callback]) -> Any:
    stores = stores_of(callbacks, folder, folders.filesystem_of(trainer._config.placement))
    damaged: list[str] = []
    found = _newest(stores, folder, damaged)
    if found is None:
        raise CheckpointError(f"ckpt_path='last': {_nothing(stores, damaged)}")
    return _as_path(*found)


def _best_in(trainer: Trainer, folder: str, callbacks: list[Callback]) -> Any:
    stores = stores_of(callbacks, folder, folders.filesystem_of(trainer._config.placement))
    monitor = next((each.monitor for each in callbacks if isinstance(each, ModelCheckpoint) and each.monitor), None)
    try:
        for store in stores:
            best = store.best(monitor, run=None if store is stores[0] else folder)
            if best is not None:
                return _as_path(store, best)
        some = any(store.manifests() for store in stores)
    except OSError as error:
        raise _away(folder, error) from None
    if not some:
        raise CheckpointError(f"ckpt_path='best': {_nothing(stores, [])}")
    raise CheckpointError(
        f"ckpt_path='best': no checkpoint in {stores[0].folder.path} was ranked by a metric: the fit needs "
        "callbacks=[ModelCheckpoint(monitor='val_loss')]; 'last' is the newest state"
    )


def _newest(stores: list[Store], folder: str, damaged: list[str] | None = None) -> tuple[Store, Manifest] | None:
    try:
        return newest_of(stores, folder, damaged)
    except OSError as error:
        raise _away(folder, error) from None


def _away(folder: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"the checkpoints of the run in {folder} cannot be looked at: {error}")


def _nothing(stores: list[Store], damaged: list[str]) -> str:
    where = " or ".join(store.folder.path for store in stores)
    worse = f"; damaged: {'; '.join(damaged)}" if damaged else ""
    return f"there is no whole checkpoint in {where}{worse}"


def _as_path(store: Store, manifest: Manifest) -> Any:
    return checkpoint_at(store, manifest.name)


def checkpoint_at(store: Store, name: str) -> LocalCheckpoint:
    """A checkpoint as ``read`` takes it, wherever it lies."""
    path = store.path_of(name)
    return LocalCheckpoint(path) if store.folder.local else StoredCheckpoint(path, store.given_filesystem)


def _readable(trainer: Trainer, path: str) -> Any:
    """A path that an attribute of ModelCheckpoint holds; on a filesystem object of RunConfig's it says which."""
    filesystem = folders.filesystem_of(trainer._config.placement)
    folder = os.path.dirname(path)
    return StoredCheckpoint(folder, filesystem) if is_remote(folder, filesystem) else LocalCheckpoint(folder)


def check_given(path: Any) -> None:
    """Raise CheckpointError where the files of a checkpoint that was given by its path are not as they were written."""
    if hasattr(path, "as_directory") or not isinstance(path, (str, os.PathLike)):  # Ray's only looks like a path
        path = getattr(path, "path", None)
        if not isinstance(path, str) or not os.path.isdir(path):
            return
    path = os.fspath(path).rstrip("/")
    path = path.removesuffix("/model.ckpt")
    if "://" not in path:
        path = os.path.abspath(os.path.expanduser(path))
        if not os.path.isdir(path):
            return
    try:
        folder = folder_at(path)
        parent, _, name = folder.path.removesuffix("/model.ckpt").rpartition("/")  # of a URI's path
        check_whole(Folder(parent, folder.given_filesystem), name)
    except OSError:
        return  # reading it words what is wrong


# -- after a fit -----------------------------------------------------------------------------------------------------
def kept_by(callbacks: list[Callback], run_folder: str, filesystem: Any) -> list[tuple[LocalCheckpoint, Manifest]]:
    """The checkpoints that a fit left, oldest first. Raises OSError."""
    kept = []
    for index, store in enumerate(stores_of(callbacks, run_folder, filesystem)):
        kept += [(store, each) for each in store.manifests() if index == 0 or each.run == run_folder]
    kept.sort(key=lambda each: each[1].age)
    return [(checkpoint_at(store, manifest.name), manifest) for store, manifest in kept]
