"""The terminal display: exact lines where there is no terminal, and what stands on the screen where there is one."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest

from raylit.display import DisplayEvent, TerminalDisplay
from raylit.display.events import KINDS
from raylit.display.text import format_clock, format_rate, format_seconds, format_value
from raylit.ports import Display


def _load(name: str) -> ModuleType:
    """Load a neighbour file: under importlib mode tests are in no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


screen = _load("screen")
ROOT = Path(__file__).resolve().parents[3]


def a_fit(epochs: int = 2) -> Iterator[dict[str, Any]]:
    yield {"kind": "fit_start", "stage": "fit", "max_epochs": epochs, "num_workers": 2}
    yield {"kind": "summary", "text": "3 Total params"}
    yield {"kind": "note", "text": "a default was used"}
    yield {"kind": "progress", "loop": "sanity", "epoch": 0, "batch": 2, "total": 2, "values": {}}
    yield {"kind": "loop_end", "loop": "sanity", "values": {}}
    for epoch in range(epochs):
        yield {"kind": "epoch_start", "epoch": epoch, "total_batches": 120}
        yield train(120, epoch=epoch)
        yield {"kind": "progress", "loop": "validation", "epoch": epoch, "batch": 5, "total": 5, "values": {}}
        yield {"kind": "loop_end", "loop": "validation", "values": {"val_acc": 0.95}}
        yield {"kind": "checkpoint", "path": "/somewhere"}
        yield {"kind": "epoch_end", "epoch": epoch, "values": {"loss": 0.12, "val_acc": 0.95}, "seconds": 4.2}
    yield {"kind": "end", "status": "finished"}


def train(batch: int, total: int | None = 120, epoch: int = 0, **more: Any) -> dict[str, Any]:
    values = more.pop("values", {"loss": 0.5})
    numbers = {"epoch": epoch, "batch": batch, "total": total}
    return {"kind": "progress", "loop": "train", **numbers, "values": values, **more}


def shown(events: Any, **options: Any) -> str:
    stream = io.StringIO()
    display = TerminalDisplay(stream=stream, **options)
    for event in events:
        display.event(event)
    return stream.getvalue()


# -- words -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12, "0.12"), (0.123456, "0.1235"), (1.0, "1.0"), (12.3456, "12.35"), (12345.678, "12345.7"), (3, "3"),
     (0.0, "0.0"), (1.2e-5, "1.2e-05"), (-0.5, "-0.5"), (float("nan"), "nan"), (float("inf"), "inf"),
     (2.5e9, "2.5e+09"), ("3", "3"), (None, "None"), (True, "True")],
)  # fmt: skip
def test_values_read_short(value: Any, text: str) -> None:
    assert format_value(value) == text


def test_times_and_rates_read_short() -> None:
    assert [format_seconds(s) for s in (0.04, 4.2, 59.9, 59.97, 62, 3723)] == [
        "0.0 s", "4.2 s", "59.9 s", "1:00", "1:02", "1:02:03",
    ]  # fmt: skip
    assert format_clock(7.4) == "0:07"
    assert [format_rate(r) for r in (0.4, 45.31, 1234.5)] == ["2.50 s/it", "45.3 it/s", "1234 it/s"]


def test_every_kind_of_event_is_described_and_listed() -> None:
    described = {kind for event in get_args(DisplayEvent) for kind in get_args(get_type_hints(event)["kind"])}
    assert described == KINDS


def test_it_is_a_display() -> None:
    assert isinstance(TerminalDisplay(), Display)


# -- not a terminal --------------------------------------------------------------------------------------------------
def test_plain_lines_of_a_fit() -> None:
    assert shown(a_fit()) == (
        "fit on 2 workers\n"
        "3 Total params\n"
        "a default was used\n"
        "epoch 1/2  120 steps  loss 0.12  val_acc 0.95  4.2 s\n"
        "epoch 2/2  120 steps  loss 0.12  val_acc 0.95  4.2 s\n"
    )


def test_without_the_bar_prints_notes_and_warnings_still_come() -> None:
    talk = [{"kind": "print", "rank": 0, "text": "mine"}, {"kind": "warning", "rank": 0, "text": "careful"}]
    assert shown([*talk, *a_fit()], enabled=False) == "mine\nwarning: careful\n3 Total params\na default was used\n"


def test_no_limit_of_epochs_and_batches_given() -> None:
    events = [
        {"kind": "fit_start", "stage": "fit", "max_epochs": -1, "num_workers": 0},
        {"kind": "epoch_end", "epoch": 4, "values": {}, "seconds": 75.0, "batches": 1},
    ]
    assert shown(events) == "epoch 5  1 step  1:15\n"


def test_prints_come_as_they_are_and_are_tagged_by_rank() -> None:
    events = [
        {"kind": "print", "rank": 0, "text": "one [bold]two[/bold]\n"},
        {"kind": "print", "rank": 1, "text": "a\nb"},
        {"kind": "print", "rank": 0, "text": ""},
    ]
    assert shown(events) == "one [bold]two[/bold]\n[rank 1] a\n[rank 1] b\n\n"


