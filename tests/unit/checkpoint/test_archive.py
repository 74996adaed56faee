"""A checkpoint's file is the one that ``torch.save`` writes, sums of the ZIP archive included."""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylit.checkpoint.archive import save

ID = "archive/.data/serialization_id"  # torch makes it of the sums
# Data that looks like a part of an archive: a header, a descriptor of as many bytes, the directory.
TRAPS = [
    b"PK\3\4" + bytes(26), b"PK\7\x08" + bytes(4) + b"\x10\0\0\0" * 2, b"PK\1\2" + bytes(42),
    b"PK\7\x08" + bytes(12),
]  # fmt: skip
PLAIN = st.one_of(st.integers(-9, 9), st.text(max_size=5), st.booleans(), st.none())
TENSORS = st.one_of(
    st.binary(max_size=300).map(lambda data: torch.tensor(list(data), dtype=torch.uint8)),
    st.sampled_from(TRAPS).map(lambda data: torch.tensor(list(data), dtype=torch.uint8)),
    st.lists(st.floats(width=32), max_size=20).map(torch.tensor),
    st.sampled_from([torch.tensor(2.5), torch.zeros(3, 0), torch.ones(2, dtype=torch.bfloat16), torch.ones(9, 9).T]),
)
CONTENTS = st.dictionaries(st.text(max_size=300), st.one_of(PLAIN, TENSORS, st.lists(TENSORS, max_size=3)), max_size=6)


def saved(content: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    save(content, out)
    return out.getvalue()


@given(CONTENTS)
def test_it_is_the_file_that_torch_writes(content: dict[str, Any]) -> None:
    expected = io.BytesIO()
    torch.save(content, expected)
    data = saved(content)
    with zipfile.ZipFile(io.BytesIO(data)) as mine, zipfile.ZipFile(expected) as theirs:
        assert mine.testzip() is None  # reads every entry and compares its sum
        assert [each.header_offset for each in mine.infolist()] == [each.header_offset for each in theirs.infolist()]
        for one, other in zip(mine.infolist(), theirs.infolist(), strict=True):
            if one.filename != ID:
                assert (one.filename, one.CRC, mine.read(one)) == (other.filename, other.CRC, theirs.read(other))
        differing = [at for at, (a, b) in enumerate(zip(data, expected.getvalue(), strict=True)) if a != b]
        assert not differing or min(differing) > mine.getinfo(ID).header_offset


def test_tensors_that_share_their_memory_still_do(tmp_path: Any) -> None:
    one = torch.arange(1000.0)
    content = torch.load(io.BytesIO(saved({"a": one, "b": one[10:20]})), weights_only=True)
    content["a"][10] = -1
    assert content["b"][0] == -1


def test_above_4_gib_descriptors_are_longer() -> None:
    large = torch.from_numpy(numpy.zeros(2**32 + 5, numpy.uint8))  # no memory: pages of it are never written to

    class Out:
        def __init__(self) -> None:
            self.parts: list[bytes] = []
            self.at = 0

        def write(self, data: Any) -> int:
            self.at += memoryview(data).nbytes
            self.parts.append(bytes(memoryview(data)[:1000]))
            return memoryview(data).nbytes

        def flush(self) -> None: ...

    out = Out()
    save({"large": large, "small": torch.arange(4)}, out)
    after_large = next(index for index, part in enumerate(out.parts) if len(part) == 1000) + 1
    crc = 0
    for start in range(0, len(large), 2**28):
        crc = zlib.crc32(large[start : start + 2**28].numpy(), crc)
    small = zlib.crc32(torch.arange(4).numpy().tobytes())
    sums = [int.from_bytes(part[4:8], "little") for part in out.parts if part[:4] == b"PK\7\x08"]
    assert len(out.parts[after_large]) == 24 and sums[4:6] == [crc, small]
    directory = next(part for part in out.parts if part[:4] == b"PK\1\2")
    assert directory.count(crc.to_bytes(4, "little")) == directory.count(small.to_bytes(4, "little")) == 1


@pytest.mark.parametrize("known", [True, False])
def test_a_setting_of_the_user_is_left_as_it_is(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is one for the whole process, as in older releases of torch: such a torch takes the sums itself."""
    if not known:
        setting = {"compute": True}
        monkeypatch.setattr(torch.serialization, "get_crc32_options", lambda: setting["compute"])
        monkeypatch.setattr(torch.serialization, "set_crc32_options", lambda compute: setting.update(compute=compute))
    data = saved({"a": torch.arange(9)})
    assert torch.serialization.get_crc32_options() is True
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
