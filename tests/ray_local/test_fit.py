"""Trainer on two Ray workers: what the caller gets back. Few jobs, since each costs some seconds; each checks much."""

from __future__ import annotations

import math
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import raylit
from raylit.errors import ResourceError
from raylit.stage import Status
from tests.unit.loggers.test_loggers import scalars

FEATURES = 4


def samples(count: int = 32, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, FEATURES, generator=generator), torch.randn(count, 2, generator=generator))


class Everything(raylit.Module):
    """A bit of everything that must come home."""

    def __init__(self, width: int = 6, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(3)
        self.first, self.norm, self.last = nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.Linear(width, 2)
        self.order = [self.first, self.norm, torch.tanh, self.last]  # a plain list: no layer list
        self.register_buffer("steps_seen", torch.zeros(()), persistent=False)
        self.history: list[float] = []
        self.untouched = {"as": ["it", "was"]}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x

    def on_train_start(self) -> None:
        self.lock = threading.Lock()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.steps_seen += 1
        loss = mse_loss(self(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def training_epoch_end(self, outputs: list[Any]) -> None:
        self.history.append(float(len(outputs)))
        self.last.note = {"epoch": self.current_epoch, "mean": torch.ones(2) * len(outputs)}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val", mse_loss(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", batch[0].mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return batch[0] + 1

    def on_train_end(self) -> None:
        self.last.bias.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class Counts(raylit.Callback):
    def __init__(self) -> None:
        self.batches, self.module = 0, None

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches, self.module = self.batches + 1, module

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}


def fit(tmp: Path, num_workers: int, batch_size: int) -> Any:
    model, counts = Everything(), Counts()
    trainer = raylit.Trainer(
        max_epochs=3, num_workers=num_workers, use_gpu=False, callbacks=[counts], sync_batchnorm=True, name="run",
        storage_path=str(tmp / str(num_workers)), enable_progress_bar=False, log_every_n_steps=1,
        num_sanity_val_steps=1,
    )  # fmt: skip
    loaders = (DataLoader(samples(), batch_size, shuffle=True), DataLoader(samples(7, seed=1), batch_size))
    torch.manual_seed(5)
    first = model.first.weight
    if num_workers:
        with pytest.warns(UserWarning, match=r"cannot be pickled.*: model\.lock$"):
            result = trainer.fit(model, *loaders)
    else:
        result = trainer.fit(model, *loaders)
    return SimpleNamespace(model=model, counts=counts, trainer=trainer, result=result, first=first)


@pytest.fixture(scope="module")
def done(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same fit on two workers and in this process, where a batch is twice as large."""
    tmp = tmp_path_factory.mktemp("runs")
    return SimpleNamespace(two=fit(tmp, 2, 4), one=fit(tmp, 0, 8))


def test_weights_and_buffers_are_those_of_one_process(done: Any) -> None:
    mine, other = done.two.model, done.one.model
    assert mine.first.weight is done.two.first  # in place
    for name, tensor in [*other.named_parameters(), *other.named_buffers()]:
        home = {**dict(mine.named_parameters()), **dict(mine.named_buffers())}[name]
        torch.testing.assert_close(home, tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert mine.steps_seen == 12
    assert not torch.equal(mine.first.weight, Everything().first.weight)
    assert type(mine.norm) is nn.BatchNorm1d


def test_attributes_flags_and_callbacks(done: Any) -> None:
    model, counts = done.two.model, done.two.counts
    assert model.history == done.one.model.history == [4.0, 4.0, 4.0]
    assert model.last.note["epoch"] == 2 and model.last.note["mean"].tolist() == [4.0, 4.0]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["last.bias"]
    assert model.order[0] is model.first and model.order[3] is model.last
    assert model.untouched == {"as": ["it", "was"]} and not hasattr(model, "lock")
    assert counts.batches == done.one.counts.batches == 12
    assert counts.module is model


def test_metrics_and_progress(done: Any) -> None:
    two, one = done.two.trainer, done.one.trainer
    assert (two.current_epoch, two.global_step, two.state) == (one.current_epoch, one.global_step, one.state)
    assert (two.current_epoch, two.global_step, two.state) == (3, 12, Status.FINISHED)
    assert (two.world_size, two.num_training_batches, two.is_global_zero) == (2, 4, True)
    for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        mine, other = getattr(two, name), getattr(one, name)
        assert mine.keys() == other.keys() and mine
        for key in mine:
            # A step's own value is rank 0's, unless sync_dist asks for all.
            if key not in ("loss_step",):
                assert float(mine[key]) == pytest.approx(float(other[key]), abs=1e-6), key
    table = two.history
    assert (
        set(table.column_names) == set(one.history.column_names) >= {"epoch", "step", "loss_step", "loss_epoch", "val"}
    )
    assert table.num_rows == one.history.num_rows
    assert [v for v in table["val"].to_pylist() if v is not None] == pytest.approx(
        [v for v in one.history["val"].to_pylist() if v is not None], abs=1e-6
    )


def test_result(done: Any) -> None:
    import ray.train

    result, other = done.two.result, done.one.result
    assert isinstance(result, ray.train.Result)
    assert result.error is None and result.metrics.keys() == other.metrics.keys()
    assert result.metrics["val"] == pytest.approx(other.metrics["val"], abs=1e-6)
    assert all(isinstance(v, float) and math.isfinite(v) for v in result.metrics.values())
    assert len(result.best_checkpoints) == len(other.best_checkpoints) == 1
    assert result.metrics_dataframe["val"].iloc[-1] == pytest.approx(result.metrics["val"])
    assert Path(result.path).name == "run" and Path(result.path) == Path(done.two.trainer.log_dir)
    for each in (done.two, done.one):
        with each.result.checkpoint.as_directory() as folder:
            content = torch.load(Path(folder) / "model.ckpt", weights_only=True)
        assert content["epoch"] == 3 and content["global_step"] == 12
        assert content["hyper_parameters"] == {"width": 6, "lr": 0.05}
        assert list(content["callbacks"].values()) == [{"batches": 12}]
        for name, tensor in each.model.state_dict().items():
            assert torch.equal(content["state_dict"][name], tensor)
        loaded = Everything.load_from_checkpoint(each.result.checkpoint)
        assert torch.equal(loaded.first.weight, each.model.first.weight) and loaded.hparams.width == 6
        assert len(content["optimizer_states"][0]["state"]) > 0
        folder = each.result.checkpoint.to_directory()
        assert (Path(folder) / "model.ckpt").is_file()


def test_run_folder(done: Any) -> None:
    for each in (done.two, done.one):
        folder = Path(each.result.path)
        assert Path(each.trainer.logger.log_dir) == folder
        names = {p.name for p in folder.iterdir()}
        assert {"hparams.yaml", "history.parquet"} <= names
        assert any(p.name.startswith("events.out.tfevents") for p in folder.rglob("*"))
        assert (folder / "hparams.yaml").read_text().split() == ["width:", "6", "lr:", "0.05"]
        assert [p.parent.parent for p in folder.rglob("model.ckpt")] == [folder / "checkpoints"]
        assert not list(folder.rglob("*.partial")) and not list(folder.rglob(".raylit_write_check"))
        import pyarrow.parquet

        assert pyarrow.parquet.read_table(folder / "history.parquet").num_rows == each.trainer.history.num_rows


def test_evaluation_afterwards(done: Any) -> None:
    """On the workers that are kept for it; with the model that came home, and without naming it again."""
    numbers = DataLoader(TensorDataset(torch.arange(5.0).view(5, 1).expand(5, FEATURES)), batch_size=1)
    for each in (done.two, done.one):
        assert each.trainer.test(dataloaders=numbers) == [{"mean": 2.0}]
        assert (12, {"mean": 2.0}) in scalars(Path(each.result.path))  # beside what the fit logged
        predicted = each.trainer.predict(each.model, numbers)
        assert torch.cat(predicted)[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
        # The sync of BatchNorm has nothing to do in an evaluation: the running statistics count.
        validated = each.trainer.validate(each.model, DataLoader(samples(7, seed=1), 2))
        assert validated[0]["val"] == pytest.approx(done.one.result.metrics["val"], abs=1e-6)


def test_going_on_from_the_checkpoint(done: Any) -> None:
    """The workers' checkpoint resumes in process: one more epoch, as if it had been four."""
    model = Everything()
    trainer = raylit.Trainer(
        max_epochs=4, num_workers=0, use_gpu=False, enable_progress_bar=False, logger=False, enable_checkpointing=False,
        storage_path=str(Path(done.two.result.path).parent), name="more", num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, DataLoader(samples(), 8), ckpt_path=done.two.result.checkpoint)
    assert (trainer.current_epoch, trainer.global_step) == (4, 16)
    assert model.history == [4.0]  # what is no hyperparameter and no weight is not in a checkpoint


def test_more_than_the_cluster_has(ray_session: None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 1, "storage_path": str(tmp_path), "enable_progress_bar": False}
    for entry in ("fit", "test"):
        with pytest.raises(ResourceError, match=r"num_workers=9 needs 9 x \(1 CPU\) = 9 CPU; the cluster has 2 CPU"):
            getattr(raylit.Trainer(num_workers=9, use_gpu=False, **options), entry)(
                Everything(), DataLoader(samples(9))
            )
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match=r"GPU.*the cluster has .*0 GPU"):
            raylit.Trainer(num_workers=2, use_gpu=True, **options).fit(Everything(), DataLoader(samples()))
    assert list(tmp_path.iterdir()) == []


# Other jobs -------------------------------------------------------------------------------------------------------
class MadeInSetup(raylit.Module):
    """Its layers are made on the workers."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = None

    def setup(self, stage: str) -> None:
        self.net = nn.Sequential(nn.Linear(FEATURES, 3), nn.Dropout(0.5), nn.Linear(3, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_one_worker_is_this_process_to_the_bit(ray_session: None, tmp_path: Path) -> None:
    """Dropout, shuffling and layers drawn in setup, after seed_everything; the layers come home."""

    def weights(num_workers: int) -> tuple[dict[str, Tensor], list[float]]:
        raylit.seed_everything(11)
        model = MadeInSetup()
        trainer = raylit.Trainer(
            max_epochs=2, num_workers=num_workers, use_gpu=False, enable_progress_bar=False, logger=False,
            storage_path=str(tmp_path),
        )  # fmt: skip
        result = trainer.fit(model, DataLoader(samples(30), batch_size=4, shuffle=True))
        assert result.metrics == {} and result.checkpoint is not None  # nothing is logged, and still it is no None
        assert isinstance(model.net[1], nn.Dropout)
        assert [p.grad for p in model.parameters()] == [None] * 4 or num_workers == 0
        # A second fit would go on from here: the caller's random numbers have moved on as far.
        return model.state_dict(), [float(torch.rand(())), random.random(), float(numpy.random.rand())]

    (here, drawn_here), (there, drawn_there) = weights(0), weights(1)
    assert drawn_here == drawn_there
    assert here.keys() == there.keys() and len(here) == 4
    for name in here:
        assert torch.equal(here[name], there[name]), name