def test_a_warning_of_many_ranks_comes_once() -> None:
    assert shown([{"kind": "warning", "rank": r, "text": "slow loader"} for r in (1, 0, 2)]) == (
        "[rank 1] warning: slow loader\n"
    )


def test_results_of_the_other_stages() -> None:
    events = [
        {"kind": "stage_start", "stage": "test"},
        {"kind": "progress", "loop": "test", "epoch": 0, "batch": 12, "total": 12, "values": {}},
        {"kind": "loop_end", "loop": "test", "values": {"acc": 0.9731}},
        {"kind": "end", "status": "finished"},
        {"kind": "stage_start", "stage": "predict"},
        {"kind": "loop_end", "loop": "predict", "values": {}},
    ]
    assert shown(events) == "test  12 batches  acc 0.9731\n"


def test_validation_in_the_middle_of_an_epoch_has_its_own_line() -> None:
    events = [
        {"kind": "fit_start", "stage": "fit", "max_epochs": 3},
        {"kind": "epoch_start", "epoch": 0, "total_batches": 120},
        {"kind": "loop_end", "loop": "validation", "values": {"val_acc": 0.5}, "batch": 60},
    ]
    assert shown(events) == "epoch 1/3  step 60  val_acc 0.5\n"


def test_errors_go_to_stderr_where_no_stream_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    display = TerminalDisplay()
    display.event({"kind": "print", "rank": 0, "text": "out"})
    display.event({"kind": "print", "rank": 1, "text": "err", "stream": "stderr"})
    display.event({"kind": "warning", "rank": 0, "text": "careful"})
    captured = capsys.readouterr()
    assert captured.out == "out\n"
    assert captured.err == "[rank 1] err\nwarning: careful\n"


def test_words_that_the_stream_cannot_write_are_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    TerminalDisplay(stream=stream).event({"kind": "print", "rank": 0, "text": "caf\u00e9"})
    assert raw.getvalue() == b"caf\\xe9\n"


# -- what goes wrong -------------------------------------------------------------------------------------------------
def test_a_broken_pipe_ends_the_drawing_and_nothing_else() -> None:
    stream = screen.BrokenPipe()
    display = TerminalDisplay(stream=stream)
    events = list(a_fit())
    for event in events[:8]:
        display.event(event)
    stream.broken = True
    for event in events[8:]:
        display.event(event)
    written = stream.getvalue()
    stream.broken = False
    display.event({"kind": "note", "text": "more"})
    assert stream.getvalue() == written
    display.close()


def test_a_closed_stream_ends_the_drawing() -> None:
    stream = io.StringIO()
    display = TerminalDisplay(stream=stream)
    stream.close()
    display.event({"kind": "note", "text": "more"})


def test_events_that_cannot_be_read_are_left_out() -> None:
    events = [{}, {"kind": "future"}, {"kind": "epoch_end"}, {"kind": "note", "text": "still here"}]
    assert shown(events) == "still here\n"


# -- a terminal ------------------------------------------------------------------------------------------------------
def test_the_bar_shows_epoch_batch_time_left_rate_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = screen.Screen()
    display = TerminalDisplay(stream=stream)
    display.event({"kind": "fit_start", "stage": "fit", "max_epochs": 10})
    display.event({"kind": "epoch_start", "epoch": 2, "total_batches": 120})
    display.event(train(30, epoch=2, values={"loss": 0.25, "v_num": 7}, steps_per_second=45.3))
    assert stream.rows == ["epoch 3/10  " + "━" * 3 + "─" * 12 + "  30/120  45.3 it/s  0:02 left  loss 0.25  v_num 7"]
    display.close()
    assert stream.rows == [""]


def test_the_screen_after_a_fit_is_the_plain_text() -> None:
    stream = screen.Screen()
    display = TerminalDisplay(stream=stream)
    for event in a_fit():
        display.event(event)
    assert stream.rows == shown(a_fit()).split("\n")
    assert "120/120" in stream.getvalue()  # and there was a bar


def test_output_goes_above_the_bar_and_the_bar_stays() -> None:
    stream = screen.Screen()
    display = TerminalDisplay(stream=stream)
    display.event({"kind": "fit_start", "stage": "fit", "max_epochs": 1})
    display.event(train(30))
    display.event({"kind": "print", "rank": 1, "text": "hello"})
    display.event({"kind": "note", "text": "x" * 200})
    assert stream.rows[:2] == ["[rank 1] hello", "x" * 200]
    assert "30/120" in stream.rows[2] and len(stream.rows) == 3


