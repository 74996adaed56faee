"""A project as it travels: which files, how large, what is said of one too large, and one file of them all."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from raylit.driver import project
from raylit.driver.project import import_folders, look_at, only, packed, root_of, size_text
from raylit.errors import ConfigError


def write(root: Path, files: dict[str, str | int]) -> Path:
    """Files by name, with a text or a size."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            with open(path, "wb") as stream:
                stream.truncate(content)
        else:
            path.write_text(textwrap.dedent(content))
    return root


def names(found: project.Project) -> list[str]:
    return [name for name, _ in found.files]


def test_what_travels(tmp_path: Path) -> None:
    write(tmp_path, {
        ".gitignore": "*.pt\ndata/\n", "main.py": "1", "data/x": 5, "w.pt": 5, "lib/a.py": "1",
        "lib/.gitignore": "!w.pt\nnotes",
        "lib/w.pt": 7, "lib/notes": "1", ".git/config": "1", "lib/__pycache__/a.pyc": "1", "env/pyvenv.cfg": "",
        "env/lib/x.py": "1",
        ".venv/x.py": "1", "sub/.rayignore": "private\n!kept.pt\n", "sub/private/x": "1", "sub/kept.pt": 3,
    })  # fmt: skip
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to("nowhere")
    assert names(look_at(tmp_path)) == [
        ".gitignore", "lib/.gitignore", "lib/a.py", "lib/w.pt", "main.py", "sub/.rayignore", "sub/kept.pt",
    ]  # fmt: skip
    assert dict(look_at(tmp_path).files)["lib/w.pt"] == 7
    assert names(look_at(tmp_path, ["/lib", "*.py"])) == [".gitignore", "sub/.rayignore", "sub/kept.pt"]
    assert "lib/a.py" in names(look_at(tmp_path, ["*.py", "!a.py"]))


def test_rules_of_the_folders_above(tmp_path: Path) -> None:
    repository = write(tmp_path / "repo", {
        ".gitignore": "*.pt\n/sub/proj/data\n", "sub/.gitignore": "logs\n", "sub/proj/w.pt": 1, "sub/proj/data/x": 1,
        "sub/proj/logs": 1, "sub/proj/main.py": 1, "sub/proj/secret": 1,
    })  # fmt: skip
    assert len(look_at(repository / "sub" / "proj").files) == 5  # no repository: what lies above is another matter
    write(repository, {".git/info/exclude": "secret\n"})
    assert names(look_at(repository / "sub" / "proj")) == ["main.py"]
    # A folder that the repository ignores was asked for by name: then its rules are no help.
    write(repository, {".gitignore": "*.pt\nproj\n"})
    assert len(look_at(repository / "sub" / "proj").files) == 5


def test_links(tmp_path: Path) -> None:
    shared = write(tmp_path / "shared", {"s.py": "1"})
    own = write(tmp_path / "own", {"main.py": "1", "a/x.py": "1"})
    (own / "shared").symlink_to(shared)
    (own / "one.py").symlink_to(shared / "s.py")
    (own / "a" / "loop").symlink_to(own)
    (own / "a" / "b").symlink_to(own / "a")
    assert names(look_at(own)) == ["a/x.py", "main.py", "one.py", "shared/s.py"]


def test_the_package(tmp_path: Path) -> None:
    own = write(tmp_path / "own", {"main.py": "print(1)\n", "ü/a b.py": "", "run.sh": "#!/bin/sh\n"})
    (own / "run.sh").chmod(0o755)
    with packed(look_at(own)) as first:
        data = Path(first).read_bytes()
        with zipfile.ZipFile(first) as package:
            assert package.namelist() == ["main.py", "run.sh", "ü/a b.py"]
            assert package.read("main.py") == b"print(1)\n"
            modes = {entry.filename: entry.external_attr >> 16 & 0o777 for entry in package.infolist()}
        assert modes == {"main.py": 0o644, "run.sh": 0o755, "ü/a b.py": 0o644}
    assert not Path(first).exists()
    os.utime(own / "main.py", (10**9, 10**9))
    with packed(look_at(own)) as second:
        assert Path(second).read_bytes() == data  # Ray names it by its content: it is not sent again
    (own / "main.py").write_text("print(2)\n")
    with packed(look_at(own)) as third:
        assert Path(third).read_bytes() != data
    assert names(only(own / "run.sh")) == ["run.sh"]


@pytest.mark.skipif(os.getuid() == 0, reason="root reads every file")
def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    own = write(tmp_path, {"main.py": "1", "secret": "1"})
    (own / "secret").chmod(0)
    with pytest.raises(ConfigError, match="secret.*cannot be read"), packed(look_at(own)):
        pass


