"""Bad input: one clear error, before a worker, or anything of the run, starts. In process and for workers alike.

The Modules here cannot be packed for a journey, so that a run on workers which is not refused ends in another error,
and Ray is never connected to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import raylit
from raylit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HookError,
    OptimizerError,
    RunExistsError,
    SerializationError,
    UnknownArgumentError,
)

workers = pytest.mark.parametrize("num_workers", [0, 2])


class Net(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.stays_here = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(count: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(count, 3)), **options)


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Callable[..., raylit.Trainer]]:
    """A Trainer that keeps its runs in the test's folder, which must be as it was after each refusal."""
    before = sorted(tmp_path.rglob("*"))

    def make(**arguments: Any) -> raylit.Trainer:
        given = {"max_epochs": 1, "use_gpu": False, "logger": False, "storage_path": str(tmp_path / "runs"),
                 "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip
        return raylit.Trainer(**{**given, **arguments})

    yield make
    left = [p for p in tmp_path.rglob("*") if p not in before and p.name not in ("runs", "kept")]
    assert not [p for p in left if "kept" not in p.parts], left


class NoStep(Net):
    training_step = raylit.Module.training_step


class NoOptimizer(Net):
    configure_optimizers = raylit.Module.configure_optimizers


class Misspelt(Net):
    def training_step(self, batch: Any, batch_idx: int, optimiser: int) -> Any: ...


class MisspeltCallback(raylit.Callback):
    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, loader: int
    ) -> None: ...


class OddCallbacks(Net):
    def configure_callbacks(self) -> Any:
        return [3]


