"""The report: exit code, summary, JSON, and what is folded for reading."""

from __future__ import annotations

import json

from raylit.doctor.report import CLUSTER, Report, Verdict, green, red, yellow

FINE = (green("clock", "a", "+0.000 s"), green("clock", "b", "+0.001 s"), green("authentication", CLUSTER, "on"))
ODD = yellow("clock", "c", "+3.000 s", "NTP")
BAD = red("clock", "d", "+40.000 s", "NTP")


def report(*rows) -> Report:
    return Report(rows, ("a", "b"), 12.34, {"all_reduce_latency_us": 5.0})


def test_exit_code_and_summary() -> None:
    assert report(*FINE).exit_code == 0
    assert report(*FINE).summary == "2 nodes, 3 checks: 3 green, 0 yellow, 0 red; can train (12 s)"
    assert report(*FINE, ODD).exit_code == 0
    assert "3 green, 1 yellow, 0 red; can train; look at the yellow rows" in report(*FINE, ODD).summary
    assert report(BAD, ODD, *FINE).exit_code == 1
    assert "3 green, 1 yellow, 1 red; put the red rows right first" in report(BAD, ODD, *FINE).summary
    assert Report((), ("a",), 1.0).summary.startswith("1 node, 0 checks")


def test_json_has_every_row() -> None:
    told = json.loads(json.dumps(report(*FINE, BAD).as_json()))
    assert told["ok"] is False and told["counts"] == {"green": 3, "yellow": 0, "red": 1} and told["seconds"] == 12.3
    assert told["checks"][-1] == {
        "check": "clock",
        "node": "d",
        "value": "+40.000 s",
        "verdict": "red",
        "remedy": "NTP",
    }
    assert told["figures"] == {"all_reduce_latency_us": 5.0} and told["nodes"] == ["a", "b"]


def test_a_report_comes_back_from_json() -> None:
    given = report(*FINE, ODD, BAD)
    back = Report.from_json(json.loads(json.dumps(given.as_json())))
    assert back == Report(given.rows, given.nodes, 12.3, given.figures)


def test_green_rows_of_one_check_are_one_line_and_others_stay() -> None:
    shown = [(row.node, row.value, row.verdict) for row in report(*FINE, ODD, BAD).folded()]
    assert shown == [
        ("c", "+3.000 s", Verdict.YELLOW),
        ("d", "+40.000 s", Verdict.RED),
        ("2 other nodes", "+0.000 s | +0.001 s", Verdict.GREEN),
        (CLUSTER, "on", Verdict.GREEN),
    ]
    assert [row.node for row in report(*FINE).folded()] == ["all 2 nodes", CLUSTER]


def test_rows_of_the_cluster_are_not_folded() -> None:
    rows = (green("open ports", CLUSTER, "GCS"), green("open ports", CLUSTER, "dashboard"))
    assert report(*rows).folded() == list(rows)


def test_many_values_are_counted() -> None:
    rows = [green("disk", f"n{i}", f"{i} GB") for i in range(5)]
    assert report(*rows).folded()[0].value == "0 GB | 1 GB | 2 GB | 2 more"
