"""Which test covers which line of the contract: reads ``lines.txt``, writes ``docs/contract.md``.

``python -m tests.contract.lines`` from the repository's root writes the page anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("lines.txt")
PAGE = ROOT / "docs" / "contract.md"

_HEAD = """# Which test covers which line

What a user may rely on, line by line, with the tests that hold it. Made from `tests/contract/lines.txt` by
`python -m tests.contract.lines`; `tests/contract/test_lines.py` checks that every line has a test and that every test
exists. A dagger (†) marks an argument that only an override gets which names it.
"""


@dataclass
class Line:
    """One line: its id and words, the ids of its tests (``file::name``), or why there are none yet."""

    id: str
    text: str
    section: str
    tests: list[str] = field(default_factory=list)
    missing: str = ""


def read(text: str) -> list[Line]:
    """Parse ``lines.txt``; ValueError with the line's number for what is not in its form."""
    files: dict[str, str] = {}
    lines: list[Line] = []
    section = ""
    for number, raw in enumerate(text.splitlines(), start=1):
        row = raw.strip()
        if not row or row.startswith("# "):
            continue
        if row.startswith("## "):
            section = row[3:]
        elif row.startswith("= "):
            _, name, path = row.split()
            files[name] = path
        elif not raw.startswith(" "):
            name, _, words = row.partition(" ")
            lines.append(Line(name, words, section))
        elif row.startswith("missing: "):
            lines[-1].missing = row.removeprefix("missing: ")
        else:
            for test in row.split():
                short, _, name = test.partition("::")
                if short not in files:
                    raise ValueError(f"lines.txt:{number}: no file is called {short!r}")
                lines[-1].tests.append(f"{files[short]}::{name}")
    return lines


def page(lines: list[Line]) -> str:
    """The page for the documentation."""
    parts = [_HEAD]
    for section in dict.fromkeys(line.section for line in lines):
        parts.append(f"\n## {section}\n\n| line | what | tests |\n| --- | --- | --- |\n")
        for line in lines:
            if line.section == section:
                # A bare * would begin emphasis.
                words = line.text.replace("*", "\\*")
                parts.append(f"| {line.id.replace('*', chr(92) + '*')} | {words} | {_cell(line)} |\n")
    return "".join(parts)


def _cell(line: Line) -> str:
    by_file: dict[str, list[str]] = {}
    for test in line.tests:
        path, _, name = test.partition("::")
        by_file.setdefault(path, []).append(name)
    cell = "; ".join(
        f"[{path.removeprefix('tests/')}](../{path}): {', '.join(names)}" for path, names in by_file.items()
    )
    return f"not there yet: {line.missing}" if line.missing else cell


if __name__ == "__main__":
    PAGE.write_text(page(read(SOURCE.read_text())))
    print(f"wrote {PAGE}")
