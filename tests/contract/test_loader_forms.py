"""Section 3: what the four dataloader hooks may return, on a Module and on a DataModule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import raylit
from raylit.errors import DataError
from tests.two_process.harness import Processes, run_here
from tests.unit.engine.small import Numbers, quiet

HOOKS = {"fit": "train_dataloader", "validate": "val_dataloader", "test": "test_dataloader",
         "predict": "predict_dataloader"}  # fmt: skip


class Stream:
    """Any iterable: no length, no index."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Tensor]:
        for value in self.values:
            yield torch.tensor([value])


class StreamSet(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[float]:
        yield from (1.0, 2.0, 3.0)


def loader(*values: float, batch_size: int = 1) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.tensor(values)), batch_size=batch_size)


def tensors(*values: float) -> list[Tensor]:
    return [torch.tensor([value]) for value in values]


# What a hook returns, and what the step sees of it: the sums of the batches, a list for each loader.
ONE: dict[str, tuple[Callable[[], Any], list[float]]] = {
    "a DataLoader": (lambda: loader(1, 2, 3, 4, 5, batch_size=2), [3, 7, 5]),
    "a DataLoader over a stream": (lambda: DataLoader(StreamSet(), batch_size=2), [3, 3]),
    "an iterable": (lambda: Stream(1, 2, 3), [1, 2, 3]),
    "a list of tensors": (lambda: tensors(4, 5), [4, 5]),
    "a tuple of tensors": (lambda: tuple(tensors(4, 5)), [4, 5]),
    "a list of tuples": (lambda: [(batch, batch) for batch in tensors(4, 5)], [8, 10]),
    "a list of dicts": (lambda: [{"x": batch} for batch in tensors(4, 5)], [4, 5]),
    "a list of one loader": (lambda: [loader(1, 2)], [1, 2]),
}
SEVERAL: dict[str, tuple[Callable[[], Any], list[list[float]]]] = {
    "a list of DataLoaders": (lambda: [loader(1, 2), loader(3, 4, batch_size=2)], [[1, 2], [7]]),
    "a tuple of loaders": (lambda: (loader(1), Stream(5, 6)), [[1], [5, 6]]),
    "a list of sequences of batches": (lambda: [tensors(1), [(batch,) for batch in tensors(8, 9)]], [[1], [8, 9]]),
}


def total(batch: Any) -> float:
    """The sum of all tensors in a batch."""
    if isinstance(batch, Tensor):
        return float(batch.sum())
    return sum(total(part) for part in (batch.values() if isinstance(batch, dict) else batch))


class Sees(Numbers):
    """Notes the sum of each batch by its loader."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[float]] = {}

    def _see(self, batch: Any, index: int) -> None:
        self.seen.setdefault(index, []).append(total(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._see(batch, 0)
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._see(batch, dataloader_idx)

    test_step = predict_step = validation_step


def run(owner: str, stage: str, make: Callable[[], Any], folder: Path) -> dict[int, list[float]]:
    """Run a stage whose loader comes from a hook of ``owner``."""
    hook = {HOOKS[stage]: lambda self: make()}
    module = type("Net", (Sees,), hook if owner == "Module" else {})()
    datamodule = type("Data", (raylit.DataModule,), hook)() if owner == "DataModule" else None
    getattr(quiet(folder), stage)(module, datamodule=datamodule)
    return module.seen


@pytest.mark.parametrize("form", ONE)
@pytest.mark.parametrize("stage", HOOKS)
@pytest.mark.parametrize("owner", ["Module", "DataModule"])
def test_one_loader(tmp_path: Path, owner: str, stage: str, form: str) -> None:
    make, expected = ONE[form]
    assert run(owner, stage, make, tmp_path) == {0: expected}


@pytest.mark.parametrize("form", SEVERAL)
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("owner", ["Module", "DataModule"])
def test_several_loaders_are_walked_one_after_another(tmp_path: Path, owner: str, stage: str, form: str) -> None:
    make, expected = SEVERAL[form]
    assert run(owner, stage, make, tmp_path) == dict(enumerate(expected))


@pytest.mark.parametrize(("form", "sums"), [("a list of DataLoaders", [8, 9]), ("a tuple of loaders", [6, 7]),
                                            ("a list of sequences of batches", [9, 10])])  # fmt: skip
def test_several_training_loaders_are_walked_together(tmp_path: Path, form: str, sums: list[float]) -> None:
    # The shorter one starts over.
    assert run("Module", "fit", SEVERAL[form][0], tmp_path) == {0: sums}


@pytest.mark.parametrize("several", [False, True])
def test_the_validation_hook_within_a_fit(tmp_path: Path, several: bool) -> None:
    class Net(Sees):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.weight * batch.sum()

        def train_dataloader(self) -> Any:
            return tensors(1)

        def val_dataloader(self) -> Any:
            return [loader(1, 2), Stream(3)] if several else tensors(1, 2)

    net = Net()
    quiet(tmp_path).fit(net)
    assert net.seen == ({0: [1, 2], 1: [3]} if several else {0: [1, 2]})


def test_the_argument_goes_before_the_datamodule_and_that_before_the_module(tmp_path: Path) -> None:
    class Net(Sees):
        def test_dataloader(self) -> Any:
            return tensors(1)

        val_dataloader = test_dataloader

    class Data(raylit.DataModule):
        def test_dataloader(self) -> Any:
            return tensors(2)

    net = Net()
    trainer = quiet(tmp_path)
    trainer.test(net, tensors(3))
    trainer.test(net, datamodule=Data())
    trainer.validate(net, datamodule=Data())  # the DataModule has none
    trainer.test(net)  # the same Module again: with the DataModule it had
    quiet(tmp_path).test(net)
    assert net.seen == {0: [3, 2, 1, 2, 1]}


class NotOnTheDriver(Sees):
    """A hook is called where the data is used."""

    def train_dataloader(self) -> Any:
        self.calls = [*getattr(self, "calls", []), self.trainer.global_rank]
        return tensors(*range(4))


def case(rank: int, world_size: int) -> Any:
    ran = run_here(NotOnTheDriver(), rank=rank, world_size=world_size)
    return ran.module.calls, ran.module.seen


def test_each_worker_asks_once_and_takes_its_own_batches(two: Processes) -> None:
    assert two(case) == [([0], {0: [0, 2]}), ([1], {0: [1, 3]})]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "train_dataloader.*there is no loader to train on"),
        (7, "train_dataloader: got 7, a int, which cannot be iterated. Pass a DataLoader"),
        ([[1.0, 2.0]], "train_dataloader.*whose first item is a float, which is not a batch"),
        ({}, "train_dataloader.*an empty collection of loaders"),
        ([], "train_dataloader.*an empty collection of loaders"),
        (TensorDataset(torch.ones(3)), "train_dataloader: got the data set TensorDataset itself. Pass DataLoader"),
    ],
)
def test_anything_else_is_refused_with_the_hooks_name(tmp_path: Path, returned: Any, message: str) -> None:
    net = type("Net", (Sees,), {"train_dataloader": lambda self: returned})()
    with pytest.raises(DataError, match=message):
        quiet(tmp_path).fit(net)
