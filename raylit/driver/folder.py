"""The run folder: where it lies, what it is called, and that nothing is overwritten. Floor 5, driver side."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from raylit.config.placement import PlacementConfig
from raylit.errors import ConfigError, RunExistsError
from raylit.stage import Stage
from raylit.uri import has_more_than_a_path, redacted
from raylit.worker.storage import is_remote, resolved

_PROBE = ".raylit_write_check"


def default_storage() -> str:
    """``RAYLIT_STORAGE``, which a cluster's set-up exports on its hosts; else Ray's own default.

    Runs with and without Ray lie side by side.
    """
    return os.environ.get("RAYLIT_STORAGE") or os.path.expanduser("~/ray_results")


def new_name(module_name: str) -> str:
    """A name no other run has: the Module's class, the time, and two random bytes."""
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return f"{module_name}-{now}-{secrets.token_hex(2)}"


def place_of(placement: PlacementConfig) -> str:
    """The folder, path or URI, of the run that the Trainer names."""
    storage, filesystem = _storage(placement)
    if is_remote(storage, filesystem):
        return f"{storage.rstrip('/')}/{placement.name}"
    return os.path.join(os.path.abspath(os.path.expanduser(storage)), placement.name or "")


def exists(placement: PlacementConfig, folder: str) -> bool:
    """Tell whether a run's folder is there and holds something."""
    filesystem = filesystem_of(placement)
    if not is_remote(folder, filesystem):
        return os.path.isdir(folder) and bool(os.listdir(folder))
    import pyarrow.fs

    try:
        filesystem, path = resolved(folder, filesystem)
        return bool(filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the storage of {folder} cannot be read: {str(error).splitlines()[0]}") from None


def claim(placement: PlacementConfig, module_name: str, stage: Stage = Stage.FIT) -> str:
    """Return the run's folder (path or URI) after checking that it is new and can be written.

    A fit's is called as the person says; an evaluation leaves that name to the fit that may follow.
    Raises RunExistsError for a name that is taken, ConfigError for a storage path that cannot be written.
    """
    storage, filesystem = _storage(placement)
    name = placement.name or new_name(module_name)
    if stage is not Stage.FIT:
        name = new_name(f"{placement.name or module_name}-{stage.value}")
    if is_remote(storage, filesystem):
        return _claim_remote(storage, name, filesystem)
    path = os.path.join(os.path.abspath(os.path.expanduser(storage)), name)
    if os.path.isdir(path) and os.listdir(path):
        raise _taken(name, storage)
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, _PROBE)
        with open(probe, "w"):
            pass
        os.unlink(probe)
    except OSError as error:
        raise ConfigError(
            f"storage_path={storage!r} cannot be written ({error.strerror}); give a folder or URI that can"
        ) from None
    return path


def filesystem_of(placement: PlacementConfig) -> Any:
    """The pyarrow filesystem that the run's folder is a path on; None for a path of this machine and for plain URIs.

    It was given in Ray's RunConfig, or is that of a URI with credentials or options in it.
    """
    return _storage(placement)[1]


def _storage(placement: PlacementConfig) -> tuple[str, Any]:
    """Where runs are kept, and the filesystem that this is a path on, if any. ConfigError for a URI that names none.

    A URI with credentials or options is taken apart here, and goes no further: run folders, messages, what lies in
    checkpoints and what Ray is told have the path alone.
    """
    storage = placement.storage_path or default_storage()
    filesystem = getattr(placement.run_config, "storage_filesystem", None)
    if filesystem is not None:
        return storage, filesystem
    if has_more_than_a_path(storage):
        filesystem, storage = _taken_apart(storage)
        return storage, filesystem
    return _path_of(storage) if storage.startswith("file:") else storage, None


@functools.lru_cache(maxsize=8)
def _taken_apart(uri: str) -> tuple[Any, str]:
    try:
        return resolved(uri)
    except (OSError, ValueError) as error:
        reason = redacted(str(error).splitlines()[0])
        raise ConfigError(f"storage_path={redacted(uri)!r} is no storage that pyarrow.fs knows: {reason}") from None


def _path_of(uri: str) -> str:
    try:
        return str(resolved(uri)[1])
    except ValueError as error:
        raise ConfigError(
            f"storage_path={uri!r} is no folder of this machine ({str(error).splitlines()[0]}); give a path, or "
            "file:///and/a/path"
        ) from None


@contextlib.contextmanager
def kept_if_used(folder: str | None) -> Iterator[None]:
    """Take a claimed folder of this machine away again where the run failed before it left anything in it."""
    try:
        yield
    except BaseException:
        if folder is not None and os.path.isabs(folder):  # else it is a URI, or a path on another filesystem
            with contextlib.suppress(OSError):  # it holds something
                os.rmdir(folder)
        raise


def _claim_remote(storage: str, name: str, filesystem: Any) -> str:
    import pyarrow.fs

    folder = f"{storage.rstrip('/')}/{name}"
    try:
        filesystem, path = resolved(folder, filesystem)
        found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
        if found:
            raise _taken(name, storage)
        filesystem.create_dir(path)
        with filesystem.open_output_stream(f"{path}/{_PROBE}") as stream:
            stream.write(b"")
        filesystem.delete_file(f"{path}/{_PROBE}")
    except (OSError, ValueError) as error:
        if isinstance(error, RunExistsError):
            raise
        raise ConfigError(f"storage_path={storage!r} cannot be written: {str(error).splitlines()[0]}") from None
    return folder


def _taken(name: str, storage: str) -> RunExistsError:
    return RunExistsError(
        f"a run named {name!r} exists in {storage}; raylit overwrites nothing. Choose another name=, or leave it out "
        "and each run gets its own; to go on with it: resume='auto', or fit(ckpt_path='last')"
    )


def split(folder: str) -> tuple[str, str]:
    """Split a run folder into Ray's storage_path and name."""
    storage, _, name = folder.rstrip("/").rpartition("/")
    return storage, name


@contextlib.contextmanager
def storage_of(folder: str | None, stage: Stage) -> Iterator[tuple[str, str]]:
    """Ray's storage_path and name for a run folder; where nothing is kept, those of a folder that goes at the end."""
    if folder is not None:
        yield split(folder)
        return
    storage, name = tempfile.gettempdir(), f"raylit-{stage.value}-{secrets.token_hex(4)}"
    try:
        yield storage, name
    finally:
        shutil.rmtree(os.path.join(storage, name), ignore_errors=True)
