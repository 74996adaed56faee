"""``raylit doctor``: arguments that cannot be, and the table."""

from __future__ import annotations

import pytest

from raylit.cli import main
from raylit.cli.doctor import show
from raylit.doctor.report import CLUSTER, Report, green, red, yellow


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "0"], "--workers 0: give the number of workers"),
        (["--timeout", "0"], "--timeout 0: give a number of seconds above 0"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--address", "http://head:8265"], "http:// does not reach the nodes themselves"),
        (["--address", "head"], "give HOST:PORT of the cluster's head"),
        (["--address", "head:70000"], "give HOST:PORT of the cluster's head"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("raylit doctor: ") and words in error and error.count("\n") == 1


def test_the_table_fits_into_100_columns_and_takes_nothing_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    long = "s3://bucket/" + "folder/" * 30
    rows = (
        green("answers", "a-host-with-a-rather-long-name-as-clouds-have-them (10.0.0.1)", "yes"),
        red(
            "storage", "b [bold] (10.0.0.2)", f"{long}: does not see what a wrote", "give a folder that all nodes mount"
        ),
        yellow("open files", "b", "2000", "ulimit -n 65536"),
        green("authentication", CLUSTER, "on"),
    )
    show(Report(rows, ("a", "b"), 3.0))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    told = "".join("".join(line.split()) for line in lines)
    assert "[bold]" in told and "->giveafolderthatallnodesmount" in told and "->ulimit-n65536" in told
    assert lines[-1] == "2 nodes, 4 checks: 2 green, 1 yellow, 1 red; put the red rows right first (3 s)"