class Unshared(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([torch.ones(3)])


FIT_CASES: dict[str, tuple[type[Net], Any, type[Exception], str]] = {
    "no_training_step": (NoStep, data, HookError, r"NoStep has no training_step: write training_step\(self, batch"),
    "no_configure_optimizers": (NoOptimizer, data, HookError, "NoOptimizer has no configure_optimizers: write"),
    "no_loader": (Net, lambda: None, DataError, r"fit has no data: pass train_dataloaders=.* or write train_datalo"),
    "empty_data_set": (Net, lambda: data(0), DataError, "train_dataloaders: .* no batch at all .*length 0"),
    "drop_last_drops_all": (Net, lambda: data(3, batch_size=8, drop_last=True), DataError, "no batch.*drop_last=True"),
    "no_batches": (Net, list, DataError, "train_dataloaders: an empty collection of loaders"),
    "data_set_itself": (Net, lambda: TensorDataset(torch.ones(2)), DataError, "got the data set TensorDataset itself"),
    "tensor": (Net, lambda: torch.ones(3), DataError, "got a tensor"),
    "number": (Net, lambda: 3, DataError, "got 3, a int, which cannot be iterated"),
    "unknown_hook_argument": (Misspelt, data, HookError, "training_step.*optimiser.*optimizer_idx"),
    "odd_callbacks": (OddCallbacks, data, HookError, "configure_callbacks returned a int"),
}  # fmt: skip


@workers
@pytest.mark.parametrize("case", FIT_CASES)
def test_fit(trainer: Callable[..., raylit.Trainer], case: str, num_workers: int) -> None:
    make, loaders, error, words = FIT_CASES[case]
    with pytest.raises(error, match=words):
        trainer(num_workers=num_workers).fit(make(), loaders())


@workers
def test_fits_other_arguments(trainer: Callable[..., raylit.Trainer], num_workers: int) -> None:
    fit = trainer(num_workers=num_workers).fit
    with pytest.raises(ConfigError, match="needs a model: pass a raylit.Module"):
        fit()
    with pytest.raises(ConfigError, match="takes a raylit.Module; got Linear"):
        fit(nn.Linear(1, 1), data())
    with pytest.raises(ConfigError, match="takes a raylit.Module.*pass an object: Linear"):
        fit(nn.Linear, data())
    with pytest.raises(ConfigError, match="goes with a Module class"):
        fit(Net(), data(), hparams={"a": 1})
    with pytest.raises(UnknownArgumentError, match="train_dataloaders"):
        fit(Net(), train_dataloader=data())
    with pytest.raises(UnknownArgumentError, match="Did you mean 'datamodule'"):
        fit(Net(), data(), data_module=None)
    with pytest.raises(ConfigError, match="got a DataModule as its loaders: pass it as datamodule="):
        fit(Net(), raylit.DataModule())
    with pytest.raises(ConfigError, match="takes a raylit.DataModule; got DataLoader"):
        fit(Net(), datamodule=data())
    with pytest.raises(ConfigError, match="got loaders and a datamodule"):
        fit(Net(), data(), datamodule=raylit.DataModule())
    with pytest.raises(DataError, match=r"fit has no data.*DataModule|a datamodule with train_dataloader\(\)"):
        fit(Net(), datamodule=raylit.DataModule())
    with pytest.raises(HookError, match="val_dataloaders are given, but Net has no validation_step"):
        fit(Net(), data(), data())


@workers
def test_a_callbacks_hook_with_an_unknown_argument(trainer: Callable[..., raylit.Trainer], num_workers: int) -> None:
    with pytest.raises(HookError, match="on_train_batch_end.*loader.*dataloader_idx"):
        trainer(num_workers=num_workers, callbacks=[MisspeltCallback()]).fit(Net(), data())


class Evaluates(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def test_step(self, batch: Any, batch_idx: int) -> None: ...


class Blank(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stays_here = threading.Lock()


@workers
@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_evaluation(trainer: Callable[..., raylit.Trainer], entry: str, num_workers: int) -> None:
    call = getattr(trainer(num_workers=num_workers), entry)
    step = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}[entry]
    with pytest.raises(ConfigError, match=rf"trainer.{entry}\(\) needs a model"):
        call(dataloaders=data())
    with pytest.raises(
        DataError, match=f"{entry} has no data: pass dataloaders=.*{'val' if entry == 'validate' else entry}_dataloader"
    ):
        call(Evaluates())
    with pytest.raises(HookError, match=f"Blank has no {step}"):
        call(Blank(), data())
    with pytest.raises(DataError, match="dataloaders: .* no batch at all"):
        call(Evaluates(), data(0))
    with pytest.raises(DataError, match=r"dataloaders\[1\]: .* no batch at all"):
        call(Evaluates(), [data(), data(0)])
    with pytest.raises(UnknownArgumentError, match="has no argument 'dataloader' in raylit. Instead: dataloaders"):
        call(Evaluates(), dataloader=data())
    with pytest.raises(CheckpointError, match="there is no checkpoint at '/nowhere'"):
        call(Evaluates(), data(), ckpt_path="/nowhere")


@workers
def test_predict_needs_no_step_where_there_is_a_forward(trainer: Any, num_workers: int) -> None:
    if num_workers:
        with pytest.raises(SerializationError):  # it got as far as being packed
            trainer(num_workers=2).predict(Net(), data())
    else:
        assert len(trainer(num_workers=0).predict(Net(), DataLoader(torch.ones(4, 3), batch_size=3))) == 2


# Streams over several workers -------------------------------------------------------------------------------------
def test_a_stream_that_cannot_be_shared_out(trainer: Callable[..., raylit.Trainer]) -> None:
    with pytest.raises(DataError, match=r"train_dataloaders: Unshared .* 2 workers.*shard\(num_shards, index\)"):
        trainer(num_workers=2).fit(Net(), DataLoader(Unshared()))


def test_fewer_samples_than_workers(trainer: Callable[..., raylit.Trainer]) -> None:
    with pytest.raises(DataError, match="data set of length 1.*world size 2.*fewer workers"):
        trainer(num_workers=2).fit(Net(), data(1))


# Placement --------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_a_gpu_where_there_is_none(trainer: Callable[..., raylit.Trainer]) -> None:
    with pytest.raises(ConfigError, match="use_gpu=True, but this process sees no CUDA device"):
        trainer(num_workers=0, use_gpu=True).fit(Net(), data())


@workers
def test_what_is_not_there_yet(trainer: Callable[..., raylit.Trainer], num_workers: int) -> None:
    with pytest.raises(ConfigError, match="strategy='fsdp' is not there yet; accepted"):
        trainer(num_workers=num_workers, strategy="fsdp").fit(Net(), data())
    with pytest.raises(ConfigError, match="strategy must be .* got object"):
        trainer(num_workers=num_workers, strategy=object()).fit(Net(), data())


class Steps(Net):
    automatic_optimization = False


class Pieces(Net):
    truncated_bptt_steps = 2


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(range(4))


@pytest.mark.parametrize(
    ("model", "given", "problem"),
    [
        (Steps, {}, "manual optimisation"),
        (Net, {"automatic_optimization": False}, "manual optimisation"),
        (Pieces, {}, "truncated BPTT"),
        (Net, {"truncated_bptt_steps": 2}, "truncated BPTT"),
        (Net, {"sync_batchnorm": True}, "sync_batchnorm"),
    ],
)
def test_what_cannot_be_with_an_elastic_batch(
    trainer: Callable[..., raylit.Trainer], model: type[Net], given: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=f"{problem}.*elastic_batch='scale'"):
        trainer(num_workers=(1, 2), **given).fit(model(), data())


@pytest.mark.parametrize(
    "loader",
    [DataLoader(Endless()), (each for each in [1]), {"a": DataLoader(Endless()), "b": [torch.zeros(1)] * 4}],
)
def test_an_elastic_run_over_data_without_positions(trainer: Callable[..., raylit.Trainer], loader: Any) -> None:
    with pytest.raises(DataError, match="train_dataloaders: an elastic run takes up its data at any number of workers"):
        trainer(num_workers=(1, 2)).fit(Net(), loader)


def test_an_elastic_step_needs_a_sample_for_each_of_the_most_workers(trainer: Callable[..., raylit.Trainer]) -> None:
    with pytest.raises(DataError, match="gives no batch at all .*length 3.*world size 4"):
        trainer(num_workers=(1, 4)).fit(Net(), DataLoader(torch.zeros(3, 2)))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"enable_checkpointing": False}, "goes on from a checkpoint at another number of workers"),
        ({"use_distributed_sampler": False}, "raylit shares the samples out anew"),
        ({"placement_strategy": "STRICT_SPREAD"}, "use 'SPREAD', or give one number of workers"),
        ({"elastic_batch": "grow"}, "elastic_batch='grow'.*'keep'.*'scale'"),
        ({"num_workers": (3, 4)}, r"only 4 workers have as many.*Use num_workers=\(2, 4\), num_workers=4, or"),
        ({"scaling_config": "labelled"}, r"ScalingConfig\(label_selector=...\)\): an elastic run counts room"),
    ],
)
def test_what_contradicts_an_elastic_run(given: dict[str, Any], text: str) -> None:
    if "scaling_config" in given:
        import ray.train

        labels = {"a": "b"}
        given = {"scaling_config": ray.train.ScalingConfig(num_workers=(1, 2), use_gpu=False, label_selector=labels)}
    with pytest.raises(ConfigError, match=text):
        raylit.Trainer(**{"num_workers": (1, 2), **given})


