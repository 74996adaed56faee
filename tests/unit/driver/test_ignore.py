"""Which files stay here: git itself is asked, over drawn patterns and over the cases of its manual."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from raylit.driver.ignore import Rules, ignored, rules_of

git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed: nobody to compare with")
NAMES = ["a", "b", "ab", "a.py", "b.txt", "]", "-", "a b", "!x", "#h", "A"]
TOKENS = (
    r"a|b|ab|*|**|?|/|/|**/|/**|[ab]|[!a]|[a-c]|[]a]|[a-]|[[:alpha:]]|\|\*|.py|.d| |!|#|s|[|]|-|[^b-z]|[\]a]"
).split("|")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    for name in NAMES:
        for path in (name, *(f"{name}.d/{way}{inner}" for inner in ("a", "b", "ab.py") for way in ("", "s/"))):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text("x")
    return root


def kept_by_git(root: Path) -> list[str]:
    command = ["git", "-c", "core.excludesFile=", "-C", str(root), "ls-files", "-o", "-z", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted(filter(None, listed.split("\0")))


def kept_by_us(root: Path, rules: list[Rules], way: str = "") -> Iterator[str]:
    for name in sorted(os.listdir(root / way)):
        path = way + name
        if path == ".git" or ignored(rules, path, (root / path).is_dir()):
            continue
        if (root / path).is_dir():
            yield from kept_by_us(root, rules, f"{path}/")
        else:
            yield path


@git
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=st.lists(st.lists(st.sampled_from(TOKENS), min_size=1, max_size=5).map("".join), min_size=1, max_size=4))
def test_as_git_reads_them(repository: Path, lines: list[str]) -> None:
    # Of asterisks that are neither alone between slashes nor single the manual says one thing, and git does another.
    assume(not any(re.search(r"[^/!]\*\*|\*\*[^/]|\*\*\*", line) for line in lines))
    (repository / ".gitignore").write_text("\n".join(lines) + "\n")
    assert sorted(kept_by_us(repository, [rules_of(lines)])) == kept_by_git(repository)


@pytest.mark.parametrize(
    ("lines", "path", "is_folder", "stays"),
    [
        (["build/"], "build", True, True),
        (["build/"], "build", False, False),  # a file of that name is none of the folders
        (["build/"], "x/build", True, True),
        (["/build"], "x/build", True, False),
        (["doc/frotz"], "a/doc/frotz", False, False),
        (["**/doc/frotz"], "a/doc/frotz", False, True),
        (["a/**/b"], "a/b", False, True),
        (["a/**/b"], "a/x/y/b", False, True),
        (["a/**"], "a", True, False),
        (["a/**"], "a/x", False, True),
        (["*.pt", "!best.pt"], "best.pt", False, False),
        (["!best.pt", "*.pt"], "best.pt", False, True),
        (["# note", "", "  "], "# note", False, False),
        ([r"\#note"], "#note", False, True),
        ([r"\!note"], "!note", False, True),
        (["note  "], "note", False, True),
        ([r"note\ "], "note ", False, True),
        (["[a-c].py"], "b.py", False, True),
        (["[!a-c].py"], "b.py", False, False),
        (["a[/]b"], "a/b", False, False),
        (["[z-a]", "[", "x\\"], "x", False, False),  # never match, and are no error
        (["A"], "a", False, False),
    ],
)
def test_single_lines(lines: list[str], path: str, is_folder: bool, stays: bool) -> None:
    assert ignored([rules_of(lines)], path, is_folder) is stays


def test_of_several_files_the_nearest_decides() -> None:
    rules = [rules_of(["*.pt", "data/"]), rules_of(["!kept.pt", "/top"], "models/")]
    assert not ignored(rules, "models/kept.pt", False)
    assert not ignored(rules, "models/deep/kept.pt", False)
    assert ignored(rules, "kept.pt", False)
    assert ignored(rules, "models/other.pt", False)
    assert ignored(rules, "models/top", False) and not ignored(rules, "top", False)


def test_a_file_above_the_project() -> None:
    rules = [rules_of(["/sub/proj/big", "*.pt", "/big"], above="sub/proj/")]
    assert ignored(rules, "big", False)  # the first line; the third is about the place above
    assert not ignored(rules, "x/big", False)
    assert ignored(rules, "x/w.pt", False)
