"""The second copy of what Tune keeps of a search: when it is written, and what it mends."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest

from raylit.checkpoint.folder import Folder
from raylit.errors import ConfigError
from raylit.search.state_copy import FILE, StateCopy

EXPERIMENT, SEARCHER = "experiment_state-2026-01-01.json", "search_gen_state-2026-01-01.json"


def tunes(folder: Path, value: int) -> list[Any]:
    """Tune's files as they are on the driver's machine, and a trial that knows where."""
    folder.mkdir(exist_ok=True)
    (folder / EXPERIMENT).write_text(json.dumps({"trials": value}))
    (folder / SEARCHER).write_bytes(pickle.dumps({"drawn": value}))
    (folder / "search.json").write_text("{}")  # not Tune's
    return [SimpleNamespace(local_experiment_path=str(folder))]


def stored(folder: Path, value: int) -> None:
    """The same files in the search's folder."""
    tunes(folder, value)
    (folder / "tuner.pkl").write_bytes(pickle.dumps("tuner"))
    (folder / "00000").mkdir(exist_ok=True)


@pytest.mark.parametrize("torn", [EXPERIMENT, SEARCHER])
@pytest.mark.parametrize("left", [0, 5])
def test_a_torn_file_has_the_copy_in_its_place_and_all_others_with_it(tmp_path: Path, torn: str, left: int) -> None:
    folder = Folder(str(tmp_path / "search"))
    StateCopy(folder).on_step_end(1, tunes(tmp_path / "here", 1))
    stored(tmp_path / "search", 2)
    (tmp_path / "search" / torn).write_bytes((tmp_path / "search" / torn).read_bytes()[:left])
    assert StateCopy(folder).mend() == [torn]
    assert json.loads((tmp_path / "search" / EXPERIMENT).read_text()) == {"trials": 1}
    assert pickle.loads((tmp_path / "search" / SEARCHER).read_bytes()) == {"drawn": 1}
    assert StateCopy(folder).mend() == []


def test_whole_files_stay_as_they_are(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "search"))
    StateCopy(folder).on_step_end(1, tunes(tmp_path / "here", 1))
    stored(tmp_path / "search", 2)
    assert StateCopy(folder).mend() == []
    assert json.loads((tmp_path / "search" / EXPERIMENT).read_text()) == {"trials": 2}


def test_without_a_copy_it_says_what_is_lost(tmp_path: Path) -> None:
    stored(tmp_path / "search", 2)
    (tmp_path / "search" / EXPERIMENT).write_text('{"tri')
    with pytest.raises(ConfigError, match=rf"cannot be taken up: {EXPERIMENT} was cut off .* checkpoints are whole"):
        StateCopy(Folder(str(tmp_path / "search"))).mend()


def test_it_is_written_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    filesystem = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    copy, trials = StateCopy(Folder("search", filesystem), every_s=1e9), tunes(tmp_path / "here", 1)
    written = tmp_path / "search" / FILE
    copy.on_step_end(1, [])  # no trial yet
    copy.on_step_end(1, [SimpleNamespace(local_experiment_path=str(tmp_path / "nowhere"))])  # Tune wrote nothing yet
    assert not written.exists()
    copy.on_step_end(2, trials)
    first = written.read_bytes()
    tunes(tmp_path / "here", 2)
    copy.on_step_end(3, trials)
    assert written.read_bytes() == first
    copy.on_experiment_end(trials)
    assert written.read_bytes() != first
    often = StateCopy(Folder("search", filesystem), every_s=-1.0)
    often.on_step_end(1, trials)
    tunes(tmp_path / "here", 3)
    often.on_step_end(2, trials)
    stored(tmp_path / "search", 4)
    (tmp_path / "search" / SEARCHER).write_bytes(b"")
    assert often.mend() == [SEARCHER]
    assert json.loads((tmp_path / "search" / EXPERIMENT).read_text()) == {"trials": 3}


def test_a_storage_that_takes_none_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    copy, trials = StateCopy(Folder(str(tmp_path / "file")), every_s=-1.0), tunes(tmp_path / "here", 1)
    with pytest.warns(UserWarning, match="no second copy of the search's state"):
        copy.on_step_end(1, trials)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.on_step_end(2, trials)
