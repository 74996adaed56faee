"""``trainer.scale_batch_size`` in process: which sizes are tried, what is set and what stays as it was, its errors."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import raylit
from raylit.driver.tuning import largest
from raylit.errors import ConfigError, DataError, HookError, RaylitError, ResourceError, WorkerLostError
from raylit.worker.probe import is_out_of_memory

OOM = "CUDA out of memory. Tried to allocate 20.00 GiB"


def make(**arguments: Any) -> raylit.Trainer:
    given = {"num_workers": 0, "use_gpu": False, "max_epochs": 1, "enable_progress_bar": False, "logger": False,
             "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip
    return raylit.Trainer(**{**given, **arguments})


class Net(raylit.Module):
    """Has memory for ``room`` samples; ``tried``, which all copies share, gets the sizes of its batches."""

    tried: list[int]

    def __init__(self, room: int = 10**9, samples: int = 1000, batch_size: int = 7, **options: Any) -> None:
        super().__init__()
        self.save_hyperparameters("room", "batch_size")
        self.layer, self.room, self.samples, self.options = nn.Linear(3, 1), room, samples, options
        self.batch_size = batch_size

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,) = batch
        Net.tried.append(len(x))
        if len(x) > self.room:
            raise RuntimeError(OOM)
        return self.layer(x).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(self.samples, 3)), batch_size=self.batch_size, **self.options)


@pytest.fixture(autouse=True)
def tried() -> list[int]:
    Net.tried = []
    return Net.tried


@pytest.fixture(autouse=True, scope="module")
def _collections_are_short() -> Iterator[None]:
    """Each trial collects garbage: not among all that torch and the other tests have loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# -- which sizes -------------------------------------------------------------------------------------------------------
SEARCHES = [
    ("power", 100, 2, 25, [2, 4, 8, 16, 32, 64, 128], 64),
    ("power", 64, 2, 25, [2, 4, 8, 16, 32, 64, 128], 64),
    ("power", 100, 2, 4, [2, 4, 8, 16], 16),  # as many trials as were asked for; the last that was tried
    ("power", 5, 64, 25, [64, 32, 16, 8, 4], 4),  # 8 is known not to fit
    ("power", 0, 4, 25, [4, 2, 1], None),
    ("power", 1, 64, 3, [64, 32, 16], None),
    ("power", 9, 3, 25, [3, 6, 12], 6),
    ("binsearch", 100, 2, 25, [2, 4, 8, 16, 32, 64, 128, 96, 112, 104, 100, 102, 101], 100),
    ("binsearch", 64, 16, 25, [16, 32, 64, 128, 96, 80, 72, 68, 66, 65], 64),
    ("binsearch", 100, 2, 9, [2, 4, 8, 16, 32, 64, 128, 96, 112], 96),
    ("binsearch", 5, 64, 25, [64, 32, 16, 8, 4, 6, 5], 5),
    ("binsearch", 1, 2, 25, [2, 1], 1),
    ("binsearch", 0, 2, 25, [2, 1], None),
]


@pytest.mark.parametrize(("mode", "room", "first", "most", "asked", "found"), SEARCHES)
def test_sizes_that_are_tried(mode: str, room: int, first: int, most: int, asked: list[int], found: int | None) -> None:
    sizes: list[int] = []

    def fits(size: int) -> bool:
        sizes.append(size)
        return size <= room

    assert largest(fits, mode, first, most) == found
    assert sizes == asked


@pytest.mark.parametrize(("mode", "found"), [("power", 16), ("binsearch", 21)])
def test_memory_is_the_limit(mode: str, found: int, tried: list[int]) -> None:
    model = Net(room=21)
    assert make().scale_batch_size(model, mode=mode, steps_per_trial=2) == found
    assert model.batch_size == model.hparams.batch_size == found and model.hparams_initial.batch_size == 7
    assert tried[:9] == [2, 2, 4, 4, 8, 8, 16, 16, 32] and max(tried) == 32  # the step that fails is the trial's last
    assert tried.count(found) == 2


def test_steps_of_a_trial_take_as_many_batches_and_epochs_as_they_need(tried: list[int]) -> None:
    model = Net(room=30, samples=40)
    # Two batches to a step: of 16, 16 and 8 in an epoch, the last a step of its own.
    assert make(accumulate_grad_batches=2, limit_train_batches=1).scale_batch_size(model, init_val=16) == 16
    assert tried == [16, 16, 8, 16, 16, 32]


