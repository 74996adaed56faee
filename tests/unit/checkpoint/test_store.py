"""Checkpoints as whole folders: found, verified, damaged, deleted; on disk and on a storage that fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from raylit.checkpoint import folder as folders
from raylit.checkpoint import read
from raylit.checkpoint.folder import Folder, Hashed
from raylit.checkpoint.ranks import read_ranks
from raylit.checkpoint.store import MANIFEST, Manifest, Store, check_whole
from raylit.errors import CheckpointError
from tests.unit.checkpoint.faulty import (
    Away,
    Dies,
    Killed,
    Memory,
    disk_full,
    manifest,
    no_permission,
)

needs_linux = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no posix_fadvise")


def common(step: int) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((300,), float(step))}, "global_step": step}


def save(store: Store, name: str, step: int, obsolete: tuple[str, ...] = (), **facts: Any) -> None:
    """What a writer does, for one rank."""
    files = {
        "model.ckpt": store.write_part(name, "model.ckpt", common(step)),
        "rank_00000.ckpt": store.write_part(name, "rank_00000.ckpt", {"rank": 0, "step": step}),
    }
    store.publish(replace(manifest(name, step, **facts), files=files))
    for each in obsolete:
        store.delete(each)


@pytest.fixture(params=["disk", "storage"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(Folder(str(tmp_path / "checkpoints"))) if request.param == "disk" else Memory().store()


def step_of(store: Store, found: Manifest) -> int:
    """Load it; the manifest and every file must be of one save."""
    with store.folder.fetched(found.name) as folder:
        loaded = read(folder)
        own = read_ranks(folder, loaded)
    assert own[0]["step"] == loaded["global_step"] == found.step
    assert torch.equal(loaded["state_dict"]["w"], torch.full((300,), float(found.step)))
    return found.step


def test_an_empty_store_has_nothing(store: Store) -> None:
    assert store.survey() == [] and store.newest() is None and store.best() is None
    store.delete("never there")


def test_whole_checkpoints_are_found_with_all_they_say(store: Store) -> None:
    save(store, "b", 2, metrics={"loss": 0.5, "odd": float("inf")}, monitor="loss")
    save(store, "a", 10, metrics={"loss": 0.7}, monitor="loss")
    assert [each.name for each in store.manifests()] == ["b", "a"]  # by step, not by name
    newest, best = store.newest(), store.best("loss")
    assert newest is not None and step_of(store, newest) == 10
    assert best is not None and step_of(store, best) == 2 and best.metrics == {"loss": 0.5, "odd": float("inf")}
    assert best.size_bytes > 1200 and set(best.files) == {"model.ckpt", "rank_00000.ckpt"}
    assert store.best("other") is None
    store.delete("a")
    assert [each.name for each in store.survey()] == ["b"]


def test_best_by_mode_and_what_is_no_number_is_the_worst(store: Store) -> None:
    for step, value in ((1, 0.5), (2, float("nan")), (3, 0.9), (4, 0.1)):
        save(store, f"c{step}", step, metrics={"acc": value}, monitor="acc", mode="max")
    best = store.best()
    assert best is not None and best.name == "c3"
    for name in ("c1", "c3", "c4"):
        store.delete(name)
    best = store.best()
    assert best is not None and best.name == "c2"


def damage(path: Path, how: str) -> str:
    file = path / "rank_00000.ckpt"
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(data[:-7])
    elif how == "longer":
        file.write_bytes(data + b"x")
    else:
        file.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    return {"longer": "rank_00000.ckpt is altered", "altered": "rank_00000.ckpt is altered: its checksum"}.get(
        how, f"rank_00000.ckpt is {how}"
    )


@pytest.mark.parametrize("how", ["missing", "truncated", "longer", "altered"])
def test_damage_is_named_and_the_one_before_is_used(tmp_path: Path, how: str) -> None:
    store = Store(Folder(str(tmp_path)))
    for step in (1, 2, 3):
        save(store, f"s{step}", step)
    words = damage(tmp_path / "s3", how)
    passed_over: list[Any] = []
    newest = store.newest(damaged=passed_over)
    assert newest is not None and step_of(store, newest) == 2
    assert [each.name for each in passed_over] == ["s3"] and passed_over[0].faults[0].startswith(words)
    with pytest.raises(CheckpointError, match=rf"s3 is damaged: {words}.*The one before it is .*s2"):
        check_whole(store.folder, "s3")
    check_whole(store.folder, "s2")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": 1}', b'{"schema": 99, "name": "x"}'])
def test_a_broken_manifest_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    store = Store(Folder(str(tmp_path)))
    save(store, "good", 1)
    save(store, "bad", 2)
    (tmp_path / "bad" / MANIFEST).write_bytes(content)
    newest = store.newest()
    assert newest is not None and newest.name == "good"
    bad = next(each for each in store.survey() if each.name == "bad")
    assert bad.manifest is None and MANIFEST in bad.faults[0]


def test_a_folder_without_manifest_was_never_finished(tmp_path: Path) -> None:
    store = Store(Folder(str(tmp_path)))
    store.write_part("half", "model.ckpt", common(5))
    assert store.newest() is None
    assert store.survey()[0].faults == ("manifest.json is missing: the checkpoint was never finished",)


def test_only_what_was_never_finished_is_swept_up(store: Store) -> None:
    for name in ("whole", "newer", "half", "somebodys"):
        save(store, name, 1)
    store.folder.write_small(f"newer/{MANIFEST}", b'{"schema": 99}')
    store.folder.delete_file(f"half/{MANIFEST}")
    store.folder.write_small("half/rank_00001.ckpt.ab12.json", b"{}")
    store.folder.write_small("half/model.ckpt.partial", b"")
    store.folder.delete_file(f"somebodys/{MANIFEST}")
    store.folder.write_small("somebodys/notes.txt", b"mine")
    assert [name for name in ("whole", "newer", "half", "somebodys") if store.sweep(name)] == ["half"]
    assert store.folder.folders() == ["newer", "somebodys", "whole"]


def test_nothing_is_left_beside_the_files_and_no_part_is_ever_visible(tmp_path: Path) -> None:
    store = Store(Folder(str(tmp_path)))
    seen: list[list[str]] = []

    def serialise(out: Hashed) -> None:
        out.write(b"abc")
        seen.append(sorted(os.listdir(tmp_path / "c")))
        out.write(b"def")

    written = store.folder.write("c/file", serialise)
    assert seen == [["file.partial"]] and os.listdir(tmp_path / "c") == ["file"]
    assert (written.size_bytes, written.checksum) == (6, f"xxh3_128:{xxhash.xxh3_128(b'abcdef').hexdigest()}")
    assert store.folder.agrees("c/file", written.checksum)


def test_checksums_of_old_manifests_are_checked_and_unknown_ones_hold_for_nothing(tmp_path: Path) -> None:
    store = Store(Folder(str(tmp_path)))
    save(store, "c", 1)
    content, text = (tmp_path / "c/model.ckpt").read_bytes(), (tmp_path / "c" / MANIFEST).read_text()
    plain = json.loads(text)
    assert plain["files"]["model.ckpt"] == {
        "size_bytes": len(content), "checksum": f"xxh3_128:{xxhash.xxh3_128(content).hexdigest()}"}  # fmt: skip
    old = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    plain |= {"schema": 1, "files": {"model.ckpt": old}}
    (tmp_path / "c" / MANIFEST).write_text(json.dumps(plain))
    assert store.newest() is not None
    (tmp_path / "c/model.ckpt").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (manifest,) = store.manifests()
    assert store.faults(manifest) == ("model.ckpt is altered: its checksum is another",)
    (tmp_path / "c/model.ckpt").write_bytes(content)
    (tmp_path / "c" / MANIFEST).write_text(text.replace("xxh3_128:", "crc0:"))
    assert store.newest() is None


def test_a_fault_of_torchs_writer_is_told_as_the_disks(tmp_path: Path) -> None:
    store = Store(Folder(str(tmp_path), patience_s=0.0))

    class Full:
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    def serialise(out: Hashed) -> None:
        out.file = Full()  # type: ignore[assignment]
        torch.save({"w": torch.zeros(10)}, out)

    with pytest.raises(OSError, match="No space left on device"):
        store.folder.write("c/model.ckpt", serialise)
    assert os.listdir(tmp_path / "c") == []


# -- a storage that fails --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("fault", "error", "words"), [
    (disk_full, OSError, "No space left"), (no_permission, PermissionError, "Permission denied"),
])  # fmt: skip
def test_what_waiting_does_not_cure_is_told_at_once(fault: Any, error: Any, words: str) -> None:
    memory = Memory()
    save(memory.store(), "old", 1)
    with pytest.raises(error, match=words):
        save(memory.store(fault), "new", 2, obsolete=("old",))
    assert memory.time.slept == []
    newest = memory.store().newest()
    assert newest is not None and step_of(memory.store(), newest) == 1


def test_a_storage_that_is_away_for_a_while_is_waited_for() -> None:
    memory = Memory()
    save(memory.store(Away(memory.time, back_at=20.0)), "one", 1)
    assert memory.time.slept == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0]
    newest = memory.store().newest()
    assert newest is not None and step_of(memory.store(), newest) == 1


def test_a_storage_that_stays_away_is_given_up_after_half_a_minute() -> None:
    memory = Memory()
    with pytest.raises(OSError, match="timed out"):
        memory.store(Away(memory.time, back_at=1e9)).manifests()
    assert memory.time.now_s == 30.0


def in_all(scene: Callable[[Store], None]) -> int:
    """How many operations a scene has."""
    counter, memory = Dies(10**9), Memory()
    save(memory.store(), "old", 1)
    scene(memory.store(counter))
    return counter.count


def replacing(store: Store) -> None:
    save(store, "new", 2, obsolete=("old",))


@settings(max_examples=60, deadline=None)
@given(at=st.integers(1, in_all(replacing)))
def test_killed_anywhere_the_newest_is_the_old_one_or_the_new_one(at: int) -> None:
    memory = Memory()
    save(memory.store(), "old", 1)
    with pytest.raises(Killed):
        replacing(memory.store(Dies(at)))
    after = memory.store()
    newest = after.newest()
    assert newest is not None and step_of(after, newest) in (1, 2)
    there = after.manifests()
    assert [each.name for each in there] in (["old"], ["old", "new"], ["new"])  # never neither
    assert all(after.faults(each) == () for each in there)  # what is half-deleted is not there any more


def test_killed_at_every_operation_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the system's own calls."""
    calls = ("replace", "unlink", "fsync", "fdatasync", "rmdir", "makedirs")
    monkeypatch.setattr(folders, "_WINDOW", 1000)  # files of several pieces
    real = {name: getattr(os, name) for name in calls}
    for at in range(1, 100):
        folder = tmp_path / str(at)
        store = Store(Folder(str(folder)))
        save(store, "old", 1)
        dies = Dies(at)

        def dying(name: str, dies: Dies = dies) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                dies(name)
                return real[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, dying(name))
            try:
                replacing(store)
            except Killed:
                done = False
            else:
                done = True
        newest = store.newest()
        assert newest is not None and step_of(store, newest) in (1, 2)
        assert all(store.faults(each) == () for each in store.manifests())
        if done:
            break
    assert done and at > 8


