"""A folder that checkpoints lie in: on this machine, or on any storage that ``pyarrow.fs`` knows. Floor 2.

Few operations. A file is written whole or not at all; while a storage is away an operation is tried again for up to
30 s. No Ray, no torch.distributed; ``pyarrow`` is imported only for a storage.

A checksum is written ``kind:hex digits``. It finds damage, not forgery: whoever can alter a file can alter its checksum
beside it. So the kind is XXH3 of 128 bits, at a tenth of what SHA-256 costs, which on a machine whose every core trains
is taken from training.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, TypeVar

import xxhash

from raylit.uri import has_more_than_a_path, redacted

T = TypeVar("T")
_CHUNK = 1 << 22
_WINDOW = 1 << 23  # bytes of a file that the system holds at once while it is written
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0
PATIENCE_S = 30.0
# Waiting does not help: each of these says what is wrong, and a person has to put it right.
_FINAL = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTEMPTY,
}  # fmt: skip
_KIND = "xxh3_128"
_KINDS: dict[str, Callable[[], Any]] = {_KIND: xxhash.xxh3_128, "sha256": hashlib.sha256}  # the latter in old manifests


@dataclass(frozen=True)
class Clock:
    """What waiting needs; tests put their own in its place."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass
class Hashed:
    """A file that is written from its start to its end; knows its size and checksum when it is done."""

    file: BinaryIO | _Passing
    size_bytes: int = 0
    error: OSError | None = None  # the first; whoever serialises may word it otherwise
    _hash: Any = field(default_factory=_KINDS[_KIND])

    def write(self, data: Any) -> int:
        """Write and hash; both leave Python's lock to others while they work."""
        view = memoryview(data).cast("B")
        try:
            self.file.write(view)
        except OSError as error:
            self.error = self.error or error
            raise
        self._hash.update(view)
        self.size_bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self.file.flush()

    @property
    def checksum(self) -> str:
        """The checksum of what was written."""
        return f"{_KIND}:{self._hash.hexdigest()}"


@dataclass(frozen=True)
class Written:
    """A file that is in its place."""

    size_bytes: int
    checksum: str


