"""What each rank keeps for itself in a checkpoint, beside rank 0's ``model.ckpt``. Floor 2, worker side.

Random states, half-summed gradients, running metrics: things that differ from rank to rank. They lie in
``rank_00000.ckpt`` and so on in the checkpoint's folder, or, where the checkpoint is one file, within it under
``raylit`` -> ``ranks``. docs/checkpoints.md has the table of all entries.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylit.checkpoint.content import FILE_NAME
from raylit.errors import CheckpointError
from raylit.seed import get_random_state, set_random_state
from raylit.uri import redacted

_NAME = re.compile(r"rank_(\d{5})\.ckpt")


def file_name(rank: int) -> str:
    """The name of one rank's file."""
    return f"rank_{rank:05d}.ckpt"


# -- random states ---------------------------------------------------------------------------------------------------
def random_state(device: torch.device) -> dict[str, Any]:
    """Return the random states of this process and of its device, as plain values."""
    state = as_plain(get_random_state())
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore what ``random_state`` returned; a device that the saving run had not keeps the seed alone."""
    set_random_state(from_plain({key: value for key, value in state.items() if key != "cuda"}))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def as_plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``seed.get_random_state`` gave with tensors for numpy's arrays: it loads with ``weights_only``."""
    plain = dict(state)
    if "numpy" in plain:
        name, keys, position, has_gauss, cached = plain["numpy"]
        plain["numpy"] = [name, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached]
    return plain


