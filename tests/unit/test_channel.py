"""The live channel between two ends in one process: order, tagging, strangers, forks, an unreachable driver."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raylit.driver import channel as driver_side
from raylit.driver.channel import DriverChannel
from raylit.wire import ChannelAddress, World
from raylit.worker import channel as worker_side
from raylit.worker import messages
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


def silent(address: ChannelAddress) -> socket.socket:
    """A stranger who connects and says nothing."""
    return socket.create_connection((address.host, address.port), timeout=30)


def read_to_the_end(stranger: socket.socket) -> bytes:
    """What a stranger is told until it is turned away."""
    data = b""
    with stranger, contextlib.suppress(ConnectionResetError):
        while part := stranger.recv(4096):
            data += part
    return data


def forked(run: Callable[[], None]) -> None:
    """Run it in a forked process, as a data loader does, and see that the process ends well."""
    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    process.join(timeout=60)
    code = process.exitcode
    process.kill()
    process.join()
    assert code == 0


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
    with pytest.raises((EOFError, ConnectionResetError)):
        messages.connect(dataclasses.replace(driver.address, key=b"guessed"), 30)
    worker = WorkerChannel(driver.address, World())
    worker.send({"kind": "after"})
    recorded.wait(2)
    worker.close()
    driver.close()
    assert [e["kind"] for e in recorded.events] == ["hello", "after"]


def test_what_was_sent_just_before_the_end_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker has sent all and gone before the driver's thread gets to run again after the handshake."""
    admit, closing = messages.admit, threading.Event()

    def slow(*args: Any) -> None:
        admit(*args)
        assert closing.wait(30)

    monkeypatch.setattr(messages, "admit", slow)
    monkeypatch.setattr(driver_side, "_DRAIN_TIMEOUT_S", 30.0)
    recorded = Recorded()
    driver = DriverChannel("127.0.0.1", recorded)
    worker = WorkerChannel(driver.address, World())
    worker.send({"kind": "last"})
    worker.close()
    closer = threading.Thread(target=driver.close)
    closer.start()
    with driver._changed:
        assert driver._changed.wait_for(lambda: driver._closing, timeout=30)
    closing.set()
    closer.join()
    assert [e["kind"] for e in recorded.events] == ["hello", "last"]


def test_a_stranger_who_says_nothing_does_not_hold_up_the_workers() -> None:
    recorded = Recorded()
    driver = DriverChannel("127.0.0.1", recorded)
    with silent(driver.address):
        worker = WorkerChannel(driver.address, World())
        worker.send({"kind": "after"})
        recorded.wait(2)
        worker.close()
        driver.close()
    assert [e["kind"] for e in recorded.events] == ["hello", "after"]


def test_a_stranger_is_turned_away_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_side, "_HANDSHAKE_TIMEOUT_S", 0.05)
    driver = DriverChannel("127.0.0.1", lambda event: None)
    assert len(read_to_the_end(silent(driver.address))) == 32  # the challenge
    driver.close()


def test_a_stranger_who_says_much_is_not_listened_to() -> None:
    recorded = Recorded()
    driver = DriverChannel("127.0.0.1", recorded)
    stranger = silent(driver.address)
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        stranger.sendall(b"\xff" * 64)
        stranger.sendall(b"\xff" * 10_000_000)
    assert len(read_to_the_end(stranger)) <= 32
    driver.close()
    assert recorded.events == []


def test_more_silent_strangers_than_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_side, "_MAX_PENDING", 4)
    monkeypatch.setattr(driver_side, "_PENDING_GRACE_S", 0.01)
    recorded = Recorded()
    driver = DriverChannel("127.0.0.1", recorded)
    strangers = [silent(driver.address) for _ in range(20)]
    worker = WorkerChannel(driver.address, World())
    recorded.wait(1)
    worker.close()
    for stranger in strangers[:16]:
        read_to_the_end(stranger)
    driver.close()
    for stranger in strangers[16:]:
        read_to_the_end(stranger)


def test_a_false_driver_is_found_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"n" * 32)
                proof = connection.recv(64, socket.MSG_WAITALL)[32:]
                connection.sendall(proof)  # the worker's own answer must not do

        impostor = threading.Thread(target=pretend)
        impostor.start()
        with pytest.raises(messages.StrangerError):
            messages.connect(ChannelAddress("127.0.0.1", listener.getsockname()[1], b"key"), 30)
        impostor.join()


@pytest.mark.timeout(30)
def test_hung_workers_share_one_deadline_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_side, "_DRAIN_TIMEOUT_S", 1.0)
    recorded = Recorded()
    driver = DriverChannel("127.0.0.1", recorded)
    hung = [messages.connect(driver.address, 30) for _ in range(60)]
    for rank, connection in enumerate(hung):
        messages.send(connection, [{"kind": "hello", "rank": rank, "node": "n", "pid": 1}])
    recorded.wait(60)
    driver.close()
    for connection in hung:
        read_to_the_end(connection)


