"""A project as it travels to other machines: its folder, which files go, how large they are, one file of them all.

Runs on the driver, and for ``raylit submit`` on the laptop. Never imports Ray. What is measured is what is sent: Ray is
given the packed file, not the folder.
"""

from __future__ import annotations

import contextlib
import os
import site
import stat
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raylit.driver.ignore import ALWAYS, Rules, ignored, rules_from, rules_in, rules_of
from raylit.errors import ConfigError

MAX_BYTES = 200 * 1000**2  # Ray itself takes some 500 MB, into its head's memory
_MAX_FILES = 50_000  # more is no project, but data, or a folder that was meant for something else
_MARKS = ("pyproject.toml", ".git")
_NAMED = 5  # entries that the error of a large project names
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files make the same package: what the cluster has is not sent again


@dataclass(frozen=True)
class Project:
    """The files of ``folder`` that travel: path from there, with "/", and size in bytes, in order."""

    folder: Path
    files: tuple[tuple[str, int], ...]
    more: bool = field(default=False)  # there were too many to look at them all

    @property
    def size_bytes(self) -> int:
        return sum(size for _, size in self.files)

    def check(self, limit_bytes: int, ways: str) -> None:
        """Raise ConfigError where it is too large, in one line that names the largest entries; ``ways``: what helps."""
        over = f"holds {size_text(self.size_bytes)}, more than the {size_text(limit_bytes)} that are sent"
        if self.more:
            over = f"holds more than {_MAX_FILES:,} files"
        elif self.size_bytes <= limit_bytes:
            return
        largest = ", ".join(f"{name} ({size_text(size)})" for name, size in self.largest())
        raise ConfigError(
            f"the project {self.folder} {over}. Largest: {largest}. Name what need not travel in its .gitignore or "
            f".rayignore, {ways}"
        )

    def largest(self) -> list[tuple[str, int]]:
        """The largest files and folders (``name/``); of a folder that is nearly all one entry, that entry instead."""
        sizes: dict[str, int] = {}
        inside: dict[str, set[str]] = {}
        for path, size in self.files:
            names = [path[: at + 1] for at, char in enumerate(path) if char == "/"] + [path]
            for above, name in zip(["", *names], names):
                sizes[name] = sizes.get(name, 0) + size
                inside.setdefault(above, set()).add(name)

        def narrowed(name: str) -> str:
            below = max(inside.get(name, ()), key=lambda each: sizes[each], default=None)
            return name if below is None or sizes[below] < 0.8 * sizes[name] else narrowed(below)

        named = {narrowed(name) for name in inside.get("", ())}
        return sorted(((name, sizes[name]) for name in named), key=lambda each: (-each[1], each[0]))[:_NAMED]

    def pack(self, target: Path) -> None:
        """Write a zip file that depends on names, contents and the right to execute alone."""
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as package:
            for name, _ in self.files:
                source = self.folder / name
                try:
                    with open(source, "rb") as stream:
                        runs = bool(os.fstat(stream.fileno()).st_mode & stat.S_IXUSR)
                        entry = zipfile.ZipInfo(name, _EPOCH)
                        entry.compress_type = zipfile.ZIP_DEFLATED
                        entry.external_attr = (stat.S_IFREG | (0o755 if runs else 0o644)) << 16
                        with package.open(entry, "w", force_zip64=True) as packed:
                            while block := stream.read(1 << 20):
                                packed.write(block)
                except OSError as error:
                    raise ConfigError(
                        f"{source} belongs to the project that is sent, and cannot be read "
                        f"({error.strerror or error}); name it in .rayignore where it need not travel"
                    ) from error


@contextlib.contextmanager
def packed(project: Project) -> Iterator[str]:
    """The path of the packed project, for the length of the body."""
    with tempfile.TemporaryDirectory(prefix="raylit-") as folder:
        target = Path(folder) / "project.zip"
        project.pack(target)
        yield str(target)


def look_at(folder: Path, excludes: Sequence[str] = ()) -> Project:
    """Find the files of a project that travel. ``excludes``: lines as in a .gitignore of its folder.

    A link is followed, once; a link to nothing, a socket or a pipe stays here, and so does a virtual environment.
    """
    own, more = rules_of(excludes), False
    found: list[tuple[str, int]] = []
    for each in _walk(folder, "", [rules_of(ALWAYS), *_rules_above(folder)], own, (folder.resolve(),)):
        if len(found) == _MAX_FILES:
            more = True
            break
        found.append(each)
    return Project(folder, tuple(sorted(found)), more)


def only(script: Path) -> Project:
    """A project of one file."""
    return Project(script.parent, ((script.name, script.stat().st_size),))


