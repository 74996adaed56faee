"""What one node does when the storage is checked: write a file, read the others' files, take all away. Floor 4.

``raylit/driver/storage_check.py`` asks for it, and ships it with ``raylit.checkpoint.folder``: a file goes the way of a
checkpoint, also from a node on which raylit is not installed. Nothing else of raylit's may be imported here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from typing import Any

from raylit.checkpoint.folder import Folder, Hashed, folder_at

# What a shared storage may take to show a new file to others: the time for which NFS keeps a folder's listing (3 s by
# default) and some more.
_VISIBLE_WITHIN_S = 5.0
_PATIENCE_S = 5.0  # for a storage that is away: much less than a checkpoint has, since a person waits for this


def write(kept: dict[str, Any], storage: str, filesystem: Any, check: str, name: str, content: bytes) -> dict[str, Any]:
    """Write this node's file into the folder ``check`` of the storage.

    Return ``{"fault": text or None, "free_bytes": int, or None for a storage that is no disk}``.
    """
    folder = _folder(storage, filesystem)
    if folder.local:
        kept["made"] = _missing(os.path.abspath(os.path.expanduser(storage)))

    def serialise(file: Hashed) -> None:
        file.write(content)

    try:
        folder.write(f"{check}/{name}", serialise)
    except Exception as error:  # pyarrow raises more than OSError; whatever it is, it is this node's fault to tell
        return {"fault": _text(error), "free_bytes": None}
    return {"fault": None, "free_bytes": shutil.disk_usage(_disk(folder)).free if folder.local else None}


def read(
    kept: dict[str, Any], storage: str, filesystem: Any, check: str, expected: Mapping[str, bytes]
) -> dict[str, str]:
    """Read the files that the nodes wrote; return for each that is not as expected what is wrong with it."""
    folder, faults = _folder(storage, filesystem), dict[str, str]()
    until = time.monotonic() + _VISIBLE_WITHIN_S
    for name, content in expected.items():
        while True:
            try:
                found = folder.read(f"{check}/{name}")
            except Exception as error:
                faults[name] = _text(error)
                break
            if found == content:
                break
            if time.monotonic() >= until:
                faults[name] = "is not there" if found is None else "has another content"
                break
            time.sleep(0.2)
    return faults


def remove(kept: dict[str, Any], storage: str, filesystem: Any, check: str) -> str | None:
    """Take the check's folder away; return what went wrong, if anything."""
    try:
        folder = _folder(storage, filesystem)
        folder.delete_folder(check)
        return f"{check} is still there" if check in folder.folders() else None
    except Exception as error:
        return _text(error)


def tidy(kept: dict[str, Any]) -> None:
    """Take away the folders above it that were not there before the check, as far as nobody has put anything in."""
    for made in kept.pop("made", ()):
        with contextlib.suppress(OSError):  # in use by now, or taken away by another node
            os.rmdir(made)


def _folder(storage: str, filesystem: Any) -> Folder:
    if filesystem is not None:
        return Folder(storage, filesystem, patience_s=_PATIENCE_S)
    given = folder_at(storage)
    return Folder(given.path, given.given_filesystem, patience_s=_PATIENCE_S)


def _disk(folder: Folder) -> str:
    return os.path.abspath(os.path.expanduser(folder.path))


def _missing(path: str) -> list[str]:
    """The folders of a path that are not there, the innermost first."""
    missing = []
    while path and not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


def _text(error: BaseException) -> str:
    lines = [line.strip() for line in str(getattr(error, "strerror", None) or error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
