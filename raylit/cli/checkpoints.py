"""``raylit checkpoints RUN``: what a run has kept, and whether it is whole. Floor 7."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from raylit.checkpoint.folder import Folder, folder_at
from raylit.checkpoint.store import MANIFEST, Found, Store
from raylit.display.text import format_values
from raylit.driver.folder import default_storage
from raylit.driver.project import size_text
from raylit.errors import CheckpointError
from raylit.worker.keeper import FOLDER


def add(parser: argparse.ArgumentParser) -> None:
    """Say this command's arguments, and what runs."""
    parser.description = "List what checkpoints a run has, the newest last."
    parser.add_argument(
        "run_folder",
        metavar="RUN",
        help="folder or URI of a run or of one checkpoint, or a run's name in $RAYLIT_STORAGE or ~/ray_results",
    )
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum; 1: damaged")
    parser.set_defaults(run=lambda given: show(given.run_folder, verify=given.verify))


def show(run: str, *, verify: bool = False) -> int:
    """Print the table of a run's checkpoints; 1 where one is not whole. CheckpointError where there is no such run."""
    store, only = store_of_run(run)
    survey = [each for each in store.survey() if only in (None, each.name)]
    # Whatever else lies there is none of ours. A save that was cut short at once has left an empty folder.
    begun = {each.name: store.begun(each.name) for each in survey}
    if not any(begun.values()):
        raise CheckpointError(_nothing_in(store))
    found = [each for each in survey if begun[each.name] is not False]
    looked = [_looked_at(store, each, verify) for each in found]
    _print(store, looked, verify)
    return 1 if any(each.faults for each in looked) else 0


def store_of_run(run: str) -> tuple[Store, str | None]:
    """The store of a run that is given by its folder, its checkpoints' folder, a URI, or its name.

    And the name of the only checkpoint that is meant, where the folder of one is given.
    """
    if not run.strip():
        raise CheckpointError("name a run: its folder, its URI, or its name in the storage")
    if "://" not in run:
        named = os.path.join(default_storage(), run)
        here = os.path.abspath(os.path.expanduser(run))
        run = here if os.path.isdir(here) or not os.path.isdir(named) else named
        if not os.path.isdir(run):
            raise CheckpointError(f"there is no run {run!r}, and none of this name in {default_storage()}")
    folder = folder_at(run)
    if folder.path.rpartition("/")[2] == FOLDER:
        return Store(folder), None
    if folder.read(MANIFEST) is not None:
        above, _, name = folder.path.rpartition("/")
        return Store(Folder(above or "/", folder.given_filesystem)), name
    inside = Store(Folder(f"{folder.path}/{FOLDER}", folder.given_filesystem))
    # A folder that a ModelCheckpoint was given has its checkpoints in it, without a folder between.
    return (inside if FOLDER in folder.folders() else Store(folder)), None


def _nothing_in(store: Store) -> str:
    """Why there is nothing to list: a folder of runs is no run."""
    folder = store.folder
    runs = [name for name in folder.folders() if FOLDER in folder.files(name)]
    if not runs:
        return f"there are no checkpoints in {folder.path}"
    several = f"it holds {len(runs)} runs" if len(runs) > 1 else "it holds one"
    return f"{folder.path} is no run, {several}: raylit checkpoints {folder.path.rstrip('/')}/{runs[0]}"


def _looked_at(store: Store, found: Found, verify: bool) -> Found:
    if found.manifest is None:
        return found
    return Found(found.name, found.manifest, store.faults(found.manifest, deep=verify))


def _print(store: Store, found: list[Found], verify: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(Text(store.folder.path), soft_wrap=True)  # whole, however long: a table would fold its title
    table = Table(box=None, pad_edge=False)
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
