"""A second copy of what Tune keeps of a search, in the search's folder. Floor 6, on the driver.

Tune writes its files in place, over and over: a driver that is killed meanwhile leaves a torn one, and nothing could
take the search up. The copy is one file, written whole or not at all, some seconds old.
"""

from __future__ import annotations

import io
import json
import os
import time
import warnings
import zipfile
from typing import Any

from raylit.checkpoint.folder import Folder
from raylit.errors import ConfigError
from raylit.search.listening import Listener

FILE = "search_state.zip"
_EVERY_S = 10.0
_ENDS_OF_PICKLES = b"."  # pickle's STOP: a file that was cut off has it at its end by accident only


class StateCopy(Listener):
    """Writes the copy while a search runs; ``mend`` puts it in the place of torn files before one is taken up."""

    def __init__(self, folder: Folder, every_s: float = _EVERY_S) -> None:
        self._folder, self._every_s = folder, every_s
        self._last: float | None = None
        self._warned = False

    # -- while a search runs -------------------------------------------------------------------------------------
    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Tune: after it has written its files, if it did."""
        if self._last is None or time.monotonic() - self._last > self._every_s:
            self._write(trials)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Called by Tune."""
        self._write(trials)

    def _write(self, trials: list[Any]) -> None:
        packed = _packed(trials[0].local_experiment_path) if trials else None  # Tune's own folder on this machine
        if packed is None:
            return
        try:
            self._folder.write_small(FILE, packed)
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"no second copy of the search's state: {error}; the search goes on", stacklevel=2)
        self._last = time.monotonic()

    # -- before one is taken up ----------------------------------------------------------------------------------
    def mend(self) -> list[str]:
        """Put the copy in the place of Tune's files where one of them is torn; the names of the torn ones.

        Raises ConfigError where there is no copy to do it with.
        """
        kept = filter(_is_state, self._folder.files(""))
        torn = [name for name in kept if _is_torn(name, self._folder.read(name))]
        if not torn:
            return []
        packed = self._folder.read(FILE)
        names: list[str] = []
        if packed is not None:
            with zipfile.ZipFile(io.BytesIO(packed)) as copy:
                names = copy.namelist()
                for name in names:
                    self._folder.write_small(name, copy.read(name))
        lost = sorted(set(torn) - set(names))
        if lost:
            raise ConfigError(
                f"the search in {self._folder.path} cannot be taken up: {lost[0]} was cut off while it was written, "
                "and there is no copy of it yet. Its trials' checkpoints are whole: load_from_checkpoint reads them"
            )
        return torn


def _is_state(name: str) -> bool:
    kept = "state-" in name or "states-" in name
    return (kept and name.endswith((".json", ".pkl"))) or name == "tuner.pkl"


def _packed(folder: str) -> bytes | None:
    """Tune's files as one; None where there is none yet."""
    names = sorted(filter(_is_state, os.listdir(folder))) if os.path.isdir(folder) else []
    if not any(name.startswith("experiment_state-") for name in names):
        return None
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in names:
            copy.write(os.path.join(folder, name), name)
    return packed.getvalue()


def _is_torn(name: str, data: bytes | None) -> bool:
    if data is None:
        return False
    if not name.startswith("experiment_state-"):
        return not data.endswith(_ENDS_OF_PICKLES)  # also those whose names end in .json
    try:
        json.loads(data)
    except ValueError:
        return True
    return False
