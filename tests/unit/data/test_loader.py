"""Loaders as users write them, prepared for one rank."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from raylit.data import prepare, prepare_all, prepare_train
from raylit.errors import DataError


def numbers(n):
    return list(range(n))


def as_list(batch):
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def walk(prepared, epoch=0, start=0):
    prepared.set_epoch(epoch, start)
    return [as_list(batch) for batch in prepared]


def ranks(make, world=2, stage="train", epoch=0, start=0, **kw):
    """Every rank's batches; each rank has a loader of its own, as in a run."""
    out = []
    for rank in range(world):
        prepared = prepare(make(), stage=stage, rank=rank, world_size=world, seed=7, **kw)
        out.append(walk(prepared, epoch, start))
        if prepared.num_batches is not None and not start:
            assert prepared.num_batches == len(out[-1])
        if prepared.num_batches is not None:
            assert prepared.batches_from(start) == len(out[-1])
    return out


def flat(batches):
    return [i for batch in batches for i in batch]


class Squares(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return i


class Noisy(Dataset):
    """Augmentation in all three random states."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return torch.tensor([i, torch.rand(()).item(), random.random(), np.random.rand()], dtype=torch.float64)


class Stream(IterableDataset):
    def __init__(self, items=range(10)):
        self.items = list(items)

    def __iter__(self):
        return iter(self.items)


class ShardableStream(Stream):
    def shard(self, num_shards, index):
        return ShardableStream(self.items[index::num_shards])


class Sized:
    """An iterable of batches that knows its length."""

    epoch = None

    def __iter__(self):
        return iter([[1], [2], [3]])

    def __len__(self):
        return 3

    def set_epoch(self, epoch):
        self.epoch = epoch


def init_worker(worker_id):
    pass


def collate_sum(items):
    return sum(items)


# --- map-style -------------------------------------------------------------------------------------------------------


def test_the_contracts_blocks():
    assert ranks(lambda: DataLoader(numbers(11), batch_size=2)) == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]
    assert ranks(lambda: DataLoader(numbers(5), batch_size=4), stage="test") == [[[0, 1, 2]], [[3, 4]]]
    assert ranks(lambda: DataLoader(numbers(1), batch_size=4), stage="predict") == [[[0]], []]


def test_shuffled_order_is_shared_and_new_each_epoch():
    def make():
        return DataLoader(numbers(20), batch_size=3, shuffle=True)

    alone = prepare(make(), stage="train", rank=0, world_size=1, seed=7)
    orders = [flat(walk(alone, epoch)) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert sorted(flat(flat(ranks(make, epoch=1)))) == list(range(20))
    # In process and on workers it is one order: rank 0 starts with the same block.
    assert ranks(make, epoch=1)[0][0] == orders[1][:3]
    assert flat(walk(alone, 0)) == orders[0]


@pytest.mark.parametrize("start", [0, 6, 12])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_resume_sees_the_rest(start, world):
    def make():
        return DataLoader(numbers(20), batch_size=2, shuffle=True)

    whole = flat(ranks(make, world=1, stage="test", epoch=4)[0])
    rest = ranks(make, world=world, stage="test", epoch=4, start=start)
    assert sorted(flat(flat(rest))) == sorted(whole[start:])


def test_the_users_generator_is_the_seed_and_is_left_alone():
    def make(seed):
        return DataLoader(numbers(20), shuffle=True, generator=torch.Generator().manual_seed(seed))

    loader = make(1)
    state = loader.generator.get_state()
    prepared = prepare(loader, stage="train", rank=0, world_size=1, seed=0)
    prepared.set_epoch(0)
    assert torch.equal(loader.generator.get_state(), state)
    assert prepared.loader.generator is loader.generator
    order = [int(b) for b in prepared]
    assert order == [int(b) for b in prepare(make(1), stage="train", rank=0, world_size=1, seed=99)]
    assert order != [int(b) for b in prepare(make(2), stage="train", rank=0, world_size=1, seed=0)]


def test_settings_survive():
    loader = DataLoader(
        numbers(12), batch_size=3, num_workers=2, collate_fn=collate_sum, pin_memory=False, timeout=11,
        worker_init_fn=init_worker, multiprocessing_context="fork", prefetch_factor=3, persistent_workers=True,
        in_order=False,
    )  # fmt: skip
    loader.note = "mine"
    prepared = prepare(loader, stage="train", rank=0, world_size=2, seed=0)
    for key in ("dataset num_workers collate_fn pin_memory timeout worker_init_fn multiprocessing_context "
                "prefetch_factor persistent_workers pin_memory_device in_order note").split():  # fmt: skip
        assert getattr(prepared.loader, key) == getattr(loader, key), key
    assert prepared.source is loader
    assert (prepared.batch_size, prepared.samples_per_step, prepared.num_samples) == (3, 6, 12)
    assert prepared.equal_steps
    pinned = DataLoader(numbers(4), pin_memory=True)
    assert prepare(pinned, stage="train", rank=0, world_size=1, seed=0).loader.pin_memory


def test_drop_last_and_batch_sampler_objects():
    def make():
        return DataLoader(numbers(11), batch_sampler=BatchSampler(RandomSampler(numbers(11)), 2, drop_last=True))

    out = ranks(make)
    assert [[len(b) for b in rank] for rank in out] == [[2, 2], [2, 2]]
    assert len(flat(flat(ranks(make, stage="test")))) == 10


def test_no_auto_collation():
    def make():
        return DataLoader(numbers(5), batch_size=None, shuffle=False)

    assert ranks(make) == [[0, 2], [1, 3]]
    assert ranks(make, stage="test") == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: WeightedRandomSampler([1.0] * 10, 30),
        lambda: SubsetRandomSampler(range(5), generator=torch.Generator().manual_seed(3)),
        lambda: RandomSampler(numbers(10), replacement=True, num_samples=13),
        lambda: [4, 3, 2, 1],
    ],
)
def test_custom_samplers_are_drawn_alike_on_every_rank(sampler):
    def make():
        return DataLoader(numbers(10), batch_size=2, sampler=sampler())

    before = torch.get_rng_state()
    whole = flat(ranks(make, world=1, stage="test", epoch=2)[0])
    torch.manual_seed(random.getrandbits(30))  # the process's own state does not matter
    parts = ranks(make, world=2, stage="test", epoch=2)
    assert sorted(flat(flat(parts))) == sorted(whole)
    assert parts[0][0] == whole[:2]
    torch.set_rng_state(before)


def test_a_samplers_generator_is_respected_and_put_back():
    def sampler(seed):
        return SubsetRandomSampler(range(20), generator=torch.Generator().manual_seed(seed))

    one = sampler(1)
    state = one.generator.get_state()
    prepared = prepare(DataLoader(numbers(20), sampler=one), stage="train", rank=0, world_size=1, seed=0)
    first, second = walk(prepared, 0), walk(prepared, 1)
    assert first != second
    assert torch.equal(one.generator.get_state(), state)
    other = prepare(DataLoader(numbers(20), sampler=sampler(2)), stage="train", rank=0, world_size=1, seed=0)
    assert walk(other, 0) != first


def test_own_batch_samplers_are_dealt_out_whole():
    class Buckets:
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([[self.epoch, 1], [2], [3, 4, 5]])

        def __len__(self):
            return 3

    def make():
        return DataLoader(numbers(10), batch_sampler=Buckets())

    assert ranks(make, epoch=9) == [[[9, 1]], [[2]]]
    assert ranks(make, epoch=9, stage="test") == [[[9, 1], [3, 4, 5]], [[2]]]
    assert ranks(make, stage="test", start=2) == [[[3, 4, 5]], []]


def test_a_distributed_sampler_is_replaced():
    data = numbers(10)

    def make():
        return DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=1, shuffle=False))

    assert sorted(flat(flat(ranks(make)))) == data


# --- random states ---------------------------------------------------------------------------------------------------


def noisy(persistent=False, **kw):
    return DataLoader(Noisy(), batch_size=3, num_workers=2, persistent_workers=persistent, **kw)


@pytest.mark.parametrize("persistent", [False, True])
def test_augmentation_follows_from_seed_epoch_and_rank(persistent):
    def run(epochs, start=0, rank=0, seed=7):
        prepared = prepare(noisy(persistent), stage="train", rank=rank, world_size=2, seed=seed)
        out = []
        for epoch in epochs:
            prepared.set_epoch(epoch, start)
            out.append(torch.cat(list(prepared)))
        return out

    zero, one = run([0, 1])
    assert torch.equal(run([1])[0], one)  # whatever came before
    assert torch.equal(run([1], start=6)[0], one[3:])  # resumed in the middle of the epoch
    assert not torch.equal(zero[:, 1:], one[:, 1:])
    other = run([0], rank=1)[0]
    assert len({*zero[:, 1].tolist(), *other[:, 1].tolist()}) == 24
    assert len({*zero[:, 2].tolist(), *other[:, 2].tolist()}) == 24
    assert len({*zero[:, 3].tolist(), *other[:, 3].tolist()}) == 24
    assert not torch.equal(run([0], seed=8)[0], zero)


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
@pytest.mark.parametrize("own_generator", [False, True])
def test_the_process_draws_what_a_plain_loop_draws(workers, own_generator):
    def make():
        generator = torch.Generator().manual_seed(3) if own_generator else None
        return DataLoader(numbers(4), batch_size=2, generator=generator, **workers)

    def run(loader, set_epoch):
        torch.manual_seed(1)
        out = []
        for epoch in range(3):
            set_epoch(epoch)
            for _ in loader:
                out.append(torch.rand(2))  # dropout, say
        return torch.stack(out)

    prepared = prepare(make(), stage="train", rank=0, world_size=1, seed=7)
    assert torch.equal(run(prepared, prepared.set_epoch), run(make(), lambda epoch: None))


def test_making_the_iterator_draws_and_walking_does_not():
    prepared = prepare(DataLoader(numbers(4), shuffle=True), stage="train", rank=0, world_size=1, seed=7)
    iterator = iter(prepared)
    state = torch.get_rng_state()
    list(iterator)
    assert torch.equal(torch.get_rng_state(), state)


# --- iterables and sequences -----------------------------------------------------------------------------------------


def test_iterable_data_sets():
    alone = prepare(DataLoader(Stream(), batch_size=4), stage="train", rank=0, world_size=1, seed=0)
    assert walk(alone) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert walk(alone, 0, 4) == [[4, 5, 6, 7], [8, 9]]
    assert alone.num_batches is None
    out = ranks(lambda: DataLoader(ShardableStream(), batch_size=4, drop_last=True))
    assert out == [[[0, 2, 4, 6]], [[1, 3, 5, 7]]]
    prepared = prepare(DataLoader(ShardableStream()), stage="test", rank=0, world_size=2, seed=0)
    assert not prepared.equal_steps


def test_iterable_data_set_with_workers_is_seeded():
    def run(epoch):
        data = DataLoader(Stream([1]), batch_size=None, num_workers=1, worker_init_fn=init_worker, collate_fn=add_noise)
        return walk(prepare(data, stage="train", rank=0, world_size=1, seed=0), epoch)

    assert run(1) == run(1) != run(2)


def add_noise(item):
    return item + torch.rand(())


def test_plain_iterables_and_sequences():
    prepared = prepare(Sized(), stage="train", rank=0, world_size=1, seed=0)
    assert (walk(prepared, 5), prepared.num_batches, prepared.source.epoch) == ([[1], [2], [3]], 3, 5)
    tensors = [torch.tensor([i]) for i in range(5)]
    assert ranks(lambda: tensors) == [[[0], [2]], [[1], [3]]]
    assert ranks(lambda: tensors, stage="test") == [[[0], [2], [4]], [[1], [3]]]
    assert ranks(lambda: tensors, stage="test", start=2) == [[[2], [4]], [[3]]]


def test_as_it_is():
    sampler = DistributedSampler(numbers(10), num_replicas=2, rank=1, shuffle=True)
    loader = DataLoader(numbers(10), sampler=sampler, batch_size=2)
    prepared = prepare(loader, stage="train", rank=1, world_size=2, seed=0, shard=False)
    assert prepared.num_batches == 3
    assert walk(prepared, 3, start=4) == [as_list(b) for b in loader][1:]
    assert sampler.epoch == 3
    tensors = [torch.tensor([i]) for i in range(3)]
    assert walk(prepare(tensors, stage="train", rank=1, world_size=2, seed=0, shard=False), 0, 2) == [[1], [2]]


def test_a_generator_can_be_walked_once():
    prepared = prepare((i for i in range(3)), stage="train", rank=0, world_size=1, seed=0)
    assert list(prepared) == [0, 1, 2]
    with pytest.raises(DataError, match="train_dataloader: the loader is a generator, which can be walked only once"):
        iter(prepared)


# --- subclasses ------------------------------------------------------------------------------------------------------


class Graphs(DataLoader):
    def __init__(self, dataset, batch_size, follow=(), **kw):
        self.follow = follow
        kw.pop("collate_fn", None)
        super().__init__(dataset, batch_size, collate_fn=lambda items: (self.follow, items), **kw)


class Closed(DataLoader):
    def __init__(self, dataset):
        super().__init__(dataset, batch_size=2)


class Forgetful(DataLoader):
    def __init__(self, dataset, secret=1, **kw):
        super().__init__(dataset, **kw)


class Clashing(DataLoader):
    def __init__(self, dataset, **kw):
        super().__init__(dataset, collate_fn=collate_sum, **kw)


def test_subclasses_are_built_again():
    out = ranks(lambda: Graphs(numbers(8), 2, follow=("x",)))
    assert out[1] == [(("x",), [2, 3]), (("x",), [6, 7])]


@pytest.mark.parametrize(
    ("loader", "why"),
    [
        (Closed(numbers(4)), "does not take batch_sampler"),
        (Forgetful(numbers(4)), "'secret' is not kept"),
        (Clashing(numbers(4)), "multiple values"),
    ],
)
def test_subclasses_that_cannot_be(loader, why):
    with pytest.raises(DataError) as caught:
        prepare(loader, stage="train", rank=0, world_size=2, seed=0)
    assert why in str(caught.value)
    assert "use_distributed_sampler=False" in str(caught.value)
    assert type(loader).__name__ in str(caught.value)
    prepare(loader, stage="train", rank=0, world_size=2, seed=0, shard=False)


# --- several loaders -------------------------------------------------------------------------------------------------


def test_several_for_evaluation():
    place = {"stage": "test", "rank": 0, "world_size": 1, "seed": 0}
    assert prepare_all(None, **place) == []
    assert len(prepare_all(DataLoader(numbers(4)), **place)) == 1
    assert len(prepare_all([DataLoader(numbers(4))] * 3, **place)) == 3
    assert len(prepare_all([torch.zeros(2), torch.zeros(2)], **place)) == 1
    assert len(prepare_all([(1, 2)], **place)) == 1
    with pytest.raises(DataError, match="for training only"):
        prepare_all({"a": DataLoader(numbers(4))}, **place)
    with pytest.raises(DataError, match=r"val_dataloader\[1\]: got 3"):
        prepare_all([DataLoader(numbers(4)), 3], **place)


@pytest.mark.parametrize("world", [1, 2])
def test_several_for_training(world):
    def make():
        loaders = {"a": DataLoader(numbers(20), batch_size=2, shuffle=True), "b": DataLoader(numbers(6), shuffle=True)}
        return prepare_train(loaders, rank=0, world_size=world, seed=7)

    combined = make()
    whole = list(combined)
    assert combined.num_batches == len(whole) == 10 // world
    assert combined.equal_steps
    assert combined.samples_per_step == 3 * world
    passes = [int(batch["b"]) for batch in whole]
    per_pass = 6 // world
    if len(passes) > per_pass:
        assert passes[:per_pass] != passes[per_pass:]
    for done in range(len(whole)):
        resumed = make()
        resumed.set_epoch(0, done * resumed.samples_per_step)
        assert resumed.batches_from(done * resumed.samples_per_step) == len(whole) - done
        rest = list(resumed)
        assert len(rest) == len(whole) - done
        for left, right in zip(rest, whole[done:]):
            assert all(torch.equal(left[key], right[key]) for key in "ab")


def test_shapes_of_combined_batches_and_unknown_lengths():
    a, b = DataLoader(numbers(4)), DataLoader(Stream([7, 8, 9]))
    place = {"rank": 0, "world_size": 1, "seed": 0}
    combined = prepare_train((a, b), **place)
    assert combined.num_batches is None
    out = list(combined)
    assert isinstance(out[0], tuple)
    assert [[int(x) for x in batch] for batch in out] == [[0, 7], [1, 8], [2, 9], [3, 7]]
    assert isinstance(next(iter(prepare_train([a, a], **place))), list)
    assert as_list(next(iter(prepare_train(a, **place)))) == [0]
    with pytest.raises(DataError, match="gave no batch when it started over"):
        list(prepare_train([a, DataLoader(Stream([]))], **place))


# --- refusals --------------------------------------------------------------------------------------------------------


class Endless:
    def __iter__(self):
        while True:
            yield 0


class OwnSharding(DistributedSampler):
    pass


class NoLength(Dataset):
    def __getitem__(self, i):
        return i


class DuckData:
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return i


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Squares(), ["the data set Squares itself", "DataLoader(dataset, batch_size=...)"]),
        (DuckData(), ["the data set DuckData itself", "DataLoader(dataset, batch_size=...)"]),
        (TensorDataset(torch.zeros(3)), ["TensorDataset itself"]),
        (torch.zeros(3), ["got a tensor", "TensorDataset"]),
        ("data", ["'data'", "text"]),
        (3, ["got 3", "cannot be iterated"]),
        ({"a": 1}, ["a dict"]),
        ([1, 2], ["first item is a int", "tensor, tuple or dict"]),
        ([], ["gives no batch", "0 batches", "world size 2"]),
        (DataLoader([]), ["length 0", "batch size 1", "world size 2"]),
        (DataLoader([1]), ["length 1", "batch size 1", "drop_last=False", "world size 2"]),
        (DataLoader(numbers(3), 2, drop_last=True), ["length 3", "batch size 2", "drop_last=True"]),
        ((i for i in range(3)), ["generator", "shard(num_shards, index)", "use_distributed_sampler=False"]),
        (DataLoader(Stream()), ["Stream", "shard(num_shards, index)", "use_distributed_sampler=False"]),
        (DataLoader(numbers(3), sampler=OwnSharding([1], 2, 0)), ["OwnSharding", "use_distributed_sampler=False"]),
        (DataLoader(NoLength()), ["NoLength has no length", "__len__"]),
        (DataLoader(numbers(3), sampler=Endless()), ["Endless", "did not end", "use_distributed_sampler=False"]),
    ],
)
def test_refusals(source, words):
    with pytest.raises(DataError) as caught:
        prepare(source, stage="train", rank=0, world_size=2, seed=0, name="train_dataloader")
    message = str(caught.value)
    assert message.startswith("train_dataloader: ")
    assert all(word in message for word in words), message


def test_other_refusals():
    place = {"rank": 0, "world_size": 1, "seed": 0}
    with pytest.raises(DataError, match="no loader to train on"):
        prepare_train(None, **place)
    for empty in ({}, [], ()):
        with pytest.raises(DataError, match="empty collection"):
            prepare_train(empty, **place)
    with pytest.raises(DataError, match="stage must be one of train"):
        prepare(DataLoader([1]), stage="fit", **place)
    with pytest.raises(DataError, match="length 0"):
        prepare(DataLoader([]), stage="test", **place)