@pytest.mark.timeout(30)
def test_the_end_does_not_wait_for_forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_side, "_DRAIN_TIMEOUT_S", 100.0)
    recorded = Recorded()
    driver = DriverChannel("127.0.0.1", recorded)
    loader = messages.connect(driver.address, 30)
    messages.send(loader, [{"kind": "aside"}])
    messages.send(loader, [{"kind": "print"}])
    recorded.wait(1)
    driver.close()
    read_to_the_end(loader)
    assert recorded.events == [{"kind": "print"}]


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


def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_side, "_CONNECT_TIMEOUT_S", 0.05)
    log = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", log)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel connects; nobody speaks
        worker = WorkerChannel(ChannelAddress("127.0.0.1", listener.getsockname()[1], b"key"), World())
        worker.send({"kind": "print", "text": "said early"})
        assert worker._dead.wait(30)
        worker.send({"kind": "print", "text": "said late"})
        worker.close()
    assert worker.dead and sorted(log.getvalue().splitlines()) == ["said early", "said late"]


@pytest.mark.timeout(30)
def test_closing_a_dead_channel_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_side, "_CLOSE_TIMEOUT_S", 100.0)
    monkeypatch.setattr(sys, "__stderr__", io.StringIO())
    recorded = Recorded()
    driver = DriverChannel("127.0.0.1", recorded)
    worker = WorkerChannel(driver.address, World())
    recorded.wait(1)
    monkeypatch.setattr(driver_side, "_DRAIN_TIMEOUT_S", 0.0)
    driver.close()
    worker.send({"kind": "print", "text": "after the driver has gone"})
    assert worker._dead.wait(30)
    for _ in range(10_000):
        worker.send({"kind": "progress"}, must_arrive=True)
    worker.close()
    assert sys.__stderr__.getvalue() == "after the driver has gone\n"  # type: ignore[union-attr]


@pytest.mark.timeout(60)
def test_giving_up_on_a_driver_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_side, "_CLOSE_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = ChannelAddress("127.0.0.1", listener.getsockname()[1], b"key")
        worker = WorkerChannel(address, World())
        connection, _ = listener.accept()
        with connection:
            messages.admit(connection, b"key", 30)
            worker.send({"kind": "much", "text": "x" * 50_000_000})
            worker.close()
            assert worker.dead
            worker._thread.join()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_prints_of_forked_processes_arrive() -> None:
    recorded = Recorded()
    driver = DriverChannel("127.0.0.1", recorded)
    worker = WorkerChannel(driver.address, World(global_rank=3))
    stream = StreamToChannel(worker, 3, "stdout", io.StringIO())
    stream.write("the parent's ")

    def loader() -> None:
        stream.write("one\ntwo\nno newline")

    with stream._lock, worker._queue.mutex:  # as if other threads were printing at the fork
        forked(loader)
        forked(loader)
    stream.write("line\n")
    worker.close()
    driver.close()
    texts = [e["text"] for e in recorded.events if e["kind"] == "print" and e["rank"] == 3]
    assert sorted(texts) == sorted(["one", "two", "no newline"] * 2 + ["the parent's line"])
    assert [e["kind"] for e in recorded.events].count("hello") == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("known", [True, False])
def test_prints_of_forked_processes_are_kept_without_a_driver(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the worker knew at the fork that the driver has gone, or its process finds out."""
    recorded = Recorded()
    driver = DriverChannel("127.0.0.1", recorded)
    with open(tmp_path / "log", "w") as log:
        monkeypatch.setattr(sys, "__stderr__", log)
        worker = WorkerChannel(driver.address, World())
        stream = StreamToChannel(worker, 0, "stdout", log)
        recorded.wait(1)
        monkeypatch.setattr(driver_side, "_DRAIN_TIMEOUT_S", 0.0)
        driver.close()
        if known:
            worker.send({"kind": "progress"})
            assert worker._dead.wait(30)

        def loader() -> None:
            stream.write("one\n")
            stream.write("two\n")
            log.flush()

        forked(loader)
        worker.close()
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_that_lives_on_does_not_hold_the_connection_open() -> None:
    recorded = Recorded()
    driver = DriverChannel("127.0.0.1", recorded)
    worker = WorkerChannel(driver.address, World())
    recorded.wait(1)
    begun, release = os.pipe(), os.pipe()

    def loader() -> None:
        os.write(begun[1], b"x")
        os.read(release[0], 1)

    process = multiprocessing.get_context("fork").Process(target=loader, daemon=True)
    process.start()
    try:
        os.read(begun[0], 1)
        worker.close()
        reader = driver._known[0].thread if driver._known else None
        if reader is not None:
            reader.join(timeout=30)
            assert not reader.is_alive()
    finally:
        os.write(release[1], b"x")
        process.join()
        for end in (*begun, *release):
            os.close(end)
        driver.close()


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
