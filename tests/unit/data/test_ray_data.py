"""A ray.data.Dataset as a loader, without Ray: what is asked of it, and who may read what."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import raylit
from raylit.data import RayDataLoader, prepare, prepare_all, prepare_train
from raylit.data.ray_data import datasets_of, stretches
from raylit.engine.evaluate import in_dataset_order
from raylit.errors import DataError, ResourceError
from raylit.wire import ClusterCpus
from raylit.worker.loaders import in_order
from raylit.worker.ray_data import check_cpus, problem, validates_within
from tests.unit.engine.small import Numbers, quiet


class Rows:
    """What one rank reads: a DataIterator. Counts its walks, and the walks that were ended."""

    def __init__(self, *values: float) -> None:
        self.values = values
        self.asked: list[dict[str, Any]] = []
        self.ended = 0

    def iter_torch_batches(
        self, *, batch_size: int = 256, drop_last: bool = False, device: str = "auto", prefetch_batches: int = 1,
        local_shuffle_buffer_size: int | None = None, local_shuffle_seed: int | None = None,
    ) -> Any:  # fmt: skip
        self.asked.append({key: value for key, value in locals().items() if key != "self"})
        return self._walk(batch_size, drop_last)

    def _walk(self, size: int, drop_last: bool) -> Iterator[dict[str, Tensor]]:
        try:
            for begin in range(0, len(self.values), size):
                part = self.values[begin : begin + size]
                if len(part) == size or not drop_last:
                    yield {"x": torch.tensor(part)}
        finally:
            self.ended += 1


class Data(Rows):
    """A Dataset."""

    def __init__(self, *values: float) -> None:
        super().__init__(*values)
        self.context = SimpleNamespace(
            enable_progress_bars=True, execution_options=SimpleNamespace(preserve_order=False)
        )

    def streaming_split(self, n: int, *, equal: bool) -> list[Rows]:
        values = self.values[: len(self.values) // n * n] if equal else self.values
        return [Rows(*values[rank::n]) for rank in range(n)]


class Sharing:
    """As the workers would share it, in one process."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.ordered: list[bool] = []

    @contextlib.contextmanager
    def beginning(self, dataset: Any, *, ordered: bool) -> Iterator[None]:
        self.ordered.append(ordered)
        yield

    def stream(self, dataset: Data, *, equal: bool) -> Rows:
        return dataset.streaming_split(self.world_size, equal=equal)[self.rank]

    def stretch(self, dataset: Data, batch_size: int | None) -> Rows:
        begins = [0, *stretches(len(dataset.values), self.world_size, batch_size), len(dataset.values)]
        return Rows(*dataset.values[begins[self.rank] : begins[self.rank + 1]])


def ranks(source: Any, stage: str, world_size: int) -> list[list[list[float]]]:
    """What each rank sees: a list of batches."""
    seen = []
    for rank in range(world_size):
        prepared = prepare(
            source, stage=stage, rank=rank, world_size=world_size, seed=0, sharing=Sharing(rank, world_size)
        )
        prepared.set_epoch(0)
        seen.append([batch["x"].tolist() for batch in prepared])
    return seen


@pytest.mark.parametrize("stage", ["train", "test", "predict"])
def test_one_rank_sees_every_row(stage: str) -> None:
    assert ranks(RayDataLoader(Data(1, 2, 3, 4, 5), batch_size=2), stage, 1) == [[[1, 2], [3, 4], [5]]]
    assert ranks(Data(1, 2, 3), stage, 1) == [[[1, 2, 3]]]
    assert ranks(Rows(1, 2, 3), stage, 1) == [[[1, 2, 3]]]


