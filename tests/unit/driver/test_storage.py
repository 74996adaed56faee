"""A run's storage: a file:// URI or another filesystem, in process, also for a run that fails; nothing else is left."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pyarrow.fs
import pyarrow.parquet
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylit
from raylit.checkpoint import read
from raylit.config.placement import PlacementConfig
from raylit.driver import folder as folders
from raylit.errors import ConfigError, RunExistsError
from raylit.loggers import CSVLogger
from raylit.stage import Stage
from raylit.worker.storage import local_folder

BUCKET = "fsspec+memory://bucket"  # one storage for the whole process, and no path of this machine


class Net(raylit.Module):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.layer, self.fails = nn.Linear(3, 1), fails

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).pow(2).mean()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        Path(self.trainer.log_dir, "tested").touch()

    def on_train_epoch_end(self) -> None:
        Path(self.trainer.log_dir, "mine").write_text("here")
        if self.fails:
            raise RuntimeError("planned")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(4, 3)))


def trainer(storage: str, **given: Any) -> raylit.Trainer:
    return raylit.Trainer(
        max_epochs=1, num_workers=0, use_gpu=False, storage_path=storage, name="one", enable_progress_bar=False,
        enable_model_summary=False, **given
    )  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder with an empty temporary folder; both must be empty at the end."""
    for name in ("cwd", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield
    assert not list((tmp_path / "cwd").iterdir())
    assert not [p for p in (tmp_path / "tmp").iterdir() if not p.name.startswith("torch")]  # torchinductor's own


@pytest.fixture
def bucket() -> Iterator[Any]:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(BUCKET)
    yield filesystem
    filesystem.delete_dir(path)


def files(filesystem: Any) -> set[str]:
    found = filesystem.get_file_info(pyarrow.fs.FileSelector("/bucket/one", recursive=True))
    return {f.path.split("/bucket/one/")[1] for f in found if f.is_file}


def test_a_file_uri_is_the_path_that_it_names(tmp_path: Path) -> None:
    fit = trainer(f"file://{tmp_path}/my%20runs", logger=False)
    result = fit.fit(Net(), loader())
    assert result.path == fit.log_dir == str(tmp_path / "my runs" / "one")
    assert (tmp_path / "my runs" / "one" / "mine").read_text() == "here"
    assert set(read(result.checkpoint)["state_dict"]) == {"layer.weight", "layer.bias"}
    with pytest.raises(RunExistsError):
        trainer(f"file://{tmp_path}/my%20runs").fit(Net(), loader())


def test_a_file_uri_of_another_host_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"storage_path='file://host/runs' is no folder of this machine"):
        folders.claim(PlacementConfig(storage_path="file://host/runs"), "Net")


def test_a_run_in_this_process_is_copied_to_its_storage(bucket: Any) -> None:
    fit = trainer(BUCKET, logger=CSVLogger())
    model = Net()
    result = fit.fit(model, loader())
    assert result.path == fit.log_dir == f"{BUCKET}/one"
    kept = f"checkpoints/{result.checkpoint.path.rpartition('/')[2]}"
    assert {"mine", f"{kept}/model.ckpt", f"{kept}/rank_00000.ckpt", f"{kept}/manifest.json"} <= files(bucket)
    with result.checkpoint.as_directory() as folder:
        assert sorted(os.listdir(folder)) == ["manifest.json", "model.ckpt", "rank_00000.ckpt"]
    assert not os.path.exists(folder)

    other = Net()
    fit.test(other, loader(), ckpt_path=result.checkpoint)
    torch.testing.assert_close(other.layer.weight, model.layer.weight)
    assert {"mine", "tested"} <= files(bucket)
    with pytest.raises(RunExistsError):
        trainer(BUCKET).fit(Net(), loader())


def test_a_test_goes_on_with_the_files_of_the_fit_on_the_storage(bucket: Any) -> None:
    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", 1.0)
            return super().training_step(batch, batch_idx)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test", 2.0)

    fit = trainer(BUCKET, logger=CSVLogger(), log_every_n_steps=2)
    fit.fit(Logs(), loader())
    with pyarrow.fs.FileSystem.from_uri(BUCKET)[0].open_input_file("/bucket/one/history.parquet") as file:
        assert pyarrow.parquet.read_table(file).equals(fit.history)
    fit.test(dataloaders=loader())
    with bucket.open_input_stream("/bucket/one/metrics.csv") as file:
        assert file.read().decode() == "step,loss,test\n2,1.0,\n4,1.0,\n4,,2.0\n"
    assert fit.logger.log_dir is None  # no folder of this machine


def test_a_run_that_fails_is_copied_to_its_storage_too(bucket: Any) -> None:
    fit = trainer(BUCKET, logger=False)
    with pytest.raises(RuntimeError, match="planned"):
        fit.fit(Net(fails=True), loader())
    assert fit.log_dir == f"{BUCKET}/one"
    assert files(bucket) == {"mine"}


def test_a_storage_that_cannot_be_written_at_the_end_costs_nothing() -> None:
    def run() -> str:
        with local_folder("nowhere://runs") as folder:
            assert folder is not None
            Path(folder, "mine").touch()
        return folder

    with pytest.warns(UserWarning, match=r"could not be copied to nowhere://runs .*; it is in ") as seen:
        folder = run()
    assert str(seen[0].message).endswith(folder)
    assert os.listdir(folder) == ["mine"]
    os.unlink(Path(folder, "mine"))
    os.rmdir(folder)


def test_a_filesystem_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    filesystem = pyarrow.fs.SubTreeFileSystem(str(tmp_path / "store"), pyarrow.fs.LocalFileSystem())
    filesystem = cloudpickle.loads(cloudpickle.dumps(filesystem))  # as it travels
    with local_folder("runs/one", filesystem) as folder:
        assert folder is not None
        Path(folder, "sub").mkdir()
        Path(folder, "sub", "mine").touch()
    assert (tmp_path / "store" / "runs" / "one" / "sub" / "mine").is_file()


def test_what_a_run_without_folder_left_is_taken_away() -> None:
    def run() -> None:
        with folders.storage_of(None, Stage.FIT) as (storage, name):
            Path(storage, name).mkdir()
            Path(storage, name, "file").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run()
    with folders.storage_of("s3://bucket/runs/one", Stage.FIT) as split:
        assert split == ("s3://bucket/runs", "one")
