"""MetricStore over real gloo processes."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raylit.errors import LogError
from raylit.metrics.place import BATCH_EVAL, BATCH_TRAIN
from raylit.metrics.store import MetricStore

CPU = torch.device("cpu")


class Gloo:
    """The port over gloo, counting its calls."""

    device = CPU

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.calls: list[str] = []

    def barrier(self) -> None:
        dist.barrier()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.calls.append("all_gather")
        out = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(out, tensor)
        return out

    def all_gather_object(self, obj: Any) -> list[Any]:
        self.calls.append("object")
        out: list[Any] = [None] * self.world_size
        dist.all_gather_object(out, obj)
        return out

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        raise AssertionError("not used")

    def all_reduce(self, tensor: torch.Tensor, op: str = "mean") -> torch.Tensor:
        raise AssertionError("not used")


def work(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        torch.save(scenarios(rank, world_size), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def scenarios(rank: int, world_size: int) -> dict[str, Any]:
    collective = Gloo()
    store = MetricStore(collective, CPU, len)
    results: dict[str, Any] = {}

    # An epoch mean of 1.0 with 2 batches on rank 0 and 1 elsewhere, three epochs: one collective each.
    for _ in range(3):
        store.begin("train")
        store.place = BATCH_TRAIN
        for _ in range(1 if rank else 2):
            store.set_batch([0])
            store.log("one", 1.0, on_epoch=True, on_step=False, sync_dist=True)
            store.log("rank", torch.tensor(float(rank)), on_epoch=True, on_step=False, reduce_fx="max")
        results["train"] = store.end().callback
    results["calls"] = list(collective.calls)

    # [0 .. 4] in batches of 1, and of 3: the last rank of three has no batch in the second.
    for name, size in (("test_1", 1), ("test_3", 3)):
        store.begin("test")
        store.place = BATCH_EVAL
        shards = torch.arange(5.0).split(size)[rank::world_size]
        for batch in shards:
            store.set_batch(batch)
            store.log("x", batch.mean())
        results[name] = store.end().callback

    from torchmetrics import MeanMetric

    metric = MeanMetric()
    store.begin("validation")
    store.place = BATCH_EVAL
    for value in torch.arange(5.0)[rank::world_size]:
        store.set_batch([0])
        metric(value)
        store.log("metric", metric)
    results["torchmetrics"] = store.end().callback

    store.begin("train")
    store.place = BATCH_TRAIN
    store.set_batch([0])
    if rank == world_size - 1:
        store.log("lonely", 1.0, on_epoch=True, sync_dist=True)
    store.sync_steps()
    try:
        store.end()
    except LogError as error:
        results["error"] = str(error)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_values_and_errors_over_gloo(world_size: int, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(world_size, port, str(tmp_path)), nprocs=world_size)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    for result in results:
        assert result["train"]["one"].item() == 1.0
        assert result["train"]["rank"].item() == world_size - 1
        assert result["calls"] == ["object", "all_gather", "all_gather"]
        assert result["test_1"]["x"].item() == 2.0
        assert result["test_3"]["x"].item() == 2.0
        assert result["torchmetrics"]["metric"].item() == 2.0
        assert f"'lonely' was logged on rank {world_size - 1} (" in result["error"]
    assert len({repr(result) for result in results}) == 1