@pytest.mark.parametrize("value", [-1, 1.5, "two", True, (2, 1), (0, 2)])
def test_num_workers(value: Any) -> None:
    with pytest.raises(ConfigError, match="num_workers"):
        raylit.Trainer(num_workers=value)


def test_unknown_and_misspelt_arguments() -> None:
    with pytest.raises(UnknownArgumentError, match="Did you mean 'max_epochs'"):
        raylit.Trainer(max_epoch=3)
    with pytest.raises(UnknownArgumentError, match="num_workers"):
        raylit.Trainer(gpus=2)
    with pytest.raises(UnknownArgumentError, match="nonsense"):
        raylit.Trainer(nonsense=1)


def test_rays_objects_and_the_shorthands() -> None:
    ray_train = pytest.importorskip("ray.train")
    with pytest.raises(ConfigError, match=r"num_workers=3\) contradicts scaling_config.num_workers=2"):
        raylit.Trainer(num_workers=3, scaling_config=ray_train.ScalingConfig(num_workers=2))
    with pytest.raises(ConfigError, match="use_gpu=True.* contradicts"):
        raylit.Trainer(use_gpu=True, scaling_config=ray_train.ScalingConfig(num_workers=2, use_gpu=False))
    with pytest.raises(ConfigError, match="name='a'.* contradicts run_config.name='b'"):
        raylit.Trainer(name="a", run_config=ray_train.RunConfig(name="b"))
    with pytest.raises(ConfigError, match="num_workers=0.*contradicts"):
        raylit.Trainer(num_workers=0, scaling_config=ray_train.ScalingConfig(num_workers=2))


# What cannot travel -----------------------------------------------------------------------------------------------
def test_a_model_that_cannot_be_pickled(trainer: Callable[..., raylit.Trainer]) -> None:
    with pytest.raises(SerializationError, match=r"model\.stays_here \(a lock\) cannot be pickled.*setup\(\)"):
        trainer(num_workers=2).fit(Net(), data())