class Folder:
    """One folder and what lies below it; ``at`` names a file by its path within the folder, with ``/``.

    ``path``: of this machine, or a URI, or a path on ``filesystem`` (of pyarrow). Every operation raises OSError.
    """

    def __init__(self, path: str, filesystem: Any = None, *, patience_s: float = PATIENCE_S,
                 clock: Clock | None = None) -> None:  # fmt: skip
        self.path = path.rstrip("/") or "/"
        self.local = filesystem is None and "://" not in path
        self.given_filesystem = filesystem
        self._patience_s, self._clock = patience_s, clock or Clock()
        self._disk: _Disk | _Storage | None = None

    @property
    def _on(self) -> Any:  # a _Disk or a _Storage: they share what is asked of both
        if self._disk is None:  # looked up late: a URI's storage may be away, and its library takes time to load
            self._disk = _Disk(self.path) if self.local else _Storage(self.path, self.given_filesystem)
        return self._disk

    @property
    def filesystem(self) -> Any:
        """pyarrow's filesystem of a storage; None for a folder of this machine."""
        return None if self.local else self._steadily(lambda: self._on).filesystem

    @property
    def path_on_filesystem(self) -> str:
        """The folder's path as ``filesystem`` takes it."""
        return str(self._steadily(lambda: self._on).root)

    # -- reading -------------------------------------------------------------------------------------------------
    def folders(self) -> list[str]:
        """Return the names of the folders within this one, sorted; none where it does not exist."""
        return sorted(self._steadily(lambda: self._on.folders()))

    def files(self, name: str) -> list[str]:
        """Return the names of what is in one of these folders, sorted; none where it does not exist."""
        return sorted(self._steadily(lambda: self._on.files(name)))

    def read(self, at: str) -> bytes | None:
        """Return a small file's content; None where it is not there."""
        found: bytes | None = self._steadily(lambda: self._on.read(at))
        return found

    def size(self, at: str) -> int | None:
        """Return a file's size in bytes; None where it is not there."""
        size_bytes: int | None = self._steadily(lambda: self._on.size(at))
        return size_bytes

    def agrees(self, at: str, checksum: str) -> bool:
        """Read a file to its end: has it this checksum? No, where the checksum is of no kind that is known."""
        kind, _, digits = checksum.partition(":")

        def read() -> bool:
            hashed = _KINDS[kind]()
            with self._on.opened(at) as file:
                while chunk := file.read(_CHUNK):
                    hashed.update(chunk)
            return bool(hashed.hexdigest() == digits)

        return kind in _KINDS and self._steadily(read)

    @contextlib.contextmanager
    def fetched(self, name: str, files: Sequence[str] | None = None) -> Iterator[str]:
        """Give one folder within this one as a folder of this machine: itself, or a copy that goes at the end.

        ``files``: those that are needed; a copy has no others. None: all of them. OSError where one is not there.
        """
        if self.local:
            yield os.path.join(self.path, name)
            return
        with tempfile.TemporaryDirectory(prefix="raylit-") as copy:
            if files is None:
                self._steadily(lambda: self._on.copy_to(name, copy))
            for file in files or ():
                self._steadily(partial(self._copy, f"{name}/{file}", os.path.join(copy, file)))
            yield copy

    def _copy(self, at: str, to: str) -> None:
        with self._on.opened(at) as source, open(to, "wb") as target:
            shutil.copyfileobj(source, target, _CHUNK)

    # -- writing -------------------------------------------------------------------------------------------------
    def write(self, at: str, serialise: Callable[[Hashed], None]) -> Written:
        """Write a file of any size, once; ``serialise`` is given the file, and called again after a fault.

        On this machine it is written beside its place and renamed. For a storage it is written to a temporary file and
        then copied there.
        """
        if self.local:
            written: Written = self._steadily(lambda: self._on.write(at, serialise))
            return written
        with tempfile.TemporaryDirectory(prefix="raylit-") as folder:
            staged = os.path.join(folder, "staged")
            written = write_through(staged, serialise)
            self._steadily(lambda: self._on.upload(staged, at))
            return written

    def write_small(self, at: str, data: bytes) -> None:
        """Write a file that appears whole: nobody ever reads a part of it."""
        self._steadily(lambda: self._on.write_small(at, data))

    def delete_file(self, at: str) -> None:
        """Delete a file; nothing where it is not there."""
        self._steadily(lambda: self._on.delete_file(at))

    def delete_folder(self, name: str) -> None:
        """Delete a folder with all that is in it; nothing where it is not there."""
        self._steadily(lambda: self._on.delete_folder(name))

    def _steadily(self, operation: Callable[[], T]) -> T:
        """Do it, again and again with growing pauses while the storage is away."""
        pause_s, until = _FIRST_PAUSE_S, self._clock.now() + self._patience_s
        while True:
            try:
                return operation()
            except OSError as error:
                left_s = until - self._clock.now()
                if error.errno in _FINAL or left_s <= 0:
                    raise
            self._clock.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def folder_at(path: str) -> Folder:
    """The folder that a path or URI names; of a URI with credentials or options only the path on its storage is kept.

    Raises OSError where the URI names no storage.
    """
    if not has_more_than_a_path(path):
        return Folder(path)
    storage = _Storage(path, None)
    return Folder(storage.root, storage.filesystem)


