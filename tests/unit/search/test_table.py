"""What a search shows: rows, the best one, the time that is left, the summary ready to paste."""

from __future__ import annotations

import math
from io import StringIO
from typing import Any

import numpy as np
from rich.console import Console

from raylit.search.table import Goal, Row, clock, eta_s, flat, line, ordered, summary, table, title, varied

LOSS = Goal("val_loss", "min")


def row(trial: str, status: str = "done", value: float | None = None, seconds: float = 10.0, **config: Any) -> Row:
    metrics = {} if value is None else {"val_loss": value, "acc": 1 - value}
    return Row(trial, config, status, 3, metrics, seconds)


ROWS = [
    row("a", value=0.5, lr=0.1, hidden=32, model={"depth": 2}),
    row("b", value=0.25, lr=0.0123456, hidden=32, model={"depth": 3}),
    row("c", "running", 0.75, 4.0, lr=1e-6, hidden=32, model={"depth": 2}),
    Row("d", {"lr": 9.0, "hidden": 32, "model": {"depth": 2}}, "failed", 1, {}, 2.0, "ValueError: no"),
    row("e", value=math.nan, lr=0.2, hidden=32, model={"depth": 2}),
]


def shown(rows: list[Row], goal: Goal = LOSS, total: int | None = 8) -> str:
    file = StringIO()
    Console(file=file, width=140, color_system=None).print(table(rows, goal, total, ["acc"]))
    return file.getvalue()


def test_the_best_is_the_best_number_in_either_direction() -> None:
    assert LOSS.best(ROWS) is ROWS[1] and Goal("val_loss", "max").best(ROWS) is ROWS[2]
    assert Goal().best(ROWS) is None and LOSS.best([ROWS[3], ROWS[4]]) is None
    assert LOSS.best([ROWS[0], row("f", "failed", 0.1)]) is ROWS[0]  # of a failed one the last value counts for nothing
    assert [each.trial for each in ordered(ROWS, LOSS)] == ["c", "b", "a", "e", "d"]


def test_the_table_has_what_differs_between_trials() -> None:
    assert flat({"lr": 1, "model": {"a": {"b": 2}, "c": {}}}) == {"lr": 1, "model/a/b": 2, "model/c": {}}
    assert varied(ROWS) == ["lr", "model/depth"] and varied(ROWS[:1]) == ["lr", "hidden", "model/depth"]
    lines = shown(ROWS).splitlines()
    assert lines[1].split() == ["trial", "status", "lr", "model/depth", "epoch", "val_loss", "acc", "time"]
    assert lines[3].split() == ["b", "done", "0.01235", "3", "3", "0.25", "0.75", "10", "s"]
    assert "hidden" not in shown(ROWS)
    assert len(shown([row(str(number), value=0.1, lr=number) for number in range(90)]).splitlines()) < 20


def test_the_line_above_it() -> None:
    assert title(ROWS, LOSS, 8) == (
        "4 of 8 trials ended, 1 running, 1 failed, best val_loss 0.25 (b), about 28 s left"
    )  # four took 8 s on the average: 4 s of the running one, three more to come
    assert title(ROWS[:1], Goal(), None) == "1 trials ended"
    assert eta_s([ROWS[2]], 8) is None and eta_s(ROWS, None) is None
    assert [clock(s) for s in (3.4, 61, 3600, 7325)] == ["3 s", "1 min 01 s", "1 h 00 min", "2 h 02 min"]


def test_a_line_of_a_trial_that_has_ended() -> None:
    told = line(ROWS[1], LOSS, ["lr", "model/depth"])
    assert told == "trial b done  lr=0.01235  model/depth=3  epoch 3  val_loss 0.25  10 s"
    assert line(ROWS[3], LOSS, ["lr"]) == "trial d failed  lr=9  epoch 1  ValueError: no  2 s"


def test_the_summary_is_ready_to_paste() -> None:
    best = Row("b", {"lr": np.float64(0.01), "name": "x", "data.batch_size": 32}, "done", 1, {"val_loss": 0.2})
    assert summary([best, ROWS[3]], LOSS, "Net", "/runs/x").splitlines() == [
        "best of 2 trials: b, val_loss 0.2 after 1 epoch",
        "  Net(lr=0.01, name='x')",
        "  data.batch_size=32",
        "1 trial failed:",
        "  d: ValueError: no",
        "search folder: /runs/x",
    ]
    failed = [Row(str(n), {}, "failed", reason="no") for n in range(7)]
    assert summary(failed, LOSS, "Net", "/runs/x").splitlines()[-2:] == ["  and 2 more", "search folder: /runs/x"]
