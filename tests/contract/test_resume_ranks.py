"""Resuming on several ranks, and on another number of them than before (contract 9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit
from raylit.stage import SafePoint
from tests.contract.resuming import (
    Net,
    Noisy,
    Recorder,
    Unsized,
    WithOutputs,
    every_point_case,
    run_recorded,
    shuffled,
    take_at,
)
from tests.two_process.harness import Processes


def schedulers(module: Any) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7), "interval": "step"}]


def validation() -> Any:
    return DataLoader(Noisy(5, seed=1), batch_size=2)


def with_schedulers() -> Any:
    return WithOutputs(schedulers)


class Several(Net):
    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        return self.loss(batch) * (optimizer_idx + 1)


def several() -> Any:
    def configure(module: Any) -> Any:
        layers = list(module.net)
        return (
            {"optimizer": torch.optim.Adam(layers[0].parameters(), 0.01), "frequency": 2},
            {"optimizer": torch.optim.SGD(layers[-1].parameters(), 0.1), "frequency": 1},
        )

    return Several(configure)


class Manual(Net):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class SkipsOnOneRank(Net):
    """In accumulation, one rank has no loss for a while."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if self.global_rank == 1 and batch_idx != 1 else self.loss(batch)


class Shared(Unsized):
    def shard(self, num_shards: int, index: int) -> Any:
        return Unsized(14 - 4 * index)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "accumulation": (with_schedulers, shuffled(17, 2), {"accumulate_grad_batches": 2, "val_check_interval": 2,
                                                        "val": validation, "log_every_n_steps": 1}),
    "frequencies": (several, shuffled(17, 2), {"accumulate_grad_batches": 2}),
    "manual": (Manual, shuffled(17, 2), {}),
    "skips": (SkipsOnOneRank, shuffled(17, 2), {"accumulate_grad_batches": 2}),
    "closures": (lambda: Net(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.01, max_iter=2)), shuffled(12, 2),
                 {"accumulate_grad_batches": 2}),
    "unknown_length": (Net, lambda: DataLoader(Shared(14), batch_size=2), {"accumulate_grad_batches": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_point_on_two_ranks(case: str, two: Processes) -> None:
    make, loaders, arguments = CASES[case]
    counts = two(every_point_case, make, loaders, {"max_epochs": 2, **arguments})
    assert counts[0] == counts[1] > 4


def test_every_point_on_three_ranks(three: Processes) -> None:
    make, _, arguments = CASES["accumulation"]
    assert len(set(three(every_point_case, make, shuffled(24, 2), {"max_epochs": 1, **arguments}))) == 1


# Another number of ranks ---------------------------------------------------------------------------------------------
class Counts(raylit.Module):
    """Gradients are the batches' own means; remembers which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += batch[0].tolist()
        self.log("mean", batch[0].mean(), on_step=False, on_epoch=True)
        return self.weight * batch[0].mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def numbered() -> Any:
    return DataLoader(TensorDataset(torch.arange(16.0)), batch_size=2, shuffle=True)


def seen_case(rank: int, world_size: int, common: Any, own: Any, arguments: dict[str, Any]) -> tuple[Any, float, Any]:
    ran, _ = run_recorded(
        Counts, numbered, seed=77, rank=rank, world_size=world_size, common=common, own=own, **arguments
    )
    notes = [event["text"] for event in ran.events if event["kind"] == "note"]
    return ran.module.seen, ran.module.weight.item(), notes


def test_from_two_ranks_to_one_each_sample_is_seen_once(two: Processes) -> None:
    arguments: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 4}
    first = two(take_at, Counts, numbered, 0, arguments)
    own = {rank: snapshot.own for rank, snapshot in enumerate(first)}
    seen, weight, notes = seen_case(0, 1, first[0].common, own, arguments)
    whole, _ = run_recorded(Counts, numbered, seed=1, max_epochs=1)
    assert seen == whole.module.seen[4:]  # the order goes on where two batches of two were done
    assert any("of 2 workers, and this run has 1" in note for note in notes)
    # The batches before the change count: two ranks' mean of the first batch, a quarter of a group, then the rest.
    order = torch.tensor(whole.module.seen)
    means = [order[:4].mean(), *(order[i : i + 2].mean() for i in range(4, 16, 2))]
    assert weight == pytest.approx(-float(sum(means)) / 4)


def test_from_one_rank_to_two_each_sample_is_seen_once(two: Processes) -> None:
    arguments: dict[str, Any] = {"max_epochs": 1}
    recorder = Recorder(only=(1,))
    whole, _ = run_recorded(Counts, numbered, seed=1, recorder=recorder, **arguments)
    point, snapshot = recorder.points[1]
    assert point is SafePoint.BATCH and snapshot is not None
    ran = two(seen_case, snapshot.common, {0: snapshot.own}, arguments)
    assert sorted(ran[0][0] + ran[1][0]) == sorted(whole.module.seen[4:])
    assert ran[0][0] == [whole.module.seen[i] for i in (4, 5, 8, 9, 12, 13)]
    assert ran[0][1] == ran[1][1]


class Measures(raylit.Module):
    """Epoch values of every kind, and outputs, over numbered samples."""

    def __init__(self) -> None:
        super().__init__()
        import torchmetrics

        self.weight = nn.Parameter(torch.zeros(()))
        self.sum_of_all, self.all_values = torchmetrics.SumMetric(), torchmetrics.CatMetric()
        self.ended: list[list[float]] = []

    def on_train_epoch_start(self) -> None:
        self.log("at_start", 7.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        values = batch[0]
        self.log("mean", values.mean(), on_step=False, on_epoch=True)
        self.log("sum", values.sum(), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("least", values.min(), on_step=False, on_epoch=True, reduce_fx=torch.min)
        self.log("most", values.max(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("largest_of_all", values.max(), on_step=False, on_epoch=True, reduce_fx=lambda all_of: all_of.max())
        if batch_idx == 0:
            self.log("early", values.mean() * 0 + 3.0, on_step=False, on_epoch=True)
        self.sum_of_all.update(values)
        self.all_values.update(values)
        self.log("summed", self.sum_of_all, on_step=False, on_epoch=True)
        return {"loss": self.weight * values.mean(), "values": values}

    def training_epoch_end(self, outputs: Any) -> None:
        self.ended.append([value for output in outputs for value in output["values"].tolist()])
        self.log("kept", float(self.all_values.compute().numel()), reduce_fx="sum")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def measured_case(rank: int, world_size: int, common: Any, own: Any) -> tuple[dict[str, float], list[float]]:
    ran, _ = run_recorded(Measures, numbered, seed=1, rank=rank, world_size=world_size, common=common, own=own,
                          max_epochs=1)  # fmt: skip
    return ran.metrics, ran.module.ended[0]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2), (2, 3)])
def test_the_metrics_of_a_half_done_epoch_go_on_at_another_number_of_ranks(
    processes: Callable[[int], Processes], before: int, after: int
) -> None:
    """Every kind of epoch value, against a calculation by hand over the samples that were used."""

    def on(ranks: int, case: Any, *arguments: Any) -> list[Any]:
        return [case(0, 1, *arguments)] if ranks == 1 else processes(ranks)(case, *arguments)

    first = on(before, take_at, Measures, numbered, 0, {"max_epochs": 1})
    own = {rank: snapshot.own for rank, snapshot in enumerate(first)}
    ended = on(after, measured_case, first[0].common, own)
    used = sorted(value for _, values in ended for value in values)  # the outputs came along, those before too
    left_over = (16 - 2 * before) % (2 * after) % after
    assert len(used) == 16 - left_over and len(set(used)) == len(used)
    for metrics, _ in ended:
        expected = {"mean": sum(used) / len(used), "sum": sum(used), "least": min(used), "most": max(used),
                    "largest_of_all": max(used), "early": 3.0, "summed": sum(used), "at_start": 7.0}  # fmt: skip
        assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_a_metric_that_cannot_be_joined_is_said_to_lack_a_part() -> None:
    import torchmetrics

    from raylit.metrics.torchmetric import join_metric_states, metric_states

    metric = torchmetrics.PearsonCorrCoef()
    metric.update(torch.arange(4.0), torch.arange(4.0))
    assert join_metric_states(metric, [metric_states(metric), metric_states(metric)]) is None
