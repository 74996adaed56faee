"""MetricStore on one worker, by hand calculation."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch

from raylit.errors import LogError
from raylit.metrics.place import BATCH_EVAL, BATCH_TRAIN, EPOCH_EVAL, EPOCH_TRAIN, NO_EPOCH, SPLIT_TRAIN
from raylit.metrics.store import MetricStore

CPU = torch.device("cpu")


def size_of(batch: Any) -> int | None:
    return len(batch) if isinstance(batch, (torch.Tensor, list)) else None


def store_in(loop: str, place: Any, **kwargs: Any) -> MetricStore:
    store = MetricStore(None, CPU, size_of)
    store.begin(loop, **kwargs)
    store.place = place
    return store


def test_mean_is_weighted_by_batch_size_read_off_the_batch() -> None:
    store = store_in("train", BATCH_TRAIN)
    for value, size in ((1.0, 4), (2.0, 4), (9.0, 1)):
        store.set_batch(torch.zeros(size, 3))
        store.log("a", torch.tensor(value), on_epoch=True, on_step=False)
        store.log("b", value, on_epoch=True, on_step=False, batch_size=1)
    end = store.end()
    assert end.callback["a"].item() == pytest.approx((4 + 8 + 9) / 9, abs=1e-12)
    assert end.callback["b"].item() == 4.0
    assert end.callback["a"].dtype == torch.float64
    assert end.callback["a"].dim() == 0


@pytest.mark.parametrize(("fx", "expected"), [
    ("sum", 10.0), (sum, 10.0), (torch.sum, 10.0), ("min", -5.0), (min, -5.0), (torch.amin, -5.0), (max, 8.0),
    (torch.max, 8.0), (lambda values: values.median(), 3.0), (lambda values: float(len(values)), 4.0),
])  # fmt: skip
@pytest.mark.parametrize("as_tensor", [True, False])
def test_reductions(fx: Any, expected: float, as_tensor: bool) -> None:
    store = store_in("validation", BATCH_EVAL)
    for value in (3, 8, -5, 4):
        store.set_batch([0])
        store.log("x", torch.tensor(value) if as_tensor else value, reduce_fx=fx)
    assert store.end().callback["x"].item() == expected


def test_long_epochs_in_float32_are_right_to_1e_6() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1000, generator=generator) + 1000
    store = store_in("train", BATCH_TRAIN)
    for i, value in enumerate(values):
        store.set_batch([0] * (1 + i % 7))
        store.log("x", value, on_epoch=True)
    weights = torch.tensor([1 + i % 7 for i in range(1000)], dtype=torch.float64)
    expected = (values.double() * weights).sum() / weights.sum()
    assert store.end().callback["x_epoch"].item() == pytest.approx(expected.item(), abs=1e-9)


def test_a_later_change_in_place_is_not_seen() -> None:
    store = store_in("train", BATCH_TRAIN)
    store.set_batch([0])
    weight = torch.nn.Parameter(torch.tensor(2.0))
    loss = weight * 3
    store.log("weight", weight, on_epoch=True)
    store.log("loss", loss, on_epoch=True)
    with torch.no_grad():
        weight += 1
    loss *= 0
    assert store.step_metrics().callback["weight_step"].item() == 2.0
    assert not store.step_metrics().callback["loss_step"].requires_grad
    end = store.end().callback
    assert (end["weight"].item(), end["loss"].item()) == (2.0, 6.0)


def test_enable_graph_keeps_the_graph_of_the_step_value() -> None:
    store = store_in("train", BATCH_TRAIN)
    store.set_batch([0])
    store.log("loss", torch.tensor(2.0, requires_grad=True) * 3, enable_graph=True)
    assert store.step_metrics().callback["loss"].requires_grad


def test_names_of_step_and_epoch_values() -> None:
    store = store_in("train", BATCH_TRAIN)
    store.set_batch([0])
    store.log("step_only", 1.0, prog_bar=True)
    store.log("both", 1.0, on_epoch=True, prog_bar=True)
    store.log("epoch_only", 1.0, on_step=False, on_epoch=True, logger=False)
    step = store.step_metrics()
    assert set(step.callback) == set(step.logger) == set(step.progress_bar) == {"step_only", "both_step"}
    end = store.end()
    assert set(end.callback) == {"both", "both_epoch", "epoch_only"}
    assert set(end.logger) == set(end.progress_bar) == {"both_epoch"}


def test_loggers_get_each_step_value_once() -> None:
    store = store_in("train", BATCH_TRAIN)
    store.set_batch([0])
    store.log("a", 1.0)
    store.log("b", torch.tensor(2.0))
    store.log("quiet", 2.0, logger=False)
    assert {k: v.item() for k, v in store.take_step_metrics().items()} == {"a": 1.0, "b": 2.0}
    store.set_batch([0])
    store.log("a", 1.0)
    assert set(store.take_step_metrics()) == {"a"}
    assert set(store.step_metrics().callback) == {"a", "b", "quiet"}


def test_validation_within_a_training_epoch_keeps_the_training_values() -> None:
    store = store_in("train", BATCH_TRAIN)
    store.set_batch([0, 0])
    store.log("loss", 1.0, on_epoch=True)
    store.begin("validation")
    store.place = BATCH_EVAL
    store.set_batch([0])
    store.log("loss", 7.0)
    assert store.end().callback["loss"].item() == 7.0
    assert store.place is BATCH_TRAIN
    store.set_batch([0])
    store.log("loss", 4.0, on_epoch=True)
    assert store.end().callback["loss"].item() == 2.0


def test_several_loaders_and_the_epoch_hook_after_them() -> None:
    store = store_in("validation", BATCH_EVAL, num_dataloaders=2)
    for loader in (0, 1):
        for value in (1.0, 3.0):
            store.set_batch([0], loader)
            store.log("acc", value + 10 * loader, on_step=True)
            store.log(f"own_{loader}", value, add_dataloader_idx=False)
    store.place = EPOCH_EVAL
    store.log("acc", 5.0)
    end = store.end().callback
    assert end["acc/dataloader_idx_0"].item() == 2.0
    assert end["acc_epoch/dataloader_idx_1"].item() == 12.0
    assert end["own_1"].item() == 2.0
    assert end["acc"].item() == 5.0


def test_one_name_for_two_loaders_is_refused_with_both() -> None:
    store = store_in("validation", BATCH_EVAL, num_dataloaders=2)
    store.set_batch([0], 0)
    store.log("acc", 1.0, add_dataloader_idx=False)
    store.set_batch([0], 1)
    with pytest.raises(LogError, match=r"dataloader 0 \(at .*test_store.py:\d+ in .*\) and dataloader 1"):
        store.log("acc", 1.0, add_dataloader_idx=False)


def test_splits_of_truncated_bptt_make_one_value_a_batch() -> None:
    store = store_in("train", BATCH_TRAIN)
    for splits in ((1.0, 3.0), (8.0,)):
        store.set_batch([0])
        store.place = SPLIT_TRAIN
        for value in splits:
            store.log("loss", torch.tensor(value), on_epoch=True)
            store.log("sum", value, on_epoch=True, on_step=False, tbptt_reduce_fx=sum)
        store.finish_splits()
        store.place = BATCH_TRAIN
    assert store.step_metrics().callback["loss_step"].item() == 8.0
    end = store.end().callback
    assert end["loss"].item() == 5.0
    assert end["sum"].item() == 6.0


def test_settings_that_differ_name_both_places() -> None:
    store = store_in("train", BATCH_TRAIN)
    store.set_batch([0])
    store.log("x", 1.0)
    with pytest.raises(LogError, match=r"at .*test_store.py:(\d+) in test_settings.* and at .*test_store.py:(\d+) in "
                       r"test_settings.*prog_bar=False against prog_bar=True"):  # fmt: skip
        store.log("x", 1.0, prog_bar=True)


def test_the_same_settings_said_in_two_ways_are_the_same() -> None:
    store = store_in("train", BATCH_TRAIN)
    store.set_batch([0])
    store.log("x", 1.0, on_epoch=True)
    store.log("x", 3.0, on_step=True, on_epoch=True, reduce_fx="mean", prog_bar=False)
    assert store.end().callback["x"].item() == 2.0


@pytest.mark.parametrize(("place", "kwargs", "words"), [
    (NO_EPOCH, {}, "on_epoch in a hook outside any epoch"),
    (NO_EPOCH, {"on_epoch": False, "on_step": True}, "on_step in a hook outside any epoch"),
    (EPOCH_TRAIN, {"on_step": True}, "on_step in an epoch hook of training"),
    (BATCH_TRAIN, {"reduce_fx": "maen"}, "Accepted: 'mean', 'sum', 'min', 'max'.*Did you mean 'mean'"),
    (BATCH_TRAIN, {"reduce_fx": 3}, "reduce_fx=3 is unknown"),
    (BATCH_TRAIN, {"sync_dist": True, "sync_dist_op": "product"}, "sync_dist_op='product' is unknown"),
    (BATCH_TRAIN, {"on_epoch": True, "batch_size": torch.tensor(3)}, "is not an int"),
    (BATCH_TRAIN, {"on_epoch": True, "batch_size": -1}, "is not an int of 0 or more"),
])  # fmt: skip
def test_refused_arguments(place: Any, kwargs: dict[str, Any], words: str) -> None:
    store = store_in("train", place)
    with pytest.raises(LogError, match=words):
        store.log("x", 1.0, **kwargs)


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(0), None, "1", {"a": 1}, [1.0], torch.tensor(1j)])
def test_values_that_are_not_one_number(value: Any) -> None:
    store = store_in("train", BATCH_TRAIN)
    store.set_batch([0])
    with pytest.raises(LogError, match=r"'x'\) at .*test_store.py"):
        store.log("x", value)


@pytest.mark.parametrize("value", [torch.tensor([[2.5]]), 2.5, torch.tensor(2.5, dtype=torch.bfloat16)])
def test_values_of_one_element(value: Any) -> None:
    store = store_in("train", BATCH_TRAIN)
    store.set_batch([0])
    store.log("x", value, on_epoch=True)
    assert store.end().callback["x"].item() == 2.5


def test_booleans_and_integers() -> None:
    store = store_in("train", BATCH_TRAIN)
    for flag in (True, False):
        store.set_batch([0])
        store.log("flag", flag, on_epoch=True)
        store.log("tensor", torch.tensor(flag), on_epoch=True)
        store.log("mixed", torch.tensor(int(flag)) if flag else 2, on_epoch=True)
    end = store.end().callback
    assert (end["flag"].item(), end["tensor"].item(), end["mixed"].item()) == (0.5, 0.5, 1.5)


def test_unreadable_batch_size() -> None:
    store = store_in("train", BATCH_TRAIN)
    store.set_batch(object())
    store.log("step", 1.0)
    store.log("total", 1.0, on_epoch=True, reduce_fx="sum")
    with pytest.raises(LogError, match=r"Pass batch_size="):
        store.log("mean", 1.0, on_epoch=True)


def test_no_loop() -> None:
    store = MetricStore(None, CPU, size_of)
    with pytest.raises(LogError, match="outside any epoch"):
        store.log("x", 1.0)
    assert store.step_metrics().callback == {}


def test_nan_is_not_lost() -> None:
    store = store_in("train", BATCH_TRAIN)
    for value in (1.0, math.nan, 2.0):
        store.set_batch([0])
        for fx in ("min", "max", "mean", "sum"):
            store.log(fx, value, on_epoch=True, reduce_fx=fx)
            store.log(fx + "_t", torch.tensor(value), on_epoch=True, reduce_fx=fx)
    assert all(math.isnan(v.item()) for v in store.end().callback.values())


def test_inference_mode_values_are_usable_afterwards() -> None:
    store = store_in("validation", BATCH_EVAL)
    with torch.inference_mode():
        for _ in range(70):
            store.set_batch([0])
            store.log("x", torch.tensor(1.0) * 2, on_step=True)
        step = store.step_metrics().callback["x_step"]
        end = store.end().callback["x"]
    assert not step.is_inference()
    assert not end.is_inference()
    assert end.item() == 2.0


@pytest.mark.parametrize("at", [3, 64, 70, 130])
def test_resuming_in_mid_epoch_is_exact_to_the_bit(at: int) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(200, generator=generator)

    def steps(store: MetricStore, first: int, last: int) -> None:
        store.place = BATCH_TRAIN
        for i in range(first, last):
            store.set_batch([0] * (1 + i % 3))
            store.log("mean", values[i], on_epoch=True)
            store.log("number", float(values[i]) / 3, on_epoch=True, on_step=False)
            store.log("low", values[i], on_epoch=True, reduce_fx="min")
            store.log("median", values[i], on_epoch=True, reduce_fx=lambda v: v.median())

    whole = store_in("train", BATCH_TRAIN)
    steps(whole, 0, 200)
    first = store_in("train", BATCH_TRAIN)
    steps(first, 0, at)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = MetricStore(None, CPU, size_of)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert second.step_metrics().callback == first.step_metrics().callback
    steps(second, at, 200)
    expected, got = whole.end().callback, second.end().callback
    assert list(expected) == list(got)
    assert all(torch.equal(expected[k], got[k]) for k in expected)


def test_no_value_is_read_back_on_the_step_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    store = store_in("train", BATCH_TRAIN)
    with Watch():
        for i in range(200):
            store.set_batch([0] * (1 + i % 2))
            store.log("x", torch.ones(()), on_epoch=True)
            store.step_metrics()
        store.end()
    assert not [name for name in seen if "_local_scalar_dense" in name or "item" in name]
