"""A terminal for tests: keeps what a person would see. Knows what the display uses: newline, return, erase, colours."""

from __future__ import annotations

import io
import re

_TOKEN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+")


class Screen(io.StringIO):
    """A stream that says it is a terminal; ``rows`` is the text on it, row by row, without styles."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    @property
    def rows(self) -> list[str]:
        return rows_of(self.getvalue())


class BrokenPipe(Screen):
    """Fails as a pipe does whose reader has gone, from the moment ``broken`` is set."""

    broken = False

    def write(self, text: str) -> int:
        if self.broken:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def rows_of(output: str) -> list[str]:
    """Return the rows that this output leaves on a terminal of any width."""
    rows, column = [""], 0
    for token in _TOKEN.findall(output):
        if token == "\n":
            rows.append("")
            column = 0
        elif token == "\r":
            column = 0
        elif token == "\x1b[2K":
            rows[-1] = ""
        elif not token.startswith("\x1b"):
            rows[-1] = rows[-1][:column].ljust(column) + token + rows[-1][column + len(token) :]
            column += len(token)
    return rows