def test_a_file_that_goes_meanwhile(tmp_path: Path) -> None:
    found = look_at(write(tmp_path, {"main.py": "1"}))
    (tmp_path / "main.py").unlink()
    with pytest.raises(ConfigError, match=r"main\.py.*cannot be read.*\.rayignore"), packed(found):
        pass


def test_too_large(tmp_path: Path) -> None:
    own = write(tmp_path, {
        "main.py": 1000, "data/train/images.bin": 150_000_000, "data/x": 10, "runs/a/1.pt": 40_000_000,
        "runs/b/2.pt": 30_000_000, "w.pt": 2_000_000, "a": 1, "b": 2, "c": 3,
    })  # fmt: skip
    found = look_at(own)
    found.check(222_001_016, "")
    with pytest.raises(ConfigError) as raised:
        found.check(222_001_015, "or do this.")
    text = str(raised.value)
    assert "\n" not in text and str(own) in text and "holds 222.0 MB, more than the 222.0 MB" in text
    # A folder that is nearly all one file is named by the file, one of several by itself; the smallest are left out.
    told = "Largest: data/train/images.bin (150.0 MB), runs/ (70.0 MB), w.pt (2.0 MB), main.py (1.0 KB), c (3 B). "
    assert told in text
    assert text.endswith(".gitignore or .rayignore, or do this.")


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "_MAX_FILES", 10)
    write(tmp_path, {f"x/{k}": "1" for k in range(10)})
    look_at(tmp_path).check(1000, "")
    write(tmp_path, {"y": "1"})
    with pytest.raises(ConfigError, match="holds more than 10 files"):
        look_at(tmp_path).check(1000, "")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Homes and temporary folders that are not above the test's own, as its projects would be none else."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temp"))
    for name in ("home", "temp"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_the_root_of_a_project(elsewhere: Path) -> None:
    home = elsewhere / "home"
    write(home, {"plain/main.py": "", "p/pyproject.toml": "", "p/a/b/main.py": "", "g/.git/x": "", "g/sub/main.py": ""})
    assert root_of(home / "plain") == home / "plain"
    assert root_of(home / "p" / "a" / "b") == home / "p"
    assert root_of(home / "g" / "sub") == home / "g"
    write(home, {"g/sub/pyproject.toml": ""})
    assert root_of(home / "g" / "sub") == home / "g" / "sub"  # the nearest


def test_what_is_no_project(elsewhere: Path) -> None:
    home, temp = elsewhere / "home", elsewhere / "temp"
    places = (home, temp, elsewhere, Path("/"), Path("/tmp"), Path("/var/tmp"), Path("/home"), Path("/home/anyone"))
    assert [root_of(each) for each in places] == [None] * len(places)
    # Dotfiles are often kept in a repository of the home folder: it is no project of what lies below.
    write(home, {".git/config": "", "pyproject.toml": "", "work/main.py": ""})
    assert root_of(home) is None
    assert root_of(home / "work") == home / "work"
    (elsewhere / "link").symlink_to(home)
    assert root_of(elsewhere / "link") is None


def test_import_folders(tmp_path: Path) -> None:
    write(tmp_path, {"src/a.py": "", "lib/b.py": "", "venv/lib/x.py": ""})
    paths = [
        str(tmp_path),
        str(tmp_path / "src"),
        "",
        "/usr",
        str(tmp_path / "none"),
        f"{tmp_path}/lib/",
        f"{tmp_path}/src",
    ]
    assert import_folders(tmp_path, paths) == ["src", "lib"]
    assert import_folders(tmp_path.parent, sys.path) == []  # where tests and packages come from is elsewhere


PRINT = "from raylit.driver.project import script_base; print(script_base())"


@pytest.mark.parametrize(
    ("arguments", "base"),
    [
        (["main.py"], "."),
        (["pkg/sub/main.py"], "pkg/sub"),
        (["-m", "pkg.sub.main"], "."),
        (["-m", "pkg"], "."),
        (["link.py"], "pkg/sub"),  # as Python itself: where the file is
        (["-c", PRINT], None),
        (["-m", "timeit", "-n1", "-r1", PRINT], None),  # an installed program
    ],
)
def test_the_base_of_a_script(tmp_path: Path, arguments: list[str], base: str | None) -> None:
    write(tmp_path, {"main.py": PRINT, "pkg/sub/main.py": PRINT, "pkg/__main__.py": PRINT})
    (tmp_path / "link.py").symlink_to("pkg/sub/main.py")
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    told = done.stdout.splitlines()[0]
    assert told == ("None" if base is None else str((tmp_path / base).resolve()))


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (999_949, "999.9 KB"), (999_960, "1.0 MB"), (15 * 10**8, "1.5 GB"),
     (10**16, "10000.0 TB")],
)  # fmt: skip
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text