# -- a file on its way to the disk -----------------------------------------------------------------------------------
PAGE = 4096


@needs_linux
@given(sizes=st.lists(st.integers(0, 5 * PAGE), max_size=8))
def test_of_a_file_no_more_than_a_piece_is_kept_in_memory(sizes: list[int]) -> None:
    """All of it reaches the disk before it is let go, and all of it is let go."""
    pieces = [os.urandom(size) for size in sizes]
    synced, kept = 0, set()

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        raw_sync, window = os.fdatasync, 2 * PAGE + 100
        patch.setattr(folders, "_WINDOW", window)

        def sync(handle: int) -> None:
            nonlocal synced
            raw_sync(handle)
            before, synced = synced, os.fstat(handle).st_size
            kept.update(range(before // PAGE, -(-synced // PAGE)))
            assert len(kept) <= 2 + window // PAGE

        def let_go(handle: int, start: int, length: int, advice: int) -> None:
            assert advice == os.POSIX_FADV_DONTNEED and start % PAGE == 0 and start + length == synced
            kept.difference_update(range(start // PAGE, synced // PAGE))  # the last one stays where it is not full

        patch.setattr(os, "fdatasync", sync)
        patch.setattr(os, "posix_fadvise", let_go)

        def serialise(file: Hashed) -> None:
            for piece in pieces:
                assert file.write(piece) == len(piece)

        written = Folder(folder).write("file", serialise)
        data = Path(folder, "file").read_bytes()
        assert data == b"".join(pieces) and written.size_bytes == len(data) == synced
        assert written.checksum == f"xxh3_128:{xxhash.xxh3_128(data).hexdigest()}"
        assert len(kept) <= 1


@needs_linux
def test_a_disk_that_is_full_when_a_piece_reaches_it_costs_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders, "_WINDOW", 1000)
    monkeypatch.setattr(os, "fdatasync", full)
    store = Store(Folder(str(tmp_path / "checkpoints")))
    with pytest.raises(OSError, match="No space left"):
        save(store, "one", 1)
    assert store.folder.files("one") == [] and store.manifests() == []


# -- strangers' files ------------------------------------------------------------------------------------------------
class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("file", ["model.ckpt", "rank_00000.ckpt"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path: Path, file: str) -> None:
    trap = tmp_path / "executed"
    folder = tmp_path / "c"
    folder.mkdir()
    torch.save(common(1), folder / "model.ckpt")
    torch.save({"rank": 0, "state_dict": {}, "x": Evil(str(trap))}, folder / file)
    with pytest.raises(CheckpointError):
        read_ranks(folder, read(folder))
    (folder / file).write_bytes(pickle.dumps({"rank": 0, "state_dict": {}, "x": Evil(str(trap))}))
    with pytest.raises(CheckpointError):
        read_ranks(folder, read(folder))
    assert not trap.exists()
