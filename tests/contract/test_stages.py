"""Sections 3 and 4: what is around the loops of every entry point, from prepare_data to the endings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import raylit
from raylit.errors import HookError
from tests.two_process.harness import Processes, run_here
from tests.two_process.modules import Net, assert_equal, loader
from tests.unit.engine.small import Numbers, numbers, quiet

STAGES = ["fit", "validate", "test", "predict"]


def note(folder: Path, rank: int, what: str) -> None:
    with open(folder / f"rank{rank}", "a") as file:
        file.write(f"{what}\n")


def notes(folder: Path, rank: int) -> list[str]:
    path = folder / f"rank{rank}"
    return path.read_text().split() if path.exists() else []


class Data(raylit.DataModule):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare_data(self) -> None:
        note(self.folder, self.trainer.global_rank, "data.prepare")

    def setup(self, stage: str) -> None:
        note(self.folder, self.trainer.global_rank, f"data.setup.{stage}")

    def teardown(self, stage: str) -> None:
        note(self.folder, self.trainer.global_rank, f"data.teardown.{stage}")

    def train_dataloader(self) -> Any:
        return loader(8, 2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Watch(raylit.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        note(self.folder, trainer.global_rank, f"callback.setup.{stage}")

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        note(self.folder, trainer.global_rank, f"callback.teardown.{stage}")


class Model(Net):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def prepare_data(self) -> None:
        note(self.folder, self.global_rank, "model.prepare")

    def setup(self, stage: str) -> None:
        note(self.folder, self.global_rank, f"model.setup.{stage}")

    def teardown(self, stage: str) -> None:
        note(self.folder, self.global_rank, f"model.teardown.{stage}")

    def validation_step(self, batch: Any, batch_idx: int) -> Any: ...

    test_step = predict_step = validation_step


def case(rank: int, world_size: int, folder: Path, stage: str, nodes: int, where: str) -> None:
    model, data = Model(folder), Data(folder)
    arguments: dict[str, Any] = {}
    if where == "module":
        model.prepare_data_per_node = True
    elif where == "datamodule":
        data.prepare_data_per_node = True
    elif where == "trainer":
        arguments["prepare_data_per_node"] = True
    elif where == "trainer says no":
        arguments["prepare_data_per_node"] = False
        model.prepare_data_per_node = data.prepare_data_per_node = True
    run_here(model, stage=stage, datamodule=data, callbacks=[Watch(folder)], rank=rank, world_size=world_size,
             nodes=nodes, **arguments)  # fmt: skip


def around(stage: str) -> list[str]:
    return [f"{owner}.{hook}.{stage}" for hook in ("setup", "teardown") for owner in ("data", "callback", "model")]


@pytest.mark.parametrize("stage", STAGES)
def test_setup_and_teardown_on_every_worker_and_prepare_data_on_the_first(
    two: Processes, tmp_path: Path, stage: str
) -> None:
    two(case, tmp_path, stage, 1, "")
    assert notes(tmp_path, 0) == ["data.prepare", "model.prepare", *around(stage)]
    assert notes(tmp_path, 1) == around(stage)


@pytest.mark.parametrize(
    ("where", "nodes", "second"),
    [
        ("", 2, []),
        ("module", 2, ["model.prepare"]),
        ("datamodule", 2, ["data.prepare"]),
        ("trainer", 2, ["data.prepare", "model.prepare"]),
        ("trainer", 1, []),  # both ranks are on one node
        ("trainer says no", 2, []),
    ],
)
def test_prepare_data_per_node(two: Processes, tmp_path: Path, where: str, nodes: int, second: list[str]) -> None:
    two(case, tmp_path, "fit", nodes, where)
    assert notes(tmp_path, 0) == ["data.prepare", "model.prepare", *around("fit")]
    assert notes(tmp_path, 1) == [*second, *around("fit")]


def test_every_entry_point_of_the_trainer_goes_through_all_of_it(tmp_path: Path) -> None:
    model, data = Model(tmp_path), Data(tmp_path)
    trainer = quiet(tmp_path / "runs", callbacks=Watch(tmp_path))
    for stage in STAGES:
        getattr(trainer, stage)(model, datamodule=data)
    expected = [line for stage in STAGES for line in ("data.prepare", "model.prepare", *around(stage))]
    assert notes(tmp_path, 0) == expected


def test_a_lightning_1_setup_without_stage(tmp_path: Path) -> None:
    class Old(Numbers):
        def setup(self, stage: Any = None) -> None:
            self.stages = [*getattr(self, "stages", []), stage]

        def teardown(self) -> None:
            self.stages.append("down")

    module = Old()
    quiet(tmp_path).fit(module, numbers(1))
    assert module.stages == ["fit", "down"]


# -- late layers -----------------------------------------------------------------------------------------------------
class Late(Net):
    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    def setup(self, stage: str) -> None:
        self.order.append("setup")

    def configure_model(self) -> None:
        self.order.append("configure_model")
        if not hasattr(self, "late"):
            torch.manual_seed(self.global_rank)  # each rank draws its own; rank 0's are everyone's
            self.late = nn.Linear(2, 2)

    def forward(self, x: Any) -> Any:
        return self.late(super().forward(x))

    def configure_optimizers(self) -> Any:
        self.order.append("configure_optimizers")
        self.before = self.late.weight.detach().clone()
        return super().configure_optimizers()


def late_case(rank: int, world_size: int) -> Any:
    ran = run_here(Late(), loader(8, 2), rank=rank, world_size=world_size)
    return ran.module.order, ran.module.before, ran.weights


def test_layers_of_configure_model_are_trained_and_the_same_on_all_workers(two: Processes) -> None:
    (order, before, weights), (other_order, other_before, other) = two(late_case)
    assert order == other_order == ["setup", "configure_model", "configure_optimizers"]
    torch.manual_seed(0)
    assert torch.equal(before, nn.Linear(2, 2).weight) and torch.equal(before, other_before)
    assert_equal(weights, other)
    assert not torch.equal(weights["late.weight"], before)


def test_configure_model_runs_in_each_entry_point(tmp_path: Path) -> None:
    class Tested(Late):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    module = Tested()
    trainer = quiet(tmp_path)
    trainer.fit(module, loader(4, 2))
    trainer.test(module, loader(4, 2))
    assert module.order.count("configure_model") == 2


# -- configure_callbacks -----------------------------------------------------------------------------------------------
class Counts(raylit.Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, trainer: Any, module: Any) -> None:
        self.batches += 1


@pytest.mark.parametrize("form", ["one", "list", "tuple", "none"])
def test_what_configure_callbacks_may_return(tmp_path: Path, form: str) -> None:
    own = Counts()
    returned = {"one": own, "list": [own], "tuple": (own,), "none": None}[form]
    module = type("Own", (Numbers,), {"configure_callbacks": lambda self: returned})()
    trainer = quiet(tmp_path)
    trainer.fit(module, numbers(1, 2))
    assert own.batches == (0 if form == "none" else 2)
    assert trainer.callbacks == ([] if form == "none" else [own])


def test_configure_callbacks_of_something_else(tmp_path: Path) -> None:
    module = type("Own", (Numbers,), {"configure_callbacks": lambda self: ["no"]})()
    with pytest.raises(HookError, match="configure_callbacks returned a str; it must be raylit.Callback objects"):
        quiet(tmp_path).fit(module, numbers(1))


# -- ending early ------------------------------------------------------------------------------------------------------
class Ends(Numbers):
    """Trains on two batches of four in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[Any] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if batch_idx == 2 else None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.ended.append("validation")

    def training_epoch_end(self, outputs: Any) -> None:
        self.ended.append(len(outputs))

    def on_train_epoch_end(self) -> None:
        self.ended.append((self.current_epoch, self.global_step))