# -- the data are the limit --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"drop_last": True}])
@pytest.mark.parametrize(("mode", "found"), [("power", 32), ("binsearch", 50)])
def test_a_batch_of_more_samples_than_there_are_does_not_count(mode: str, found: int, options: Any,
                                                               tried: list[int]) -> None:  # fmt: skip
    model = Net(samples=50, **options)
    assert make().scale_batch_size(model, mode=mode) == model.batch_size == found
    assert max(tried) == found
    assert make().scale_batch_size(Net(samples=50), init_val=128, mode=mode) == found


@pytest.mark.parametrize("other", [[torch.ones(2)] * 3, DataLoader(TensorDataset(torch.ones(8)), batch_size=2)])
def test_several_loaders_that_are_walked_together(other: Any) -> None:
    """One of them has the size, the other is as it is."""

    class Both(Net):
        def train_dataloader(self) -> Any:
            return {"a": super().train_dataloader(), "b": other}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["a"], batch_idx)

    assert make().scale_batch_size(Both(samples=20), steps_per_trial=1) == 16
    assert make().scale_batch_size(Both(room=5), steps_per_trial=1) == 4


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter((torch.ones(3),) for _ in range(20))


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_a_stream_ends_where_all_of_it_is_one_batch(mode: str, tried: list[int]) -> None:
    class Streams(Net):
        def train_dataloader(self) -> Any:
            return DataLoader(Stream(), batch_size=self.batch_size)

    found = make().scale_batch_size(Streams(), mode=mode)
    assert (mode, found) in (("power", 16), ("binsearch", 19))
    assert make().scale_batch_size(Streams(room=9), mode="binsearch") == 9


# -- what is set -------------------------------------------------------------------------------------------------------
class Data(raylit.DataModule):
    def __init__(self, batch_size: int = 7) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        self.set = TensorDataset(torch.ones(100, 3))

    def train_dataloader(self) -> Any:
        return DataLoader(self.set, batch_size=self.hparams.batch_size)


class OwnName(Data):
    def __init__(self) -> None:
        super().__init__()
        self.per_worker = 1

    def train_dataloader(self) -> Any:
        return DataLoader(self.set, batch_size=self.per_worker)


def test_a_datamodule_has_it() -> None:
    class Bare(Net):
        def __init__(self) -> None:
            super().__init__(room=9)
            del self.batch_size, self.hparams["batch_size"]

    data = Data()
    assert make().scale_batch_size(Bare(), datamodule=data) == data.hparams.batch_size == 8
    assert not hasattr(data, "set") and not hasattr(data, "batch_size") and data.trainer is None
    own = OwnName()
    assert make().scale_batch_size(Net(room=9), datamodule=own, batch_arg_name="per_worker") == own.per_worker == 8
    assert own.hparams.batch_size == 7


def test_all_that_have_it_are_set() -> None:
    model, data = Net(room=9), Data()
    assert make().scale_batch_size(model, datamodule=data) == 8
    assert model.batch_size == model.hparams.batch_size == data.hparams.batch_size == 8


def test_lines_are_shown_where_the_trainer_shows_how_a_run_goes(capsys: pytest.CaptureFixture[str]) -> None:
    make(enable_progress_bar=True).scale_batch_size(Net(room=5))
    assert capsys.readouterr().out.splitlines() == [
        "batch size 2: fits", "batch size 4: fits", f"batch size 8: out of memory ({OOM})",
        "scale_batch_size set batch_size to 4",
    ]  # fmt: skip
    make().scale_batch_size(Net(room=5))
    assert capsys.readouterr().out == ""