def from_plain(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Undo ``as_plain``."""
    state = dict(plain)
    if "numpy" in state:
        name, keys, position, has_gauss, cached = state["numpy"]
        state["numpy"] = (name, keys.numpy().astype("uint32"), position, has_gauss, cached)
    return state


# -- values that must come back to the device they lay on ------------------------------------------------------------
def placed(value: Any) -> dict[str, Any]:
    """Return a nested value with a note of which of its tensors lay on the CPU; ``put_back`` undoes it."""
    return {"value": value, "on_cpu": [tensor.device.type == "cpu" for tensor in _tensors(value)]}


def put_back(saved: Mapping[str, Any], device: torch.device) -> Any:
    """Return the value that ``placed`` was given, its tensors on ``device`` where they did not lie on the CPU."""
    on_cpu = iter(saved["on_cpu"])

    def put(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if next(on_cpu) else value.to(device)
        if isinstance(value, Mapping):
            return {key: put(item) for key, item in value.items()}
        return type(value)(put(item) for item in value) if type(value) in (list, tuple) else value

    return put(saved["value"])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


# -- another number of ranks -----------------------------------------------------------------------------------------
def for_rank(own: Mapping[int, dict[str, Any]], rank: int, saved_ranks: int, ranks: int,
             shares: int | None = None, loaders: bool = False) -> dict[str, Any] | None:  # fmt: skip
    """Return what ``rank`` of ``ranks`` goes on with, of a checkpoint by ``saved_ranks``; None where there is nothing.

    At another number of ranks each gets the mean of the half-summed gradients, so that the batches behind them still
    count. The metrics of rank r are the concern of rank r % ``ranks`` now: ``metrics_of`` has those of each whose place
    is taken. ``outputs`` are dealt out as the data are, of which a step had so many ``shares``. ``loaders``: of an
    elastic run, where what loaders keep is the same on all ranks, and random states follow from the place in the data.
    """
    if saved_ranks == ranks:
        return own.get(rank)
    if not own or len(own) != saved_ranks or any("gradients" not in part for part in own.values()):
        return None
    parts = [own[each] for each in range(saved_ranks)]
    names = sorted({name for part in parts for name in part["gradients"]})
    means = {name: sum(p["gradients"][name] for p in parts if name in p["gradients"]) / saved_ranks for name in names}
    took_part = [any(lane) for lane in zip(*(part["group"]["took_part"] for part in parts))]
    mine = parts[rank % saved_ranks]
    taken: dict[str, Any] = {"gradients": means, "group": {"took_part": took_part}}
    kept = ("shown", "measured", *(("loaders",) if loaders else ()))
    taken |= {name: mine[name] for name in kept if name in mine}
    if loaders and rank < saved_ranks and "random" in mine:  # an elastic run: each share has numbers of its own
        taken["random"] = mine["random"]
    if mine.get("metrics") is not None:
        taken["metrics_of"] = [part["metrics"] for part in parts[rank::ranks]]
        taken["metrics_example"] = parts[0]["metrics"]
    if mine.get("outputs") is not None:
        taken["outputs"] = _dealt([part["outputs"] for part in parts], rank, ranks, shares or saved_ranks)
    return taken


def _dealt(saved: Sequence[Mapping[str, Any]], rank: int, ranks: int, shares: int) -> dict[str, Any]:
    """Return the outputs of several ranks that are ``rank``'s now, in order. Each is (see ``placed``) a list of lists.

    A rank's n-th output belongs to its n-th share of the data; where batches were skipped this is not exact.
    """
    lanes: list[list[Any]] = []
    flags: list[list[bool]] = []
    for old, part in enumerate(saved):
        own = range(old, shares, len(saved))  # the shares of a step that this rank had
        on_cpu = iter(part["on_cpu"])
        for number, lane in enumerate(part["value"]):
            if number == len(lanes):
                lanes.append([])
            for count, output in enumerate(lane):
                step, turn = divmod(count, len(own))
                where = [next(on_cpu) for _ in _tensors(output)]
                if own[turn] % ranks == rank:
                    lanes[number].append((step, own[turn], output, where))
    for lane in lanes:
        lane.sort(key=lambda each: each[:2])
        flags += [where for *_, where in lane]
    return {"value": [[output for _, _, output, _ in lane] for lane in lanes],
            "on_cpu": [each for where in flags for each in where]}  # fmt: skip


# -- reading ---------------------------------------------------------------------------------------------------------
def read_ranks(path: Any, common: Mapping[str, Any], only: int | None = None) -> dict[int, dict[str, Any]]:
    """Load every rank's own state of the checkpoint at ``path``, whose ``common`` part is read already.

    ``path``: as ``read`` takes it. Empty where there are none, as in a checkpoint of weights or of Lightning's.
    ``only``: the rank whose file alone is read, where each has one.
    """
    within = (common.get("raylit") or {}).get("ranks")
    if within:
        return dict(enumerate(within))
    if hasattr(path, "as_directory"):
        with path.as_directory() as folder:
            return read_ranks(folder, common, only)
    if "://" in str(path):
        return _from_storage(str(path), only)
    folder = Path(path).expanduser()
    folder = folder.parent if folder.name == FILE_NAME else folder
    files = sorted(folder.glob("rank_*.ckpt" if only is None else file_name(only))) if folder.is_dir() else []
    return {int(found[1]): _load(file, str(file)) for file in files if (found := _NAME.fullmatch(file.name))}


def _from_storage(uri: str, only: int | None) -> dict[int, dict[str, Any]]:
    import pyarrow.fs

    filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
    if path.endswith(f"/{FILE_NAME}"):
        path = path.rpartition("/")[0]
    if filesystem.get_file_info(path).type is not pyarrow.fs.FileType.Directory:
        return {}
    own = {}
    for entry in filesystem.get_file_info(pyarrow.fs.FileSelector(path)):
        found = _NAME.fullmatch(entry.base_name)
        if found and only in (None, int(found[1])):
            with filesystem.open_input_stream(entry.path) as stream:
                own[int(found[1])] = _load(io.BytesIO(stream.read()), f"{redacted(uri)}: {entry.base_name}")
    return own


def _load(file: Any, shown: str) -> dict[str, Any]:
    try:
        own = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{shown} cannot be loaded: damaged, or holding more than data ({str(error).splitlines()[0]}). Without it "
            "the run cannot go on as it was: use another checkpoint, or move all rank_*.ckpt files away"
        ) from error
    if not isinstance(own, dict) or "rank" not in own:
        raise CheckpointError(f"{shown} is no rank's state: it has no 'rank'")
    return own


def ordered(own: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort ranks' states by rank."""
    return sorted(own, key=lambda each: int(each["rank"]))