def test_minus_one_ends_the_epoch_and_the_next_begins(tmp_path: Path) -> None:
    module = Ends()
    trainer = quiet(tmp_path, max_epochs=2)
    trainer.fit(module, numbers(1, 10, 100, 1000), numbers(1))
    # The epoch's hooks run as ever; validation at the end of an epoch belongs to its last batch, which never came.
    assert module.ended == [2, (0, 2), 2, (1, 4)]
    assert module.weight.item() == -22.0 and trainer.current_epoch == 2


def ends_case(rank: int, world_size: int) -> Any:
    ran = run_here(Ends(), numbers(1, 10, 100, 1000, 5, 5, 5, 5), rank=rank, world_size=world_size)
    return ran.module.weight.item(), ran.module.ended


def test_minus_one_on_two_workers(two: Processes) -> None:
    # Rank 0 has 1, 100 and rank 1 has 10, 1000 before the end: steps of 5.5 and 550.
    assert two(ends_case) == [(-555.5, [2, (0, 2)])] * 2


# -- endings -----------------------------------------------------------------------------------------------------------
class Fails(raylit.Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.seen.append((type(exception).__name__, str(exception), trainer.state.value, module.trainer is trainer))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.seen.append("on_train_end")

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        self.seen.append("teardown")


@pytest.mark.parametrize(
    "hook",
    ["on_fit_start", "prepare_data", "setup", "configure_optimizers", "training_step", "validation_step",
     "on_validation_end", "training_epoch_end", "on_fit_end"],
)  # fmt: skip
def test_an_exception_in_any_hook_reaches_on_exception_once(tmp_path: Path, hook: str) -> None:
    def fails(self: Any, *args: Any) -> Any:
        raise LookupError(f"in {hook}")

    body = {"validation_step": lambda self, batch, batch_idx: None, hook: fails}
    watch = Fails()
    with pytest.raises(LookupError, match=f"in {hook}"):
        quiet(tmp_path, callbacks=watch).fit(type("Net", (Numbers,), body)(), numbers(1), numbers(1))
    errors = [each for each in watch.seen if isinstance(each, tuple)]
    assert errors == [("LookupError", f"in {hook}", "failed", True)]
    assert ("teardown" in watch.seen) == (hook == "on_fit_end")
