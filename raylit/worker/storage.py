"""The run folder while a run goes on: always a folder of this machine, whatever the storage is. Floor 4."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def is_remote(folder: str, filesystem: Any = None) -> bool:
    """Tell whether a run folder is a URI, or a path on a filesystem of its own: not one that ``open`` understands."""
    return filesystem is not None or "://" in folder


@contextlib.contextmanager
def local_folder(run_folder: str | None, filesystem: Any = None, begun: Sequence[str] = ()) -> Iterator[str | None]:
    """Give the run folder as a path; for a remote one a temporary folder, copied to the storage at the end.

    It is copied after an exception too, and then removed. Where copying fails, it stays, and a warning says where.
    A process that is killed leaves what it wrote on its own machine only. ``begun``: files that an earlier stage of the
    run may have left, which this one goes on with.
    """
    if run_folder is None or not is_remote(run_folder, filesystem):
        if run_folder is not None:
            os.makedirs(run_folder, exist_ok=True)
        yield run_folder
        return
    folder = tempfile.mkdtemp(prefix="raylit-")
    try:
        for name in begun:
            _fetch(f"{run_folder.rstrip('/')}/{name}", folder, filesystem)
        yield folder
    finally:
        try:
            upload(folder, run_folder, filesystem)
        except Exception as error:  # the run's own outcome counts for more
            reason = (str(error).splitlines() or [""])[0]
            warnings.warn(f"the run could not be copied to {run_folder} ({reason}); it is in {folder}", stacklevel=3)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def files_of(loggers: Iterable[Any]) -> list[str]:
    """The files of the run folder that loggers go on with."""
    return [name for logger in loggers for name in logger.goes_on_with]


def _fetch(stored: str, folder: str, filesystem: Any) -> None:
    import pyarrow.fs

    source, path = resolved(stored, filesystem)
    if source.get_file_info(path).type is pyarrow.fs.FileType.File:
        target = os.path.join(folder, os.path.basename(path))
        pyarrow.fs.copy_files(path, target, source_filesystem=source,
                              destination_filesystem=pyarrow.fs.LocalFileSystem())  # fmt: skip


def upload(folder: str, run_folder: str, filesystem: Any = None) -> None:
    """Copy what is in ``folder``, if anything, to the run's storage."""
    if not os.listdir(folder):
        return
    import pyarrow.fs

    target, path = resolved(run_folder, filesystem)
    target.create_dir(path)
    pyarrow.fs.copy_files(folder, path, source_filesystem=pyarrow.fs.LocalFileSystem(), destination_filesystem=target)


def download(stored: str, folder: str, filesystem: Any = None) -> None:
    """Copy a folder of the storage into ``folder``."""
    import pyarrow.fs

    source, path = resolved(stored, filesystem)
    pyarrow.fs.copy_files(path, folder, source_filesystem=source, destination_filesystem=pyarrow.fs.LocalFileSystem())


def resolved(stored: str, filesystem: Any = None) -> tuple[Any, str]:
    """The filesystem that a URI or path belongs to, and the path on it."""
    import pyarrow.fs

    return (filesystem, stored) if filesystem is not None else pyarrow.fs.FileSystem.from_uri(stored)
