"""``raylit`` itself: its version, and whose usage is shown."""

from __future__ import annotations

import pytest

import raylit
from raylit.cli import main


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"raylit {raylit.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "unknown"),
    [
        (["doctor", "--frob", "1"], "--frob"),
        (["doctor", "a.yaml", "b.yaml"], "b.yaml"),
        (["submit", "--frob", "main.py"], "--frob"),
        (["token", "lab", "--frob"], "--frob"),
        (["checkpoints", "run", "more"], "more"),
    ],
)
def test_an_unknown_argument_shows_the_usage_of_its_command(
    arguments: list[str], unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: raylit {arguments[0]} ")
    assert f"raylit {arguments[0]}: error: unrecognized arguments: {unknown}" in error