class _Disk:
    """A folder of this machine: files are synchronised and renamed, so that a power cut leaves the old or the new."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(os.path.expanduser(root))

    def folders(self) -> list[str]:
        try:
            return [entry.name for entry in os.scandir(self.root) if entry.is_dir()]
        except FileNotFoundError:
            return []

    def files(self, name: str) -> list[str]:
        try:
            return os.listdir(self._of(name))
        except FileNotFoundError:
            return []

    def read(self, at: str) -> bytes | None:
        try:
            with self.opened(at) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, at: str) -> int | None:
        try:
            return os.stat(self._of(at)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def opened(self, at: str) -> BinaryIO:
        return open(self._of(at), "rb")

    def write(self, at: str, serialise: Callable[[Hashed], None]) -> Written:
        target = self._of(at)
        self._make(os.path.dirname(target))
        partial = f"{target}.partial"
        try:
            written = write_through(partial, serialise, passing=True)
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):  # the first fault is the one to tell
                os.unlink(partial)
            raise
        _sync_folder(os.path.dirname(target))
        return written

    def write_small(self, at: str, data: bytes) -> None:
        def serialise(file: Hashed) -> None:
            file.write(data)

        self.write(at, serialise)

    def delete_file(self, at: str) -> None:
        target = self._of(at)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
            _sync_folder(os.path.dirname(target))

    def delete_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._of(name))

    def _of(self, at: str) -> str:
        return os.path.join(self.root, *at.split("/"))

    def _make(self, folder: str) -> None:
        if not os.path.isdir(folder):
            os.makedirs(folder, exist_ok=True)
            _sync_folder(os.path.dirname(folder))


class _Storage:
    """A folder on one of pyarrow's filesystems. Files appear whole on an object store, and grow on others."""

    def __init__(self, root: str, filesystem: Any) -> None:
        import pyarrow.fs

        self._fs = pyarrow.fs
        try:
            known = (filesystem, root) if filesystem is not None else pyarrow.fs.FileSystem.from_uri(root)
        except ValueError as error:  # pyarrow's own, for a scheme that it does not know
            raise OSError(errno.EINVAL, f"{redacted(repr(root))}: {redacted(str(error).splitlines()[0])}") from None
        self.filesystem, self.root = known[0], str(known[1])

    def folders(self) -> list[str]:
        found = self.filesystem.get_file_info(self._fs.FileSelector(self.root, allow_not_found=True))
        return [each.base_name for each in found if each.type is self._fs.FileType.Directory]

    def files(self, name: str) -> list[str]:
        found = self.filesystem.get_file_info(self._fs.FileSelector(self._of(name), allow_not_found=True))
        return [each.base_name for each in found]

    def read(self, at: str) -> bytes | None:
        if self.size(at) is None:
            return None
        with self.opened(at) as stream:
            return bytes(stream.read())

    def size(self, at: str) -> int | None:
        found = self.filesystem.get_file_info(self._of(at))
        return int(found.size or 0) if found.type is self._fs.FileType.File else None

    def opened(self, at: str) -> Any:
        return self.filesystem.open_input_stream(self._of(at))

    def upload(self, local: str, at: str) -> None:
        self._make(at)
        with open(local, "rb") as file, self.filesystem.open_output_stream(self._of(at)) as stream:
            while chunk := file.read(_CHUNK):
                stream.write(chunk)

    def write_small(self, at: str, data: bytes) -> None:
        self._make(at)
        partial = f"{self._of(at)}.partial"
        with self.filesystem.open_output_stream(partial) as stream:
            stream.write(data)
        self.filesystem.move(partial, self._of(at))

    def copy_to(self, name: str, folder: str) -> None:
        self._fs.copy_files(self._of(name), folder, source_filesystem=self.filesystem,
                            destination_filesystem=self._fs.LocalFileSystem())  # fmt: skip

    def delete_file(self, at: str) -> None:
        if self.size(at) is not None:
            self.filesystem.delete_file(self._of(at))

    def delete_folder(self, name: str) -> None:
        if self.filesystem.get_file_info(self._of(name)).type is self._fs.FileType.Directory:
            self.filesystem.delete_dir(self._of(name))

    def _of(self, at: str) -> str:
        return f"{self.root}/{at}"

    def _make(self, at: str) -> None:
        self.filesystem.create_dir(self._of(at).rpartition("/")[0], recursive=True)


def write_through(path: str, serialise: Callable[[Hashed], None], *, passing: bool = False) -> Written:
    """Write a file of this machine to the disk itself, hashing on the way; ``passing``: see ``_Passing``."""
    with open(path, "wb") as raw:
        file = Hashed(_Passing(raw) if passing else raw)
        try:
            serialise(file)
        except Exception as error:
            if file.error is not None and error is not file.error:  # torch words it as a fault of its own
                raise file.error from error
            raise
        file.flush()
        os.fsync(raw.fileno())
    return Written(file.size_bytes, file.checksum)


class _Passing:
    """A file that the system does not keep in memory: it goes to the disk piece by piece, and each piece is let go.

    A large file pushes out of the system's memory what was read there, a data set of the training's for one. And where
    the memory is new to a virtual machine, since its host takes free memory back, writing a file to it takes five to
    ten times the CPU; here a file needs no more of it than a piece.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._start, self._end = raw, 0, 0  # bytes: of the piece that was not let go yet

    def write(self, view: memoryview) -> int:
        done = 0
        while done < view.nbytes:
            piece = view[done : done + self._start + _WINDOW - self._end]
            self._raw.write(piece)
            done, self._end = done + piece.nbytes, self._end + piece.nbytes
            if self._end - self._start == _WINDOW:
                self.flush()
        return view.nbytes

    def flush(self) -> None:
        """What was written is on the disk."""
        self._raw.flush()
        if hasattr(os, "posix_fadvise"):  # Linux
            os.fdatasync(self._raw.fileno())
            page = self._start - self._start % 4096  # the one that the piece before ended in
            os.posix_fadvise(self._raw.fileno(), page, self._end - page, os.POSIX_FADV_DONTNEED)
        self._start = self._end


def _sync_folder(folder: str) -> None:
    """Make a rename or a deletion last; filesystems that cannot do that for folders say so, and are let be."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
