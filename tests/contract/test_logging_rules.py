"""Contract 6: names, places, settings, errors, and what logging costs in collectives and waits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import raylit
from raylit.errors import LogError
from tests.two_process.harness import Processes, RankFailed, run_here
from tests.unit.engine.small import Numbers, numbers, quiet

HERE = re.escape(__file__)


# -- names -----------------------------------------------------------------------------------------------------------
class TwoLoaders(Numbers):
    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("plain", batch.mean())
        self.log("both", batch.mean(), on_step=True, on_epoch=True)
        self.log(f"own_{dataloader_idx}", batch.mean(), add_dataloader_idx=False)
        self.log_dict({"a": batch.min(), "b": batch.max()}, prog_bar=True, reduce_fx="max")

    test_step = validation_step


def test_several_loaders_have_names_of_their_own(tmp_path):
    first, second = numbers(1, 2, 6), [torch.tensor([10.0, 20.0, 30.0]), torch.tensor([5.0])]
    trainer = quiet(tmp_path)
    results = trainer.test(TwoLoaders(), [first, second])
    means, largest = (3.0, (60 + 5) / 4), ((6.0, 6.0), (10.0, 30.0))
    for index, result in enumerate(results):
        end = f"/dataloader_idx_{index}"
        own = {"plain": means[index], "both": means[index], "both_epoch": means[index]}
        expected = {f"{name}{end}": value for name, value in own.items()}
        expected |= {f"a{end}": largest[index][0], f"b{end}": largest[index][1]}
        expected |= {"own_0": means[0], "own_1": means[1]}
        assert result == pytest.approx(expected, abs=1e-6)
    assert set(trainer.progress_bar_metrics) == {f"{name}/dataloader_idx_{i}" for name in "ab" for i in (0, 1)}
    alone = quiet(tmp_path).test(TwoLoaders(), first)
    assert set(alone[0]) == {"plain", "both", "both_epoch", "own_0", "a", "b"}


def test_both_gives_a_steps_name_an_epochs_name_and_the_plain_one(tmp_path):
    class Both(Numbers):
        def training_step(self, batch, batch_idx):
            self.log("both", batch.sum(), on_step=True, on_epoch=True, prog_bar=True)
            self.log("step", batch.sum())
            self.log("epoch", batch.sum(), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer = quiet(tmp_path, log_every_n_steps=1)
    trainer.fit(Both(), numbers(1, 2, 6))
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert values == {"both": 3.0, "both_epoch": 3.0, "both_step": 6.0, "step": 6.0, "epoch": 3.0}
    assert set(trainer.logged_metrics) == {"both_step", "both_epoch", "step", "epoch"}
    assert {name: float(v) for name, v in trainer.progress_bar_metrics.items()} == {"both_step": 6.0, "both_epoch": 3.0}
    assert trainer.history.to_pydict() == {
        "epoch": [0, 0, 0, 0], "step": [1, 2, 3, 3], "both_step": [1.0, 2.0, 6.0, None], "step_logged": [1, 2, 6, None],
        "both_epoch": [None] * 3 + [3.0], "epoch_logged": [None] * 3 + [3.0],
    }  # fmt: skip


def test_step_values_of_an_evaluation_that_were_asked_for(tmp_path):
    seen = []

    class Module(Numbers):
        def validation_step(self, batch, batch_idx):
            self.log("val", batch.sum(), on_step=True, on_epoch=True)

        def on_validation_batch_end(self, outputs, batch, batch_idx):
            seen.append(float(self.trainer.callback_metrics["val_step"]))

    trainer = quiet(tmp_path, log_every_n_steps=2)
    trainer.fit(Module(), numbers(1, 1, 1), numbers(1, 2, 4, 8, 5))
    assert seen == [1.0, 2.0, 4.0, 8.0, 5.0]
    assert trainer.history.to_pydict() == {
        "epoch": [0, 0, 0], "step": [3, 3, 3], "val_step": [2.0, 8.0, None], "val_epoch": [None, None, 4.0],
    }  # fmt: skip


def test_log_dict_is_log_for_each(tmp_path):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            self.log_dict({"a": batch.sum(), "b": 2 * batch.sum()}, True, on_epoch=True, on_step=False, reduce_fx=max)
            return super().training_step(batch, batch_idx)

    trainer = quiet(tmp_path)
    trainer.fit(Module(), numbers(3, 1))
    assert {name: float(value) for name, value in trainer.progress_bar_metrics.items()} == {"a": 3.0, "b": 6.0}


# -- truncated BPTT, graphs ------------------------------------------------------------------------------------------
def test_splits_are_one_value_by_tbptt_reduce_fx(tmp_path):
    class Splits(Numbers):
        def training_step(self, batch, batch_idx, hiddens):
            for fx in ("mean", "sum", torch.max, lambda values: values[0]):
                name = fx if isinstance(fx, str) else "first" if "lambda" in repr(fx) else "max"
                self.log(name, batch.sum(), on_epoch=True, tbptt_reduce_fx=fx, tbptt_pad_token=-1)
            return {"loss": self.weight * batch.sum(), "hiddens": self.weight}

    trainer = quiet(tmp_path, truncated_bptt_steps=2, log_every_n_steps=1)
    trainer.fit(Splits(), [torch.tensor([[1.0, 2, 3, 4, 5]]), torch.tensor([[5.0, 4, 3, 2, 2], [0, 0, 0, 0, 0]])])
    by_batch = {"mean": [5.0, 6.0], "sum": [15.0, 16.0], "max": [7.0, 9.0], "first": [3.0, 9.0]}  # of 3+7+5 and 9+5+2
    by_batch["mean"][1] = 16 / 3
    for name, (first, second) in by_batch.items():
        steps = trainer.history.column(f"{name}_step").drop_null().to_pylist()
        assert steps == pytest.approx([first, second], abs=1e-6), name
        # The second batch has two samples.
        assert float(trainer.callback_metrics[name]) == pytest.approx((first + 2 * second) / 3, abs=1e-6), name


def test_enable_graph_keeps_the_graph(tmp_path):
    seen = []

    class Graph(Numbers):
        def training_step(self, batch, batch_idx):
            loss = self.weight * batch.sum()
            self.log("kept", loss, enable_graph=True)
            self.log("cut", loss)
            return loss

        def on_before_backward(self, loss):
            metrics = self.trainer.callback_metrics
            seen.append((metrics["kept"].requires_grad, metrics["cut"].requires_grad))
            (gradient,) = torch.autograd.grad(metrics["kept"], self.weight, retain_graph=True)
            seen.append(float(gradient))

    trainer = quiet(tmp_path, log_every_n_steps=1)
    trainer.fit(Graph(), numbers(3))
    assert seen == [(True, False), 3.0]
    assert not any(value.requires_grad for value in trainer.callback_metrics.values())  # no memory is held on to


# -- errors ----------------------------------------------------------------------------------------------------------
def test_two_settings_for_one_name_are_refused_with_both_places(tmp_path):
    class Twice(Numbers):
        def training_step(self, batch, batch_idx):
            self.log("x", batch.sum())
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("x", batch.sum(), on_epoch=True)

    words = (
        rf"log\('x'\) was called with different settings in one loop: at {HERE}:\d+ in training_step and at "
        rf"{HERE}:\d+ in on_train_batch_end: on_epoch=False against on_epoch=True"
    )
    with pytest.raises(LogError, match=words):
        quiet(tmp_path).fit(Twice(), numbers(1))


@pytest.mark.parametrize(("value", "words"), [
    (torch.ones(3), r"the value has shape \(3,\) and dtype torch.float32; one real number is needed. .*value.mean\(\)"),
    ({"a": 1.0}, r"a value of type dict cannot be logged.*Use log_dict for a dict"),
    ("0.5", r"a value of type str cannot be logged; a number, a tensor of one element or a torchmetrics Metric can"),
    (None, r"a value of type NoneType cannot be logged"),
])  # fmt: skip
def test_what_is_no_number_is_refused_where_it_is_logged(tmp_path, value, words):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            self.log("x", value)
            raise AssertionError("the call of log must have raised")

    with pytest.raises(LogError, match=rf"log\('x'\) at {HERE}:\d+ in training_step: {words}"):
        quiet(tmp_path).fit(Module(), numbers(1))


@pytest.mark.parametrize(("fx", "words"), [
    ("avarage", "reduce_fx='avarage' is unknown. Accepted: 'mean', 'sum', 'min', 'max', the torch functions and "
                "builtins of these names, or a callable that is given all values as one 1-d tensor"),
    ("main", "Did you mean 'min'"),
    (3, "reduce_fx=3 is unknown"),
])  # fmt: skip
def test_an_unknown_reduction_is_refused_at_the_call(tmp_path, fx, words):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            self.log("x", batch.sum(), reduce_fx=fx)
            raise AssertionError("the call of log must have raised")

    with pytest.raises(LogError, match=words):
        quiet(tmp_path).fit(Module(), numbers(1))


def test_a_torchmetrics_result_that_is_no_number_is_named(tmp_path):
    from torchmetrics.classification import BinaryConfusionMatrix

    class Module(Numbers):
        def __init__(self):
            super().__init__()
            self.matrix = BinaryConfusionMatrix()

        def test_step(self, batch, batch_idx):
            self.matrix.update(batch.int(), batch.int())
            self.log("matrix", self.matrix)

    words = r"log\('matrix'\) at .* in test_step: compute\(\) gave a tensor of shape \(2, 2\) at the end"
    with pytest.raises(LogError, match=words):
        quiet(tmp_path).test(Module(), numbers(1, 0))


# -- several workers -------------------------------------------------------------------------------------------------
class Lonely(Numbers):
    """Rank 1 logs a key that rank 0 does not, in one place."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def log_alone(self, where: str, **settings: Any) -> None:
        if where == self.where and self.global_rank == 1:
            self.log("lonely", 1.0, **settings)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("loss", batch.sum(), on_epoch=True, sync_dist=True)
        self.log_alone("a step value")
        self.log_alone("a step value with sync_dist", sync_dist=True)
        self.log_alone("an epoch value", on_epoch=True)
        self.log_alone("a callable", on_step=False, on_epoch=True, reduce_fx=torch.median)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", batch.sum())
        self.log_alone("validation")

    def on_validation_epoch_end(self) -> None:
        self.log_alone("the epoch's end")