def test_validation_takes_the_bar_and_gives_it_back() -> None:
    stream = screen.Screen()
    display = TerminalDisplay(stream=stream)
    display.event({"kind": "fit_start", "stage": "fit", "max_epochs": 1})
    display.event(train(120))
    display.event({"kind": "progress", "loop": "validation", "epoch": 0, "batch": 5, "total": 5, "values": {}})
    assert stream.rows[-1].startswith("epoch 1/1  validation  ") and "5/5" in stream.rows[-1]
    display.event({"kind": "loop_end", "loop": "validation", "values": {}})
    assert "120/120" in stream.rows[-1] and "validation" not in stream.rows[-1]


def test_an_unknown_length_has_no_bar_but_a_count() -> None:
    stream = screen.Screen()
    display = TerminalDisplay(stream=stream)
    display.event({"kind": "stage_start", "stage": "predict"})
    display.event({"kind": "progress", "loop": "predict", "epoch": 0, "batch": 7, "total": None, "values": {}})
    assert stream.rows == ["predict  7 batches"]


def test_the_bar_is_never_wider_than_the_terminal() -> None:
    stream = screen.Screen()
    display = TerminalDisplay(stream=stream)
    display.event(train(3, values={f"a_long_name_{k}": 0.5 for k in range(20)}))
    assert len(stream.rows[-1]) <= 79 and stream.rows[-1].endswith("…")


def test_redrawing_is_rare() -> None:
    stream = screen.Screen()
    display = TerminalDisplay(stream=stream)
    start = time.monotonic()
    for batch in range(1000):
        display.event(train(batch, total=5000))
    assert stream.getvalue().count("\x1b[2K") <= 2 + 10 * (time.monotonic() - start)


def test_without_a_terminal_type_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = screen.Screen()
    display = TerminalDisplay(stream=stream)
    for event in a_fit():
        display.event(event)
    assert stream.getvalue() == shown(a_fit())


def test_a_bar_that_cannot_be_drawn_gives_way_to_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    stream = screen.Screen()
    display = TerminalDisplay(stream=stream)
    for event in a_fit():
        display.event(event)
    assert stream.getvalue() == shown(a_fit())


def test_many_threads_may_send() -> None:
    stream = screen.Screen()
    display = TerminalDisplay(stream=stream)
    display.event(train(1))

    def talk(rank: int) -> None:
        for k in range(50):
            display.event({"kind": "print", "rank": rank, "text": f"line {k}"})
            display.event(train(k))

    threads = [threading.Thread(target=talk, args=(rank,)) for rank in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    display.close()
    assert sorted(stream.rows[:-1]) == sorted(f"[rank {r}] line {k}" for r in range(1, 5) for k in range(50))


# -- this process's own output, in a real terminal -------------------------------------------------------------------
_SCRIPT = """
import sys, warnings
from raylit.display import TerminalDisplay
out, err = sys.stdout, sys.stderr
display = TerminalDisplay()
def train(batch):
    display.event({"kind": "progress", "loop": "train", "epoch": 0, "batch": batch, "total": 9, "values": {}})
print("before", flush=True)
display.event({"kind": "fit_start", "stage": "fit", "max_epochs": 1})
train(1)
print("above", "w" * 100)
print("error", file=sys.stderr)
warnings.warn("careful")
print("prompt> ", end="", flush=True)
train(9)
print("answer")
print("no newline", end="")
if "exit" in sys.argv:
    sys.exit(0)
display.event({"kind": "end", "status": "finished"})
assert sys.stdout is out and sys.stderr is err
print("after")
"""


def _in_a_terminal(*arguments: str) -> str:
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True,
    )  # fmt: skip
    os.close(theirs)
    output = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # EIO: the other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(ours)
    assert process.wait(30) == 0, output.decode()
    return output.decode().replace("\r\n", "\n")


def test_this_process_own_prints_go_above_the_bar() -> None:
    output = _in_a_terminal()
    rows = screen.rows_of(output)
    assert rows[:4] == ["before", "above " + "w" * 100, "error", "<string>:13: UserWarning: careful"]
    assert rows[4:] == ["prompt> answer", "no newline", "after", ""]
    assert "9/9" in output  # the bar came back after the prompt was answered


def test_a_script_that_ends_early_leaves_a_clean_last_row() -> None:
    assert screen.rows_of(_in_a_terminal("exit"))[-3:] == ["prompt> answer", "no newline", ""]


def test_a_bar_costs_no_import_before_it_is_drawn() -> None:
    code = (
        "import sys; from raylit.display import TerminalDisplay as T; d = T();"
        "d.event({'kind': 'fit_start', 'stage': 'fit'}); d.event({'kind': 'note', 'text': ''});"
        "sys.stdout.isatty = lambda: True; d.event({'kind': 'fit_start', 'stage': 'fit'});"
        "d.event({'kind': 'progress', 'loop': 'sanity', 'epoch': 0, 'batch': 1, 'total': 2, 'values': {}});"
        "assert not any(name.split('.')[0] == 'rich' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