# -- what stays as it was ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("room", [20, 0])
def test_nothing_else_of_the_trials_is_kept(room: int, tmp_path: Path) -> None:
    class Draws(Net):
        def __init__(self) -> None:
            super().__init__(room, shuffle=True)
            self.norm, self.calls = nn.BatchNorm1d(3), 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.calls += 1
            self.drawn = random.random() + numpy.random.rand() + float(torch.rand(()))
            return super().training_step([self.norm(batch[0])], batch_idx)

    def draw() -> list[float]:
        return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]

    model = Draws()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    raylit.seed_everything(3)
    expected = draw()
    raylit.seed_everything(3)
    trainer = make(logger=True, enable_checkpointing=True, storage_path=str(tmp_path))
    if room:
        trainer.scale_batch_size(model)
    else:
        with pytest.raises(ResourceError):
            trainer.scale_batch_size(model)
        assert model.batch_size == model.hparams.batch_size == 7
    assert draw() == expected and not list(tmp_path.iterdir())
    assert model.calls == 0 and not hasattr(model, "drawn") and model.norm.training is False
    assert trainer.global_step == 0 and trainer.model is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_trial_that_failed_lets_go_of_its_memory() -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Holds(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 0:
                assert not [each for each in alive if each() is not None]
            held = batch[0] * 2
            alive.append(weakref.ref(held))
            self.held = held
            return super().training_step([held], batch_idx)

    assert make().scale_batch_size(Holds(room=20), mode="binsearch") == 20
    assert len(alive) > 10 and not [each for each in alive if each() is not None]


# -- memory ------------------------------------------------------------------------------------------------------------
EXHAUSTED = [
    MemoryError(), torch.cuda.OutOfMemoryError(OOM), RuntimeError(OOM), RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ..."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"),
    WorkerLostError("worker 1 died without an exception: Task was killed due to the node running low on memory."),
]  # fmt: skip
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError(OOM), RuntimeError("CUDA error: device-side"),
    WorkerLostError("worker 1 died without an exception: SIGSEGV\nKilled by the system (out of memory?), by a signal"),
    KeyboardInterrupt(),
]  # fmt: skip


@pytest.mark.parametrize("error", EXHAUSTED, ids=str)
def test_is_out_of_memory(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_is_another_error(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_torch_and_numpy_say_it_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as numpys:
        numpy.empty(2**60, dtype=numpy.uint8)
    assert is_out_of_memory(numpys.value)


# -- errors ------------------------------------------------------------------------------------------------------------
class Fixed(Net):
    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(100, 3)), batch_size=5)


class Nameless(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.batch_size, self.hparams["batch_size"]
        self.batchsize = 3


class Breaks(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) == 8:
            raise ZeroDivisionError("by hand")
        return super().training_step(batch, batch_idx)


class NoLoader(raylit.Module):
    batch_size = 3

    def training_step(self, batch: Any, batch_idx: int) -> Any: ...
    def configure_optimizers(self) -> Any: ...


def loader() -> Any:
    return DataLoader(TensorDataset(torch.ones(10, 3)), batch_size=5)


ERRORS = [
    (Net, {}, {"mode": "linear"}, ConfigError, r"mode='linear'\): expected 'power' or 'binsearch'"),
    (Net, {}, {"steps_per_trial": 0}, ConfigError, r"steps_per_trial=0\): expected a whole number of at least 1"),
    (Net, {}, {"init_val": 2.0}, ConfigError, r"init_val=2.0\)"),
    (Net, {}, {"max_trials": 0}, ConfigError, r"max_trials=0\)"),
    (Net, {"fast_dev_run": True}, {}, ConfigError, r"Trainer\(fast_dev_run=1\)"),
    (Net, {}, {"train_dataloaders": loader()}, ConfigError,
     r"a DataLoader that is passed has its own: make it in train_dataloader\(\)"),
    (Net, {}, {"batch_arg_name": "batchsize"}, ConfigError, r"Net has no attribute.*Did you mean 'batch_size'"),
    (Nameless, {}, {}, ConfigError, r"Nameless has no attribute or hyperparameter.*It has: .*batchsize"),
    (Nameless, {}, {"datamodule": raylit.DataModule()}, ConfigError, "Nameless and DataModule have no attribute"),
    (Fixed, {}, {}, ConfigError,
     r"makes batches of 5, whatever batch_size is \(2, then 4\). Make the loader with batch_size=self.batch_size"),
    (Breaks, {}, {}, ZeroDivisionError, "by hand"),
    (NoLoader, {}, {}, DataError, "has no data"),
    (lambda: Net(samples=0), {}, {}, DataError, "gives no batch at all"),
    (lambda: Net(room=0), {}, {}, ResourceError, r"not even a batch of one sample can be .*: out of memory \(CUDA"),
    (lambda: Net(room=1), {}, {"init_val": 64, "max_trials": 2}, ResourceError, r"max_trials=2; the last tried was 32"),
    (raylit.Module, {}, {"batch_arg_name": "prepare_data_per_node"}, HookError, "no training_step"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "trainer", "arguments", "kind", "words"), ERRORS)
def test_errors(model: Any, trainer: Any, arguments: Any, kind: type[RaylitError], words: str) -> None:
    net = model()
    before = getattr(net, "batch_size", None)
    with pytest.raises(kind, match=words):
        make(**trainer).scale_batch_size(net, **arguments)
    assert getattr(net, "batch_size", None) == before
