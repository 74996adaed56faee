"""Contract 3: the Module's small helpers and its properties, before, during and after a run."""

from __future__ import annotations

import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import raylit
from raylit.errors import ConfigError, NotAttachedError
from tests.two_process.harness import Processes, run_here
from tests.unit.engine.small import Numbers, numbers, quiet


# -- freeze and unfreeze ---------------------------------------------------------------------------------------------
def test_freeze_and_unfreeze() -> None:
    module = raylit.Module()
    module.net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    module.net[0].bias.requires_grad_(False)
    module.freeze()
    assert not any(p.requires_grad for p in module.parameters()) and not any(m.training for m in module.modules())
    module.unfreeze()
    assert all(p.requires_grad for p in module.parameters()) and all(m.training for m in module.modules())


# -- print -----------------------------------------------------------------------------------------------------------
class Prints(Numbers):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.print("rank", self.global_rank, 2.5, sep="-")
        self.print("straight", file=sys.stderr)
        return super().training_step(batch, batch_idx)


def print_case(rank: int, world_size: int) -> list[dict[str, Any]]:
    ran = run_here(Prints(), numbers(1, 2), rank=rank, world_size=world_size)
    return [event for event in ran.events if event["kind"] == "print"]


def test_print_is_rank_zeros_and_goes_by_way_of_the_display(two: Processes) -> None:
    first, second = two(print_case)
    assert first == [{"kind": "print", "rank": 0, "text": "rank-0-2.5", "stream": "stdout"}]
    assert second == []


def test_print_with_a_file_and_outside_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet(tmp_path).fit(Prints(), numbers(1))
    shown = capsys.readouterr()
    assert shown.out == "rank-0-2.5\n" and shown.err == "straight\n"
    Prints().print("a", "b", end="!")
    assert capsys.readouterr().out == "a b!"


# -- all_gather ------------------------------------------------------------------------------------------------------
Pair = namedtuple("Pair", "x y")


class Gathers(Numbers):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        rank = self.global_rank
        self.found = self.all_gather({
            "pair": Pair(torch.full((2,), rank), (rank + 0.5, True)), "array": np.full(3, rank), "text": "kept",
        })  # fmt: skip
        if self.world_size > 1:
            assert self.all_gather(batch, group=torch.distributed.group.WORLD).shape == (2, 1)
        with pytest.raises(ConfigError, match="gathers over all workers"):
            self.all_gather(batch, group="mine")
        return super().training_step(batch, batch_idx)


def gather_case(rank: int, world_size: int) -> Any:
    return run_here(Gathers(), numbers(1, 1), rank=rank, world_size=world_size).module.found


def check_gathered(found: Any, world_size: int) -> None:
    ranks = list(range(world_size))
    assert type(found["pair"]).__name__ == "Pair" and found["pair"].x.tolist() == [[r, r] for r in ranks]
    assert found["pair"].y[0].tolist() == [r + 0.5 for r in ranks] and found["pair"].y[1].tolist() == [
        True for _ in ranks
    ]
    assert found["array"].tolist() == [[r] * 3 for r in ranks] and found["text"] == "kept"


def test_all_gather_of_any_nesting_gains_a_dimension_of_world_size(two: Processes) -> None:
    for found in two(gather_case):
        check_gathered(found, 2)
    check_gathered(gather_case(0, 1), 1)