class Travels(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.stays_here


def test_a_loader_that_cannot_be_pickled(trainer: Callable[..., raylit.Trainer]) -> None:
    loader = data()
    loader.dataset.file = threading.Lock()
    with pytest.raises(SerializationError, match=r"train loader\.dataset\.file \(a lock\)"):
        trainer(num_workers=2).fit(Travels(), loader)


# The run's folder -------------------------------------------------------------------------------------------------
@workers
@pytest.mark.parametrize("path", ["/dev/null/x", "file"])
def test_a_storage_path_that_cannot_be_written(
    trainer: Callable[..., raylit.Trainer], tmp_path: Path, path: str, num_workers: int
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("")
    given = path if path.startswith("/") else str(tmp_path / "kept" / path)
    with pytest.raises(ConfigError, match=f"storage_path='{given}' cannot be written .*give a folder or URI"):
        trainer(num_workers=num_workers, storage_path=given).fit(Net(), data())


@workers
def test_an_unknown_kind_of_storage(trainer: Callable[..., raylit.Trainer], num_workers: int) -> None:
    with pytest.raises(ConfigError, match="storage_path='nonsense://x' cannot be written"):
        trainer(num_workers=num_workers, storage_path="nonsense://x").fit(Net(), data())


def test_a_second_run_of_the_same_name(trainer: Callable[..., raylit.Trainer], tmp_path: Path) -> None:
    storage = str(tmp_path / "kept")
    first = trainer(num_workers=0, name="one", storage_path=storage)
    result = first.fit(Net(), data())
    before = {p: p.read_bytes() for p in Path(result.path).rglob("*") if p.is_file()}
    assert before
    for again in (0, 2):
        with pytest.raises(RunExistsError, match="a run named 'one' exists.*overwrites nothing.*Choose another name"):
            trainer(num_workers=again, name="one", storage_path=storage).fit(Net(), data())
    with pytest.raises(RunExistsError):
        first.fit(Net(), data())
    with pytest.raises(RunExistsError):
        trainer(num_workers=0, name="one", storage_path=f"file://{storage}").fit(Net(), data())
    assert before == {p: p.read_bytes() for p in Path(result.path).rglob("*") if p.is_file()}


# Checkpoints ------------------------------------------------------------------------------------------------------
class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)


class Deeper(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(1, 1)


@pytest.fixture
def checkpoint(trainer: Callable[..., raylit.Trainer], tmp_path: Path) -> Any:
    return trainer(num_workers=0, name="one", storage_path=str(tmp_path / "kept")).fit(Net(), data()).checkpoint


@workers
def test_checkpoints(trainer: Callable[..., raylit.Trainer], tmp_path: Path, checkpoint: Any, num_workers: int) -> None:
    fit = trainer(num_workers=num_workers).fit
    damaged = tmp_path / "kept" / "damaged.ckpt"
    damaged.write_bytes((Path(checkpoint.path) / "model.ckpt").read_bytes()[:-200])
    other = tmp_path / "kept" / "other.ckpt"
    torch.save({"weights": 1}, other)
    code = tmp_path / "kept" / "code.ckpt"
    torch.save({"state_dict": {}, "evil": Net}, code)
    empty = tmp_path / "kept" / "empty"
    empty.mkdir()
    for path, words in [
        ("/nowhere/x.ckpt", "there is no checkpoint at '/nowhere/x.ckpt'"),
        (empty, "there is no checkpoint at .*empty.*model.ckpt"),
        (damaged, "damaged.ckpt cannot be loaded: damaged"),
        (code, "code.ckpt cannot be loaded: .*more than tensors and plain values"),
        (other, "other.ckpt is no checkpoint of a Module: it has no 'state_dict'"),
        (3, "a checkpoint is given as a file, a folder, a URI, or a Ray Checkpoint; got a int"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            fit(Net(), data(), ckpt_path=path)
    with pytest.raises(
        CheckpointError, match=r"another model than Wider: of another shape: layer.weight \(\[1, 3\], .*\[1, 4\]\)"
    ):
        fit(Wider(), data(), ckpt_path=checkpoint)
    with pytest.raises(CheckpointError, match=r"than Deeper: not in the checkpoint: more.bias, more.weight"):
        fit(Deeper(), data(), ckpt_path=checkpoint.path)


# In the first step ------------------------------------------------------------------------------------------------
def returning(value: Any) -> type[Net]:
    class Returns(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return value(self, batch) if callable(value) else value

    return Returns


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("text", "training_step.*returned.*str"),
        (3.5, "training_step.*returned.*float"),
        ({"los": 1}, "loss"),
        (lambda m, b: {"loss": 1.0}, "loss"),
        (lambda m, b: m.layer(b[0]), "shape"),
        (lambda m, b: torch.ones(()), "loss without grad"),
        (lambda m, b: m.layer(b[0]).mean().detach(), "loss without grad"),
    ],
)
def test_what_training_step_returns(trainer: Callable[..., raylit.Trainer], value: Any, words: str) -> None:
    with pytest.raises(HookError, match=words):
        trainer(num_workers=0, fast_dev_run=True).fit(returning(value)(), data(batch_size=2))


@pytest.mark.parametrize("value", [3, "adam", [1], {"optimiser": None}, nn.Linear(1, 1), [[], [], []]])
def test_what_configure_optimizers_returns(trainer: Callable[..., raylit.Trainer], value: Any) -> None:
    class Returns(Net):
        def configure_optimizers(self) -> Any:
            return value

    with pytest.raises(OptimizerError, match="configure_optimizers"):
        trainer(num_workers=0, fast_dev_run=True).fit(Returns(), data())
