"""Running, taking the state at every safe point, and going on from each: what the tests of resuming share."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import raylit
from raylit.ports import RunSnapshot
from raylit.stage import SafePoint
from tests.two_process.harness import Ran, run_here

FEATURES, TARGETS = 3, 2


def through_file(value: dict[str, Any]) -> dict[str, Any]:
    """What a file gives back, loaded as a stranger's is."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@dataclass
class Recorder:
    """A checkpointer that keeps the state at every safe point, or at those numbered in ``only``."""

    only: tuple[int, ...] | None = None
    points: list[tuple[SafePoint, RunSnapshot | None]] = field(default_factory=list)

    def safe_point(self, point: SafePoint, take: Callable[[], RunSnapshot]) -> None:
        wanted = self.only is None or len(self.points) in self.only or point is SafePoint.END
        snapshot = None
        if wanted:
            taken = take()
            snapshot = RunSnapshot(through_file(taken.common), through_file(taken.own))
        self.points.append((point, snapshot))

    @property
    def end(self) -> RunSnapshot:
        point, snapshot = self.points[-1]
        assert point is SafePoint.END and snapshot is not None
        return snapshot


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run_recorded(
    make: Callable[[], raylit.Module], loaders: Callable[[], Any], *, seed: int, recorder: Recorder | None = None,
    rank: int = 0, world_size: int = 1, common: Any = None, own: dict[int, Any] | None = None,
    val: Callable[[], Any] | None = None, callbacks: Callable[[], Iterable[Any]] = tuple,
    held: bool = False, notices: Any = None, **arguments: Any,
) -> tuple[Ran, Recorder]:  # fmt: skip
    """Fit with states of the random generators that follow from ``seed`` and the rank.

    ``held``: signals wait for the end of a batch, as in a fit in the caller's process.
    """
    recorder = recorder or Recorder(only=())
    module = make()
    seed_all(seed + rank)
    ran = run_here(
        module, loaders(), rank=rank, world_size=world_size, val=None if val is None else val(),
        callbacks=callbacks(), order_seed=seed, checkpoint=common, own_states=own, checkpointer=recorder, held=held,
        notices=notices, **arguments,
    )  # fmt: skip
    return ran, recorder


def check_every_point(
    make: Callable[[], raylit.Module], loaders: Callable[[], Any], own_too: bool = True, **arguments: Any
) -> Recorder:
    """Go on from each safe point of a fit, with other seeds, and end in the very state of the fit; return its points.

    The saved state has to overwrite all: the script's own seeds differ.
    """
    _, whole = run_recorded(make, loaders, seed=1, recorder=Recorder(), **arguments)
    for number, (point, snapshot) in enumerate(whole.points[:-1]):
        assert snapshot is not None
        start = RunSnapshot(through_file(snapshot.common), through_file(snapshot.own))
        _, resumed = run_recorded(make, loaders, seed=77, common=start.common, own={0: start.own}, **arguments)
        where = f"from point {number} ({point})"
        assert_same(whole.end.common, resumed.end.common, f"{where}: common")
        if own_too:
            assert_same(whole.end.own, resumed.end.own, f"{where}: own")
        assert [each for each, _ in resumed.points] == [each for each, _ in whole.points[number + 1 :]], where
    return whole


def assert_same(mine: Any, other: Any, where: str = "") -> None:
    """Compare nested states exactly, tensors bit for bit; NaN equals NaN."""
    assert type(mine) is type(other), f"{where}: {mine!r} against {other!r}"
    if isinstance(mine, Tensor):
        same = mine.dtype == other.dtype and mine.shape == other.shape
        assert same and torch.equal(mine.nan_to_num(), other.nan_to_num()), f"{where}: {mine} against {other}"
    elif isinstance(mine, dict):
        assert list(mine) == list(other), f"{where}: keys {list(mine)} against {list(other)}"
        for key in mine:
            assert_same(mine[key], other[key], f"{where}.{key}")
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(other), f"{where}: {mine} against {other}"
        for index, (one, two) in enumerate(zip(mine, other)):
            assert_same(one, two, f"{where}[{index}]")
    else:
        assert mine == other or (mine != mine and other != other), f"{where}: {mine!r} against {other!r}"


# Modules and data ---------------------------------------------------------------------------------------------------
class Noisy(Dataset[Any]):
    """Samples with augmentation from python's, numpy's and torch's random states."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, FEATURES, generator=generator)
        self.y = torch.randn(count, TARGETS, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + float(np.random.rand()) + torch.rand(FEATURES)
        return self.x[index] + 0.1 * noise, self.y[index]


def shuffled(count: int = 14, batch_size: int = 4, **options: Any) -> Callable[[], DataLoader[Any]]:
    return lambda: DataLoader(Noisy(count), batch_size=batch_size, shuffle=True, **options)


class Unsized(IterableDataset[Any]):
    """Samples of an unknown number, with a draw for each."""

    def __init__(self, count: int) -> None:
        self.data = Noisy(count)

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self.data)):
            yield self.data[index]


class Net(raylit.Module):
    """Dropout, BatchNorm, and logged values of every kind."""

    def __init__(self, configure: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, TARGETS)
        )
        self._configure = configure or (lambda module: torch.optim.AdamW(module.parameters(), lr=0.01))
        self.seen: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True)
        self.log("largest", batch[0].max(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("plain", float(batch_idx), on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch) + torch.rand(()))

    def configure_optimizers(self) -> Any:
        return self._configure(self)


class WithOutputs(Net):
    """The outputs of an epoch count."""

    def training_epoch_end(self, outputs: Any) -> None:
        losses = torch.stack([output["loss"] for output in outputs])
        self.log("from_outputs", (losses * torch.arange(1.0, len(losses) + 1)).sum() + torch.rand(()))


# On several ranks ----------------------------------------------------------------------------------------------------
def every_point_case(
    rank: int, world_size: int, make: Callable[[], raylit.Module], loaders: Callable[[], Any], arguments: dict[str, Any]
) -> int:
    """``check_every_point`` as one rank of several; returns the number of points."""
    import torch.distributed as dist

    place: dict[str, Any] = {"rank": rank, "world_size": world_size, **arguments}
    _, whole = run_recorded(make, loaders, seed=1, recorder=Recorder(), **place)
    for number, (point, snapshot) in enumerate(whole.points[:-1]):
        assert snapshot is not None
        assert bool(snapshot.common) is (rank == 0)
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, (snapshot.common, snapshot.own))
        common, own = gathered[0][0], {each: parts[1] for each, parts in enumerate(gathered)}
        _, resumed = run_recorded(make, loaders, seed=77, common=common, own=own, **place)
        where = f"rank {rank} from point {number} ({point})"
        assert_same(whole.end.common, resumed.end.common, f"{where}: common")
        assert_same(whole.end.own, resumed.end.own, f"{where}: own")
    return len(whole.points)


def take_at(
    rank: int, world_size: int, make: Callable[[], raylit.Module], loaders: Callable[[], Any], number: int,
    arguments: dict[str, Any],
) -> RunSnapshot:  # fmt: skip
    """This rank's state at one safe point of a run."""
    recorder = Recorder(only=(number,))
    run_recorded(make, loaders, seed=1, recorder=recorder, rank=rank, world_size=world_size, **arguments)
    snapshot = recorder.points[number][1]
    assert snapshot is not None
    return snapshot
