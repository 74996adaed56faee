"""An elastic run is the run on ``max`` workers, whatever the number that is there; resizing it changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import raylit
from raylit.ports import RunSnapshot
from raylit.stage import SafePoint
from tests.contract.resuming import Recorder, through_file
from tests.two_process.harness import Processes, run_here

MOST = 4
SAMPLES, BATCH = 37, 2  # of four shares: four whole steps, and a last one of a sample each


class Numbered(Dataset[Any]):
    """Samples with augmentation from every random state, and their numbers."""

    def __init__(self, count: int, noise: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.noise = torch.randn(count, 3, generator=generator), noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        drawn = random.random() + float(np.random.rand()) + torch.rand(3)
        return self.x[index] + self.noise * drawn, index


def loader(noise: float = 0.0, **options: Any) -> DataLoader[Any]:
    return DataLoader(Numbered(SAMPLES, noise), batch_size=BATCH, shuffle=True, **options)


class Net(raylit.Module):
    """Keeps every batch that it was given, and what came of the epochs."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.taken: list[tuple[int, int, list[int]]] = []  # epoch, global step, samples
        self.ended: list[list[list[int]]] = []
        self.drawn: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, ids = batch
        loss = self.net(x).square().mean()
        self.taken.append((self.current_epoch, self.global_step, ids.tolist()))
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("ids", ids.float().sum(), on_step=True, on_epoch=True, reduce_fx="sum", sync_dist=True,
                 sync_dist_op="sum")  # fmt: skip
        self.log("largest", ids.float().max(), on_step=False, on_epoch=True, reduce_fx="max")
        return {"loss": loss, "ids": ids}

    def training_epoch_end(self, outputs: Any) -> None:
        self.ended.append([output["ids"].tolist() for output in outputs])
        self.drawn.append(float(torch.rand(())))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7), "interval": "step"}]


class Cycle(Net):
    """Two optimizers with frequencies."""

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        return {**output, "loss": output["loss"] * (optimizer_idx + 1)}

    def training_epoch_end(self, outputs: Any) -> None:
        super().training_epoch_end([*outputs[0], *outputs[1]])

    def configure_optimizers(self) -> Any:
        layers = list(self.net)
        first = torch.optim.AdamW(layers[0].parameters(), 0.05)
        second = torch.optim.SGD(layers[-1].parameters(), 0.05)
        return ({"optimizer": first, "frequency": 2}, {"optimizer": second, "frequency": 1})


