"""``raylit doctor``: arguments that cannot be, and the table."""

from __future__ import annotations

import json

import pytest

from raylit.cli import main
from raylit.cli.doctor import show
from raylit.cli.doctor_job import report_in
from raylit.doctor.report import CLUSTER, Report, green, red, yellow
from raylit.errors import ConfigError


def test_the_report_is_found_in_a_jobs_log() -> None:
    given = Report((green("answers", "a", "yes"),), ("a",), 3.0)
    told = json.dumps(given.as_json(), indent=2)
    noise = "2026-11-27 20:00:00 INFO job_manager.py -- Runtime env is setting up.\n"
    for log in (told, noise + told, f"{noise}{told}\nsome last word\n"):
        assert report_in(log) == given


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("raylit doctor: nobody answers at head:6379\n(some more)", "from the cluster: nobody answers at head:6379"),
        ("Traceback ...\nModuleNotFoundError: No module named 'raylit'\n", "No module named 'raylit'"),
        ('{\n  "ok": true,\n', '"ok": true'),  # it broke off
        ("", "it said nothing"),
    ],
)
def test_a_job_without_a_report_is_told_in_its_own_words(log: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        report_in(log)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "0"], "--workers 0: give the number of workers"),
        (["--timeout", "0"], "--timeout 0: give a number of seconds above 0"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--address", "ray://head:10001"], "ray:// does not reach the nodes themselves"),
        (["--address", "http://127.0.0.1:1"], "nothing answers at http://127.0.0.1:1"),
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
