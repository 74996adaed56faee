"""Profilers: what they count, what they write, and that none is none."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path

import pytest
import torch

from raylit.errors import ConfigError
from raylit.profilers import PassThroughProfiler, PyTorchProfiler, SimpleProfiler, make_profiler


def test_names() -> None:
    assert make_profiler(None) is None
    assert isinstance(make_profiler("simple"), SimpleProfiler)
    assert isinstance(make_profiler("pytorch"), PyTorchProfiler)
    mine = SimpleProfiler()
    assert make_profiler(mine) is mine
    with pytest.raises(ConfigError, match="Did you mean 'simple'"):
        make_profiler("simpel")


def test_simple_counts_and_adds_up() -> None:
    profiler = SimpleProfiler()
    profiler.setup("fit")
    for _ in range(3):
        with profiler.profile("short"):
            pass
    with profiler.profile("long"):
        time.sleep(0.02)
    lines = profiler.summary().splitlines()
    assert lines[0].startswith("Profile of fit, rank 0, ")
    assert lines[1].split() == ["Action", "Mean", "s", "Total", "s", "Calls", "%"]
    assert [line.split()[0] for line in lines[3:]] == ["long", "short"]
    assert lines[4].split()[3] == "3"
    assert 0.02 <= float(lines[3].split()[2]) < 0.2


def test_simple_refuses_what_does_not_match() -> None:
    profiler = SimpleProfiler()
    with pytest.raises(ValueError, match="has not begun"):
        profiler.stop("a")
    profiler.start("a")
    with pytest.raises(ValueError, match="has begun"):
        profiler.start("a")


def test_an_action_that_raises_is_counted() -> None:
    profiler = SimpleProfiler()
    with pytest.raises(KeyError), profiler.profile("a"):
        raise KeyError
    with profiler.profile("a"):
        pass
    assert profiler.summary().splitlines()[3].split()[3] == "2"


def test_the_report_is_printed_on_rank_0_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, filename in [(0, None), (1, None), (1, "times")]:
        profiler = pickle.loads(pickle.dumps(SimpleProfiler(filename=filename, extended=False)))
        profiler.setup("test", rank, tmp_path / "run")
        with profiler.profile("a"):
            pass
        profiler.teardown("test")
        printed = capsys.readouterr().out
        assert ("Profile of test, rank 0" in printed) == (rank == 0)
    assert "Profile of test, rank 1" in (tmp_path / "run" / "times-test-rank1.txt").read_text()
    profiler.setup("fit")
    profiler.teardown("fit")
    assert capsys.readouterr().out == ""


def test_none_measures_nothing() -> None:
    profiler = PassThroughProfiler()
    assert profiler.profile("a") is profiler.profile("b")
    with profiler.profile("a"), profiler.profile("b"):
        pass
    profiler.start("a")
    profiler.stop("never begun")
    profiler.step()
    profiler.teardown("fit")
    assert profiler.summary() == ""


def test_pytorch_writes_a_trace_of_the_scheduled_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiler = pickle.loads(pickle.dumps(PyTorchProfiler()))
    profiler.setup("fit", 0, tmp_path)
    weight = torch.ones(4, 4)
    for _ in range(8):
        with profiler.profile("training_step"):
            weight @ weight
        profiler.step()
    profiler.teardown("fit")
    trace = json.loads((tmp_path / "profile-fit-rank0.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("training_step") == 3
    report = capsys.readouterr().out
    assert "Profile of fit, rank 0" in report and "aten::mm" in report


def test_pytorch_records_whole_stages_without_batches_to_count(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="trace", row_limit=5)
    profiler.setup("test", 2)
    torch.ones(2).sum()
    profiler.teardown("test")
    assert (tmp_path / "trace-test-rank2.json").exists()
    assert "aten::sum" in (tmp_path / "trace-test-rank2.txt").read_text()
    profiler.teardown("test")  # a second one finds nothing to end
