"""The real Lightning beside raylit: each reads the files that the other's Trainer wrote (contract 9).

Lightning is imported by the first test that asks for it, and its own warnings are let be; raylit's are errors as ever.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit
from raylit.callbacks import EarlyStopping, ModelCheckpoint

QUIET: dict[str, Any] = {
    "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip


def batches() -> Any:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(12, 3, generator=generator)), batch_size=3)


def classes(module: type[Any], datamodule: type[Any]) -> tuple[type[Any], type[Any]]:
    """One source for both libraries: a Module with hyperparameters, buffers and a schedule, and its data."""

    class Net(module):  # type: ignore[misc]
        def __init__(self, width: int = 4, lr: float = 0.1, sizes: tuple[int, ...] = (1,)) -> None:
            super().__init__()
            self.save_hyperparameters()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
            self.seen: list[tuple[int, int]] = []
            self.began: Any = None

        def on_train_start(self) -> None:
            optimizer = self.optimizers()
            moments = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
            weights = {name: tensor.clone() for name, tensor in self.state_dict().items()}
            self.began = weights, moments, optimizer.param_groups[0]["lr"]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append((self.current_epoch, batch_idx))
            loss: Tensor = self.net(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.net(batch[0]).square().mean())

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    class Data(datamodule):  # type: ignore[misc]
        def __init__(self, folder: str = "x") -> None:
            super().__init__()
            self.save_hyperparameters()
            self.count = 0

        def train_dataloader(self) -> Any:
            self.count += 1
            return batches()

        def val_dataloader(self) -> Any:
            return batches()

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    return Net, Data


@pytest.fixture(scope="module")
def lightning() -> Iterator[Any]:
    """The package, with ``Net`` and ``Data`` made for it, and its Trainer's ``run`` without its warnings."""
    worded, environment = warnings.formatwarning, dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pytorch_lightning as pl
    # Lightning changes both for the whole process.
    warnings.formatwarning = worded
    os.environ.clear()
    os.environ.update(environment)

    def run(entry: str, folder: Path, model: Any, *data: Any, ckpt_path: Any = None, **given: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = pl.Trainer(accelerator="cpu", default_root_dir=str(folder),
                                 **{"enable_checkpointing": False, **QUIET, **given})  # fmt: skip
            getattr(trainer, entry)(model, *data, ckpt_path=ckpt_path)

    levels = {name: logging.getLogger(name).level for name in ("pytorch_lightning", "lightning_fabric")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    net, data = classes(pl.LightningModule, pl.LightningDataModule)
    yield SimpleNamespace(pl=pl, Net=net, Data=data, run=run)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


OurNet, OurData = classes(raylit.Module, raylit.DataModule)


def fit(folder: Path, model: Any, ckpt_path: Any = None, **given: Any) -> Any:
    trainer = raylit.Trainer(num_workers=0, use_gpu=False, storage_path=str(folder), **QUIET, **given)
    return trainer, trainer.fit(model, datamodule=OurData("here"), ckpt_path=ckpt_path)


def same_weights(mine: nn.Module, other: nn.Module) -> bool:
    left, right = mine.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# -- ours, read by Lightning -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("stop", [{"max_epochs": 2}, {"max_epochs": 2, "max_steps": 6}])
def test_lightning_loads_what_a_fit_of_ours_kept(lightning: Any, stop: dict[str, Any], tmp_path: Path) -> None:
    """Of an epoch's end, and of the middle of one; loaded with ``weights_only``, which is Lightning's default here."""
    model = OurNet(width=5, lr=0.05, sizes=(2, 3))
    callbacks = [ModelCheckpoint(monitor="val_loss", save_last=True), EarlyStopping("val_loss", patience=9)]
    _, result = fit(tmp_path, model, callbacks=callbacks, **stop)
    path = f"{result.checkpoint.path}/model.ckpt"
    for given in ({}, {"weights_only": True}):
        loaded = lightning.Net.load_from_checkpoint(path, **given)
        assert same_weights(loaded, model)
        assert dict(loaded.hparams) == {"width": 5, "lr": 0.05, "sizes": (2, 3)}
    assert lightning.Net.load_from_checkpoint(path, lr=0.3).hparams.lr == 0.3
    data = lightning.Data.load_from_checkpoint(path)
    assert (data.hparams.folder, data.count) == ("here", 1)


def test_lightnings_trainer_takes_our_file_as_ckpt_path(lightning: Any, tmp_path: Path) -> None:
    """Weights in every entry point; optimizers and schedulers in a fit, which counts its own epochs from 0."""
    model = OurNet(width=5)
    _, result = fit(tmp_path, model, max_epochs=2)
    path = f"{result.checkpoint.path}/model.ckpt"
    again = OurNet(width=5)
    fit(tmp_path, again, result.checkpoint, max_epochs=3)
    theirs = lightning.Net(width=5)
    lightning.run("fit", tmp_path, theirs, batches(), ckpt_path=path, max_epochs=1)
    weights, moments, rate = theirs.began
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert len(moments) == len(again.began[1]) > 0 and rate == again.began[2] == 0.1 * 0.5**2
    assert all(torch.equal(mine, other) for mine, other in zip(moments, again.began[1]))
    assert theirs.seen == [(0, batch) for batch in range(4)]
    for entry in ("validate", "predict"):
        theirs = lightning.Net(width=5)
        lightning.run(entry, tmp_path, theirs, batches(), ckpt_path=path)
        assert same_weights(theirs, model)


# -- Lightning's, read by us -----------------------------------------------------------------------------------------
def test_we_load_what_lightnings_trainer_wrote_and_a_fit_goes_on_from_it(lightning: Any, tmp_path: Path) -> None:
    """From the end of an epoch to the bit as Lightning's own run; from the middle of one the epoch begins anew."""
    keep = lightning.pl.callbacks.ModelCheckpoint
    given: dict[str, Any] = {"dirpath": tmp_path, "save_top_k": -1}
    kept = [keep(filename="{epoch}", auto_insert_metric_name=False, **given),
            keep(filename="step-{step}", auto_insert_metric_name=False, every_n_train_steps=6, **given),
            lightning.pl.callbacks.EarlyStopping("val_loss", patience=9)]  # fmt: skip
    whole = lightning.Net(width=5, lr=0.05, sizes=(2, 3))
    lightning.run("fit", tmp_path, whole, None, None, lightning.Data("there"), callbacks=kept,
                  enable_checkpointing=True, max_epochs=3)  # fmt: skip
    loaded = OurNet.load_from_checkpoint(tmp_path / "2.ckpt")
    assert same_weights(loaded, whole) and dict(loaded.hparams) == {"width": 5, "lr": 0.05, "sizes": (2, 3)}
    assert OurNet.load_from_checkpoint(tmp_path / "2.ckpt", lr=0.3).hparams.lr == 0.3
    data = OurData.load_from_checkpoint(tmp_path / "2.ckpt")
    assert (data.hparams.folder, data.count) == ("there", 1)
    for epoch in (0, 1):
        stopping = EarlyStopping("val_loss", patience=9)
        model = OurNet(width=5, lr=0.05)
        trainer, _ = fit(tmp_path, model, tmp_path / f"{epoch}.ckpt", callbacks=[stopping], max_epochs=3)
        assert same_weights(model, whole) and trainer.global_step == 12
        assert model.seen == [(each, batch) for each in range(epoch + 1, 3) for batch in range(4)]
    model = OurNet(width=5, lr=0.05)
    fit(tmp_path, model, tmp_path / "step-6.ckpt", max_epochs=2)
    assert model.seen == [(1, batch) for batch in range(4)]
    loaded = OurNet.load_from_checkpoint(tmp_path / "step-6.ckpt")
    assert all(torch.equal(model.began[0][name], tensor) for name, tensor in loaded.state_dict().items())