def test_training_gives_each_rank_as_many_rows_and_evaluation_each_row_once() -> None:
    loader = RayDataLoader(Data(1, 2, 3, 4, 5), batch_size=2)
    assert ranks(loader, "train", 2) == [[[1, 3]], [[2, 4]]]
    assert ranks(loader, "validate", 2) == [[[1, 3], [5]], [[2, 4]]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("count", [0, 1, 5, 6, 13])
@pytest.mark.parametrize("world_size", [2, 3])
def test_predictions_of_all_ranks_are_those_of_one(world_size: int, count: int, batch_size: int) -> None:
    loader = RayDataLoader(Data(*range(count)), batch_size=batch_size)
    merged = in_dataset_order([[rank] for rank in ranks(loader, "predict", world_size)], [True])
    assert merged == ranks(loader, "predict", 1)


def test_stretches_begin_at_whole_batches_and_are_even() -> None:
    assert stretches(10, 2, 3) == [6]
    assert stretches(12, 3, 2) == [4, 8]
    assert stretches(1, 3, 4) == [0, 0]
    assert stretches(7, 2, None) == [3]


def test_predictions_are_asked_for_in_order_and_others_are_not() -> None:
    for stage, ordered in (("train", False), ("test", False), ("predict", True)):
        sharing = Sharing(0, 1)
        prepared = prepare(Data(1, 2), stage=stage, rank=0, world_size=1, seed=0, sharing=sharing)
        assert len(list(prepared)) == 1
        assert sharing.ordered == [ordered]


def test_what_ray_is_asked_for() -> None:
    data = Data(1)
    list(RayDataLoader(data, batch_size=5, drop_last=True, prefetch_batches=3))
    list(prepare(data, stage="train", rank=0, world_size=1, seed=0))
    first, bare = data.asked
    assert (first["batch_size"], first["drop_last"], first["prefetch_batches"]) == (5, True, 3)
    assert bare["batch_size"] == 256
    # Not Ray's "auto": the batch goes to the device as that of any loader.
    assert first["device"] == bare["device"] == "cpu"
    assert first["local_shuffle_seed"] is None


def test_a_local_shuffle_has_another_order_in_each_epoch_and_on_each_rank() -> None:
    def seeds(seed: int, rank: int = 0, **options: Any) -> list[int]:
        data = Data(1, 2)
        loader = RayDataLoader(data, batch_size=1, local_shuffle_buffer_size=2, **options)
        prepared = prepare(loader, stage="train", rank=rank, world_size=2, seed=seed, shard=False)
        for epoch in (0, 1, 0):
            prepared.set_epoch(epoch)
            list(prepared)
        return [each["local_shuffle_seed"] for each in data.asked]

    first, second, again = seeds(7)
    assert first == again != second
    assert not set(seeds(7)) & set(seeds(7, rank=1))
    assert not set(seeds(7)) & set(seeds(8))
    assert seeds(7, local_shuffle_seed=3) == seeds(8, local_shuffle_seed=3) != seeds(7, local_shuffle_seed=4)


def test_overfitting_walks_without_the_shuffle() -> None:
    loader = RayDataLoader(Data(1, 2), batch_size=1, local_shuffle_buffer_size=2, prefetch_batches=0)
    assert in_order(loader).options == {"prefetch_batches": 0}
    assert in_order(loader).batch_size == 1


def test_a_walk_that_is_given_up_ends_and_the_next_begins_anew() -> None:
    data = Data(1, 2, 3, 4)
    prepared = prepare(RayDataLoader(data, batch_size=1), stage="train", rank=0, world_size=1, seed=0)
    walk = iter(prepared)
    assert next(walk)["x"].item() == 1
    assert data.ended == 0
    again = iter(prepared)  # the first walk is still held
    assert data.ended == 1
    assert next(again)["x"].item() == 1
    del again
    assert data.ended == 2, "let go, and Ray goes on making rows for it"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resume_drops_what_was_seen(world_size: int) -> None:
    loader = RayDataLoader(Data(*range(12)), batch_size=2)
    place: dict[str, Any] = {"rank": 0, "world_size": world_size, "seed": 0, "sharing": Sharing(0, world_size)}
    prepared = prepare_train(loader, **place)
    assert prepared.samples_per_step == 2 * world_size
    whole = [batch["x"].tolist() for batch in prepared]
    prepared.set_epoch(0, 2 * prepared.samples_per_step)
    assert [batch["x"].tolist() for batch in prepared] == whole[2:]
    assert [batch["x"].tolist() for batch in prepared] == whole, "later walks begin at the start"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RayDataLoader([1, 2]), "takes a ray.data.Dataset; got a list"),
        (lambda: RayDataLoader(Data), "takes a ray.data.Dataset; got a type"),
        (lambda: RayDataLoader(Data(1), batch_size=0), "batch_size=.*at least 1, or None for Ray's blocks; got 0"),
        (lambda: RayDataLoader(Data(1), batch_size=2.0), "got 2.0"),
        (lambda: RayDataLoader(Data(1), batch_size=True), "got True"),
        (lambda: RayDataLoader(Data(1), device="cuda"), "takes no device.*pin_memory"),
        (lambda: RayDataLoader(Data(1), prefetch_batch=2), "'prefetch_batch'. Did you mean 'prefetch_batches'"),
        (lambda: RayDataLoader(Data(1), batch_size=None, local_shuffle_buffer_size=3), "needs a batch_size; got None"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_what_several_workers_cannot_share_is_refused() -> None:
    place: dict[str, Any] = {"rank": 0, "world_size": 2, "seed": 0}
    with pytest.raises(DataError, match="a Rows of Ray's cannot be shared out over 2 workers. Pass the ray.data.Data"):
        prepare_train(Rows(1), name="train_dataloaders", **place)
    with pytest.raises(DataError, match="2 workers would get different numbers of them"):
        prepare_train([RayDataLoader(Data(1), batch_size=None)], **place)
    whole = prepare(Rows(1, 2), stage="train", shard=False, **place)
    assert [batch["x"].tolist() for batch in whole] == [[1, 2]] and not whole.equal_steps
    assert prepare_all(RayDataLoader(Data(1), batch_size=None), stage="test", **place)


def test_datasets_are_found_in_every_form() -> None:
    one, other = Data(1), Data(2)
    assert datasets_of(one) == [one] and datasets_of(RayDataLoader(one)) == [one]
    assert datasets_of([one, RayDataLoader(other)]) == datasets_of({"a": one, "b": other}) == [one, other]
    assert datasets_of([torch.ones(1)]) == datasets_of(None) == datasets_of(Data) == []


def test_the_cpus_that_are_left_for_ray_datas_tasks() -> None:
    full = ClusterCpus(total=2.0, workers=2, each=1.0)
    assert problem(0, full) is None and problem(1, None) is None
    assert problem(1, ClusterCpus(2.0, 2, 0.5)) is None
    assert problem(1, ClusterCpus(1.3, 3, 0.1)) is None, "0.1 three times is 0.3"
    text = problem(1, full)
    assert text is not None
    for part in ("1 CPU beside the workers", "has 2 CPUs", "2 workers x 1 take 2, which leaves 0", "materialize()"):
        assert part in text
    with pytest.raises(ResourceError, match="2 ray.data.Datasets at a time takes 2 CPUs"):
        check_cpus(2, ClusterCpus(4.0, 3, 1.0))


@pytest.mark.parametrize(
    ("arguments", "within"),
    [
        ({}, False), ({"val_check_interval": 1}, True), ({"val_check_interval": 0.5}, True),
        ({"limit_train_batches": 1}, True), ({"limit_train_batches": 1.0}, False), ({"overfit_batches": 2}, True),
    ],
)  # fmt: skip
def test_when_a_validation_comes_before_the_training_data_are_through(
    tmp_path: Path, arguments: dict[str, Any], within: bool
) -> None:
    assert validates_within(quiet(tmp_path, **arguments)._config.fit) is within


class Sees(Numbers):
    """Its weight goes down by the mean of each batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.weight * batch["x"].mean()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", batch["x"].mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch["x"] * 2


def test_every_entry_point_in_this_process(tmp_path: Path) -> None:
    class Net(Sees):
        def train_dataloader(self) -> Any:
            return RayDataLoader(Data(1.0, 2.0, 3.0, 4.0), batch_size=2)

    net, trainer = Net(), quiet(tmp_path, max_epochs=2)
    trainer.fit(net)
    assert net.weight.item() == -2 * (1.5 + 3.5)
    assert trainer.num_training_batches == float("inf") and trainer.global_step == 4
    assert trainer.test(net, [Data(1.0, 2.0, 6.0), Data(5.0)]) == [
        {"mean/dataloader_idx_0": 3.0}, {"mean/dataloader_idx_1": 5.0}
    ]  # fmt: skip
    predicted = trainer.predict(net, RayDataLoader(Data(1.0, 2.0, 3.0), batch_size=2))
    assert [each.tolist() for each in predicted] == [[2.0, 4.0], [6.0]]


def test_beside_another_training_loader_the_shorter_starts_over(tmp_path: Path) -> None:
    class Both(Numbers):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.weight * (batch["rows"]["x"].sum() + batch["list"].sum())

    net = Both()
    loaders = {
        "rows": RayDataLoader(Data(1.0, 2.0, 4.0), batch_size=1),
        "list": [torch.tensor(8.0), torch.tensor(16.0)],
    }
    quiet(tmp_path).fit(net, loaders)
    assert net.weight.item() == -(1 + 8 + 2 + 16 + 4 + 8)


def test_a_fit_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    def loader() -> Any:
        return RayDataLoader(Data(1.0, 2.0, 4.0, 8.0, 16.0), batch_size=1)

    class Half(raylit.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                module.weight.data.zero_()

    net = Sees()
    quiet(tmp_path, callbacks=[Half()]).fit(net, loader())
    assert net.weight.item() == -(4 + 8 + 16)
    again = Sees()
    quiet(tmp_path).fit(again, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert again.weight.item() == -31


def test_a_share_of_the_batches_needs_their_number(tmp_path: Path) -> None:
    with pytest.raises(raylit.errors.ConfigError, match=r"limit_train_batches=0.5"):
        quiet(tmp_path, limit_train_batches=0.5).fit(Sees(), Data(1.0))


def test_an_empty_dataset_is_refused_in_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gave no batch"):
        quiet(tmp_path).fit(Sees(), Data())


def test_the_name_is_public() -> None:
    assert raylit.data.RayDataLoader is RayDataLoader
