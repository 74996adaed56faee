"""A Ray ``Checkpoint`` as ``ckpt_path``: it has ``__fspath__``, which raises, so it must not be taken for a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylit.driver.going_on import check_given
from raylit.errors import CheckpointError


class RaysCheckpoint:
    """Its ways to get at the files, and its trap."""

    def __init__(self, path: str) -> None:
        self.path = path

    def as_directory(self) -> None: ...

    def __fspath__(self) -> str:
        raise TypeError("You cannot use `Checkpoint` objects directly as paths.")


def test_it_is_no_path(tmp_path: Path) -> None:
    check_given(RaysCheckpoint("bucket/run/checkpoint"))  # on a storage: looked at when it is read
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "manifest.json").write_text("no json")
    with pytest.raises(CheckpointError, match="manifest.json cannot be read"):
        check_given(RaysCheckpoint(str(tmp_path / "good")))
