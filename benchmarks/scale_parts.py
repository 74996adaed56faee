"""What one message costs, for messages of which a run of N workers has N or more: the figures behind docs/scale.md.

    python benchmarks/scale_parts.py                                 all parts, for 1,000 workers
    python benchmarks/scale_parts.py --only channel reduction        some of them
    python benchmarks/scale_parts.py --workers 4000

No part starts 1,000 workers. Each has as many messages as 1,000 workers send at the one place where they all meet, the
senders being threads, or a few actors that answer many times; so it measures that place, and neither a network nor the
workers. How it is measured, part by part:

    polls      Ray Train's controller asks each worker how it is. ``--actors`` actors of no resources answer a status
               like Ray's; one round submits a call to each of N (actors answer several times), waits for all, and gets
               each answer. Wall and CPU time of the asking process, a worker, median of the rounds.
    barrier    ``ray.train.get_preemption_info`` and ``report`` are calls of all ranks to one asyncio actor, which
               answers when the last has come. N calls from this process; CPU time of the actor's process a call, and
               whether N + 1 calls are ever answered (``--beyond``).
    waits      The end of an evaluation: ``ray.wait`` for one of N references until none is left.
    channel    N connections to raylit's ``DriverChannel`` from another process: seconds until all are known, what
               memory they take, and how many events a second come through when all of them print.
    reduction  The end of a loop with 10 logged keys, on one rank, once N ranks' numbers are there: the steady one (a
               vector a rank) and the first one (keys and values as objects). No network: this thread's CPU time.
    notes      What rank 0 reads and deletes for a checkpoint: N - 1 small files, on this machine's disk.
    gloo       Process groups of 2, 4, ... ``--gloo`` ranks, each rank a thread of this process: open files a rank, the
               bytes that each rank publishes in the store, and the time of one all-reduce of a number and one
               all-gather of a 10-key vector. All ranks share these cores, so its milliseconds are an upper bound.
    store      Reads of 8 KiB values from one torch TCPStore by 8 threads: requests and bytes a second.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import pickle
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

KEYS = 10  # logged metrics


def row(part: str, what: str, value: str) -> None:
    print(f"| {part:9} | {what:66} | {value:>22} |", flush=True)


# -- Ray -------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def own_ray() -> Iterator[Any]:
    """A Ray of this program alone: in a folder of its own, whatever else runs on the machine."""
    import ray

    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                 object_store_memory=100_000_000)  # fmt: skip
        try:
            yield ray
        finally:
            ray.shutdown()


class Status:
    """As large as the ``WorkerStatus`` of a worker that trains."""

    def __init__(self) -> None:
        self.running, self.error, self.training_report, self.return_value, self.preemption_info = (True, *[None] * 4)


class Answering:
    def poll_status(self) -> Status:
        return Status()


class Meeting:
    """A barrier as Ray Train's: an asyncio actor, with Ray's own limit on calls at a time."""

    async def meet(self, expected: int) -> None:
        import asyncio

        if not hasattr(self, "condition"):
            self.condition, self.here = asyncio.Condition(), 0
        async with self.condition:
            self.here += 1
            if self.here == expected:
                self.condition.notify_all()
                self.here = 0
            else:
                await self.condition.wait()

    async def pid(self) -> int:
        return os.getpid()


def polls(ray: Any, workers: int, actors: int, rounds: int = 7) -> None:
    answering = [ray.remote(Answering).options(num_cpus=0).remote() for _ in range(actors)]
    ray.get([each.poll_status.remote() for each in answering])
    seen: list[tuple[float, float]] = []
    for _ in range(rounds):
        began, cpu = time.perf_counter(), time.process_time()
        refs = [answering[number % actors].poll_status.remote() for number in range(workers)]
        ray.wait(refs, num_returns=len(refs))
        for ref in refs:
            ray.get(ref)
        seen.append((time.perf_counter() - began, time.process_time() - cpu))
    wall, cpu = (statistics.median(each[index] for each in seen) for index in (0, 1))
    row("polls", f"one poll of {workers} workers, {actors} actors: wall", f"{wall * 1e3:.0f} ms")
    row("polls", "CPU of the asking process, a worker", f"{cpu / workers * 1e6:.0f} us")
    for each in answering:
        ray.kill(each)


def barrier(ray: Any, workers: int, beyond: bool, rounds: int = 5) -> None:
    import psutil

    actor = ray.remote(Meeting).options(num_cpus=0).remote()
    process = psutil.Process(ray.get(actor.pid.remote()))
    seen: list[tuple[float, float]] = []
    for _ in range(rounds):
        began, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
        ray.get([actor.meet.remote(workers) for _ in range(workers)])
        seen.append((time.perf_counter() - began, sum(process.cpu_times()[:2]) - cpu))
    wall, cpu = (statistics.median(each[index] for each in seen) for index in (0, 1))
    row("barrier", f"{workers} calls to one asyncio actor: until all are answered", f"{wall * 1e3:.0f} ms")
    row("barrier", "CPU of the actor's process, a call", f"{cpu / workers * 1e6:.0f} us")
    if beyond:
        for count in (workers, workers + 1):
            answered, _ = ray.wait([actor.meet.remote(count) for _ in range(count)], num_returns=count, timeout=20)
            row("barrier", f"{count} calls: answered within 20 s", str(len(answered)))
    ray.kill(actor)


def waits(ray: Any, workers: int) -> None:
    refs = [ray.put(number) for number in range(workers)]
    began, pending = time.perf_counter(), list(refs)
    while pending:
        _, pending = ray.wait(pending, num_returns=1, timeout=1.0)
    row("waits", f"ray.wait for one of {workers}, until none is left", f"{time.perf_counter() - began:.2f} s")
    began = time.perf_counter()
    ray.wait(refs, num_returns=len(refs))
    row("waits", "one ray.wait for all of them", f"{(time.perf_counter() - began) * 1e3:.1f} ms")


# -- raylit's own ----------------------------------------------------------------------------------------------------
CLIENT = """
import sys, time
from raylit.wire import ChannelAddress
from raylit.worker import messages
host, port, key, workers, events = sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3]), *map(int, sys.argv[4:])
address = ChannelAddress(host, port, key)
open_ones = []
for rank in range(workers):
    open_ones.append(messages.connect(address, 60.0))
    messages.send(open_ones[-1], [{"kind": "hello", "rank": rank, "node": "node", "pid": 1}])
