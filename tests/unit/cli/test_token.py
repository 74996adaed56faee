"""``raylit token``: a file that its owner alone may read, from the moment it exists; its content is never shown."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from raylit.cli import main
from raylit.cli import token as command
from raylit.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_first_one_and_what_is_printed(home: Path, umask: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.umask(umask)
    try:
        assert main(["token", "lab"]) == 0
    finally:
        os.umask(before)
    path = home / ".ray" / "tokens" / "lab"
    token = path.read_text()
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    out = capsys.readouterr()
    assert str(path) in out.out and f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={path}" in out.out
    assert token not in out.out + out.err


def test_it_is_kept_and_rotated(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / ".ray" / "tokens" / "lab"
    assert main(["token", "lab"]) == 0
    first = path.read_text()
    assert main(["token", "lab"]) == 0
    assert path.read_text() == first and f"there already, kept as it is: {path}" in capsys.readouterr().out
    assert main(["token", "lab", "--rotate"]) == 0
    second = path.read_text()
    assert re.fullmatch("[0-9a-f]{64}", second) and second != first
    assert mode(path) == 0o600
    assert os.listdir(path.parent) == ["lab"]  # nothing half done is left beside it
    assert "ray up" in capsys.readouterr().out
    assert main(["token", "other", "--rotate"]) == 0  # there was none
    assert path.with_name("other").read_text() != second


def test_it_is_never_open_to_others(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a moment: what ``open`` is asked for is 0600, and a file that is there is not written to."""
    asked: list[tuple[int, int]] = []
    opened = os.open

    def spy(path, flags, mode=0o777, **more):
        if ".ray/tokens" in str(path):
            asked.append((flags, mode))
        return opened(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", spy)
    assert main(["token", "lab"]) == main(["token", "lab", "--rotate"]) == 0
    assert len(asked) == 2
    assert all(mode == 0o600 and flags & os.O_EXCL and flags & os.O_CREAT for flags, mode in asked)


def test_a_clusters_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = home / "x.yaml"
    file.write_text("cluster_name: lab-2\nprovider: {type: local}\n")
    assert main(["token", str(file)]) == 0
    assert (home / ".ray" / "tokens" / "lab-2").exists()
    assert main(["token", str(file), "--rotate"]) == 0
    assert f"ray up {file}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("provider: {}\n", "no cluster_name"),
        ("cluster_name: 3\n", "no cluster_name"),
        ("apiVersion: ray.io/v1\nkind: RayJob\n", "is for kubectl and has no cluster_name"),
        ("kind: Namespace\napiVersion: v1\n---\nkind: Secret\n", "raylit token raylit-k8s"),
        ("- a\n", "no cluster's file"),
        ("a: [\n", "no YAML"),
        ("cluster_name: a/b\n", "no name"),
        (None, "there is no file"),
    ],
)
def test_a_bad_clusters_file(home: Path, text: str | None, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = home / "x.yml"
    if text is not None:
        file.write_text(text)
    assert main(["token", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("raylit token: ") and says in line
    assert not (home / ".ray" / "tokens").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "/etc/x", ".hidden", "a b", "a\nb", "a\0b", "n" * 200])
def test_names_that_are_none_for_a_file(home: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no name for a token's file" in line
    assert not (home / ".ray").exists()


def test_files_that_are_no_safe_place(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / ".ray" / "tokens" / "lab"
    assert main(["token", "lab"]) == 0
    token = path.read_text()
    path.chmod(0o640)
    for more in ([], ["--rotate"]):
        assert main(["token", "lab", *more]) == 2
        assert f"chmod 600 {path}" in capsys.readouterr().err
    path.chmod(0o600)
    path.parent.chmod(0o750)
    assert main(["token", "lab"]) == 2
    assert f"chmod 700 {path.parent}" in capsys.readouterr().err
    path.parent.chmod(0o700)
    path.rename(home / "elsewhere")
    path.symlink_to(home / "elsewhere")
    for more in ([], ["--rotate"]):
        assert main(["token", "lab", *more]) == 2
        assert "is a link" in capsys.readouterr().err
    path.unlink()
    path.symlink_to(home / "nowhere")  # must not be made through the link
    assert main(["token", "lab"]) == 2
    assert not (home / "nowhere").exists()
    path.unlink()
    path.mkdir()
    assert main(["token", "lab"]) == 2
    assert "no plain file" in capsys.readouterr().err
    assert (home / "elsewhere").read_text() == token


def test_the_folder_is_no_link(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / ".ray").mkdir()
    (home / "shared").mkdir()
    (home / ".ray" / "tokens").symlink_to(home / "shared")
    assert main(["token", "lab"]) == 2
    assert "no folder of its own" in capsys.readouterr().err
    assert not list((home / "shared").iterdir())


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", "märz".encode()])
def test_a_file_that_holds_no_token(home: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "lab"]) == 0
    path = home / ".ray" / "tokens" / "lab"
    path.write_bytes(content)
    assert main(["token", "lab"]) == 2
    assert "--rotate" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds no token"):
        command.read(path)
    assert main(["token", "lab", "--rotate"]) == 0
    assert re.fullmatch("[0-9a-f]{64}", command.read(path))