class Climbs(Net):
    """LBFGS computes its passes anew, on all workers alike."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def ran_case(
    rank: int, world_size: int, make: Callable[[], Net], noise: float, arguments: dict[str, Any],
    taken: tuple[Any, Any] | None = None, only: tuple[int, ...] = (),
) -> Any:  # fmt: skip
    recorder = Recorder(only=only)
    common, own = taken or (None, None)
    ran = run_here(
        make(), loader(noise), rank=rank, world_size=world_size, order_seed=7, log_every_n_steps=1,
        checkpointer=recorder, checkpoint=common, own_states=own,
        **{"max_epochs": 2, "enable_checkpointing": True, "seed": 5, "precision": "64", **arguments},
    )  # fmt: skip
    module, history = ran.module, ran.trainer.history
    points = [(point, snapshot) for point, snapshot in recorder.points]
    assert history is not None
    return ran.weights, module.taken, module.ended, history.to_pydict(), ran.metrics, module.drawn, points


ELASTIC: dict[str, Any] = {"num_workers": (1, MOST)}
SIZES = [1, 2, MOST]


def on(processes: Callable[[int], Processes], workers: int, *args: Any) -> Any:
    return [ran_case(0, 1, *args)] if workers == 1 else processes(workers)(ran_case, *args)


def assert_close(mine: Any, theirs: Any) -> None:
    """The same but for the order of additions: weights, history, metrics, and what hooks drew on rank 0."""
    for name in theirs[0]:
        torch.testing.assert_close(mine[0][name], theirs[0][name], rtol=1e-8, atol=1e-10)
    assert list(mine[3]) == list(theirs[3]) and mine[3]["step"] == theirs[3]["step"]
    for name, column in theirs[3].items():
        for one, other in zip(mine[3][name], column, strict=True):
            assert (one is None) == (other is None) and (one is None or one == pytest.approx(other, rel=1e-7)), name
    assert mine[4] == pytest.approx(theirs[4], rel=1e-7)


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (Net, {}),
        (Net, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (Net, {"limit_train_batches": 3}),
        (Cycle, {}),
        (Climbs, {}),
        (Climbs, {"accumulate_grad_batches": 2}),
    ],
)
def test_fewer_workers_take_the_steps_of_the_most(
    processes: Callable[[int], Processes], make: type[Net], given: dict[str, Any]
) -> None:
    """Against the fixed run on ``max`` workers, of plain DDP: one, two and three workers."""
    fixed = processes(MOST)(ran_case, make, 0.0, given)
    for workers in SIZES:
        elastic = on(processes, workers, make, 0.0, {**given, **ELASTIC})
        assert_close(elastic[0], fixed[0])
        for (at, samples), group in _by_step(elastic).items():
            assert group == _by_step(fixed)[at, samples]
        assert all(torch.equal(elastic[0][0][name], each[0][name]) for each in elastic for name in each[0])


def _by_step(ran: Any) -> dict[tuple[int, int], list[int]]:
    """{(epoch, step): samples}, over all ranks and turns."""
    found: dict[tuple[int, int], list[int]] = {}
    for each in ran:
        for epoch, step, samples in each[1]:
            found[epoch, step] = sorted(found.get((epoch, step), []) + samples)
    return found


def test_what_is_drawn_at_random_is_the_same_on_any_number_of_workers(processes: Callable[[int], Processes]) -> None:
    """Dropout, augmentation in the data set, and on rank 0 what hooks draw."""

    def make() -> Net:
        return Net(dropout=0.5)

    most = processes(MOST)(ran_case, make, 0.3, ELASTIC)
    for workers in (1, 2):
        fewer = on(processes, workers, make, 0.3, ELASTIC)
        assert_close(fewer[0], most[0])
        assert fewer[0][5] == most[0][5]
    another = on(processes, 1, make, 0.3, {**ELASTIC, "seed": 5})
    assert another[0][5] == most[0][5] and len(set(most[0][5])) == 2


def test_augmentation_in_loader_workers_too() -> None:
    def case(workers: int) -> Any:
        ran = run_here(Net(), loader(0.3, num_workers=workers), order_seed=7, max_epochs=1, enable_checkpointing=True,
                       seed=5, **ELASTIC)  # fmt: skip
        return ran.weights

    one, two = case(1), case(2)
    assert all(torch.equal(one[name], two[name]) for name in one)


def at_point(ran: Any, number: int) -> tuple[Any, Any]:
    """(common, own states) of all ranks at a safe point."""
    snapshots: list[RunSnapshot] = [each[6][number][1] for each in ran]
    return through_file(snapshots[0].common), {rank: through_file(each.own) for rank, each in enumerate(snapshots)}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_run_that_is_resized_twice_is_the_run_that_never_was(
    processes: Callable[[int], Processes], data: st.DataObject
) -> None:
    """Points and numbers of workers are drawn; half-done accumulation groups among them. No sample twice or never."""
    make = data.draw(st.sampled_from([Net, Cycle]), label="module")
    arguments = {**ELASTIC, "accumulate_grad_batches": data.draw(st.sampled_from([1, 3]), label="accumulate")}
    first, second, third = (data.draw(st.sampled_from(SIZES), label="workers") for _ in range(3))
    points = 11  # of a fit of two epochs: five batches and an end each, and the end of all
    one = data.draw(st.integers(0, points - 3), label="first point")
    other = data.draw(st.integers(one + 1, points - 2), label="second point")

    def with_dropout() -> Net:
        return make(dropout=0.3)

    whole = on(processes, MOST, with_dropout, 0.2, arguments)
    begun = on(processes, first, with_dropout, 0.2, arguments, None, (one,))
    middle = on(processes, second, with_dropout, 0.2, arguments, at_point(begun, one), (other - one - 1,))
    ended = on(processes, third, with_dropout, 0.2, arguments, at_point(middle, other - one - 1))
    assert_close(ended[0], whole[0])
    seen: dict[tuple[int, int], list[int]] = {}
    stops = (at_point(begun, one)[0], at_point(middle, other - one - 1)[0], None)
    for part, until in zip((begun, middle, ended), stops):
        stop = None if until is None else _position(until)
        for each in part:
            for epoch, step, samples in each[1]:
                if stop is None or (epoch, step) < stop:
                    seen.setdefault((epoch, step), []).extend(samples)
    if arguments["accumulate_grad_batches"] == 1:
        assert {at: sorted(samples) for at, samples in seen.items()} == _by_step(whole)
    # Outputs of the half-done epoch came along: every batch of each epoch once, over the ranks.
    for epoch in range(len(ended[0][2])):
        theirs = sorted(ids for each in whole for ids in each[2][epoch - len(ended[0][2])])
        assert sorted(ids for each in ended for ids in each[2][epoch]) == theirs


def _position(common: Any) -> tuple[int, int]:
    return int(common["epoch"]), int(common["global_step"])


def test_a_validation_in_the_middle_comes_at_the_same_steps(processes: Callable[[int], Processes]) -> None:
    def points(ran: Any) -> list[SafePoint]:
        return [point for point, _ in ran[0][6]]

    given = {"val_check_interval": 2, "limit_train_batches": 4, "limit_val_batches": 2}
    fixed = processes(MOST)(validated_case, given)
    for workers in (1, 2):
        args = ({**given, **ELASTIC},)
        elastic = [validated_case(0, 1, *args)] if workers == 1 else processes(workers)(validated_case, *args)
        assert points(elastic) == points(fixed)
        assert elastic[0][3]["val_loss"] == pytest.approx(fixed[0][3]["val_loss"], rel=1e-4, nan_ok=True)


def validated_case(rank: int, world_size: int, arguments: dict[str, Any]) -> Any:
    recorder = Recorder(only=())
    ran = run_here(
        Net(), loader(), val=DataLoader(Numbered(21, 0.0), batch_size=2), rank=rank, world_size=world_size, seed=5,
        order_seed=7, log_every_n_steps=1, checkpointer=recorder, enable_checkpointing=True, max_epochs=1, **arguments,
    )  # fmt: skip
    assert ran.trainer.history is not None
    history = ran.trainer.history.to_pydict()
    history["val_loss"] = [value for value in history.get("val_loss", ()) if value is not None]
    return None, None, None, history, None, None, recorder.points


def test_by_scale_a_step_has_the_workers_batches(processes: Callable[[int], Processes]) -> None:
    given = {**ELASTIC, "elastic_batch": "scale"}
    scaled = processes(2)(ran_case, Net, 0.0, given)
    plain = processes(2)(ran_case, Net, 0.0, {})
    assert all(torch.equal(scaled[0][0][name], plain[0][0][name]) for name in plain[0][0])
    assert scaled[0][3] == plain[0][3]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.sampled_from([1, 2, 3]), second=st.sampled_from([1, 2, 3]), point=st.integers(0, 3))
def test_by_scale_no_sample_is_seen_twice_or_left_out(
    processes: Callable[[int], Processes], first: int, second: int, point: int
) -> None:
    """Also where the place is within a step of the new number of workers; fewer than these are left over at the end."""
    arguments = {**ELASTIC, "elastic_batch": "scale", "max_epochs": 1}
    begun = on(processes, first, Net, 0.0, arguments, None, (point,))
    ended = on(processes, second, Net, 0.0, arguments, at_point(begun, point))
    used = [each for part in ended for ids in part[2][0] for each in ids]  # of the outputs, which came along
    assert len(set(used)) == len(used) and SAMPLES - len(used) < second


class Plateau(Net):
    """A rate that goes down by each step's loss, where that is not the least so far."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step", "monitor": "loss_step"}}  # fmt: skip