sys.stdin.readline()
for number in range(events):
    for rank, each in enumerate(open_ones):
        messages.send(each, [{"kind": "print", "rank": rank, "text": "x" * 60, "stream": "stdout"}])
sys.stdin.readline()
"""


def memory_mib() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**20


def channel(workers: int, events: int = 10) -> None:
    from raylit.driver.channel import DriverChannel

    raise_limit(2 * workers + 200)
    counted = [0]

    def count(event: dict[str, Any]) -> None:
        counted[0] += event["kind"] == "print"

    before = memory_mib()
    listening = DriverChannel("127.0.0.1", count)
    there = listening.address
    began = time.perf_counter()
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, there.host, str(there.port), there.key.hex(), str(workers), str(events)],
        stdin=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )  # fmt: skip
    assert client.stdin is not None
    while len(listening.workers) < workers and client.poll() is None:
        time.sleep(0.005)
    row("channel", f"{workers} workers connect, one after the other", f"{time.perf_counter() - began:.2f} s")
    row("channel", "memory of the driver for them", f"{memory_mib() - before:.0f} MiB")
    began = time.perf_counter()
    print(file=client.stdin, flush=True)
    while counted[0] < workers * events and client.poll() is None:
        time.sleep(0.005)
    a_second = counted[0] / (time.perf_counter() - began)
    row("channel", f"{workers * events} lines of all of them: a second", f"{a_second:,.0f}")
    with contextlib.suppress(BrokenPipeError):
        print(file=client.stdin, flush=True)
    client.wait()
    listening.close()


def raise_limit(files: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(files, hard), hard))


class AsMany:
    """A collective whose other ranks send what this one sends."""

    def __init__(self, ranks: int) -> None:
        import torch

        self.world_size, self.rank, self.device = ranks, 0, torch.device("cpu")
        self.sizes: list[int] = []  # bytes of this rank's message

    def all_gather(self, tensor: Any) -> list[Any]:
        self.sizes.append(tensor.nbytes)
        return [tensor.clone() for _ in range(self.world_size)]

    def all_gather_object(self, obj: Any) -> list[Any]:
        data = pickle.dumps(obj)
        self.sizes.append(len(data))
        return [pickle.loads(data) for _ in range(self.world_size)]


def reduction(workers: int, rounds: int = 5) -> None:
    import torch

    from raylit.metrics.place import BATCH_TRAIN
    from raylit.metrics.store import MetricStore

    collective = AsMany(workers)
    store = MetricStore(collective, torch.device("cpu"), len)  # type: ignore[arg-type]
    seconds = []
    for _ in range(rounds + 1):
        store.begin("train")
        store.set_batch([0] * 8)
        store.place = BATCH_TRAIN
        for key in range(KEYS):
            store.log(f"some_metric_{key}", torch.tensor(1.0), on_step=False, on_epoch=True)
        began = time.thread_time()
        store.end()
        seconds.append(time.thread_time() - began)
    row("reduction", f"first end of a loop, {KEYS} keys of {workers} ranks: on each rank", f"{seconds[0] * 1e3:.0f} ms")
    row("reduction", "what each rank sends then", f"{collective.sizes[0]:,} bytes")
    row("reduction", "every later end: on each rank", f"{statistics.median(seconds[1:]) * 1e3:.1f} ms")
    row("reduction", "what each rank sends then", f"{collective.sizes[-1]:,} bytes")


def notes(workers: int) -> None:
    import json

    import torch

    from raylit.checkpoint.folder import Folder
    from raylit.checkpoint.ranks import file_name, random_state
    from raylit.checkpoint.store import Store

    with tempfile.TemporaryDirectory() as at:
        folder = Folder(at)
        written = Store(folder).write_part("c", file_name(0), {"random": random_state(torch.device("cpu"))})
        note = json.dumps(asdict(written)).encode()
        names = [f"c/{file_name(rank)}.0123abcd.json" for rank in range(1, workers)]
        for name in names:
            folder.write_small(name, note)
        began = time.perf_counter()
        for name in names:
            folder.read(name)
        read = time.perf_counter() - began
        began = time.perf_counter()
        for name in names:
            folder.delete_file(name)
        row("notes", "a rank's file with random states alone; the note beside it",
            f"{written.size_bytes:,} + {len(note)} bytes")  # fmt: skip
        row("notes", f"reading {workers - 1} notes on a local disk", f"{read * 1e3:.0f} ms")
        row("notes", "deleting them", f"{(time.perf_counter() - began) * 1e3:.0f} ms")


# -- torch -----------------------------------------------------------------------------------------------------------
def gloo(most: int) -> None:
    import torch
    from torch.distributed import HashStore, ProcessGroupGloo

    raise_limit(2 * most * (most + 10) + 200)
    alive: list[Any] = []  # all groups: files of one that is closed meanwhile would be missing in the next count
    for lazy in (False, True):
        ranks = 2
        while ranks <= most:
            store, groups, files = HashStore(), [None] * ranks, open_files()
            alive.append(groups)
            make = group_of(ProcessGroupGloo, store, groups, ranks, lazy)
            threads(ranks, make)
            published = sum(len(store.get(key)) for key in store.list_keys()) / ranks
            times = {}
            for name, action in (
                ("all-reduce", lambda group: group.allreduce([torch.ones(1)]).wait()),
                ("all-gather", lambda group: group.allgather([list(torch.empty(group.size(), 33, dtype=torch.float64))],
                                                             [torch.ones(33, dtype=torch.float64)]).wait()),
            ):  # fmt: skip
                repeated = repeating(action, groups)
                threads(ranks, repeated)
                began = time.perf_counter()
                threads(ranks, repeated)
                times[name] = (time.perf_counter() - began) / TIMES * 1e3
            told = f"{(open_files() - files) / ranks:.0f} files, {published:.0f} B; " + ", ".join(
                f"{value:.2f}" for value in times.values()
            )
            row("gloo", f"{ranks} ranks{', lazy' * lazy}: files and bytes a rank; all-reduce, all-gather in ms", told)
            ranks *= 2


TIMES = 10  # a measured collective is repeated


def group_of(kind: Any, store: Any, groups: list[Any], ranks: int, lazy: bool) -> Callable[[int], None]:
    def make(rank: int) -> None:
        options = kind._Options()
        options._devices = [kind.create_device(hostname="127.0.0.1", lazy_init=lazy)]
        options._timeout = datetime.timedelta(seconds=120)
        groups[rank] = kind(store, rank, ranks, options)

    return make


def repeating(action: Callable[[Any], Any], groups: list[Any]) -> Callable[[int], None]:
    def repeat(rank: int) -> None:
        for _ in range(TIMES):
            action(groups[rank])

    return repeat


def threads(count: int, body: Callable[[int], None]) -> None:
    every = [threading.Thread(target=body, args=(number,)) for number in range(count)]
    for each in every:
        each.start()
    for each in every:
        each.join()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def store(size: int = 8192, clients: int = 8, reads: int = 1500) -> None:
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    server.set("key", "x" * size)
    connected = [TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(clients)]

    def read(number: int) -> None:
        for _ in range(reads):
            connected[number].get("key")

    began = time.perf_counter()
    threads(clients, read)
    a_second = clients * reads / (time.perf_counter() - began)
    told = f"{a_second:,.0f}, {a_second * size / 1e6:.0f} MB"
    row("store", f"{size} byte values read by {clients} threads: a second", told)


PARTS = ("polls", "barrier", "waits", "channel", "reduction", "notes", "gloo", "store")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--actors", type=int, default=8, help="that answer the polls")
    parser.add_argument("--gloo", type=int, default=64, help="most ranks of a group")
    parser.add_argument("--beyond", action="store_true", help="whether a barrier of one more worker is answered")
    args = parser.parse_args()
    import torch

    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    print(f"| {'part':9} | {'what':66} | {'measured':>22} |\n| {'---':9} | {'---':66} | {'---:':>22} |")
    if {"polls", "barrier", "waits"} & set(args.only):
        with own_ray() as ray:
            if "polls" in args.only:
                polls(ray, args.workers, args.actors)
            if "barrier" in args.only:
                barrier(ray, args.workers, args.beyond)
            if "waits" in args.only:
                waits(ray, args.workers)
    alone: dict[str, Callable[[], None]] = {
        "channel": lambda: channel(args.workers),
        "reduction": lambda: reduction(args.workers),
        "notes": lambda: notes(args.workers),
        "gloo": lambda: gloo(args.gloo),
        "store": store,
    }
    for name, part in alone.items():
        if name in args.only:
            part()


if __name__ == "__main__":
    main()
