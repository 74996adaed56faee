"""Finding and reading a checkpoint: a file, a folder, a Ray ``Checkpoint``, a URI. Floor 2, any process.

Files are read with ``weights_only=True``: one from a stranger executes nothing. Beside tensors and plain values a few
types are let through that Lightning's files hold among hyperparameters. They are data, and building one calls nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylit.checkpoint.content import FILE_NAME
from raylit.errors import CheckpointError
from raylit.uri import redacted

_LIGHTNING = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")
_ATTRIBUTE_DICTS = [f"{package}.utilities.{f}.AttributeDict" for package in _LIGHTNING for f in ("parsing", "data")]


def read(path: Any, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint; CheckpointError where there is none, or where it is damaged or holds more than data.

    ``path``: a file; a folder that holds ``model.ckpt``, or one ``.ckpt`` of another name; a URI of either that
    ``pyarrow.fs`` opens; a Ray ``Checkpoint``. ``map_location``: as in ``torch.load``.
    """
    with _on_this_machine(path) as file:
        shown = redacted(str(path if isinstance(path, str | os.PathLike) else file))
        return _load(file, map_location, shown)


@contextlib.contextmanager
def _on_this_machine(path: Any) -> Iterator[Path]:
    """Give the checkpoint's file as one that ``open`` takes; a copy where it lies elsewhere."""
    if hasattr(path, "as_directory"):
        with path.as_directory() as folder:
            yield _file_in(Path(folder), repr(path))
    elif not isinstance(path, str | os.PathLike):
        raise CheckpointError(
            f"a checkpoint is given as a file, a folder, a URI, or a Ray Checkpoint; got a {type(path).__name__}"
        )
    elif "://" in str(path):
        with tempfile.TemporaryDirectory(prefix="raylit-") as folder:
            yield _fetched(str(path), Path(folder))
    else:
        found = Path(path).expanduser()
        if found.is_dir():
            found = _file_in(found, repr(str(path)))
        elif not found.is_file():
            raise CheckpointError(f"there is no checkpoint at {str(path)!r} (looked for {found})")
        yield found


def _file_in(folder: Path, shown: str) -> Path:
    """The checkpoint in a folder: raylit's name for it, or, as Lightning and Ray name theirs, the only ``.ckpt``."""
    named = folder / FILE_NAME
    if named.is_file():
        return named
    others = sorted(entry.name for entry in folder.glob("*.ckpt"))
    if len(others) == 1:
        return folder / others[0]
    several = f"; it holds {', '.join(others)}: give the path of one of these" if others else ""
    raise CheckpointError(f"there is no checkpoint at {shown} (looked for {named}{several})")


def _fetched(uri: str, folder: Path) -> Path:
    """Copy one checkpoint from a storage into ``folder``: its file, not what else lies beside it."""
    import pyarrow.fs

    shown = redacted(uri)
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
        found = filesystem.get_file_info(path)
        if found.type == pyarrow.fs.FileType.Directory:
            inside = filesystem.get_file_info(pyarrow.fs.FileSelector(path))
            files = [each for each in inside if each.is_file and each.base_name.endswith(".ckpt")]
            named = [each for each in files if each.base_name == FILE_NAME] or files
            if len(named) != 1:
                held = f", it holds {', '.join(sorted(e.base_name for e in named))}" if named else ""
                raise CheckpointError(f"there is no checkpoint at {shown!r} (looked for {FILE_NAME} in it{held})")
            found = named[0]
        if not found.is_file:
            raise CheckpointError(f"there is no checkpoint at {shown!r}")
        target = folder / str(found.base_name)
        with filesystem.open_input_stream(found.path) as source, open(target, "wb") as file:
            while chunk := source.read(1 << 22):
                file.write(chunk)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{shown!r} cannot be read: {redacted(_first_line(error))}") from None
    return target


def _load(file: Path, map_location: Any, shown: str) -> dict[str, Any]:
    try:
        with _plain_types_allowed():
            loaded = torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{shown} cannot be loaded: damaged, or holding more than tensors and plain values ({_reason(error)})"
        ) from error
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        raise CheckpointError(f"{shown} is no checkpoint of a Module: it has no 'state_dict'")
    return loaded


@contextlib.contextmanager
def _plain_types_allowed() -> Iterator[None]:
    """Let through what is data by another name, for the length of one load."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):  # knows no names of types
        yield
        return
    posix, windows = (
        [f"pathlib.{kind}", f"pathlib._local.{kind}"] for kind in ("PosixPath", "WindowsPath")
    )  # fmt: skip
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefdgFD"}
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [
        argparse.Namespace, np.dtype, *dtypes,
        *((scalar, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")),
        *((pathlib.Path, name) for name in posix), *((pathlib.PureWindowsPath, name) for name in windows),
        *((OrderedDict, name) for name in _ATTRIBUTE_DICTS),
    ]  # fmt: skip
    with torch.serialization.safe_globals(allowed):
        yield


def _reason(error: Exception) -> str:
    """Torch's reason without its advice to load whatever it is."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked is not None:
        return f"it asks for {asked[1]}, which is not let through, since loading it could run code"
    if "weights_only" in str(error).lower():
        return "it is no file of torch.save's, or holds objects"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
