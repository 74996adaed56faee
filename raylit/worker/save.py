"""``trainer.save_checkpoint``: one file with the whole state, written now. Floor 4, every rank; rank 0 writes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import Any

from raylit.checkpoint import FILE_NAME, write
from raylit.checkpoint.ranks import ordered
from raylit.engine.parts import Parts
from raylit.errors import CheckpointError, RaylitError
from raylit.uri import redacted
from raylit.worker.storage import resolved


def save_checkpoint(parts: Parts, path: str, weights_only: bool) -> None:
    """Take the state on every rank, bring the ranks' own parts to rank 0 and write all to ``path``.

    CheckpointError, on every rank, where it cannot be written.
    """
    if parts.state.take is None:
        raise RaylitError("save_checkpoint works while a run goes on: call it in a hook")
    snapshot = parts.state.take(weights_only)
    collective = parts.strategy.collective
    own = collective.gather_object(snapshot.own) if snapshot.own else None
    fault = ""
    if parts.state.world.global_rank == 0:
        common = snapshot.common
        if own:
            common["raylit"]["ranks"] = ordered(own)
        try:
            write_file(common, path)
        except Exception as error:  # whatever it is: the other ranks wait for a word
            fault = redacted(str(error)) or type(error).__name__
    fault = collective.broadcast_object(fault)  # all wait for the file: a rank may read it in its next line
    if fault:
        raise CheckpointError(f"the checkpoint cannot be written to {redacted(path)!r}: {fault}")


def write_file(checkpoint: dict[str, Any], path: str) -> None:
    """Write one file, whole or not at all: ``path`` itself, or ``model.ckpt`` in it where it is a folder."""
    if "://" in path:
        import pyarrow.fs

        filesystem, target = resolved(path)
        if filesystem.get_file_info(target).type is pyarrow.fs.FileType.Directory or path.endswith("/"):
            target = f"{target.rstrip('/')}/{FILE_NAME}"
        with tempfile.TemporaryDirectory(prefix="raylit-") as folder:
            file = write(checkpoint, folder)
            filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            # Beside its place first: an object store shows a file when it is whole, a file system while it grows.
            partial = f"{target}.partial"
            try:
                pyarrow.fs.copy_files(file, partial, source_filesystem=pyarrow.fs.LocalFileSystem(),
                                      destination_filesystem=filesystem)  # fmt: skip
                filesystem.move(partial, target)
            except OSError:
                with contextlib.suppress(OSError):  # the first fault is the one to tell
                    filesystem.delete_file(partial)
                raise
        return
    folder, name = (path, FILE_NAME) if os.path.isdir(path) or path.endswith(os.sep) else os.path.split(path)
    write(checkpoint, folder or ".", name)
