"""A ray.data.Dataset as a loader, with Ray's own: in this process, and streamed to two workers.

Ray deals the rows out as it likes, so the tests look at what does not depend on it: sums over all ranks, means, order.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import raylit
from raylit.data import RayDataLoader
from raylit.errors import ResourceError


class Rows(raylit.Module):
    """Its weight goes down by the mean of each step's rows, so that an epoch takes off a sum that has no order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rows = batch["id"].float()
        self.seen.append(batch["id"].tolist())
        for name, value in (("sum", rows.sum()), ("squares", (rows**2).sum()), ("count", float(len(rows)))):
            self.log(name, value, reduce_fx="sum", on_step=False, on_epoch=True)
        return self.weight * rows.mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", batch["id"].float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", batch["id"].float().mean())
        self.log("rows", float(len(batch["id"])), reduce_fx="sum")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch["id"] * 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class WithHooks(Rows):
    """Makes its Datasets where they are used."""

    def val_dataloader(self) -> Any:
        import ray.data

        return ray.data.from_items([{"id": value} for value in range(5)])

    def test_dataloader(self) -> Any:
        import ray.data

        return ray.data.range(5)


def trainer(folder: Path, num_workers: int, cpu: float = 0.5, **arguments: Any) -> raylit.Trainer:
    return raylit.Trainer(
        num_workers=num_workers, use_gpu=False, logger=False, enable_checkpointing=False, storage_path=str(folder),
        enable_model_summary=False, enable_progress_bar=False, max_epochs=2,
        **({"resources_per_worker": {"CPU": cpu}} if num_workers else {}), **arguments,
    )  # fmt: skip


def rows(count: int, blocks: int) -> Any:
    import ray.data

    return ray.data.range(count, override_num_blocks=blocks)


def test_in_this_process(ray_session: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, module, here = rows(10, 3), Rows(), trainer(tmp_path, 0)
    levels = [handler.level for handler in logging.getLogger("ray.data").handlers]
    capfd.readouterr()
    here.fit(module, RayDataLoader(data, batch_size=4))
    assert [len(each) for each in module.seen] == [4, 4, 2] * 2
    assert here.callback_metrics["sum"] == 45 and here.callback_metrics["squares"] == 285
    assert [each["mean"] for each in here.test(module, data)] == [4.5]
    predicted = here.predict(module, RayDataLoader(data, batch_size=4))
    assert [each.tolist() for each in predicted] == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]
    assert capfd.readouterr().err.count("Dataset") == 0, "Ray Data's own lines between raylit's"
    assert [handler.level for handler in logging.getLogger("ray.data").handlers] == levels
    assert data.context.execution_options.preserve_order is False and data.context.enable_progress_bars is True


def test_a_walk_that_is_limited_lets_go_of_ray_data(ray_session: None, tmp_path: Path) -> None:
    module = Rows()
    trainer(tmp_path, 0, limit_train_batches=2).fit(module, RayDataLoader(rows(1000, 10), batch_size=3))
    assert [len(each) for each in module.seen] == [3, 3] * 2


def test_two_workers_train_on_each_row_once_and_validate_on_all(ray_session: None, tmp_path: Path) -> None:
    module, two = WithHooks(), trainer(tmp_path, 2, val_check_interval=1)
    two.fit(module, RayDataLoader(rows(8, 4), batch_size=2))
    # Steps of 4 rows: an epoch takes 28/4 off the weight.
    assert module.weight.item() == -2 * 28 / 4 and two.global_step == 4
    metrics = {name: float(value) for name, value in two.callback_metrics.items()}
    assert metrics == {"sum": 28.0, "squares": 140.0, "count": 8.0, "val": pytest.approx(2.0)}
    assert [len(each) for each in module.seen] == [2, 2] * 2, "worker 0's part"


def test_two_workers_test_on_each_row_once_and_predict_in_order(ray_session: None, tmp_path: Path) -> None:
    module, two = WithHooks(), trainer(tmp_path, 2)
    one_block = rows(3, 1).materialize()  # one worker gets none
    results = two.test(module, [RayDataLoader(rows(5, 5), batch_size=2), one_block])
    assert results[0] == {"mean/dataloader_idx_0": pytest.approx(2.0), "rows/dataloader_idx_0": 5.0}
    assert results[1] == {"mean/dataloader_idx_1": pytest.approx(1.0), "rows/dataloader_idx_1": 3.0}
    predicted = two.predict(module, RayDataLoader(rows(10, 4), batch_size=3))
    assert [each.tolist() for each in predicted] == [[0, 2, 4], [6, 8, 10], [12, 14, 16], [18]]


def test_no_cpu_left_for_the_rows_is_refused(ray_session: None, tmp_path: Path) -> None:
    full = trainer(tmp_path, 2, cpu=1)
    message = "ray.data.Dataset at a time takes 1 CPU beside.*has 2 CPUs, 2 workers x 1 take 2, which leaves 0"
    with pytest.raises(ResourceError, match=message):
        full.fit(Rows(), rows(8, 1))
    with pytest.raises(ResourceError, match=message):
        full.predict(Rows(), rows(8, 1).materialize())  # splitting them in order is a task too
    with pytest.raises(ResourceError, match="2 ray.data.Datasets at a time"):
        # The training data may not be at their end when validation begins.
        trainer(tmp_path, 2, val_check_interval=1).fit(WithHooks(), rows(8, 1), rows(5, 1))
    with pytest.raises(ResourceError, match=message):
        full.test(WithHooks())  # a hook's Dataset shows on the worker
    # Rows that are made already need none.
    (metrics,) = full.test(WithHooks(), rows(5, 2).materialize())
    assert metrics == {"mean": pytest.approx(2.0), "rows": 5.0}
