"""Which files of a project stay here: the patterns of ``.gitignore``, read as git reads them. Runs on the driver.

Ray's own packager reads ``.gitignore`` too, but not those above the folder that is shipped, and no ``!pattern`` that
takes back what a file above it has ignored; it walks into every ignored folder. Standard library only.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Read in each folder, the second after the first: its "!pattern" can take back what git need not know of.
FILES = (".gitignore", ".rayignore")
# Never of use on another machine. An own ``.rayignore`` can take them back.
ALWAYS = (
    ".git", ".hg", ".svn", "__pycache__/", "*.pyc", ".venv/", "venv/", "node_modules/", ".tox/", ".nox/",
    ".mypy_cache/", ".ruff_cache/", ".pytest_cache/", ".hypothesis/", ".ipynb_checkpoints/", ".DS_Store",
)  # fmt: skip
_CLASSES = {
    "alnum": "a-zA-Z0-9", "alpha": "a-zA-Z", "blank": " \\t", "cntrl": "\\x00-\\x1f\\x7f", "digit": "0-9",
    "graph": "\\x21-\\x7e", "lower": "a-z", "print": "\\x20-\\x7e", "punct": "!-/:-@\\[-`{-~", "space": "\\s",
    "upper": "A-Z", "xdigit": "0-9A-Fa-f",
}  # fmt: skip


@dataclass(frozen=True)
class Pattern:
    """One line: ``regex`` over the path from the folder of the file that the line stands in."""

    regex: re.Pattern[str]
    takes_back: bool  # begins with "!"
    folders_only: bool  # ends with "/"


@dataclass(frozen=True)
class Rules:
    """The lines of one file, for what is below ``folder`` ("": the project's own; else ``"a/b/"``).

    ``above``: where the file lies above the project, the way from there down to the project, ``"sub/project/"``.
    """

    patterns: tuple[Pattern, ...]
    folder: str = ""
    above: str = ""

    def says(self, path: str, is_folder: bool) -> bool | None:
        """Whether it ignores ``path`` (from the project's folder, with "/"); None: no line matches."""
        if not path.startswith(self.folder):
            return None
        own = self.above + path[len(self.folder) :]
        for pattern in reversed(self.patterns):
            if (is_folder or not pattern.folders_only) and pattern.regex.fullmatch(own):
                return not pattern.takes_back
        return None


def ignored(rules: Iterable[Rules], path: str, is_folder: bool) -> bool:
    """Whether ``path`` stays here; of ``rules`` the last that has something to say decides."""
    said = (each.says(path, is_folder) for each in reversed(list(rules)))
    return next((each for each in said if each is not None), False)


def rules_of(lines: Iterable[str], folder: str = "", above: str = "") -> Rules:
    """Read lines as git does; those that can never match are left out."""
    return Rules(tuple(filter(None, map(_pattern, lines))), folder, above)


def rules_in(place: Path, folder: str = "", above: str = "") -> Iterator[Rules]:
    """The rules of the files that lie in the folder ``place``."""
    for name in FILES:
        yield from rules_from(place / name, folder, above)


def rules_from(file: Path, folder: str = "", above: str = "") -> Iterator[Rules]:
    """The rules of one file; nothing where it is not there."""
    if file.is_file():
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
        yield rules_of((line.removesuffix("\r") for line in text.split("\n")), folder, above)


@functools.lru_cache(maxsize=4096)
def _pattern(line: str) -> Pattern | None:
    if line.startswith("#"):
        return None
    while line.endswith(" ") and not _escaped(line):
        line = line[:-1]
    takes_back = line.startswith("!")
    line = line[takes_back:]
    folders_only = line.endswith("/")
    line = line[:-1] if folders_only else line
    if not line:
        return None
    anchored = "/" in line
    body = _regex(line.removeprefix("/"))
    if body is None:
        return None
    try:
        regex = re.compile(body if anchored else f"(?:.*/)?{body}", re.DOTALL)
    except re.error:  # a range from high to low, which git never matches either
        return None
    return Pattern(regex, takes_back, folders_only)


def _escaped(line: str) -> bool:
    """Whether the last character has an odd number of backslashes before it."""
    before = line[:-1]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _regex(glob: str) -> str | None:
    out, at = [], 0
    while at < len(glob):
        char = glob[at]
        if glob.startswith("**/", at) and (at == 0 or glob[at - 1] == "/"):
            out.append("(?:.*/)?")
            at += 3
        elif glob[at:] == "**" and at and glob[at - 1] == "/":
            out.append(".+")
            at += 2
        elif char == "*":
            while at < len(glob) and glob[at] == "*":
                at += 1
            out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
            at += 1
        elif char == "[":
            found = _bracket(glob, at)
            if found is None:
                return None
            out.append(found[0])
            at = found[1]
        elif char == "\\":
            if at + 1 == len(glob):
                return None
            out.append(re.escape(glob[at + 1]))
            at += 2
        else:
            out.append(re.escape(char))
            at += 1
    return "".join(out)


def _bracket(glob: str, start: int) -> tuple[str, int] | None:
    """``[...]`` as a regex and where it ends; None: it never ends, so that git matches nothing."""
    at = start + 1
    negated = glob[at : at + 1] in ("!", "^")
    at += negated
    out: list[str] = []
    first = True
    while at < len(glob):
        char = glob[at]
        if char == "]" and not first:
            inside = "".join(out)
            # "/" is never matched by a class, whatever stands in it.
            return f"(?!/)[{'^' if negated else ''}{inside}]", at + 1
        first = False
        named = re.match(r"\[:(\w*):\]", glob[at:])
        if named:
            if named[1] not in _CLASSES:
                return None
            out.append(_CLASSES[named[1]])
            at += named.end()
            continue
        if char == "\\":
            at += 1
            if at == len(glob):
                return None
            char = glob[at]
        out.append("-" if _is_range(glob, at, out) else re.escape(char))
        at += 1
    return None


def _is_range(glob: str, at: int, out: list[str]) -> bool:
    """Whether the "-" at this place stands between two characters."""
    return glob[at] == "-" and glob[at - 1] != "\\" and bool(out) and glob[at + 1 : at + 2] not in ("]", "")
