"""A worker in its caller's place: which of the caller's folders it takes, and where it takes Ray's copy instead."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from raylit.wire import Job
from raylit.worker import entry


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with Ray's copy of the project ``/caller/own`` (which is not here), and a process that began in it."""
    copy = tmp_path / "_ray_pkg_1234"
    for name in ("main.py", "train/neighbour.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(f"# {name}\n")
    monkeypatch.setenv("PYTHONPATH", f"{copy}:/somewhere")
    monkeypatch.setenv(entry.PROJECT, "/caller/own:/link/own")
    monkeypatch.setattr(sys, "path", ["/before"])
    monkeypatch.chdir(copy)
    entry._holds_all_of.cache_clear()
    return copy


def take(*paths: str | Path, cwd: str | Path | None = None) -> None:
    entry.take_callers_place(Job("fit", b"", sys_path=tuple(map(str, paths)), working_dir=cwd and str(cwd)))


def test_what_was_shipped_is_taken_from_the_copy(host: Path) -> None:
    take(
        "/caller/own/train", "/caller/own", "/link/own/train", "/caller/own/none", "/elsewhere", cwd="/caller/own/train"
    )
    assert sys.path == [str(host / "train"), str(host), "/before"]
    assert os.getcwd() == str(host / "train")


def test_a_name_that_only_begins_alike(host: Path) -> None:
    take("/caller/own-other/train")
    assert sys.path == ["/before"]


def test_an_old_copy_of_the_project_is_not_imported_from(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    own = tmp_path / "own"
    (own / "train").mkdir(parents=True)
    (own / "main.py").write_text("# main.py\n")
    (own / "train" / "neighbour.py").write_text("# older\n")
    monkeypatch.setenv(entry.PROJECT, str(own))
    take(own / "train", cwd=own)
    assert sys.path == [str(host / "train"), "/before"]
    # Where it is the same code, the caller's own folder is taken: there is more in it, and errors name its files.
    (own / "train" / "neighbour.py").write_text("# train/neighbour.py\n")
    (own / "train" / "made.py").write_text("")
    entry._holds_all_of.cache_clear()
    take(own / "train", cwd=own)
    assert sys.path[0] == str(own / "train")
    assert os.getcwd() == str(own)


def test_a_jobs_folder_on_another_host(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(entry.PROJECT)
    take(
        "/other/ray/working_dir_files/_ray_pkg_1234/train",
        "/other/_ray_pkg_99",
        "/usr",
        cwd="/other/_ray_pkg_1234/train",
    )
    assert sys.path == [str(host / "train"), "/usr", "/before"]
    assert os.getcwd() == str(host / "train")


def test_without_anything_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "path", ["/before"])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir("/")
    take(tmp_path / "here", tmp_path / "there", cwd=tmp_path / "here")
    assert sys.path == [str(tmp_path / "here"), "/before"]
    assert os.getcwd() == str(tmp_path / "here")