class Weighs(raylit.Module):
    """Manual optimisation, so that nothing but ``all_gather`` talks between the ranks."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        mine = self.weight**2 * (self.global_rank + 1)
        every = self.all_gather({"w": mine}, sync_grads=True)["w"]
        weights = torch.tensor([[1.0, 2.0], [3.0, 5.0]]) * (self.global_rank + 1)
        self.manual_backward((every * weights).sum())
        self.grad = self.weight.grad.tolist()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def grad_case(rank: int, world_size: int) -> Any:
    return run_here(Weighs(), numbers(1, 1), rank=rank, world_size=world_size).module.grad


def test_gradients_through_all_gather_are_those_of_all_ranks_losses(two: Processes) -> None:
    # loss of rank s: (s+1) * sum_r c[r] * (r+1) * w^2, c = ((1, 2), (3, 5)). Rank r gets from all s: 3 * c[r] * (r+1)
    # * 2 w, w = (1, 2).
    assert two(grad_case) == [[3 * 1 * 1 * 2, 3 * 2 * 1 * 4], [3 * 3 * 2 * 2, 3 * 5 * 2 * 4]]


def test_all_gather_outside_a_run() -> None:
    with pytest.raises(NotAttachedError, match="all_gather works while a run goes on"):
        Numbers().all_gather(torch.ones(1))


# -- the progress bar's items ------------------------------------------------------------------------------------------
class Shows(Numbers):
    seen: dict[str, Any]

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("acc", batch_idx, prog_bar=True)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self) -> None:
        self.seen = self.get_progress_bar_dict()


class Chooses(Shows):
    def get_progress_bar_dict(self) -> dict[str, Any]:
        items = super().get_progress_bar_dict()
        items.pop("v_num")
        return {**items, "mine": 7}


def test_the_bar_begins_with_loss_and_a_short_v_num(tmp_path: Path) -> None:
    module = Shows()
    assert module.get_progress_bar_dict() == {}
    quiet(tmp_path, logger=True).fit(module, numbers(3))
    assert list(module.seen) == ["loss", "v_num", "acc"]
    assert len(module.seen["v_num"]) == 4 and float(module.seen["loss"]) == 0.0
    quiet(tmp_path, logger=raylit.loggers.CSVLogger(tmp_path / "logs", version=3)).fit(module, numbers(3))
    assert module.seen["v_num"] == 3
    quiet(tmp_path, logger=False).fit(module, numbers(3))
    assert list(module.seen) == ["loss", "acc"]


@pytest.mark.parametrize(
    ("name", "shown"), [("baseline", "baseline"), ("exp-with-a-long-name-v2", "v2"), ("averylongname", "longname")]
)
def test_a_name_is_cut_to_what_the_bar_has_room_for(name: str, shown: str, tmp_path: Path) -> None:
    module = Shows()
    quiet(tmp_path, logger=True, name=name).fit(module, numbers(3))
    assert module.seen["v_num"] == shown


def test_an_override_removes_and_adds_keys(tmp_path: Path) -> None:
    module = Chooses()
    quiet(tmp_path, logger=True).fit(module, numbers(3))
    assert list(module.seen) == ["loss", "acc", "mine"]


# -- the summary -----------------------------------------------------------------------------------------------------
class Layered(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def test_summarize_shows_layers_and_with_an_example_their_sizes() -> None:
    module = Layered()
    assert "encoder | Sequential | 40     | train\n" in module.summarize()
    assert "In sizes" not in module.summarize()
    module.example_input_array = torch.zeros(5, 4)
    assert "encoder | Sequential | 40     | train | [5, 4]   | [5, 8]\n" in module.summarize()
    assert "encoder.0" not in module.summarize() and "encoder.0" in module.summarize(max_depth=2)
    assert module.summarize(-1) == module.summarize("full") == module.summarize(2)
    assert module.summarize("top") == module.summarize(1)
    with pytest.raises(ValueError, match="max_depth=-2"):
        module.summarize(-2)


# -- properties ------------------------------------------------------------------------------------------------------
PROPERTIES = """current_epoch global_step global_rank local_rank node_rank world_size device dtype hparams
    hparams_initial logger loggers datamodule precision use_amp use_ddp use_ddp2 use_dp use_tpu on_gpu
    example_input_array automatic_optimization truncated_bptt_steps""".split()
BEFORE: dict[str, Any] = {
    "current_epoch": 0, "global_step": 0, "global_rank": 0, "local_rank": 0, "node_rank": 0, "world_size": 1,
    "device": torch.device("cpu"), "dtype": torch.float32, "hparams": {"lr": 0.1}, "hparams_initial": {"lr": 0.1},
    "logger": None, "loggers": [], "datamodule": None, "precision": "32-true", "use_amp": False, "use_ddp": False,
    "use_ddp2": False, "use_dp": False, "use_tpu": False, "on_gpu": False, "example_input_array": None,
    "automatic_optimization": True, "truncated_bptt_steps": 0,
}  # fmt: skip


class Tells(Numbers):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()

    def on_train_batch_end(self) -> None:
        self.during = {name: getattr(self, name) for name in PROPERTIES}
        assert self.trainer.global_step == self.global_step


class Data(raylit.DataModule):
    def train_dataloader(self) -> Any:
        return numbers(1, 2, 3, 4)


def test_before_a_run_they_are_those_of_a_single_process() -> None:
    assert {name: getattr(Tells(), name) for name in PROPERTIES} == BEFORE
    with pytest.raises(NotAttachedError, match=r"Tells.trainer needs a run: it works in hooks"):
        _ = Tells().trainer


def test_during_and_after_a_run_in_process(tmp_path: Path) -> None:
    module, data = Tells(), Data()
    module.example_input_array = torch.ones(1)
    logger = raylit.loggers.CSVLogger()
    trainer = quiet(tmp_path, precision="bf16-mixed", max_epochs=2, logger=logger)
    trainer.fit(module, datamodule=data)
    during = BEFORE | {
        "current_epoch": 1, "global_step": 8, "datamodule": data, "precision": "bf16-mixed", "use_amp": True,
        "logger": logger, "loggers": [logger], "example_input_array": module.example_input_array,
    }  # fmt: skip
    assert module.during == during
    assert {name: getattr(module, name) for name in PROPERTIES} == during | {"current_epoch": 2}
    with pytest.raises(NotAttachedError):
        _ = module.trainer


def tells_case(rank: int, world_size: int) -> Any:
    module = Tells()
    run_here(module, numbers(1, 2, 3, 4), rank=rank, world_size=world_size)
    return module.during


def test_during_a_run_on_two_workers(two: Processes) -> None:
    for rank, during in enumerate(two(tells_case)):
        assert during == BEFORE | {
            "global_step": 2,
            "global_rank": rank,
            "local_rank": rank,
            "world_size": 2,
            "use_ddp": True,
        }


def test_a_module_without_parameters_is_where_the_run_is(tmp_path: Path) -> None:
    class Empty(raylit.Module):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.during = (self.device, self.dtype)

    module = Empty()
    assert (module.device, module.dtype) == (torch.device("cpu"), torch.float32)
    quiet(tmp_path).test(module, numbers(1))
    assert module.during == (torch.device("cpu"), torch.float32)


def test_every_member_that_needs_a_run_says_so_by_name() -> None:
    module, optimizer = Numbers(), torch.optim.SGD([torch.zeros(1)], lr=1.0)
    for name, call in {
        "optimizers": module.optimizers, "lr_schedulers": module.lr_schedulers,
        "manual_backward": lambda: module.manual_backward(torch.zeros(1)),
        "manual_optimizer_step": lambda: module.manual_optimizer_step(optimizer),
        "clip_gradients": lambda: module.clip_gradients(optimizer),
        "toggle_optimizer": lambda: module.toggle_optimizer(optimizer),
        "untoggle_optimizer": lambda: module.untoggle_optimizer(optimizer),
        "tbptt_split_batch": lambda: module.tbptt_split_batch(torch.zeros(1, 2), 1),
    }.items():  # fmt: skip
        with pytest.raises(NotAttachedError, match=rf"Numbers\.{name} needs a run"):
            call()
