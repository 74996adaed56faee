"""``raylit checkpoints RUN``: what a run has kept, and whether it is whole. Floor 7."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from raylit.checkpoint.folder import Folder, folder_at
from raylit.checkpoint.store import Found, Store
from raylit.display.text import format_values
from raylit.driver.folder import default_storage
from raylit.errors import CheckpointError
from raylit.worker.keeper import FOLDER

_UNITS = ("B", "KB", "MB", "GB", "TB")


def add(parser: argparse.ArgumentParser) -> None:
    """Say this command's arguments, and what runs."""
    parser.description = "List what checkpoints a run has, the newest last."
    parser.add_argument("run_folder", metavar="RUN", help="run folder or URI, or a run's name in ~/ray_results")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum; 1: damaged")
    parser.set_defaults(run=lambda given: show(given.run_folder, verify=given.verify))


def show(run: str, *, verify: bool = False) -> int:
    """Print the table of a run's checkpoints; 1 where one is not whole. CheckpointError where there is no such run."""
    store = store_of_run(run)
    found = store.survey()
    if not found:
        raise CheckpointError(f"there are no checkpoints in {store.folder.path}")
    looked = [_looked_at(store, each, verify) for each in found]
    _print(store, looked, verify)
    return 1 if any(each.faults for each in looked) else 0


def store_of_run(run: str) -> Store:
    """The store of a run that is given by its folder, its checkpoints' folder, a URI, or its name."""
    if "://" not in run:
        named = os.path.join(default_storage(), run)
        here = os.path.abspath(os.path.expanduser(run))
        run = here if os.path.isdir(here) or not os.path.isdir(named) else named
        if not os.path.isdir(run):
            raise CheckpointError(f"there is no run {run!r}, and none of this name in {default_storage()}")
    folder = folder_at(run)
    if folder.path.rpartition("/")[2] == FOLDER:
        return Store(folder)
    inside = Store(Folder(f"{folder.path}/{FOLDER}", folder.given_filesystem))
    # A folder that a ModelCheckpoint was given has its checkpoints in it, without a folder between.
    return inside if FOLDER in folder.folders() else Store(folder)


def _looked_at(store: Store, found: Found, verify: bool) -> Found:
    if found.manifest is None:
        return found
    return Found(found.name, found.manifest, store.faults(found.manifest, deep=verify))


def _print(store: Store, found: list[Found], verify: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(title=store.folder.path, title_justify="left", title_style="", box=None, pad_edge=False)
    for name in ("checkpoint", "epoch", "step"):
        table.add_column(name, justify="left" if name == "checkpoint" else "right")
    for name in ("metrics", "ranked by", "size", "whole" if verify else "files"):
        table.add_column(name, justify="right" if name == "size" else "left")
    for each in found:
        state = "; ".join(each.faults) if each.faults else "yes" if verify else "there"
        table.add_row(*map(Text, (each.name, *_facts(each.manifest), state)))  # names are no markup
    console.print(table)


def _facts(manifest: Any) -> tuple[str, str, str, str, str]:
    if manifest is None:
        return ("", "", "", "", "")
    ranked = f"{manifest.monitor} ({manifest.mode})" if manifest.monitor else ""
    size = size_text(manifest.size_bytes)
    return (str(manifest.epoch), str(manifest.step), format_values(manifest.metrics), ranked, size)


def size_text(size_bytes: int) -> str:
    """``1.2 MB``: powers of 1000."""
    size, unit = float(size_bytes), 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"
