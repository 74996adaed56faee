"""Contract 6: what a logged number is. One, two and three workers give the number of the whole data set, by hand.

Ten samples in batches of 3 make shards and batches of unequal size on two and three workers. Expected values are
computed in float64 from all samples that were seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import raylit
from tests.two_process.harness import Processes, run_here

on_workers = pytest.mark.parametrize("workers", [1, 2, 3])
COUNT = 11


def data() -> Tensor:
    return torch.rand(COUNT, generator=torch.Generator().manual_seed(0)) * 3 - 1


def loader(batch_size: int = 3) -> DataLoader[Any]:
    return DataLoader(TensorDataset(data()), batch_size=batch_size)


def trained_on(workers: int, batch_size: int = 3) -> Tensor:
    """The samples of a training epoch: fewer than there are workers are dropped at the end."""
    seen, step = 0, workers * batch_size
    while seen + step <= COUNT:
        seen += step
    return data()[: seen + (COUNT - seen) // workers * workers]


def run(processes: Callable[[int], Processes], workers: int, case: Callable[..., Any], *args: Any) -> list[Any]:
    """The case's result of each rank; one worker runs here."""
    return [case(0, 1, *args)] if workers == 1 else processes(workers)(case, *args)


def the_same(results: list[dict[str, float]]) -> dict[str, float]:
    """All ranks have the same numbers, to the bit."""
    assert all(repr(result) == repr(results[0]) for result in results)
    return results[0]


