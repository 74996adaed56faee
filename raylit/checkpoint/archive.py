"""``torch.save`` with the archive's CRC-32 taken faster than torch takes it. Floor 2, any process.

``torch.save`` writes a ZIP archive, and half of its time goes into the CRC-32 of the archive's entries. torch does not
look at them when it reads; others do (``unzip``, ``zipfile``). torch can leave them out, and writes 0 then. Here
they are put in while the bytes pass by, with the processor's own instructions, at an eighth of the time.

An entry, as torch writes it, each line with one or more calls of ``write`` (PKWARE's APPNOTE.TXT, 4.3)::

    local file header   30 bytes    CRC 0; flag 3: a data descriptor follows. An empty entry has none
    name, extra field               what their lengths in the header say
    data                            in one call
    data descriptor     16 or 24    CRC
    ...
    central directory               the CRC of every entry again, in one call
"""

from __future__ import annotations

import contextvars
import struct
from collections.abc import Mapping
from typing import IO, Any, Protocol, cast

import torch
from zlib_ng import zlib_ng

_HEADER, _DESCRIPTOR, _DIRECTORY = b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02"
_HEADER_BYTES, _DIRECTORY_ENTRY_BYTES = 30, 46
_HAS_DESCRIPTOR = 1 << 3  # of an entry's flags


class Out(Protocol):
    """What is written to."""

    def write(self, data: Any) -> int: ...
    def flush(self) -> None: ...


def save(content: Mapping[str, Any], out: Out) -> None:
    """Write plain values and tensors on the CPU as ``torch.save`` does, bit for bit but for one entry of torch's own.

    That is ``.data/serialization_id``, which torch derives from the sums. A torch that cannot leave the sums out for
    one caller alone (older than about 2.9) takes them itself.
    """
    options = torch.serialization
    context = contextvars.copy_context()
    if hasattr(options, "set_crc32_options") and options.get_crc32_options():
        context.run(options.set_crc32_options, False)
        if not options.get_crc32_options():  # it holds for everyone in this process: not ours to change
            options.set_crc32_options(True)
            context = contextvars.copy_context()
    context.run(torch.save, dict(content), cast(IO[bytes], _Summing(out)))  # it asks for write and flush alone


class _Summing:
    """Passes an archive on, with the sums put in. What it does not know it passes on as it is."""

    def __init__(self, out: Out) -> None:
        self._out = out
        self._before_data = 0  # bytes of the entry's name and extra field that are still to come
        self._data_next = False
        self._described = 0  # the size of the data that a descriptor has to follow now
        self._sums: list[int] = []  # of the entries so far
        self._known = True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._out.write(self._with_sums(view) if self._known else view)
        return view.nbytes

    def flush(self) -> None:
        self._out.flush()

    def _with_sums(self, view: memoryview) -> Any:
        size, sign = view.nbytes, bytes(view[:4])
        if self._before_data:
            self._before_data -= size
            self._known = self._before_data >= 0
        elif self._data_next:
            self._sums[-1], self._data_next, self._described = zlib_ng.crc32(view), False, size
        elif self._described:
            return self._descriptor(view)
        elif sign == _HEADER and size == _HEADER_BYTES:
            flags, name, extra = (struct.unpack_from("<H", view, at)[0] for at in (6, 26, 28))
            self._before_data, self._data_next = name + extra, bool(flags & _HAS_DESCRIPTOR)
            self._sums.append(0)
        elif sign == _DIRECTORY:
            return self._directory(view)
        return view

    def _descriptor(self, view: memoryview) -> Any:
        """Of 16 bytes, or of 24 in a large archive: signature, CRC, size, size."""
        size, self._described = self._described, 0
        form = {16: "<4sIII", 24: "<4sIQQ"}.get(view.nbytes)
        if form is None or struct.unpack(form, view) != (_DESCRIPTOR, 0, size, size):
            self._known = False
            return view
        return struct.pack(form, _DESCRIPTOR, self._sums[-1], size, size)

    def _directory(self, view: memoryview) -> Any:
        whole, at = bytearray(view), 0
        for crc in self._sums:
            if whole[at : at + 4] != _DIRECTORY:
                return view
            struct.pack_into("<I", whole, at + 16, crc)
            at += _DIRECTORY_ENTRY_BYTES + sum(struct.unpack_from("<HHH", whole, at + 28))
        return whole if at == len(whole) else view
