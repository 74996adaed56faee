"""The live channel between two ends in one process: order, tagging, strangers, an unreachable driver."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from typing import Any

import pytest

from raylit.driver.channel import DriverChannel
from raylit.wire import ChannelAddress, World
from raylit.worker.channel import StreamToChannel, WorkerChannel, redirected


class Recorded:
    """Collects events; ``wait(n)`` returns once n of them are there."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._more = threading.Condition()

    def __call__(self, event: dict[str, Any]) -> None:
        with self._more:
            self.events.append(event)
            self._more.notify_all()

    def wait(self, count: int) -> list[dict[str, Any]]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.events) >= count, timeout=30)
        return self.events


class Pipe:
    """Stands in for a WorkerChannel."""

    def __init__(self) -> None:
        self.dead = False
        self.sent: list[dict[str, Any]] = []

    def send(self, event: dict[str, Any], *, must_arrive: bool = False) -> None:
        self.sent.append(event)


def test_events_arrive_in_order_and_workers_are_known() -> None:
    recorded = Recorded()
    driver = DriverChannel("127.0.0.1", recorded)
    workers = [WorkerChannel(driver.address, World(global_rank=r, node_name=f"n{r}"), pid=10 + r) for r in range(3)]
    for number in range(1000):
        for rank, worker in enumerate(workers):
            worker.send({"kind": "n", "rank": rank, "n": number}, must_arrive=True)
    for worker in workers:
        worker.close()
    driver.close()
    for rank in range(3):
        assert [e["n"] for e in recorded.events if e["kind"] == "n" and e["rank"] == rank] == list(range(1000))
    assert driver.workers == {0: ("n0", 10), 1: ("n1", 11), 2: ("n2", 12)}


def test_a_stranger_is_turned_away_and_others_still_served() -> None:
    recorded = Recorded()
    driver = DriverChannel("127.0.0.1", recorded)
    with pytest.raises(AuthenticationError):
        Client((driver.address.host, driver.address.port), authkey=b"guessed")
    worker = WorkerChannel(driver.address, World())
    worker.send({"kind": "after"})
    recorded.wait(2)
    worker.close()
    driver.close()
    assert [e["kind"] for e in recorded.events] == ["hello", "after"]


def test_a_display_that_raises_does_not_end_the_events() -> None:
    seen = Recorded()

    def broken(event: dict[str, Any]) -> None:
        seen(event)
        raise RuntimeError("display")

    driver = DriverChannel("127.0.0.1", broken)
    worker = WorkerChannel(driver.address, World())
    worker.send({"kind": "a"})
    worker.send({"kind": "b", "not_json": {1, 2}.__class__, 3: 4})
    worker.close()
    driver.close()
    assert [e["kind"] for e in seen.events] == ["hello", "a", "b"]


def test_an_unreachable_driver_costs_nothing_but_the_display() -> None:
    driver = DriverChannel("127.0.0.1", lambda event: None)
    closed = driver.address
    driver.close()
    worker = WorkerChannel(ChannelAddress(closed.host, closed.port, closed.key), World())
    for _ in range(10_000):
        worker.send({"kind": "progress"})
    worker.close()
    assert worker.dead


def test_lines_and_carriage_returns() -> None:
    pipe = Pipe()
    stream = StreamToChannel(pipe, 3, "stdout", io.StringIO())  # type: ignore[arg-type]
    stream.write("a")
    stream.write("b\nc\n\n")
    for percent in range(100):
        stream.write(f"\r{percent} %")
    stream.write("\nlast")
    assert [e["text"] for e in pipe.sent] == ["ab", "c", "", "99 %"]
    stream.finish()
    assert pipe.sent[-1] == {"kind": "print", "rank": 3, "text": "last", "stream": "stdout"}


def test_streams_are_put_back_and_left_alone_without_a_channel() -> None:
    before = sys.stdout, sys.stderr
    with redirected(None, 0):
        assert (sys.stdout, sys.stderr) == before
    pipe = Pipe()
    with contextlib.suppress(KeyError), redirected(pipe, 0):  # type: ignore[arg-type]
        print("said")
        raise KeyError
    assert (sys.stdout, sys.stderr) == before
    assert [e["text"] for e in pipe.sent] == ["said"]


def test_text_goes_to_the_former_stream_once_the_channel_is_dead() -> None:
    pipe, original = Pipe(), io.StringIO()
    stream = StreamToChannel(pipe, 0, "stderr", original)  # type: ignore[arg-type]
    pipe.dead = True
    stream.write("kept\n")
    assert original.getvalue() == "kept\n" and pipe.sent == []
