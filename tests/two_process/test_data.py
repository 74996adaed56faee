"""What each rank sees of the data: every sample once in evaluation and prediction, streams shared out, no hang."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import raylit
from raylit.errors import DataError
from tests.two_process.harness import Processes, RankFailed, run_here
from tests.two_process.modules import Net, Numbers, assert_equal, fit_case, loader, numbers


class Measures(Numbers):
    """Logs the mean of what it is tested on, and predicts twice the value."""

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("mean", batch.mean())
        self.log("sum", batch.sum(), reduce_fx="sum")
        self.log("largest", batch.max(), reduce_fx=max)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"twice": batch * 2, "rank": self.global_rank}


def values(count: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader([torch.tensor(float(i)) for i in range(count)], batch_size=batch_size)  # type: ignore[arg-type]


def test_case(rank: int, world_size: int, loaders: Callable[[], Any], arguments: dict[str, Any]) -> Any:
    ran = run_here(Measures(), loaders(), stage="test", rank=rank, world_size=world_size, **arguments)
    return [{name: float(value) for name, value in metrics.items()} for metrics in ran.outcome.result.metrics]


test_case.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_test_sees_each_sample_once(processes: Callable[[int], Processes], world_size: int, batch_size: int) -> None:
    ranks = processes(world_size)(test_case, lambda: values(5, batch_size), {})
    assert ranks == [[{"mean": 2.0, "sum": 10.0, "largest": 4.0}]] * world_size


def test_two_loaders_and_a_sequence_of_batches(two: Processes) -> None:
    ranks = two(test_case, lambda: [values(5, 2), numbers(7, 8, 9)], {})
    mean = [metrics[f"mean/dataloader_idx_{i}"] for i, metrics in enumerate(ranks[0])]
    assert mean == [2.0, 8.0] and ranks[0] == ranks[1]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_without_a_batch_of_one_loader_has_nothing_to_log_there(
    processes: Callable[[int], Processes], world_size: int
) -> None:
    ranks = processes(world_size)(test_case, lambda: [values(5, 2), values(1, 1), values(4, 1)], {})
    mean = [metrics[f"mean/dataloader_idx_{i}"] for i, metrics in enumerate(ranks[0])]
    assert mean == [2.0, 0.0, 1.5] and all(rank == ranks[0] for rank in ranks)


def log_on_rank_0(rank: int, world_size: int) -> None:
    class Half(Measures):
        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
            if rank == 0 or dataloader_idx == 0:
                self.log("mean", batch.mean())

    run_here(Half(), [values(4, 1), values(4, 1)], stage="test", rank=rank, world_size=world_size)


def test_a_rank_with_batches_that_does_not_log_is_an_error(two: Processes) -> None:
    with pytest.raises(RankFailed, match="'mean/dataloader_idx_1' was logged on rank 0 .* but not on rank 1"):
        two(log_on_rank_0)


def test_a_limit_counts_batches_of_each_rank(two: Processes) -> None:
    ranks = two(test_case, lambda: values(12, 2), {"limit_test_batches": 2})
    assert ranks[0][0]["sum"] == sum(range(8))


def predict_case(rank: int, world_size: int, loaders: Callable[[], Any], arguments: dict[str, Any]) -> Any:
    ran = run_here(Measures(), loaders(), stage="predict", rank=rank, world_size=world_size, **arguments)
    return ran.outcome.result.predictions


def flat(predictions: Any) -> list[float]:
    return torch.cat([batch["twice"] for batch in predictions]).tolist()


@pytest.mark.parametrize(("count", "batch_size"), [(13, 2), (5, 8), (1, 1), (12, 3), (7, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_predictions_are_in_the_data_sets_order(
    processes: Callable[[int], Processes], world_size: int, count: int, batch_size: int
) -> None:
    loaders = lambda: values(count, batch_size)  # noqa: E731
    ranks = [predict_case(0, 1, loaders, {})] if world_size == 1 else processes(world_size)(predict_case, loaders, {})
    assert flat(ranks[0][0]) == [2.0 * i for i in range(count)]
    assert all(other is None for other in ranks[1:])


def test_predictions_of_two_loaders_under_a_limit(two: Processes) -> None:
    predictions = two(predict_case, lambda: [values(9, 2), values(3, 2)], {"limit_predict_batches": 1})[0]
    assert [flat(each) for each in predictions] == [[0.0, 2.0, 4.0, 6.0], [0.0, 2.0, 4.0]]
    assert {batch["rank"] for batch in predictions[0]} == {0, 1}


# Streams ----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """Numbers from 1, shared out as Hugging Face's data sets are."""

    def __init__(self, count: int, index: int = 0, num_shards: int = 1, length: bool = False) -> None:
        self.count, self.index, self.num_shards, self.length = count, index, num_shards, length

    def shard(self, num_shards: int, index: int) -> Stream:
        return Stream(self.count, index, num_shards, self.length)

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor(float(i + 1)) for i in range(self.index, self.count, self.num_shards))

    def __len__(self) -> int:
        if not self.length:
            raise TypeError("no length")
        return len(range(self.index, self.count, self.num_shards))