WHERE = ["a step value", "a step value with sync_dist", "an epoch value", "a callable", "validation", "the epoch's end"]


def lonely_case(rank: int, world_size: int, where: str) -> None:
    run_here(Lonely(where), numbers(1, 2, 3, 4), val=numbers(1, 2, 3, 4), rank=rank, world_size=world_size,
             log_every_n_steps=1)  # fmt: skip


@pytest.mark.parametrize("where", WHERE)
def test_a_key_of_one_rank_is_an_error_with_rank_and_key_and_no_hang(two: Processes, where: str) -> None:
    with pytest.raises(RankFailed) as caught:
        two(lonely_case, where)
    assert set(caught.value.errors) == {0, 1}
    for error in caught.value.errors.values():
        assert isinstance(error, LogError)
        words = r"'lonely' was logged on rank 1 \(.*test_logging_rules.py:\d+ in log_alone\) but not on rank 0"
        assert re.search(words, str(error))
        assert "rank_zero_only=True" in str(error)


def differing_case(rank: int, world_size: int) -> None:
    class Differs(Numbers):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("x", batch.sum(), reduce_fx="sum" if self.global_rank else "mean")

    run_here(Differs(), numbers(1, 2), stage="validate", rank=rank, world_size=world_size)


def test_settings_that_differ_between_ranks_are_refused_with_both_places(two: Processes) -> None:
    with pytest.raises(RankFailed) as caught:
        two(differing_case)
    for error in caught.value.errors.values():
        place = r"\(.*test_logging_rules.py:\d+ in validation_step\)"
        assert re.search(rf"log\('x'\): rank 0 {place} and rank 1 {place} log it with different settings: "
                         r"reduce_fx='mean' against reduce_fx='sum'", str(error))  # fmt: skip


