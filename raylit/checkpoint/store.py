"""The checkpoints of a run as folders of whole files. Floor 2; no Ray, no torch.distributed, any process.

::

    <folder>/<name>/model.ckpt        rank 0: weights, optimizers, ... (content.py)
                    rank_00000.ckpt   each rank's own part (ranks.py)
                    manifest.json     what the others are: written last, deleted first

A checkpoint is there from the moment its manifest is, and gone from the moment its manifest is: what lies in a folder
without one was interrupted. The manifest has each file's size and checksum, so that damage is found and named.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from raylit.checkpoint.archive import save
from raylit.checkpoint.folder import Folder, Written
from raylit.errors import CheckpointError

MANIFEST = "manifest.json"
SCHEMA = 2  # 1 had SHA-256 of the files: read, no longer written
# What a save that was cut short leaves: files of ours, and no manifest.
_OWN = re.compile(r"(model\.ckpt|rank_\d{5}\.ckpt|rank_\d{5}\.ckpt\..*\.json)(\.partial)?|manifest\.json\.partial")


@dataclass(frozen=True)
class Manifest:
    """What one checkpoint is. Counts start at 0."""

    name: str
    step: int  # optimizer steps done
    batches: int  # training batches done
    epoch: int  # number of the epoch that it was taken in, or at the end of
    world_size: int  # ranks whose own parts belong to it
    metrics: dict[str, float] = field(default_factory=dict)  # measured on these very weights
    monitor: str | None = None
    mode: str = "min"
    keeper: str = ""  # who keeps it: a callback's state_key
    run: str = ""  # the folder of the run that wrote it
    weights_only: bool = False
    notice: bool = False  # kept because of a notice alone: the newest state, never one of the best
    saved_at: float = 0.0  # seconds since 1970, on the writer's clock
    files: dict[str, Written] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def age(self) -> tuple[int, int, float]:
        """Sorts checkpoints of one run, the newest last."""
        return (self.step, self.batches, self.saved_at)

    @property
    def score(self) -> float | None:
        """The monitored metric; None where there is none of these weights."""
        return None if self.monitor is None else self.metrics.get(self.monitor)

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(file.size_bytes for file in self.files.values())

    def to_json(self) -> bytes:
        """The manifest's file. JSON has no nan and no infinity: they are text in it."""
        plain = asdict(self)
        plain["metrics"] = {k: v if math.isfinite(v) else str(v) for k, v in self.metrics.items()}
        return json.dumps(plain, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read a manifest's file; CheckpointError where it is none."""
        try:
            plain = json.loads(data)
            if plain["schema"] > SCHEMA:
                raise CheckpointError(f"schema {plain['schema']} is of a newer raylit")
            known = {name: plain[name] for name in cls.__dataclass_fields__ if name in plain}
            known["metrics"] = {name: float(value) for name, value in plain["metrics"].items()}
            known["files"] = {name: _written(entry) for name, entry in plain["files"].items()}
            return cls(**{**known, "schema": SCHEMA})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{MANIFEST} cannot be read: {error}") from None


@dataclass(frozen=True)
class Found:
    """A folder of the store: a checkpoint, or what is left of one."""

    name: str
    manifest: Manifest | None
    faults: tuple[str, ...] = ()  # empty: nothing wrong was found


class Store:
    """The checkpoints in one folder. Operations on the storage raise OSError where it fails."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def path_of(self, name: str) -> str:
        """The path, or URI, of a checkpoint's folder."""
        return f"{self.folder.path}/{name}"

    @property
    def given_filesystem(self) -> Any:
        """pyarrow's filesystem that the folder was given with; None where its path or URI says it all."""
        return self.folder.given_filesystem

    # -- reading -------------------------------------------------------------------------------------------------
    def survey(self) -> list[Found]:
        """Look at every folder's manifest, not at the files; those without a manifest first, then by age."""
        found = [self._look(name) for name in self.folder.folders()]
        return sorted(found, key=lambda each: each.manifest.age if each.manifest else (-1, -1, 0.0))

    def manifests(self) -> list[Manifest]:
        """Return the checkpoints that are there by their manifests, the newest last."""
        return [each.manifest for each in self.survey() if each.manifest is not None]

    def _look(self, name: str) -> Found:
        data = self.folder.read(f"{name}/{MANIFEST}")
        if data is None:
            return Found(name, None, (f"{MANIFEST} is missing: the checkpoint was never finished",))
        try:
            # A folder that someone renamed or copied is still the checkpoint that it was.
            return Found(name, replace(Manifest.from_json(data), name=name))
        except CheckpointError as error:
            return Found(name, None, (str(error),))

    def faults(self, manifest: Manifest, *, deep: bool = True) -> tuple[str, ...]:
        """Name what is wrong with a checkpoint's files; ``deep`` reads them to their end, else sizes are compared."""
        wrong = []
        for name, file in sorted(manifest.files.items()):
            at = f"{manifest.name}/{name}"
            size = self.folder.size(at)
            if size is None:
                wrong.append(f"{name} is missing")
            elif size != file.size_bytes:
                what = "truncated" if size < file.size_bytes else "altered"
                wrong.append(f"{name} is {what}: {size} bytes, not {file.size_bytes}")
            elif deep and not self.folder.agrees(at, file.checksum):
                wrong.append(f"{name} is altered: its checksum is another")
        return tuple(wrong)

    def newest(self, accepted: Callable[[Manifest], bool] = lambda each: True,
               damaged: list[Found] | None = None) -> Manifest | None:  # fmt: skip
        """Return the newest checkpoint whose files are all as they were written; None where there is none.

        ``accepted``: which ones to look at. ``damaged`` is given those that were passed over, with their faults.
        """
        return self._first_whole(reversed(self.manifests()), accepted, damaged)

    def best(self, monitor: str | None = None, run: str | None = None,
             damaged: list[Found] | None = None) -> Manifest | None:  # fmt: skip
        """Return the whole checkpoint with the best score, of those ranked by ``monitor`` (None: by any).

        ``run``: of this run's alone; None: of all that are here.
        """
        ranked = [each for each in self.manifests()
                  if each.score is not None and (monitor is None or each.monitor == monitor)]  # fmt: skip
        ranked.sort(key=lambda each: worse_last(each.score, each.mode))
        return self._first_whole(ranked, lambda each: run is None or each.run == run, damaged)

    def _first_whole(self, manifests: Iterable[Manifest], accepted: Callable[[Manifest], bool],
                     damaged: list[Found] | None) -> Manifest | None:  # fmt: skip
        for manifest in manifests:
            if not accepted(manifest):
                continue
            faults = self.faults(manifest)
            if not faults:
                return manifest
            if damaged is not None:
                damaged.append(Found(manifest.name, manifest, faults))
        return None

    def begun(self, name: str) -> bool | None:
        """Whether a folder has a checkpoint's files in it, of a whole one or not; None where it is empty."""
        files = self.folder.files(name)
        return any(file == MANIFEST or _OWN.fullmatch(file) for file in files) if files else None

    # -- writing -------------------------------------------------------------------------------------------------
    def write_part(self, name: str, file: str, content: Mapping[str, Any]) -> Written:
        """Write one file of a checkpoint that has no manifest yet; plain values and tensors on the CPU."""
        return self.folder.write(f"{name}/{file}", partial(save, content))

    def publish(self, manifest: Manifest) -> None:
        """Make a checkpoint be there: all its files are."""
        self.folder.write_small(f"{manifest.name}/{MANIFEST}", replace(manifest, saved_at=time.time()).to_json())

    def sweep(self, name: str) -> bool:
        """Delete what is left of a checkpoint that was never finished; False where anything else lies in the folder."""
        if not all(_OWN.fullmatch(file) for file in self.folder.files(name)):
            return False
        self.folder.delete_folder(name)
        return True

    def delete(self, name: str) -> None:
        """Delete a checkpoint: it is gone with its manifest, and then its files go."""
        self.folder.delete_file(f"{name}/{MANIFEST}")
        self.folder.delete_folder(name)


def _written(entry: Mapping[str, Any]) -> Written:
    old = entry.get("sha256")
    return Written(**entry) if old is None else Written(entry["size_bytes"], f"sha256:{old}")


def worse_last(score: float | None, mode: str) -> float:
    """A sort key for scores: the best first, what is no number last."""
    if score is None or math.isnan(score):
        return math.inf
    return score if mode == "min" else -score


def check_whole(folder: Folder, name: str) -> None:
    """Raise CheckpointError naming the damaged files of one checkpoint; one without a manifest is let be."""
    store = Store(folder)
    data = folder.read(f"{name}/{MANIFEST}")
    if data is None:
        return
    shown = store.path_of(name)
    manifest = replace(Manifest.from_json(data), name=name)
    faults = store.faults(manifest)
    if faults:
        others = [each.name for each in store.manifests() if each.age < manifest.age]
        hint = f" The one before it is {store.path_of(others[-1])}." if others else ""
        raise CheckpointError(f"the checkpoint {shown} is damaged: {'; '.join(faults)}.{hint}")