class Sees(Measures):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen += batch.tolist()
        return super().training_step(batch, batch_idx)


def stream_case(rank: int, world_size: int, loaders: Callable[[], Any], arguments: dict[str, Any]) -> Any:
    ran = run_here(Sees(), loaders(), rank=rank, world_size=world_size, **arguments)
    return ran.module.seen, ran.weights, ran.outcome.state.global_step


@pytest.mark.parametrize("length", [False, True], ids=["unknown_length", "known_length"])
@pytest.mark.parametrize(
    ("count", "arguments", "steps"),
    [
        (8, {}, 4),
        (7, {}, 3),  # the last of rank 0 has no partner
        (7, {"max_epochs": 2, "accumulate_grad_batches": 2}, 4),
        (9, {"limit_train_batches": 2}, 2),
        (7, {"limit_train_batches": 4}, 3),
        (7, {"max_epochs": 2, "max_steps": 5}, 5),
    ],
)
def test_a_stream_is_shared_out(
    two: Processes, count: int, arguments: dict[str, Any], steps: int, length: bool
) -> None:
    ranks = two(stream_case, lambda: DataLoader(Stream(count, length=length), batch_size=1), arguments)
    assert [r[2] for r in ranks] == [steps, steps]
    assert_equal(ranks[0][1], ranks[1][1])
    first = [r[0][: count // 2] for r in ranks]
    assert not set(first[0]) & set(first[1])
    assert set(first[0] + first[1]) <= set(range(1, count + 1))


def test_a_stream_with_fewer_items_than_ranks_trains_on_nothing(two: Processes) -> None:
    with pytest.raises(RankFailed, match="gave no batch") as caught:
        two(stream_case, lambda: DataLoader(Stream(1), batch_size=1), {})
    assert {type(e) for e in caught.value.errors.values()} == {DataError}


def test_streams_in_evaluation_may_be_uneven(two: Processes) -> None:
    ranks = two(test_case, lambda: DataLoader(Stream(7), batch_size=2), {})
    assert ranks[0] == ranks[1] == [{"mean": 4.0, "sum": 28.0, "largest": 7.0}]


class Unshared(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(4.0))


def test_a_stream_that_cannot_say_how_it_is_shared(two: Processes) -> None:
    with pytest.raises(RankFailed) as caught:
        two(stream_case, lambda: DataLoader(Unshared(), batch_size=1), {})
    message = str(caught.value.errors[0])
    assert (
        "Unshared" in message and "shard(num_shards, index)" in message and "use_distributed_sampler=False" in message
    )
    assert two(stream_case, lambda: DataLoader(Unshared(), batch_size=1), {"use_distributed_sampler": False})[0][2] == 4


def test_fewer_samples_than_workers(three: Processes) -> None:
    with pytest.raises(RankFailed, match="gives no batch at all.*world size 3") as caught:
        three(fit_case, Net, lambda: loader(2, 1), {})
    assert set(caught.value.errors) == {0, 1, 2}


class OwnLoaders(raylit.DataModule):
    """Notes who was asked for what, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def setup(self, stage: str) -> None:
        self.asked.append(f"setup {stage}")

    def train_dataloader(self) -> Any:
        self.asked.append("train")
        return loader(16, 2, shuffle=True)


def datamodule_case(rank: int, world_size: int) -> Any:
    data = OwnLoaders()
    ran = run_here(Net(), datamodule=data, rank=rank, world_size=world_size)
    return data.asked, ran.outcome.state.num_training_batches, ran.weights


def test_a_data_modules_loader_is_shared_out(two: Processes) -> None:
    ranks = two(datamodule_case)
    assert [r[:2] for r in ranks] == [(["setup fit", "train"], 4)] * 2
    assert_equal(ranks[0][2], ranks[1][2])