def collectives_case(rank: int, world_size: int) -> list[list[str]]:
    """What goes over the wire between the last batch of each validation and its end."""
    import torch.distributed as dist

    calls: list[str] = []
    loops: list[list[str]] = []
    names = ["all_gather", "all_reduce", "broadcast", "barrier", "all_gather_object", "gather_object",
             "broadcast_object_list", "all_gather_into_tensor", "reduce", "gather"]  # fmt: skip
    originals = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            setattr(dist, name, originals[name])  # one that calls another counts once
            try:
                return originals[name](*args, **kwargs)
            finally:
                setattr(dist, name, call)

        return call

    class Counted(Numbers):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            for index in range(10):
                self.log(f"mean_{index}", batch.mean())
                self.log(f"sum_{index}", batch.sum(), reduce_fx="sum", on_step=True)
                self.log(f"max_{index}", batch.max(), reduce_fx="max", sync_dist=True)
            calls.clear()

        def on_validation_end(self) -> None:
            loops.append(list(calls))

    for name in names:
        setattr(dist, name, counted(name))
    try:
        run_here(Counted(), numbers(1, 2), val=numbers(1, 2, 3), rank=rank, world_size=world_size, max_epochs=3)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return loops


def test_a_loops_end_is_one_collective_for_all_keys(two: Processes) -> None:
    # The first one exchanges what the keys are; from then on there is one vector for all of them.
    assert two(collectives_case) == [[["all_gather_object"], ["all_gather"], ["all_gather"]]] * 2


# -- no waiting ------------------------------------------------------------------------------------------------------
class Reads(TorchDispatchMode):
    """Notes every operation that hands a number from the device to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
                    torch.ops.aten.equal.default):  # fmt: skip
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_step_reads_a_value_back(tmp_path):
    reads = Reads()

    class Watch(raylit.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 0:
                reads.__enter__()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.log("end", outputs["loss"], on_step=True, on_epoch=True, reduce_fx="max", batch_size=2)
            trainer.callback_metrics["loss"]  # reading them waits for nothing either
            if batch_idx == 149:
                reads.__exit__(None, None, None)

    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, prog_bar=True)
            self.log("both", loss, on_step=True, on_epoch=True, sync_dist=True)
            self.log("sum", loss, on_step=False, on_epoch=True, reduce_fx=torch.sum)
            self.log("callable", loss, on_step=False, on_epoch=True, reduce_fx=torch.median)
            return loss

    quiet(tmp_path, callbacks=Watch(), log_every_n_steps=1000).fit(Module(), numbers(*range(150)))
    assert reads.seen == []
