"""One batch: size, device, pieces in time."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from raylit.data import batch_size_of, split_time, to_device
from raylit.errors import DataError

Pair = namedtuple("Pair", "x y")
META = torch.device("meta")
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Record:
    x: torch.Tensor
    name: str = "n"
    twice: int = dataclasses.field(default=2, init=False)


class SelfMoving:
    def __init__(self):
        self.device = None

    def to(self, device):
        self.device = device  # and returns None


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 2), 3),
        (torch.tensor(1.0), 1),
        ([["a", "b"], torch.zeros(4)], 4),
        ({"meta": {"k": 1}, "x": (torch.zeros(5, 1), torch.zeros(2))}, 5),
        (Pair("a", torch.zeros(6)), 6),
        (Record(torch.zeros(7)), 7),
        (UserDict(x=torch.zeros(2)), 2),
        (["a", "b", "c"], 3),
        ([1, 2], None),
        ("text", None),
        (None, None),
        (pack_sequence([torch.zeros(4), torch.zeros(3)]), 2),
    ],
)
def test_batch_size(batch, size):
    assert batch_size_of(batch) == size


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2),
        [torch.zeros(2), "a"],
        (torch.zeros(2), 1),
        Pair(torch.zeros(2), None),
        {"x": torch.zeros(2), "s": "t"},
        OrderedDict(x=[torch.zeros(2)]),
        defaultdict(list, x=torch.zeros(2)),
        UserDict(x=torch.zeros(2)),
        Record(torch.zeros(2)),
    ],
)
def test_to_device_keeps_kind_and_identity(batch):
    assert to_device(batch, CPU) is batch
    moved = to_device(batch, META)
    assert type(moved) is type(batch)
    assert moved is not batch
    assert batch_size_of(moved) == 2
    tensors = [moved] if isinstance(moved, torch.Tensor) else []
    values = list(moved.values()) if hasattr(moved, "values") and not tensors else []
    for part in [*values, *(moved if isinstance(moved, (list, tuple)) else [])]:
        tensors += [t for t in (part if isinstance(part, list) else [part]) if isinstance(t, torch.Tensor)]
    if isinstance(moved, Record):
        tensors.append(moved.x)
        assert (moved.name, moved.twice) == ("n", 2)
    if isinstance(moved, defaultdict):
        assert moved.default_factory is list
    assert tensors
    assert all(t.device == META for t in tensors)


def test_objects_move_themselves():
    thing = SelfMoving()
    batch = [thing, Record]
    assert to_device(batch, META) is batch
    assert thing.device == META
    packed = pack_sequence([torch.zeros(4)])
    assert to_device(packed, CPU) is packed


def test_split_time_of_each_kind():
    x = torch.arange(12).reshape(2, 6)
    pieces = split_time([x, [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]], 4)
    assert [p[0].shape for p in pieces] == [(2, 4), (2, 2)]
    assert pieces[1][1] == [[5, 6], [11, 12]]
    assert torch.equal(torch.cat([p["x"] for p in split_time({"x": x, "label": torch.zeros(2)}, 5)], 1), x)
    assert split_time({"x": x, "s": ["a", "b"]}, 6)[0]["s"] == ["a", "b"]
    assert isinstance(split_time(Pair(x, x), 2)[0], Pair)
    assert [p.shape for p in split_time(x, 4)] == [(2, 4), (2, 2)]


@pytest.mark.parametrize(
    ("batch", "size", "words"),
    [
        ([torch.zeros(2, 3), torch.zeros(2, 4)], 2, ["part 0: 3", "part 1: 4", "tbptt_split_batch"]),
        ([[[1, 2], [1, 2, 3]]], 2, ["sample 1: 3"]),
        ([torch.zeros(2)], 2, ["time dimension", "(batch, time, ...)"]),
        ([torch.zeros(2, 3)], 0, ["truncated_bptt_steps", "at least 1", "0"]),
    ],
)
def test_split_time_refusals(batch, size, words):
    with pytest.raises(DataError) as caught:
        split_time(batch, size)
    assert all(word in str(caught.value) for word in words)