def _walk(
    folder: Path, way: str, rules: list[Rules], excludes: Rules, seen: tuple[Path, ...]
) -> Iterator[tuple[str, int]]:  # fmt: skip
    rules = [*rules, *rules_in(folder, way)]
    try:
        entries = sorted(os.scandir(folder), key=lambda each: each.name)
    except OSError as error:
        raise ConfigError(
            f"the folder {folder} belongs to the project that is sent, and cannot be read ({error.strerror or error}); "
            "name it in .rayignore where it need not travel"
        ) from error
    for entry in entries:
        path = way + entry.name
        is_folder = entry.is_dir()
        if ignored([*rules, excludes], path, is_folder):
            continue
        if not is_folder:
            if entry.is_file():
                yield path, entry.stat().st_size
            continue
        inner = Path(entry.path)
        real = inner.resolve() if entry.is_symlink() else seen[-1] / entry.name
        if real in seen or (inner / "pyvenv.cfg").exists() or (inner / "conda-meta").is_dir():
            continue
        yield from _walk(inner, path + "/", rules, excludes, (*seen, real))


def _rules_above(folder: Path) -> list[Rules]:
    """The rules of the folders above, up to the one that has the ``.git``; none where they ignore the folder itself."""
    folder, way = folder.resolve(), ""
    found: list[Rules] = []
    for place in (folder, *folder.parents):
        if place != folder:
            found[:0] = rules_in(place, above=way)
        if (place / ".git").exists():
            found[:0] = rules_from(place / ".git" / "info" / "exclude", above=way)
            break
        way = f"{place.name}/{way}"
    else:
        return []  # no repository: what lies above has nothing to do with it
    steps = way.split("/")[:-1]  # from the repository's folder to the project's

    def ignores(depth: int) -> bool:
        for each in reversed(found):
            start = len(steps) - each.above.count("/")
            if start < depth:
                said = Rules(each.patterns).says("/".join(steps[start:depth]), True)
                if said is not None:
                    return said
        return False

    return [] if any(map(ignores, range(1, len(steps) + 1))) else found


def root_of(folder: Path) -> Path | None:
    """The project that ``folder`` lies in: the nearest folder upwards with a pyproject.toml or .git, else ``folder``.

    None for a place that is no project: a home, the folder of temporary files, or what lies above one.
    """
    folder = folder.resolve()
    if _is_no_project(folder):
        return None
    for place in (folder, *folder.parents):
        if _is_no_project(place):
            break
        if any((place / mark).exists() for mark in _MARKS):
            return place
    return folder


def _is_no_project(folder: Path) -> bool:
    real = [Path(each).expanduser().resolve() for each in ("~", tempfile.gettempdir(), "/tmp", "/var/tmp", "/root")]
    homes = folder.parent.as_posix() in ("/home", "/Users") or folder.as_posix() in ("/home", "/Users")
    return homes or any(folder == each or folder in each.parents for each in real)


def script_base() -> Path | None:
    """The folder from which the running script's own modules are imported; None where there is no such script.

    There is none in a notebook or with ``-c``; a program of an installed package (pytest) is no script of the user's.
    """
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if main is None or file is None:
        return None
    path = Path(file).resolve()
    if any(path.is_relative_to(each) for each in _installed()):
        return None
    spec = getattr(main, "__spec__", None)  # with -m: as many folders up as its name has dots
    return path.parents[spec.name.count(".") if spec is not None else 0]


def import_folders(root: Path, paths: Iterable[str]) -> list[str]:
    """Those of the import path ``paths`` that lie within the project, from its folder on; its own is not named."""
    installed, found = _installed(), []
    for each in paths:
        path = Path(each or ".").resolve()
        below = path != root and path.is_relative_to(root) and path.is_dir()
        if below and not any(path.is_relative_to(place) or place.is_relative_to(path) for place in installed):
            found.append(path.relative_to(root).as_posix())
    return list(dict.fromkeys(found))


def is_installed(path: Path) -> bool:
    """Whether a file belongs to Python or to a package that was installed."""
    return any(path.is_relative_to(each) for each in _installed())


def _installed() -> list[Path]:
    paths = [*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()]
    kept = [Path(each).resolve() for each in paths if each]
    data = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}  # sysconfig's "data": may be all of "/usr"
    return [each for each in dict.fromkeys(kept) if each not in data]


def size_text(size_bytes: int) -> str:
    """``1.2 MB``: powers of 1000."""
    size, unit = float(size_bytes), 0
    units = ("B", "KB", "MB", "GB", "TB")
    while size >= 999.95 and unit < len(units) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{size:.1f} {units[unit]}"