class Base(raylit.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.settings = settings

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight * batch[0].mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


# -- weights and reductions ------------------------------------------------------------------------------------------
REDUCTIONS = {"mean": ["mean", torch.mean], "sum": ["sum", torch.sum, sum], "min": ["min", torch.min, torch.amin, min],
              "max": ["max", torch.max, torch.amax, max]}  # fmt: skip


class Reductions(Base):
    def log_all(self, x: Tensor) -> None:
        own = {"mean": x.mean(), "sum": x.sum(), "min": x.min(), "max": x.max()}
        for name, spellings in REDUCTIONS.items():
            for index, fx in enumerate(spellings):
                self.log(f"{name}_{index}", own[name], on_step=False, on_epoch=True, reduce_fx=fx)
        # A mean of the positive ones only: their number is the weight.
        positive = x[x > 0]
        self.log("positive", positive.mean() if len(positive) else 0.0, on_step=False, on_epoch=True,
                 batch_size=len(positive))  # fmt: skip
        self.log("unweighted", x.mean(), on_step=False, on_epoch=True, batch_size=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log_all(batch[0])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_all(batch[0])

    test_step = validation_step


def reductions_case(rank: int, world_size: int, stage: str) -> tuple[dict[str, float], list[float]]:
    seen: list[Tensor] = []

    class Watched(Reductions):
        def log_all(self, x: Tensor) -> None:
            seen.append(x.clone())
            super().log_all(x)

    ran = run_here(Watched(), loader(), stage=stage, rank=rank, world_size=world_size)
    return ran.metrics, [x.double().mean().item() for x in seen]


@on_workers
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_epoch_values_are_those_of_the_whole_data_set(processes: Any, workers: int, stage: str) -> None:
    results = run(processes, workers, reductions_case, stage)
    metrics = the_same([metrics for metrics, _ in results])
    seen = (trained_on(workers) if stage == "fit" else data()).double()
    expected = {"mean": seen.mean(), "sum": seen.sum(), "min": seen.min(), "max": seen.max()}
    for name, spellings in REDUCTIONS.items():
        for index in range(len(spellings)):
            assert metrics[f"{name}_{index}"] == pytest.approx(expected[name].item(), abs=1e-6), name
    assert metrics["positive"] == pytest.approx(seen[seen > 0].mean().item(), abs=1e-6)
    means = [mean for _, of_rank in results for mean in of_rank]
    assert metrics["unweighted"] == pytest.approx(sum(means) / len(means), abs=1e-6)


def callable_case(rank: int, world_size: int) -> dict[str, float]:
    class Custom(Base):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("median", batch[0][0], reduce_fx=torch.median)
            self.log("spread", batch[0][0], reduce_fx=lambda values: values.max() - values.min())
            self.log("count", batch[0][0], reduce_fx=len)

    return run_here(Custom(), loader(1), stage="test", rank=rank, world_size=world_size).metrics


@on_workers
def test_a_callable_gets_the_stacked_values_of_all_workers(processes: Any, workers: int) -> None:
    metrics = the_same(run(processes, workers, callable_case))
    everything = data().double()
    assert metrics["median"] == pytest.approx(everything.median().item(), abs=1e-6)
    assert metrics["spread"] == pytest.approx((everything.max() - everything.min()).item(), abs=1e-6)
    assert metrics["count"] == COUNT


BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "dict": lambda x: {"name": "a", "inputs": {"x": x}},
    "nested": lambda x: ([x, x], {"mask": x > 0}),
}


def sizes_case(rank: int, world_size: int, kind: str) -> dict[str, float]:
    class Sizes(Base):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x = {"tensor": lambda: batch, "dict": lambda: batch["inputs"]["x"], "nested": lambda: batch[0][0]}[kind]()
            self.log("mean", x.mean())

    batches = [BATCHES[kind](x) for x in data().split([1, 4, 2, 3, 1])]
    return run_here(Sizes(), batches, stage="validate", rank=rank, world_size=world_size).metrics


@on_workers
@pytest.mark.parametrize("kind", BATCHES)
def test_the_batch_size_is_read_off_the_batch(processes: Any, workers: int, kind: str) -> None:
    metrics = the_same(run(processes, workers, sizes_case, kind))
    assert metrics["mean"] == pytest.approx(data().double().mean().item(), abs=1e-6)


# -- Lightning's known faults ----------------------------------------------------------------------------------------
def one_case(rank: int, world_size: int) -> dict[str, float]:
    class One(Base):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("one", 1.0, on_epoch=True, sync_dist=True)
            self.log("one_int", 1, on_epoch=True, sync_dist=True)

    batches = [torch.zeros(1)] * 3  # two on rank 0, one on rank 1
    return run_here(One(), batches, stage="validate", rank=rank, world_size=world_size).metrics


def test_a_mean_of_ones_is_one_where_ranks_have_two_batches_and_one(two: Processes) -> None:
    assert the_same(two(one_case)) == {"one": 1.0, "one_int": 1.0}


def five_case(rank: int, world_size: int) -> tuple[dict[str, float], int]:
    seen = []

    class Five(Base):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            seen.extend(batch.tolist())
            self.log("mean", batch.mean())

    numbers: Any = torch.arange(5.0)
    ran = run_here(Five(), DataLoader(numbers, batch_size=1), stage="test", rank=rank, world_size=world_size)
    return ran.metrics, len(seen)


@on_workers
def test_test_on_0_to_4_is_2(processes: Any, workers: int) -> None:
    results = run(processes, workers, five_case)
    assert the_same([metrics for metrics, _ in results]) == {"mean": 2.0}
    assert sum(count for _, count in results) == 5


# -- sync_dist, rank_zero_only ---------------------------------------------------------------------------------------
def sync_case(rank: int, world_size: int) -> tuple[list[Any], dict[str, float]]:
    class Synced(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            value = torch.tensor(float(10 * batch_idx + self.global_rank))
            self.log("own", value)
            for op in ("mean", "sum", "min", "max"):
                self.log(op, value, sync_dist=True, sync_dist_op=op)
            self.log("both", value, sync_dist=True, on_epoch=True, batch_size=1 + self.global_rank)
            return super().training_step(batch, batch_idx)

    ran = run_here(Synced(), [torch.ones(1)] * (2 * world_size), rank=rank, world_size=world_size, log_every_n_steps=1)
    return ran.trainer.history.to_pylist(), ran.metrics


@on_workers
def test_sync_dist_is_about_step_values(processes: Any, workers: int) -> None:
    results = run(processes, workers, sync_case)
    rows = [row for row in results[0][0] if row["own"] is not None]
    ranks = range(workers)
    for batch_idx, row in enumerate(rows):
        values = [10.0 * batch_idx + rank for rank in ranks]
        assert row["own"] == values[0]  # rank 0's own
        assert (row["mean"], row["sum"]) == (pytest.approx(sum(values) / workers), sum(values))
        assert (row["min"], row["max"], row["both_step"]) == (values[0], values[-1], row["mean"])
    weights = [1.0 + rank for rank in ranks]
    both = sum(w * (10 * b + r) for b in (0, 1) for r, w in zip(ranks, weights)) / (2 * sum(weights))
    for _, metrics in results:
        assert metrics["both_epoch"] == metrics["both"] == pytest.approx(both, abs=1e-6)
        assert metrics["sum"] == sum(10.0 + rank for rank in ranks)  # the last step's stays to be read
    assert [metrics["own"] for _, metrics in results] == [10.0 + rank for rank in ranks]


def zero_case(rank: int, world_size: int) -> dict[str, float]:
    class Zero(Base):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("all", batch.mean(), rank_zero_only=True)
            if self.global_rank == 0:
                self.log("mine", 7.0, rank_zero_only=True)
                self.log("median", batch.mean(), rank_zero_only=True, reduce_fx=torch.median)

    batches = [torch.full((n,), float(n)) for n in (1, 2, 3, 4, 5)]
    return run_here(Zero(), batches, stage="validate", rank=rank, world_size=world_size).metrics


@on_workers
def test_rank_zero_only_leaves_the_workers_out(processes: Any, workers: int) -> None:
    metrics = the_same(run(processes, workers, zero_case))
    own = [1, 2, 3, 4, 5][::workers]
    assert metrics["all"] == pytest.approx(sum(n * n for n in own) / sum(own), abs=1e-6)
    assert (metrics["mine"], metrics["median"]) == (7.0, float(torch.tensor(own, dtype=torch.float64).median()))


# -- torchmetrics ----------------------------------------------------------------------------------------------------
def torchmetrics_case(rank: int, world_size: int) -> tuple[list[dict[str, float]], list[int]]:
    from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection
    from torchmetrics.classification import BinaryAUROC

    class Measured(Base):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.auroc = MeanMetric(), BinaryAUROC()
            self.train_mean = MeanMetric()
            self.several = MetricCollection({"mse": MeanSquaredError(), "rmse": MeanSquaredError(squared=False)})
            self.kept: list[dict[str, float]] = []
            self.left: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.train_mean(batch[0], weight=torch.ones_like(batch[0]))
            self.log("train_mean", self.train_mean, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x = batch[0]
            self.mean.update(x)
            self.auroc.update(x.sin() / 2 + 0.5, (x > 0.3).long())
            self.several.update(x, torch.zeros_like(x))
            self.log("mean", self.mean)
            self.log("auroc", self.auroc)
            self.log_dict(self.several)

        def on_validation_end(self) -> None:
            self.kept.append({name: float(v) for name, v in self.trainer.callback_metrics.items()})
            self.left.append(self.mean.update_count + self.several["rmse"].update_count + len(self.auroc.preds))

    model = Measured()
    ran = run_here(model, loader(), val=loader(1), rank=rank, world_size=world_size, max_epochs=2)
    return [*model.kept, ran.metrics], model.left


@on_workers
def test_torchmetrics_are_computed_at_the_epochs_end_and_reset(processes: Any, workers: int) -> None:
    from torchmetrics.functional.classification import binary_auroc

    results = run(processes, workers, torchmetrics_case)
    everything = data()
    for kept, left in results:
        assert left == [0, 0]
        for metrics in kept[:2]:  # the second epoch has not the first one's in it
            assert metrics["mean"] == pytest.approx(everything.double().mean().item(), abs=1e-6)
            assert metrics["mse"] == pytest.approx(everything.double().square().mean().item(), abs=1e-6)
            assert metrics["rmse"] == pytest.approx(everything.double().square().mean().sqrt().item(), abs=1e-6)
            auroc = binary_auroc(everything.sin() / 2 + 0.5, (everything > 0.3).long())
            assert metrics["auroc"] == pytest.approx(auroc.item(), abs=1e-6)
        assert kept[2]["train_mean"] == pytest.approx(trained_on(workers).double().mean().item(), abs=1e-6)
        assert kept[2]["train_mean_epoch"] == kept[2]["train_mean"]


# -- readable everywhere ---------------------------------------------------------------------------------------------
def readable_case(rank: int, world_size: int) -> list[dict[str, Any]]:
    class Readable(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", batch[0].sum(), on_epoch=True, prog_bar=True, sync_dist=True)
            self.log("quiet", batch[0].sum(), logger=False)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", batch[0].mean(), prog_bar=True)

    ran = run_here(Readable(), loader(2), val=loader(), rank=rank, world_size=world_size, log_every_n_steps=1)
    trainer = ran.trainer
    kinds = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
    assert all(isinstance(v, Tensor) and v.dim() == 0 for kind in kinds for v in kind.values())
    return [{name: float(value) for name, value in kind.items()} for kind in kinds]


@on_workers
def test_metrics_are_dicts_of_tensors_on_every_worker(processes: Any, workers: int) -> None:
    results = run(processes, workers, readable_case)
    for callback, logged, bar in results:
        assert set(callback) == {"loss", "loss_step", "loss_epoch", "quiet", "val"}
        assert set(logged) == {"loss_step", "loss_epoch", "val"}
        assert set(bar) == {"loss_step", "loss_epoch", "val"}
    for key in ("loss", "loss_epoch", "loss_step", "val"):
        assert len({callback[key] for callback, _, _ in results}) == 1, key


def nan_case(rank: int, world_size: int) -> dict[str, float]:
    class Nan(Base):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            value = math.nan if self.global_rank == world_size - 1 and batch_idx == 0 else 1.0
            for name in ("mean", "sum", "min", "max"):
                self.log(name, value, reduce_fx=name)

    return run_here(Nan(), [torch.ones(1)] * 4, stage="validate", rank=rank, world_size=world_size).metrics


@on_workers
def test_a_nan_on_one_worker_is_not_lost(processes: Any, workers: int) -> None:
    metrics = the_same(run(processes, workers, nan_case))
    assert all(math.isnan(value) for value in metrics.values()) and len(metrics) == 4
