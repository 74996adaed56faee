"""MetricStore over several workers, as threads with a fake collective."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylit.errors import LogError
from raylit.metrics.place import BATCH_EVAL, BATCH_TRAIN, EPOCH_EVAL
from raylit.metrics.store import MetricStore

CPU = torch.device("cpu")


class Exchange:
    """What the ranks of one fake job share: a barrier, one seat a rank, and the kinds of collectives so far."""

    def __init__(self, world_size: int) -> None:
        self.seats: list[Any] = [None] * world_size
        # A rank left alone at a collective is an error within seconds here, where it would hang in a real job.
        self.barrier = threading.Barrier(world_size, timeout=10)
        self.calls: list[str] = []


class FakeCollective:
    device = CPU

    def __init__(self, rank: int, world_size: int, exchange: Exchange) -> None:
        self.rank, self.world_size, self._exchange = rank, world_size, exchange

    def _swap(self, kind: str, value: Any) -> list[Any]:
        exchange = self._exchange
        if self.rank == 0:
            exchange.calls.append(kind)
        exchange.seats[self.rank] = (kind, value)
        exchange.barrier.wait()
        seats = list(exchange.seats)
        exchange.barrier.wait()
        assert {seat[0] for seat in seats} == {kind}, seats
        return [seat[1] for seat in seats]

    def barrier(self) -> None:
        self._swap("barrier", None)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        gathered = self._swap("all_gather", tensor.clone())
        assert len({(t.shape, t.dtype) for t in gathered}) == 1
        return gathered

    def all_gather_object(self, obj: Any) -> list[Any]:
        return self._swap("object", obj)

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        return self._swap("broadcast", obj)[src]

    def all_reduce(self, tensor: torch.Tensor, op: str = "mean") -> torch.Tensor:
        raise AssertionError("not used")


def on_ranks(world_size: int, body: Callable[[MetricStore, int], Any], **kwargs: Any) -> tuple[list[Any], Exchange]:
    """Run ``body(store, rank)`` on every rank; return results (or exceptions) in rank order, and the exchange."""
    exchange = Exchange(world_size)
    results: list[Any] = [None] * world_size

    def work(rank: int) -> None:
        modules = kwargs.get("modules")
        named = (lambda: modules[rank].named_modules()) if modules else tuple
        store = MetricStore(FakeCollective(rank, world_size, exchange), CPU, len, named)
        try:
            results[rank] = body(store, rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, exchange


def values(results: list[Any]) -> list[dict[str, float]]:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return [{k: v.item() for k, v in result.callback.items()} for result in results]


batches_of_rank = st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5), max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(batches_of_rank, min_size=2, max_size=3))
def test_uneven_shards_give_the_values_of_the_whole_data_set(shards: list[list[list[float]]]) -> None:
    def body(store: MetricStore, rank: int) -> Any:
        store.begin("validation")
        store.place = BATCH_EVAL
        for batch in shards[rank]:
            data = torch.tensor(batch, dtype=torch.float32)
            store.set_batch(data)
            store.log("mean", data.double().mean())
            store.log("sum", data.double().sum(), reduce_fx="sum")
            store.log("min", data.min(), reduce_fx="min", on_step=True)
            store.log("max", float(data.max()), reduce_fx=max)
            store.log("firsts", data[0], reduce_fx=lambda v: v.sum())
        return store.end()

    results = values(on_ranks(len(shards), body)[0])
    everything = torch.tensor([x for shard in shards for batch in shard for x in batch], dtype=torch.float64)
    assert all(result == results[0] for result in results)
    if not len(everything):
        assert results[0] == {}
        return
    assert results[0]["mean"] == pytest.approx(everything.mean().item(), rel=1e-9, abs=1e-9)
    assert results[0]["sum"] == pytest.approx(everything.sum().item(), rel=1e-9, abs=1e-9)
    assert results[0]["min"] == results[0]["min_epoch"] == everything.min().item()
    assert results[0]["max"] == everything.max().item()
    firsts = sum(batch[0] for shard in shards for batch in shard)
    assert results[0]["firsts"] == pytest.approx(firsts, rel=1e-9, abs=1e-9)


def test_an_epoch_mean_of_one_is_one() -> None:
    def body(store: MetricStore, rank: int) -> Any:
        store.begin("train")
        store.place = BATCH_TRAIN
        for _ in range(2 - rank):
            store.set_batch([0])
            store.log("x", 1.0, sync_dist=True, on_epoch=True)
        return store.end()

    assert values(on_ranks(2, body)[0])[0]["x"] == 1.0


def test_one_collective_a_loop_end() -> None:
    def body(store: MetricStore, rank: int) -> Any:
        for _ in range(3):
            store.begin("train")
            store.place = BATCH_TRAIN
            for value in range(5):
                store.set_batch([0] * (rank + 1))
                for key in range(10):
                    store.log(f"key_{key}", torch.tensor(float(value)), on_epoch=True)
            end = store.end()
        return end

    _, exchange = on_ranks(3, body)
    assert exchange.calls == ["object", "all_gather", "all_gather"]


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("kwargs", [{}, {"on_epoch": True}, {"on_epoch": True, "sync_dist": True}])
def test_a_key_on_one_rank_only_is_an_error_everywhere(epoch: int, kwargs: dict[str, Any]) -> None:
    def body(store: MetricStore, rank: int) -> Any:
        for i in range(3):
            store.begin("train")
            store.place = BATCH_TRAIN
            store.set_batch([0])
            store.log("loss", 1.0, on_epoch=True, sync_dist=True)
            if rank == 1 and i == epoch:
                store.log("lonely", 1.0, **kwargs)
            store.sync_steps()
            store.end()
        return None

    results, _ = on_ranks(3, body)
    for result in results:
        assert isinstance(result, LogError)
        assert "'lonely' was logged on rank 1 (" in str(result)
        assert "test_workers.py" in str(result)
        assert "not on ranks 0, 2" in str(result)


def test_a_key_missing_in_one_later_epoch_is_an_error() -> None:
    def body(store: MetricStore, rank: int) -> Any:
        for i in range(2):
            store.begin("train")
            store.place = BATCH_TRAIN
            store.set_batch([0])
            if not (rank == 0 and i == 1):
                store.log("loss", 1.0, on_epoch=True)
            store.end()
        return None

    results, exchange = on_ranks(2, body)
    assert all("'loss' was logged on rank 1" in str(r) and "not on rank 0" in str(r) for r in results)
    assert exchange.calls == ["object", "all_gather"]


def test_keys_that_come_and_go_on_all_ranks_are_no_error() -> None:
    def body(store: MetricStore, rank: int) -> Any:
        names = []
        for i in range(6):
            store.begin("train")
            store.place = BATCH_TRAIN
            store.set_batch([0])
            store.log("loss", 1.0, on_epoch=True)
            if i % 2:
                store.log("sometimes", rank, on_epoch=True, on_step=False)
            names.append(sorted(store.end().callback))
        return names

    results, exchange = on_ranks(2, body)
    assert results[0] == results[1] == [["loss", "loss_epoch"], ["loss", "loss_epoch", "sometimes"]] * 3
    assert exchange.calls == ["object", "all_gather", "object", *["all_gather"] * 4]


def test_different_settings_on_ranks_are_an_error_everywhere() -> None:
    def body(store: MetricStore, rank: int) -> Any:
        store.begin("train")
        store.place = BATCH_TRAIN
        store.set_batch([0])
        store.log("x", 1.0, on_epoch=True, reduce_fx="sum" if rank else "mean")
        return store.end()

    results, _ = on_ranks(2, body)
    assert all("rank 0 (" in str(r) and "reduce_fx='mean' against reduce_fx='sum'" in str(r) for r in results)


def test_who_sees_a_value_may_differ_by_rank() -> None:
    def body(store: MetricStore, rank: int) -> Any:
        store.begin("train")
        store.place = BATCH_TRAIN
        store.set_batch([0])
        store.log("x", float(rank), on_epoch=True, prog_bar=rank == 0, logger=rank == 0)
        return store.end()

    results, _ = on_ranks(2, body)
    assert [set(r.logger) for r in results] == [{"x_epoch"}, set()]
    assert values(results)[1]["x"] == 0.5


def test_rank_zero_only_leaves_the_workers_out() -> None:
    def body(store: MetricStore, rank: int) -> Any:
        ends = []
        for _ in range(2):
            store.begin("train")
            store.place = BATCH_TRAIN
            store.set_batch([0])
            store.log("all", float(rank), on_epoch=True, rank_zero_only=True)
            if rank == 0:
                store.log("mine", 5.0, on_epoch=True, rank_zero_only=True)
                store.log("median", 3.0, on_epoch=True, rank_zero_only=True, reduce_fx=lambda v: v.median())
            ends.append(store.end())
        return ends[-1]

    for result in values(on_ranks(2, body)[0]):
        assert (result["all"], result["mine"], result["median"]) == (0.0, 5.0, 3.0)


def test_a_rank_without_batches_is_exempt_and_gets_every_value() -> None:
    def body(store: MetricStore, rank: int) -> Any:
        ends = []
        for _ in range(2):
            store.begin("test")
            store.place = BATCH_EVAL
            for value in ([4.0], [1.0, 2.0], [])[rank]:
                store.set_batch([0])
                store.log("x", value)
                store.log("spread", value, reduce_fx=lambda v: v.max() - v.min())
            store.place = EPOCH_EVAL
            store.log("hook", (4.0, 1.5, float("nan"))[rank])
            ends.append(store.end())
        assert values([ends[0]]) == values([ends[1]])
        return ends[-1]

    for result in values(on_ranks(3, body)[0]):
        assert result["x"] == pytest.approx(7 / 3, abs=1e-12)
        assert result["spread"] == 3.0
        # An epoch hook's value counts for the samples its rank has seen: (4 * 1 + 1.5 * 2) / 3.
        assert result["hook"] == pytest.approx(7 / 3, abs=1e-12)


def test_step_values_with_sync_dist_are_reduced_where_all_ranks_meet() -> None:
    def body(store: MetricStore, rank: int) -> Any:
        store.begin("train")
        store.place = BATCH_TRAIN
        seen = []
        for i in range(3):
            store.set_batch([0])
            store.log("mean", torch.tensor(rank), sync_dist=True)  # an integer mean is not floored
            store.log("max", float(rank), sync_dist=True, sync_dist_op="max", on_epoch=True)
            store.log("local", float(rank))
            if rank == 1 and i == 2:
                store.log("late", 1.0, sync_dist=True)
            store.sync_steps()
            seen.append({k: v.item() for k, v in store.take_step_metrics().items()})
        return seen

    results, exchange = on_ranks(2, body)
    assert exchange.calls == ["object", *["all_gather"] * 3]
    assert results[0][0] == {"mean": 0.5, "max_step": 1.0, "local": 0.0}
    assert results[1] == [{"mean": 0.5, "max_step": 1.0, "local": 1.0}] * 2 + [{**results[1][0], "late": 1.0}]


def test_results_are_the_same_bits_on_all_ranks() -> None:
    def body(store: MetricStore, rank: int) -> Any:
        generator = torch.Generator().manual_seed(rank)
        ends = []
        for _ in range(2):
            store.begin("train")
            store.place = BATCH_TRAIN
            for _ in range(100):
                store.set_batch([0] * (1 + rank))
                store.log("x", torch.rand((), generator=generator), on_epoch=True)
            ends.append(store.end())
        return ends[-1]

    results = values(on_ranks(3, body)[0])
    assert results[0] == results[1] == results[2]


class Holder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torchmetrics import MeanMetric
        from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

        self.accuracy = MulticlassAccuracy(num_classes=3, average="micro")
        self.auroc = BinaryAUROC()  # list states
        self.mean = MeanMetric()


@pytest.mark.parametrize("sizes", [(4, 3), (4, 0)])
def test_torchmetrics_are_computed_over_all_ranks_and_reset(sizes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(sum(sizes), generator=generator)
    target = torch.arange(sum(sizes)) % 2
    holders = [Holder(), Holder()]

    def body(store: MetricStore, rank: int) -> Any:
        module, ends = holders[rank], []
        for _ in range(2):
            store.begin("validation")
            store.place = BATCH_EVAL
            start = sizes[0] * rank
            for i in range(start, start + sizes[rank]):
                store.set_batch([0])
                module.accuracy((scores[i : i + 1] > 0.5).long(), target[i : i + 1])
                module.auroc.update(scores[i : i + 1], target[i : i + 1])
                store.log("acc", module.accuracy, on_step=True, on_epoch=True)
                store.log("auroc", module.auroc)
            ends.append(store.end())
        assert module.accuracy.update_count == 0
        assert not module.auroc.preds
        return ends[-1]

    from torchmetrics.functional.classification import binary_auroc

    for result in values(on_ranks(2, body, modules=holders)[0]):
        assert result["acc"] == pytest.approx(((scores > 0.5).long() == target).double().mean().item(), abs=1e-6)
        assert result["auroc"] == pytest.approx(binary_auroc(scores, target).item(), abs=1e-6)


def test_torchmetrics_on_one_worker_and_over_a_resume() -> None:
    def run(store: MetricStore, module: Holder, numbers: range) -> None:
        store.place = BATCH_TRAIN
        for i in numbers:
            store.set_batch([0])
            module.mean(float(i))
            store.log("mean", module.mean, on_step=True, on_epoch=True)

    first, second = Holder(), Holder()
    store = MetricStore(None, CPU, len, first.named_modules)
    store.begin("train")
    run(store, first, range(3))
    assert store.step_metrics().callback["mean_step"].item() == 2.0
    resumed = MetricStore(None, CPU, len, second.named_modules)
    resumed.load_state_dict(store.state_dict())
    run(resumed, second, range(3, 6))
    assert resumed.end().callback["mean"].item() == 2.5
    assert second.mean.update_count == 0


def test_torchmetrics_without_a_batch_value() -> None:
    module = Holder()
    store = MetricStore(None, CPU, len)
    store.begin("train")
    store.place = BATCH_TRAIN
    module.mean.update(1.0)
    with pytest.raises(LogError, match=r"only update\(\) was called"):
        store.log("mean", module.mean)


def test_a_metric_that_is_no_single_number_says_what_to_do_instead() -> None:
    from torchmetrics import MetricCollection
    from torchmetrics.classification import BinaryAccuracy, BinaryConfusionMatrix

    def logged(metric: Any) -> None:
        store = MetricStore(None, CPU, len)
        store.begin("test")
        store.place = BATCH_EVAL
        store.set_batch([0])
        metric.update(torch.tensor([0.2, 0.7]), torch.tensor([0, 1]))
        store.log("found", metric)
        store.end()

    with pytest.raises(LogError, match=r"log\('found'\) at .*test_workers.py.*\(2, 2\).*epoch-end hook"):
        logged(BinaryConfusionMatrix())
    with pytest.raises(LogError, match=r"log\('found'\) at .*test_workers.py.*gave dict.*Use log_dict"):
        logged(MetricCollection({"accuracy": BinaryAccuracy()}))


def test_a_metric_that_was_never_updated_is_named() -> None:
    from torchmetrics import CatMetric

    class Strict(CatMetric):
        def compute(self) -> Any:
            if not len(self.value):
                raise ValueError("No samples to concatenate")

    store = MetricStore(None, CPU, len)
    store.begin("test")
    store.place = BATCH_EVAL
    store.set_batch([0])
    store.log("found", Strict())
    with pytest.raises(LogError, match=r"log\('found'\) at .*test_workers.py.*Strict failed.*Was it updated"):
        store.end()
