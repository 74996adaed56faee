"""What each rank reads of the checkpoint that a run goes on from: what it needs, or N ranks would read N x N files."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store
from raylit.strategies.collective import LocalCollective
from raylit.worker.going_on import load_newest
from tests.unit.checkpoint.faulty import Memory, manifest

SAVED_RANKS = 3


@dataclass
class Rank:
    """One rank after another, rank 0 first: what it broadcasts the others are given. A ``ports.Collective``."""

    rank: int
    world_size: int
    said: list[Any] = field(default_factory=list)

    def broadcast_object(self, obj: Any) -> Any:
        if self.rank == 0:
            self.said.append(obj)
        return self.said[-1]


class Reads:
    """The files that are opened on a storage."""

    def __init__(self) -> None:
        self.opened = 0

    def __call__(self, operation: str) -> None:
        self.opened += operation in ("open_input_stream", "open_input_file")


def save(store: Store) -> None:
    state = {"global_step": 7, "state_dict": {"w": torch.ones(3)}, "raylit": {"world_size": SAVED_RANKS}}
    files = {"model.ckpt": store.write_part("c", "model.ckpt", state)}
    for rank in range(SAVED_RANKS):
        name = f"rank_{rank:05d}.ckpt"
        files[name] = store.write_part("c", name, {"rank": rank})
    store.publish(replace(manifest("c", 7), world_size=SAVED_RANKS, files=files))


def loaded(store: Store, collective: Any) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    found = load_newest([store], "run", collective, lambda note: None)
    assert found is not None and found[0]["global_step"] == 7
    return found


@pytest.fixture(params=["disk", "storage"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Store, Reads]:
    """The store as rank 0 and as another rank reach it, and what the other one reads."""
    reads, memory = Reads(), Memory()
    if request.param == "disk":
        return Store(Folder(str(tmp_path))), Store(Folder(str(tmp_path))), reads
    return memory.store(), memory.store(reads), reads


def test_with_as_many_ranks_each_reads_its_own_part(place: tuple[Store, Store, Reads]) -> None:
    first, other, reads = place
    save(first)
    zero = Rank(0, SAVED_RANKS)
    assert loaded(first, zero)[1] == {0: {"rank": 0}}
    for rank in (0, 2):
        first.folder.delete_file(f"c/rank_{rank:05d}.ckpt")  # rank 1 has no use for it
    assert loaded(other, Rank(1, SAVED_RANKS, zero.said))[1] == {1: {"rank": 1}}
    assert reads.opened <= 2  # the model and its own part


@pytest.mark.parametrize("ranks", [2, 4])
def test_with_another_number_of_ranks_each_reads_all(place: tuple[Store, Store, Reads], ranks: int) -> None:
    first, other, _ = place
    save(first)
    every = {rank: {"rank": rank} for rank in range(SAVED_RANKS)}
    zero = Rank(0, ranks)
    assert loaded(first, zero)[1] == every
    assert loaded(other, Rank(1, ranks, zero.said))[1] == every


def test_one_worker_goes_on_from_what_three_left(place: tuple[Store, Store, Reads]) -> None:
    save(place[0])
    assert len(loaded(place[0], LocalCollective(torch.device("cpu")))[1]) == SAVED_RANKS
