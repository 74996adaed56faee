"""The run folder: claimed when it is free, never overwritten, taken away again when nothing came of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylit.config.placement import PlacementConfig
from raylit.driver import folder
from raylit.errors import ConfigError, RunExistsError


def placement(storage: object, name: str | None = None) -> PlacementConfig:
    return PlacementConfig(num_workers=0, storage_path=str(storage), name=name)


def test_a_claimed_folder_is_there_and_empty(tmp_path: Path) -> None:
    path = Path(folder.claim(placement(tmp_path / "deep" / "er", "one"), "Net"))
    assert path == tmp_path / "deep" / "er" / "one" and list(path.iterdir()) == []


def test_each_run_without_a_name_gets_its_own(tmp_path: Path) -> None:
    names = {Path(folder.claim(placement(tmp_path), "Net")).name for _ in range(5)}
    assert len(names) == 5 and all(name.startswith("Net-20") for name in names)


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folder.claim(placement("runs", "a"), "Net") == str(tmp_path / "runs" / "a")
    assert folder.claim(placement("~/runs", "a"), "Net") == str(tmp_path / "home" / "runs" / "a")


def test_the_storage_of_a_cluster_is_taken_where_none_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLIT_STORAGE", str(tmp_path / "shared"))
    assert folder.claim(PlacementConfig(num_workers=0, name="a"), "Net") == str(tmp_path / "shared" / "a")
    assert folder.claim(placement(tmp_path / "mine", "a"), "Net") == str(tmp_path / "mine" / "a")
    monkeypatch.setenv("RAYLIT_STORAGE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folder.claim(PlacementConfig(num_workers=0, name="a"), "Net") == str(tmp_path / "home" / "ray_results" / "a")


def test_a_uri_of_files(tmp_path: Path) -> None:
    claimed = folder.claim(placement(f"file://{tmp_path}", "a"), "Net")
    assert claimed.removeprefix("file://") == f"{tmp_path}/a" and list((tmp_path / "a").iterdir()) == []
    (tmp_path / "a" / "something").write_text("")
    for storage in (f"file://{tmp_path}", str(tmp_path)):
        with pytest.raises(RunExistsError, match="a run named 'a' exists"):
            folder.claim(placement(storage, "a"), "Net")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be written"):
        folder.claim(placement(tmp_path, "a"), "Net")
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize("left", [False, True])
def test_a_failed_run_leaves_its_folder_only_with_something_in_it(tmp_path: Path, left: bool) -> None:
    path = Path(folder.claim(placement(tmp_path, "one"), "Net"))

    def fail() -> None:
        with folder.kept_if_used(str(path)):
            if left:
                (path / "log").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.exists() == left


def test_a_run_that_ends_well_keeps_its_folder(tmp_path: Path) -> None:
    path = Path(folder.claim(placement(tmp_path, "one"), "Net"))
    with folder.kept_if_used(str(path)), folder.kept_if_used(None):
        pass
    assert path.exists()