class Cuts(Net):
    """Ends each epoch before its third step, in the step's first turn or in a later one."""

    at = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        turns = self.trainer.num_training_batches // 5
        return -1 if batch_idx == 2 * turns + min(self.at, turns - 1) else None


class CutsLate(Cuts):
    at = 3


class Stops(Net):
    """Asks to stop after two steps."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trainer.should_stop = self.trainer.should_stop or self.global_step == 2


@pytest.mark.parametrize("make", [Plateau, Cuts, CutsLate, Stops])
def test_what_is_decided_by_a_step_is_decided_alike(processes: Callable[[int], Processes], make: type[Net]) -> None:
    """A schedule by the step's loss, an epoch that a hook cuts off, a request to stop."""
    given = {"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 3}
    most = processes(MOST)(ran_case, make, 0.0, {**given, **ELASTIC})
    for workers in (1, 2):
        fewer = on(processes, workers, make, 0.0, {**given, **ELASTIC})
        if make is not CutsLate:  # batches of the step that is dropped were seen, and count in the epoch's mean
            assert_close(fewer[0], most[0])
        for name, tensor in most[0][0].items():
            torch.testing.assert_close(fewer[0][0][name], tensor, rtol=1e-8, atol=1e-10)
        assert fewer[0][3]["step"] == most[0][3]["step"]


def test_loaders_that_start_over_draw_nothing_from_a_share(processes: Callable[[int], Processes]) -> None:
    def case(rank: int, world_size: int) -> Any:
        class Both(Net):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                super().training_step(batch[1], batch_idx)
                return super().training_step(batch[0], batch_idx)

        short = DataLoader(Numbered(9, 0.1), batch_size=1, shuffle=True)
        ran = run_here(Both(0.4), [loader(0.1), short], rank=rank, world_size=world_size, order_seed=7, seed=5,
                       precision="64", max_epochs=2, enable_checkpointing=True, **ELASTIC)  # fmt: skip
        return ran.weights

    most = processes(MOST)(case)
    for workers in (1, 2):
        ran = case(0, 1) if workers == 1 else processes(workers)(case)[0]
        for name in ran:
            torch.testing.assert_close(ran[name], most[0][name], rtol=1e-8, atol=1e-10)


class Draws(Net):
    def on_train_epoch_start(self) -> None:
        self.drawn.append(float(torch.rand(())))


def test_hooks_of_the_next_epoch_draw_the_same_after_a_change_at_an_epochs_end(
    processes: Callable[[int], Processes]
) -> None:
    whole = on(processes, 2, Draws, 0.0, ELASTIC)
    begun = on(processes, 2, Draws, 0.0, ELASTIC, None, (5,))
    assert begun[0][6][5][0] is SafePoint.EPOCH
    ended = on(processes, 1, Draws, 0.0, ELASTIC, at_point(begun, 5))
    assert ended[0][5][0] == whole[0][5][2]
